"""Which modules are quantized: ``--include``, ``--exclude``, ``--all-linears``.

What the ignore lists mean is decided by vLLM's own functions, on the configs as they are written.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from quantize.checkpoint.reader import Checkpoint
from quantize.errors import QuantizeError
from quantize.experts import linears
from quantize.experts.find import find
from quantize.experts.gates import Gate
from quantize.layouts import LAYOUTS
from quantize.layouts.heads import heads
from quantize.run.options import Options
from quantize.run.plan import plan
from tests.quantize import checkpoints, reference
from tests.quantize.checkpoints import convert
from tests.quantize.reference import Raw
from tests.quantize.test_cli import refusal, run

Folders = Callable[[str], Path]
SILU = Gate("silu")
Patterns = tuple[str, ...]

SUFFIXES = {
    "modelopt": ("weight", "weight_scale", "weight_scale_2"),
    "compressed-tensors": ("weight_packed", "weight_scale", "weight_global_scale"),
}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def experts_of(*layers: int) -> set[str]:
    """Modules of qwen3_moe's experts."""
    return {
        f"model.layers.{layer}.mlp.experts.{expert}.{kind}"
        for layer in layers
        for expert in range(4)
        for kind in checkpoints.PROJECTIONS
    }


def attention_of(*layers: int) -> set[str]:
    return {f"model.layers.{layer}.self_attn.{kind}" for layer in layers for kind in ATTENTION}


def assert_just_these_are_quantized(
    source: dict[str, Raw], out: dict[str, Raw], modules: set[str], layout: str
) -> None:
    """And every other tensor is the source's, byte for byte."""
    made = {f"{module}.{suffix}" for module in modules for suffix in SUFFIXES[layout]}
    kept = {name for name in source if name.removesuffix(".weight") not in modules}
    assert set(out) == made | kept
    assert {name: out[name] for name in kept} == {name: source[name] for name in kept}
    for module in modules:
        exact = source[f"{module}.weight"].array()
        error = np.linalg.norm(reference.weight(out, module) - exact) / np.linalg.norm(exact)
        assert 0.02 < error < 0.2, module


# -- which are taken -------------------------------------------------------------------------------

CHOICES: dict[str, tuple[Patterns, Patterns, bool, set[str]]] = {
    "all experts": ((), (), False, experts_of(0, 1)),
    "one layer": (("model.layers.1.*",), (), False, experts_of(1)),
    "all but one": ((), ("*.layers.1.mlp.experts",), False, experts_of(0)),
    "both": (("*.layers.?.*",), ("*.layers.0.*",), False, experts_of(1)),
    "several": (("*.layers.0.*", "*.layers.1.*"), (), False, experts_of(0, 1)),
    "linears too": ((), (), True, experts_of(0, 1) | attention_of(0, 1)),
    "linears alone": (("*.self_attn.*",), (), True, attention_of(0, 1)),
    "linears of one": ((), ("*.1.self_attn.*",), True, experts_of(0, 1) | attention_of(0)),
    "no output": (
        *((), ("*.o_proj",), True),
        experts_of(0, 1) | {m for m in attention_of(0, 1) if not m.endswith("o_proj")},
    ),
    "query without its siblings": (
        *((), ("*.q_proj",), True),
        experts_of(0, 1) | {m for m in attention_of(0, 1) if m.endswith("o_proj")},
    ),
    "what stays anyway": ((), ("lm_head", "*.norm", "*.mlp.gate"), False, experts_of(0, 1)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("choice", CHOICES)
def test_just_the_chosen_modules_are_quantized(
    choice: str, layout: str, saved: Folders, tmp_path: Path
) -> None:
    include, exclude, all_linears, modules = CHOICES[choice]
    options = [f"--include={p}" for p in include] + [f"--exclude={p}" for p in exclude]
    options += ["--all-linears"] * all_linears + ["--layout", layout]
    result = run("quantize", saved("qwen3_moe"), tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    out = reference.read_folder(tmp_path / "out")
    source = reference.read_folder(saved("qwen3_moe"))
    assert_just_these_are_quantized(source, out, modules, layout)
    checked = run("verify", saved("qwen3_moe"), tmp_path / "out")
    assert checked.exit_code == 0, checked.stderr
    shown = run("inspect", saved("qwen3_moe"), "--json", *options)
    size = sum(len(raw.data) for raw in out.values())
    assert json.loads(shown.stdout)["bytes_after"] == size


@pytest.mark.parametrize("layout", LAYOUTS)
def test_experts_only_is_the_default(layout: str, saved: Folders, tmp_path: Path) -> None:
    source = saved("deepseek_v3")
    for name, flags in (("one", []), ("two", ["--experts-only"])):
        assert run("quantize", source, tmp_path / name, "--layout", layout, *flags).exit_code == 0
    one, two = (reference.read_folder(tmp_path / name) for name in ("one", "two"))
    assert one == two
    assert not [n for n in one if "self_attn" in n and n.endswith(SUFFIXES[layout][1])]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_excluded_stacked_experts_stay_stacked(
    layout: str, stacked: Folders, tmp_path: Path
) -> None:
    source = stacked("qwen3_moe")
    convert(source, tmp_path / "out", layout, exclude=("*.layers.0.*",))
    out, original = reference.read_folder(tmp_path / "out"), reference.read_folder(source)
    left = {n: raw for n, raw in out.items() if n.startswith("model.layers.0.mlp.experts")}
    assert left == {n: raw for n, raw in original.items() if n in left}
    assert set(left) == {
        f"model.layers.0.mlp.experts.{kind}" for kind in ("gate_up_proj", "down_proj")
    }
    assert run("verify", source, tmp_path / "out").exit_code == 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_verify_names_what_is_wrong_with_what_was_left(
    layout: str, stacked: Folders, tmp_path: Path
) -> None:
    source, out = stacked("qwen3_moe"), tmp_path / "out"
    convert(source, out, layout, exclude=("*.layers.0.*",), linears=True)
    tensors = load_file(out / "model.safetensors")
    del tensors["model.layers.0.mlp.experts.down_proj"]
    tensors["model.layers.0.self_attn.q_proj.weight"][0, 0] += 1
    del tensors[f"model.layers.1.self_attn.o_proj.{SUFFIXES[layout][1]}"]
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    result = run("verify", source, out, "--json")
    assert result.exit_code == 1
    problems = sorted(json.loads(result.stdout)["problems"])
    assert [problem.partition(";")[0] for problem in problems] == [
        "model.layers.0.mlp.experts.down_proj is missing",
        "model.layers.1.self_attn.o_proj.weight_scale is missing",
        "model.safetensors: model.layers.0.self_attn.q_proj.weight differs from the source",
    ]


# -- siblings share a global scale -----------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_linears_follow_the_max_rule_with_one_global_scale_for_fused_siblings(
    layout: str, saved: Folders, tmp_path: Path
) -> None:
    source = reference.read_folder(saved("deepseek_v3"))
    convert(saved("deepseek_v3"), tmp_path / "out", layout, linears=True)
    out = reference.read_folder(tmp_path / "out")
    attention, mlp = "model.layers.1.self_attn", "model.layers.1.mlp.shared_experts"
    sets = (
        (f"{attention}.q_a_proj", f"{attention}.kv_a_proj_with_mqa"),
        (f"{attention}.q_b_proj",),
        (f"{attention}.o_proj",),
        (f"{mlp}.gate_proj", f"{mlp}.up_proj"),
        (f"{mlp}.down_proj",),
        tuple(f"model.layers.0.mlp.{kind}_proj" for kind in ("gate", "up")),
    )
    codes_at, blocks_at, scale_at = SUFFIXES[layout]
    for modules in sets:
        scale, wanted = reference.max_rule(*(source[f"{m}.weight"].array() for m in modules))
        for module, (codes, blocks) in zip(modules, wanted, strict=True):
            packed = out[f"{module}.{codes_at}"].array()
            np.testing.assert_array_equal(reference.unpack(packed), codes, err_msg=module)
            np.testing.assert_array_equal(out[f"{module}.{blocks_at}"].array(), blocks)
            factor = out[f"{module}.{scale_at}"].array()
            assert factor == (scale if layout == "modelopt" else np.float32(1) / scale), module
    assert out[f"{attention}.kv_b_proj.weight"] == source[f"{attention}.kv_b_proj.weight"]


def linear_sets(folder: Path, tensors: dict[str, tuple[int, ...]], **config: Any) -> set[Any]:
    """The sets found among linears of these shapes, beside the experts of layer 0."""
    experts = {
        f"model.layers.0.mlp.experts.{e}.{kind}.weight": (32, 32)
        for e in range(2)
        for kind in checkpoints.PROJECTIONS
    }
    made = {name: torch.zeros(shape) for name, shape in (experts | tensors).items()}
    checkpoints.save(folder, made, {"num_experts": 2, "num_hidden_layers": 1} | config)
    with Checkpoint(folder) as checkpoint:
        found = linears.find(checkpoint, find(checkpoint))
    return {frozenset(name.removesuffix(".weight") for name in names) for names in found}


def test_which_linears_are_siblings(tmp_path: Path) -> None:
    at = "model.layers.0.self_attn"
    found = linear_sets(
        tmp_path,
        {
            **{f"{at}.{kind}.weight": (32, 32) for kind in ATTENTION},
            "model.layers.0.mlp.shared_expert.gate_proj.weight": (32, 32),
            "model.layers.0.mlp.shared_expert.up_proj.weight": (32, 32),
            "model.layers.0.mlp.shared_expert.down_proj.weight": (32, 32),
        },
    )
    mlp = "model.layers.0.mlp.shared_expert"
    assert found == {
        frozenset(f"{at}.{kind}" for kind in ATTENTION[:3]),
        frozenset({f"{at}.o_proj"}),
        frozenset({f"{mlp}.gate_proj", f"{mlp}.up_proj"}),
        frozenset({f"{mlp}.down_proj"}),
    }


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("k_proj", (24, 32)),  # its rows are no multiple of a block
        ("index_q_proj", (32, 32)),  # MiniMax-M3's, fused with the others
        ("b_proj", (2, 32)),  # Bailing's
    ],
)
def test_siblings_of_what_cannot_be_quantized_stay(
    name: str, shape: tuple[int, int], tmp_path: Path
) -> None:
    """An engine that fuses them needs all of them in one format."""
    at = "model.layers.0.self_attn"
    tensors = {f"{at}.{kind}.weight": (32, 32) for kind in ATTENTION} | {
        f"{at}.{name}.weight": shape
    }
    assert linear_sets(tmp_path, tensors) == {frozenset({f"{at}.o_proj"})}


@pytest.mark.parametrize(
    "module",
    [
        "visual.layers.0.self_attn.q_proj",  # a tower of its own
        "model.layers.1.self_attn.q_proj",  # drafting: beyond num_hidden_layers
        "mtp.layers.0.self_attn.q_proj",
        "model.layers.0.mlp.gate",
        "model.layers.0.self_attn.kv_b_proj",
        "lm_head",
        "q_proj",
    ],
)
def test_what_is_no_linear_of_the_decoder(module: str, tmp_path: Path) -> None:
    assert linear_sets(tmp_path, {f"{module}.weight": (32, 32)}) == set()


# -- patterns that are mistakes --------------------------------------------------------------------


@pytest.mark.parametrize("command", ["quantize", "inspect"])
@pytest.mark.parametrize(
    ("options", "pattern", "why"),
    [
        (["--include", "*.layer.1.*"], "*.layer.1.*", "matches nothing"),
        (["--exclude", "*.layers.9.*"], "*.layers.9.*", "matches nothing"),
        (["--exclude", "*.layers.0.*", "--exclude", "typo"], "typo", "matches nothing"),
        (["--exclude", "model.layers.0"], "model.layers.0", "model.layers.0.mlp.experts"),
        (["--exclude", "*.experts.3.*"], "*.experts.3.*", "matches nothing"),
        (["--include", "*.self_attn.*"], "*.self_attn.*", "--all-linears"),
        (["--include", "lm_head", "--all-linears"], "lm_head", "matches nothing"),
    ],
)
def test_a_pattern_that_changes_nothing(
    options: list[str], pattern: str, why: str, command: str, saved: Folders, tmp_path: Path
) -> None:
    target = [tmp_path / "out"] * (command == "quantize")
    message = refusal(command, saved("qwen3_moe"), *target, *options)
    assert f"{options[-2 if '--all-linears' not in options else 0]} {pattern!r}" in message
    assert why in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options", [["--exclude", "*"], ["--include", "*.q_proj", "--all-linears"]]
)
def test_patterns_that_leave_nothing(options: list[str], saved: Folders, tmp_path: Path) -> None:
    message = refusal("quantize", saved("qwen3_moe"), tmp_path / "out", *options)
    assert "leave nothing to quantize" in message


def test_all_linears_of_a_model_that_has_none(tmp_path: Path) -> None:
    linear_sets(tmp_path, {})
    with Checkpoint(tmp_path) as checkpoint, pytest.raises(QuantizeError, match="--all-linears"):
        plan(checkpoint, Options(linears=True, gate=SILU))


# -- what vLLM makes of the ignore lists -----------------------------------------------------------


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
