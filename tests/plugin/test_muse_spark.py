"""vLLM's own class for Muse Spark, which runs its experts itself: how single experts get there, and
what is said where it cannot run them.

The class's layer is vLLM's from 0.33 on. In 0.32, which has none, the part of it stands in that
loads. What is expected is what is in the files, and what vLLM's layer makes of stacks.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
import vllm
from safetensors.torch import load_file
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.fused_moe import FusedMoEFactory, RoutedExperts
from vllm.model_executor.layers.quantization.modelopt import ModelOptNvFp4FusedMoE
from vllm.model_executor.models.llama import LlamaModel

from tests.plugin import others
from tests.plugin.test_bits import without_nvfp4_kernels
from vllm_nvfp4_moe.errors import RefusedError
from vllm_nvfp4_moe.formats import from_checkpoint
from vllm_nvfp4_moe.loading import muse_spark

Load = Callable[..., dict[str, Any]]
NAME = "vllm.models.muse_spark.common.moe"
PREFIX = others.LAYERS[1]
PARTS = ("weight", "weight_scale", "weight_scale_2", "input_scale")
STACKS = {
    f"{stack}_{part}": (rows, part) for stack, rows in (("w13", 2), ("w2", 1)) for part in PARTS
}
"""What the class's layer calls stacks, once vLLM's mapping of names was applied."""


class Consolidated(RoutedExperts):
    """As ``MuseSparkConsolidatedRoutedExperts`` loads, for stacks of whole matrices."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterable[str]:
        for name, tensor in weights:
            param = getattr(self, name, None)
            if param is None:
                raise AttributeError(f"{self.layer_name}: unexpected expert weight {name!r}")
            parts: Any = (("w2", tensor),)
            if name.startswith("w13"):
                parts = zip(("w1", "w3"), tensor.chunk(2, 1), strict=True)
            for shard, stack in parts:
                for expert, one in enumerate(stack):
                    param.weight_loader(
                        param=param, loaded_weight=one.squeeze() if one.numel() == 1 else one,
                        weight_name=name, shard_id=shard, expert_id=expert,
                    )  # fmt: skip
            yield name


@pytest.fixture
def consolidated(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The class's layer, with the method that it gives to itself."""
    if find_spec(NAME.rpartition(".common")[0]):
        base: Any = import_module(NAME).MuseSparkConsolidatedRoutedExperts
    else:
        base = Consolidated
        module: Any = ModuleType(NAME)
        module.MuseSparkConsolidatedRoutedExperts = base
        monkeypatch.setitem(sys.modules, NAME, module)

    class MuseSparkRoutedExperts(base):
        def _get_quant_method(self, prefix: str, quant_config: Any, moe_config: Any) -> Any:
            return ModelOptNvFp4FusedMoE(quant_config, moe_config)

    return MuseSparkRoutedExperts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = others.plain(tmp_path_factory.mktemp("muse") / "bf16")
    return others.quantized(source, source.parent / "nvfp4", activations=True)


@pytest.fixture
def build(
    load: Load, folder: Path, consolidated: Any, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[], Any]]:
    """``build()``: a model with one such layer, as it is before it is loaded."""
    load(folder, skip_tokenizer_init=True)  # vLLM's groups of ranks are there then
    without_nvfp4_kernels(monkeypatch)
    engine = EngineArgs(model=str(folder), max_model_len=64).create_engine_config()
    config = transformers.AutoConfig.from_pretrained(folder)
    quantization = from_checkpoint(config.quantization_config)
    quantization.maybe_update_config(str(folder), config)

    def build() -> Any:
        engine.compilation_config.static_forward_context.clear()
        model: Any = torch.nn.Module()
        model.experts = FusedMoEFactory(
            num_experts=others.EXPERTS, top_k=2, hidden_size=others.HIDDEN,
            intermediate_size=others.INNER, renormalize=True, quant_config=quantization,
            prefix=PREFIX, routed_experts_cls=consolidated,
        )  # fmt: skip
        muse_spark.load_one_by_one(model, quantization.stored)
        return model.experts

    with set_current_vllm_config(engine):
        yield build


def single(folder: Path) -> list[tuple[str, torch.Tensor]]:
    """The layer's tensors, each by its name below the layer."""
    tensors = load_file(folder / "model.safetensors").items()
    return [(n.removeprefix(f"{PREFIX}."), t) for n, t in tensors if n.startswith(f"{PREFIX}.")]


def stacked(folder: Path) -> dict[str, torch.Tensor]:
    """The same as the class has them: in stacks."""
    tensors = dict(single(folder))
    found = {}
    for name, (rows, part) in STACKS.items():
        kinds = others.PROJECTIONS[:2] if rows == 2 else others.PROJECTIONS[2:]
        experts = [[tensors[f"{e}.{k}.{part}"] for k in kinds] for e in range(others.EXPERTS)]
        if part in ("weight", "weight_scale"):
            found[name] = torch.stack([torch.cat(each) for each in experts])
        else:
            found[name] = torch.stack([torch.stack(each) for each in experts]).squeeze(-1)
    return found


def same(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return torch.equal(found.float(), wanted.float())


@pytest.mark.parametrize("mapped", [False, True], ids=["as stored", "as Llama's names"])
def test_single_experts(build: Callable[[], Any], folder: Path, mapped: bool) -> None:
    """Also once the class's model has brought all names to Llama's: gate and up are then one name,
    and which half a tensor is it says itself."""
    experts, weights = build(), single(folder)
    if mapped:
        named = ((f".{name}", tensor) for name, tensor in weights)
        weights = [(n[1:], t) for n, t in LlamaModel.hf_to_vllm_mapper.apply(named)]
        assert {name.split(".")[1] for name, _ in weights} == {"gate_up_proj", "down_proj"}
    reported = set(experts.load_weights(iter(weights)))
    assert reported == {f"routed_experts.{name}" for name in STACKS}
    for name, wanted in stacked(folder).items():
        assert same(getattr(experts.routed_experts, name).data, wanted), name
    experts.routed_experts.quant_method.process_weights_after_loading(experts.routed_experts)


def test_stacks(build: Callable[[], Any], folder: Path) -> None:
    """The class's own, which go to the class."""
    experts = build()
    reported = set(experts.load_weights(iter(stacked(folder).items())))
    assert reported == {f"routed_experts.{name}" for name in STACKS}
    for name, wanted in stacked(folder).items():
        assert same(getattr(experts.routed_experts, name).data, wanted), name
    experts.routed_experts.quant_method.process_weights_after_loading(experts.routed_experts)


def test_what_neither_knows(build: Callable[[], Any], folder: Path) -> None:
    with pytest.raises(AttributeError, match="unexpected expert weight 'w3_weight'"):
        list(build().load_weights([("w3_weight", torch.zeros(2))]))


@pytest.mark.parametrize("part", PARTS[:3])
@pytest.mark.parametrize("kind", others.PROJECTIONS)
def test_one_tensor_that_is_not_there(
    build: Callable[[], Any], folder: Path, kind: str, part: str
) -> None:
    experts = build()
    list(experts.load_weights((n, t) for n, t in single(folder) if n != f"2.{kind}.{part}"))
    stack = "w2" if kind == "down_proj" else "w13"
    message = rf"{PREFIX}: nothing was loaded into {stack}_{part} for 1 of its 4 .*first is 2, "
    with pytest.raises(RefusedError, match=message):
        experts.routed_experts.quant_method.process_weights_after_loading(experts.routed_experts)


SAID = {
    "MuseSpark NVFP4 MoE requires FLASHINFER_TRTLLM or Marlin "
    "on Hopper; got NvFp4MoeBackend.HUMMING.": "Start with --moe-backend marlin, or on Blackwell",
    "MuseSpark NVFP4 MoE requires W4A4 SwiGLU checkpoints.": "Quantize the original again with: ",
}
"""vLLM's errors, the second of which is seen where a checkpoint has weights alone."""


@pytest.mark.parametrize("said", SAID)
def test_what_to_do_is_said(load: Load, folder: Path, monkeypatch: Any, said: str) -> None:
    """While vLLM builds the model, by its own loader."""

    def chooses(*_: Any) -> Any:
        raise NotImplementedError(said)

    monkeypatch.setattr(RoutedExperts, "_get_quant_method", chooses)
    with pytest.raises(RefusedError, match=f"vLLM's class for Muse Spark .*{SAID[said]}") as error:
        load(folder, skip_tokenizer_init=True)
    assert said in str(error.value)


def test_vllm_says_so() -> None:
    """In the versions that have the class."""
    file = Path(vllm.__file__).parent / "models/muse_spark/nvidia/muse_moe_runner.py"
    if file.exists():
        text = re.sub(r'"\s*f?"', "", file.read_text())
        for said in SAID:
            assert said.partition("; got")[0] in text
    else:
        assert vllm.__version__.startswith("0.32")


def test_other_errors_stay(load: Load, folder: Path, monkeypatch: Any) -> None:
    def chooses(*_: Any) -> Any:
        raise NotImplementedError("something else")

    monkeypatch.setattr(RoutedExperts, "_get_quant_method", chooses)
    with pytest.raises(NotImplementedError, match=r"^something else$"):
        load(folder, skip_tokenizer_init=True)
