"""To vLLM, our config is the layout's own in everything but routed experts: stock vLLM judges."""

from __future__ import annotations

import ast
import copy
import json
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import vllm
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from quantize.experts.gates import Gate, Gates
from quantize.layouts import LAYOUTS
from tests.plugin import mixed
from vllm_nvfp4_moe.config import NvFp4MoEConfig

Load = Callable[..., dict[str, Any]]
FP8_CACHE = {
    "num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True,
}  # fmt: skip
LISTED = ["lm_head", "model.layers.1.self_attn*", "model.layers.0.mlp.experts*"]


def stored(layout: str) -> dict[str, Any]:
    """A ``quantization_config`` with an FP8 cache and modules that are left alone."""
    if layout == "modelopt_mixed":
        return {
            "quant_method": "modelopt",
            "quant_algo": "MIXED_PRECISION",
            "kv_cache_scheme": FP8_CACHE,
            "ignore": LISTED,
            "quantized_layers": {
                "model.layers.1.mlp.experts.0.up_proj": {"quant_algo": "NVFP4", "group_size": 16},
                "model.layers.0.mlp.down_proj": {"quant_algo": "FP8"},
            },
        }
    config = LAYOUTS["modelopt" if layout == "modelopt_fp4" else layout].quantization_config(LISTED)
    return config | {"kv_cache_scheme": FP8_CACHE}


STOCK = ("modelopt_fp4", "modelopt_mixed", "compressed-tensors")


def both(layout: str) -> tuple[Any, Any]:
    """(ours, vLLM's own) for the same checkpoint."""
    ours: Any = NvFp4MoEConfig.from_config(stored(layout))
    ours.gates = Gates.uniform(Gate("silu"))
    return ours, get_quantization_config(layout).from_config(stored(layout))


def source() -> Iterator[ast.AST]:
    for file in sorted(Path(vllm.__file__).parent.rglob("*.py")):
        text = file.read_text()
        if "quant_config" in text:
            yield from ast.walk(ast.parse(text))


def is_config(node: ast.AST) -> bool:
    name = node.id if isinstance(node, ast.Name) else getattr(node, "attr", "")
    return name.endswith("quant_config")


@pytest.fixture(scope="module")
def read() -> tuple[set[str], set[str]]:
    """What vLLM's source reads off something called ``…quant_config``, and which classes it asks
    whether that is."""
    attributes, classes = set(), set()
    for node in source():
        if isinstance(node, ast.Attribute) and is_config(node.value):
            attributes.add(node.attr)
        if not isinstance(node, ast.Call) or not node.args or not is_config(node.args[0]):
            continue
        function = getattr(node.func, "id", None)
        if function in ("getattr", "hasattr") and isinstance(node.args[1], ast.Constant):
            attributes.add(node.args[1].value)
        if function == "isinstance":
            for part in ast.walk(node.args[1]):
                classes.add(getattr(part, "attr", getattr(part, "id", "")))
    return attributes, classes - {""}


def contents(value: Any) -> Any:
    """A value to compare: configs inside configs have no equality of their own."""
    if isinstance(value, QuantizationConfig):
        return type(value), {k: contents(v) for k, v in vars(value).items()}
    return value


@pytest.mark.parametrize("layout", STOCK)
def test_all_that_vllm_reads(read: tuple[set[str], set[str]], layout: str) -> None:
    ours, stock = both(layout)
    attributes, _ = read
    assert {"kv_cache_scheme", "exclude_modules", "get_name", "packed_modules_mapping"} < attributes
    assert {"weight_block_size", "has_blocked_weights", "quantized_layers"} < attributes
    compared = 0
    for name in sorted(attributes | set(vars(stock))):
        assert hasattr(ours, name) == hasattr(stock, name), name
        value = getattr(stock, name, None)
        if not callable(value):
            assert contents(getattr(ours, name, None)) == contents(value), name
            compared += hasattr(stock, name)
    assert compared >= 6
    for method in ("get_name", "get_min_capability", "has_blocked_weights", "get_config_filenames"):
        if hasattr(stock, method):
            assert getattr(ours, method)() == getattr(stock, method)(), method
    more = set(ours.get_supported_act_dtypes()) - set(stock.get_supported_act_dtypes())
    assert more <= {torch.float32}  # which the CPU backend takes
    assert set(stock.get_supported_act_dtypes()) <= set(ours.get_supported_act_dtypes())


@pytest.mark.parametrize("layout", STOCK)
def test_every_class_that_vllm_asks_for(read: tuple[set[str], set[str]], layout: str) -> None:
    ours, stock = both(layout)
    _, names = read
    known: dict[str, set[type]] = {}
    waiting = [QuantizationConfig]
    while waiting:
        each = waiting.pop()
        waiting += each.__subclasses__()
        if not each.__module__.startswith("vllm_nvfp4_moe"):
            known.setdefault(each.__name__, set()).add(each)
    asked = [each for name in names for each in known.get(name, ())]
    assert len(asked) >= 8
    for each in {*asked, *type(stock).__mro__}:
        assert isinstance(ours, each) == isinstance(stock, each), each


@pytest.mark.parametrize("layout", STOCK)
def test_attention_and_its_cache(load: Load, shallow: dict[str, Path], layout: str) -> None:
    """vLLM's layer takes the scheme of the cache, and its scales, from the config."""
    from vllm.model_executor.layers.attention import Attention

    load(shallow["modelopt"])  # vLLM's groups of ranks are there then
    engine = EngineArgs(model=str(shallow["modelopt"]), max_model_len=64).create_engine_config()
    made = []
    for config in both(layout):
        with set_current_vllm_config(engine):
            cache, name = copy.copy(engine.cache_config), f"layers.{len(made)}.attn"
            layer = Attention(2, 64, 1.0, 1, cache_config=cache, quant_config=config, prefix=name)
        made.append((layer.kv_cache_dtype, layer.kv_cache_torch_dtype, type(layer.quant_method)))
    assert made[0] == made[1]
    if layout == "compressed-tensors":
        assert made[0][1] == torch.uint8


@pytest.mark.parametrize("layout", STOCK)
def test_methods_of_all_other_layers(load: Load, shallow: dict[str, Path], layout: str) -> None:
    from vllm.model_executor.layers.linear import ColumnParallelLinear
    from vllm.model_executor.layers.vocab_parallel_embedding import (
        ParallelLMHead,
        VocabParallelEmbedding,
    )

    load(shallow["modelopt"])
    kinds = {
        "model.layers.1.self_attn.q_proj": ColumnParallelLinear,
        "model.layers.1.mlp.gate": ColumnParallelLinear,
        "model.embed_tokens": VocabParallelEmbedding,
        "lm_head": ParallelLMHead,
    }
    for prefix, kind in kinds.items():
        with set_current_vllm_config(VllmConfig(), check_compile=False):
            layer = kind(64, 64)
            ours, stock = both(layout)
            headers = {"has_head": lambda self: True, "beside_experts": True}
            ours.stored = type("Headers", (), headers)()
            found = []
            for config in (ours, stock):
                try:
                    found.append(type(config.get_quant_method(layer, prefix)))
                except ValueError as error:  # no such kernel here
                    found.append(str(error))
        assert found[0] == found[1], prefix


def test_who_asks_for_what_the_user_called_the_quantization() -> None:
    """``ModelConfig.quantization`` is our name, whatever the layout; nobody else may ask for
    vLLM's names of it. ``NAMED_NVFP4`` answers the first question. The other two are about
    ``hf_quant_config.json``, which our config reads itself."""
    names = {*STOCK, "modelopt"}
    asked: dict[str, int] = {}
    for file in sorted(Path(vllm.__file__).parent.rglob("*.py")):
        text = file.read_text()
        if not any(name in text for name in names):
            continue
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.Compare | ast.Match):
                continue
            values = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)}
            read = {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}
            if values & names and "quantization" in read:
                asked[file.name] = asked.get(file.name, 0) + 1
    assert asked == {"model.py": 3, "weight_utils.py": 2}


def test_models_that_ask_for_a_name_or_a_list() -> None:
    """The drafting heads of Qwen3-Next leave a matrix out by the name; drafts read the lists."""
    ours, stock = both("modelopt_fp4")
    assert ours.get_name() == "modelopt_fp4"
    from vllm.model_executor.models.utils import WeightsMapper

    mapper = WeightsMapper(orig_to_new_prefix={"model.": "language_model.model."})
    ours.stored = type("Headers", (), {"rename": lambda self, mapper: None})()
    for config in (ours, stock):
        config.apply_vllm_mapper(mapper)
    assert ours.exclude_modules == stock.exclude_modules
    assert "language_model.model.layers.1.self_attn" in ours.exclude_modules


@pytest.mark.parametrize("layout", ["modelopt_fp4", "modelopt_mixed"])
def test_a_flat_list_under_its_other_name(layout: str) -> None:
    """ModelOpt writes either; vLLM 0.32 reads one of them. Nested, both versions read this one."""
    flat = stored(layout)
    flat["exclude_modules"] = flat.pop("ignore")
    nested = flat | {"kv_cache_quant_algo": None}
    stock: Any = get_quantization_config(layout).from_config({"quantization": nested})
    ours: Any = NvFp4MoEConfig.from_config(flat)
    assert ours.exclude_modules == stock.exclude_modules == both(layout)[1].exclude_modules
    assert len(ours.exclude_modules) == len(LISTED)
    assert "exclude_modules" in flat and "ignore" not in flat
    flat["ignore"] = ["lm_head"]
    ours = NvFp4MoEConfig.from_config(flat)
    assert ours.exclude_modules == ["lm_head"]


def test_counted_as_nvfp4(
    quantized: dict[str, Path], shallow_bf16: Path, shallow: dict[str, Path], tmp_path: Path
) -> None:
    both_mixed = mixed.write(shallow["modelopt"], tmp_path / "mixed", map_in_config=True)
    for folder, stock in (
        (quantized["modelopt"], "modelopt_fp4"),
        (quantized["compressed-tensors"], "compressed-tensors"),
        (both_mixed, "modelopt_mixed"),
    ):
        told = [
            EngineArgs(model=str(folder), quantization=name).create_model_config()
            for name in ("nvfp4_moe", stock)
        ]
        assert [each.quantization for each in told] == ["nvfp4_moe", stock]
        assert [each.is_nvfp4_quantized() for each in told] == [True, True]
    plain = EngineArgs(model=str(shallow_bf16), quantization="nvfp4_moe").create_model_config()
    assert not plain.is_nvfp4_quantized()
    assert plain.quantization == "nvfp4_moe"
    assert not EngineArgs(model=str(shallow_bf16)).create_model_config().is_nvfp4_quantized()


@pytest.mark.parametrize("layout", [*STOCK, "on the fly"])
def test_on_its_way_to_workers(layout: str, tmp_path: Path) -> None:
    """vLLM copies configs, and sends them to processes that have not registered us yet."""
    if layout == "on the fly":
        ours = stock = NvFp4MoEConfig()
        ours.gates = Gates.uniform(Gate("silu"))
    else:
        ours, stock = both(layout)
    packed = pickle.dumps(ours)
    for other in (copy.copy(ours), copy.deepcopy(ours), pickle.loads(packed)):
        assert contents(other) == contents(ours)
        assert other.gates == ours.gates
        assert other.layout is ours.layout
    file = tmp_path / "config"
    file.write_bytes(packed)
    code = (
        "import json, pickle, sys; from pathlib import Path\n"
        "config = pickle.loads(Path(sys.argv[1]).read_bytes())\n"
        "print(json.dumps([config.get_name(), str(config.gates), type(config).__name__]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=True
    )
    said = json.loads(done.stdout.splitlines()[-1])
    assert said == [stock.get_name(), "silu", type(ours).__name__]
