"""What ignore lists mean, by vLLM's own functions, on the configs that are written; heads."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from quantize.layouts import LAYOUTS
from quantize.layouts.heads import heads
from tests.quantize import checkpoints
from tests.quantize.checkpoints import convert
from tests.quantize.test_cli import run
from tests.quantize.test_selection import (
    ATTENTION,
    CHOICES,
    SILU,
    Folders,
)


def taken_by_vllm(
    folder: Path, modules: list[str], model: str, fused: dict[str, list[str]] | None = None
) -> set[str]:
    """Those of ``modules`` (vLLM's names) that its config for the folder takes as quantized.

    Args:
        model: vLLM's class, which knows what it fuses and how it renames modules.
        fused: what it fuses besides.
    """
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
        CompressedTensorsConfig,
    )
    from vllm.model_executor.layers.quantization.modelopt import ModelOptNvFp4Config
    from vllm.model_executor.models.registry import ModelRegistry

    served = ModelRegistry._try_load_model_cls(model)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    modelopt = config["quant_method"] == "modelopt"
    stock = (ModelOptNvFp4Config if modelopt else CompressedTensorsConfig).from_config(config)
    stock.packed_modules_mapping = served.packed_modules_mapping | (fused or {})
    if mapper := getattr(served, "hf_to_vllm_mapper", None):
        stock.apply_vllm_mapper(mapper)
    if modelopt:
        return {module for module in modules if not stock.is_layer_excluded(module)}
    stock._add_fused_moe_to_target_scheme_map()

    def scheme(module: str) -> bool:
        if not module.endswith(".experts"):
            return stock.get_scheme_dict(torch.nn.Linear(1, 1), module) is not None
        layer = RoutedExperts.__new__(RoutedExperts)  # only its class is looked at
        found = {
            stock.get_scheme_dict(layer, f"{module}.0.{kind}") is not None
            for kind in checkpoints.PROJECTIONS
        }
        assert len(found) == 1  # else vLLM refuses
        return found.pop()

    return {module for module in modules if scheme(module)}


QWEN = [
    f"model.layers.{layer}.{module}"
    for layer in range(2)
    for module in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate", "mlp.experts")
]


def fused(modules: set[str]) -> set[str]:
    """Our modules in vLLM's names: of qwen3_moe, and of parts of other models alike."""
    names = (("qkv_proj", ATTENTION[:3]), ("gate_up_proj", checkpoints.PROJECTIONS[:2]))
    parts = {part: name for name, all_parts in names for part in all_parts}
    out = set()
    for module in modules:
        parent, _, last = module.rpartition(".")
        expert = parent.rpartition(".")[0]
        routed = expert.endswith(".experts")
        out.add(expert if routed else f"{parent}.{parts.get(last, last)}")
    return out


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", ["saved", "stacked"])
@pytest.mark.parametrize("choice", CHOICES)
def test_vllm_takes_just_the_quantized_modules(
    choice: str, form: str, layout: str, saved: Folders, stacked: Folders, tmp_path: Path
) -> None:
    include, exclude, all_linears, modules = CHOICES[choice]
    source = {"saved": saved, "stacked": stacked}[form]("qwen3_moe")
    more = {"include": include, "exclude": exclude, "linears": all_linears}
    convert(source, tmp_path / "out", layout, **more)
    taken = taken_by_vllm(tmp_path / "out", QWEN, "Qwen3MoeForCausalLM")
    assert taken == fused(modules)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("all_linears", [False, True])
def test_vllm_on_latent_attention_and_shared_experts(
    all_linears: bool, layout: str, saved: Folders, tmp_path: Path
) -> None:
    convert(saved("deepseek_v3"), tmp_path / "out", layout, linears=all_linears)
    experts = "model.layers.1.mlp.experts"
    quantized = {
        *(
            f"model.layers.{i}.self_attn.{kind}"
            for i in range(2)
            for kind in ("q_b_proj", "o_proj")
        ),
        *(f"model.layers.{i}.self_attn.fused_qkv_a_proj" for i in range(2)),
        *("model.layers.0.mlp.gate_up_proj", "model.layers.0.mlp.down_proj"),
        *(f"model.layers.1.mlp.shared_experts.{kind}" for kind in ("gate_up_proj", "down_proj")),
    }
    stays = {"model.layers.0.self_attn.kv_b_proj", "model.layers.1.mlp.gate"}
    taken = taken_by_vllm(
        tmp_path / "out",
        [*quantized, *stays, experts],
        "DeepseekV3ForCausalLM",
        {"fused_qkv_a_proj": ["q_a_proj", "kv_a_proj_with_mqa"]},
    )
    assert taken == (quantized | {experts} if all_linears else {experts})


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("all_linears", [False, True])
def test_vllm_on_a_model_with_a_vision_tower(
    all_linears: bool, layout: str, stacked: Folders, tmp_path: Path
) -> None:
    """Ernie 4.5 VL's class renames modules, those of the ignore lists too."""
    tensors = load_file(stacked("qwen3_moe") / "model.safetensors")
    for name in ("vision_model.blocks.0.attn.qkv", "model.resampler_model.mlp"):
        tensors[f"{name}.weight"] = torch.ones(32, 32, dtype=torch.bfloat16)
    config = {"model_type": "made up", "text_config": {"num_experts": 4, "num_hidden_layers": 2}}
    source = checkpoints.save(tmp_path / "source", tensors, config)
    exclude = ("*.layers.0.mlp.experts",)
    convert(source, tmp_path / "out", layout, exclude=exclude, linears=all_linears, gate=SILU)
    modules = [f"language_model.{module}" for module in QWEN]
    modules += ["vision_model.blocks.0.attn.qkv", "resampler_model.mlp"]
    taken = taken_by_vllm(tmp_path / "out", modules, "Ernie4_5_VLMoeForConditionalGeneration")
    at = "language_model.model.layers"
    attention = {f"{at}.{i}.self_attn.{kind}" for i in range(2) for kind in ("qkv_proj", "o_proj")}
    assert taken == {f"{at}.1.mlp.experts"} | (attention if all_linears else set())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("all_linears", [False, True])
def test_vllm_where_keys_are_the_values(
    all_linears: bool, layout: str, saved: Folders, tmp_path: Path
) -> None:
    """Gemma 4's full attention has no v_proj. vLLM fuses one with query and key all the same."""
    tensors = load_file(saved("qwen3_moe") / "model.safetensors")
    del tensors["model.layers.1.self_attn.v_proj.weight"]
    config = json.loads((saved("qwen3_moe") / "config.json").read_text())
    source = checkpoints.save(tmp_path / "source", tensors, config)
    convert(source, tmp_path / "out", layout, linears=all_linears)
    attention = {module for module in QWEN if "self_attn" in module}
    experts = {module for module in QWEN if module.endswith("experts")}
    # Its class gives vLLM's config no other names than those of the checkpoint.
    taken = taken_by_vllm(tmp_path / "out", QWEN, "Gemma4ForCausalLM")
    assert taken == (experts | attention if all_linears else experts)
    assert run("verify", source, tmp_path / "out").exit_code == 0


# -- heads -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("linears", [False, True])
def test_heads_are_left_to_stock_vllm_as_they_are(
    layout: str, tied: bool, linears: bool, tmp_path: Path
) -> None:
    """Stock vLLM's own configs build the head; a tied one has no tensor in the checkpoint."""
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
        CompressedTensorsConfig,
    )
    from vllm.model_executor.layers.quantization.modelopt import ModelOptNvFp4Config
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    checkpoints.build("qwen3_moe", tie_word_embeddings=tied).save_pretrained(tmp_path / "source")
    checkpoints.convert(tmp_path / "source", tmp_path / "target", layout=layout, linears=linears)
    file = tmp_path / "target" / "config.json"
    config = json.loads(file.read_text())["quantization_config"]
    assert {"lm_head", "output", "embed_out"} <= set(config["ignore"])
    modelopt = layout == "modelopt"
    stock = (ModelOptNvFp4Config if modelopt else CompressedTensorsConfig).from_config(config)
    head = ParallelLMHead.__new__(ParallelLMHead)  # only its class is looked at
    # As vLLM names heads of language models alone, and within models that have other parts.
    for prefix in ("lm_head", "language_model.lm_head", "model.lm_head", "thinker.lm_head"):
        method = stock.get_quant_method(head, prefix)
        assert method is None or isinstance(method, UnquantizedLinearMethod), prefix
    # AFMoE, EXAONE-MoE and Qwen3-Omni give it no name. No entry of ModelOpt's list can match that
    # without matching all else, so there the plugin answers for the head.
    if not modelopt:
        assert stock.get_quant_method(head, "") is None
    modules = ["model.layers.0.mlp.experts", *(["model.layers.0.self_attn.o_proj"] * linears)]
    assert taken_by_vllm(tmp_path / "target", modules, "Qwen3MoeForCausalLM") == set(modules)


@pytest.mark.parametrize(
    ("embedding", "head"),
    [
        ("model.embed_tokens.weight", "lm_head"),
        ("language_model.model.embed_tokens.weight", "language_model.lm_head"),
        ("thinker.model.embed_tokens.weight", "thinker.lm_head"),
        ("model.language_model.embed_tokens.weight", "lm_head"),
        ("backbone.embeddings.weight", "lm_head"),
        ("transformer.wte.weight", "lm_head"),
    ],
)
def test_names_of_heads_that_have_no_tensor(embedding: str, head: str) -> None:
    assert head in heads([embedding], [])


def test_no_name_of_a_head_is_part_of_what_is_quantized() -> None:
    """ModelOpt's lists are looked for within names: "output" would leave this out."""
    quantized = ["model.layers.3.output.experts"]
    assert "output" not in heads(["model.embed_tokens.weight"], quantized)
    assert "lm_head" in heads(["model.embed_tokens.weight"], quantized)


def test_the_heads_of_layers_that_draft(saved: Folders, tmp_path: Path) -> None:
    """A tied one has no tensor. Its names are those under which vLLM builds it: DeepSeek-V3's MTP
    layer has ``shared_head.head``, GLM-4.5's ``head`` (model_executor/models/*_mtp.py)."""
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
        CompressedTensorsConfig,
    )
    from vllm.model_executor.layers.quantization.modelopt import ModelOptNvFp4Config
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    tensors = load_file(saved("deepseek_v3") / "model.safetensors")
    config = json.loads((saved("deepseek_v3") / "config.json").read_text())
    for name in ("eh_proj", "enorm", "hnorm", "shared_head.norm"):
        shape = (32, 64) if name == "eh_proj" else (32,)
        tensors[f"model.layers.2.{name}.weight"] = torch.ones(shape).bfloat16()
    source = checkpoints.save(tmp_path / "source", tensors, config)
    wanted = {f"model.layers.2.{name}" for name in ("shared_head.head", "head", "eh_proj")}
    for layout in ("modelopt", "compressed-tensors"):
        out = tmp_path / layout
        convert(source, out, layout)
        described = json.loads((out / "config.json").read_text())["quantization_config"]
        names = described.get("ignore", described.get("exclude_modules"))
        assert set(names) >= wanted
        assert not [name for name in names if "model.layers.1.head" in name]
        assert run("verify", source, out).exit_code == 0
        stock = ModelOptNvFp4Config if layout == "modelopt" else CompressedTensorsConfig
        head = ParallelLMHead.__new__(ParallelLMHead)  # only its class is looked at
        for name in wanted:
            method = stock.from_config(described).get_quant_method(head, name)
            assert method is None or isinstance(method, UnquantizedLinearMethod), name
    assert heads(["model.layers.2.transformer.shared_head.output.weight"], []) >= {
        "model.layers.2.transformer.shared_head.head"
    }
