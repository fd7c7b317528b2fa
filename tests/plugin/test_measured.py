"""``NVFP4_MOE_SELECT=measured``: doctor's table of this machine chooses the kernel."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.model_executor.layers.fused_moe.oracle.nvfp4 import map_nvfp4_backend

from quantize.experts.gates import Gate
from quantize.native import jit
from vllm_nvfp4_moe import backends, measured, settings
from vllm_nvfp4_moe.backends import vllm_kernels
from vllm_nvfp4_moe.backends.cpu import forward
from vllm_nvfp4_moe.backends.cpu.method import CpuMethod
from vllm_nvfp4_moe.backends.selection import Selection
from vllm_nvfp4_moe.doctor.saved import save
from vllm_nvfp4_moe.kernels.cpu.kernel import VARIANTS, kernel_named, lacking
from vllm_nvfp4_moe.measured import Table

LAYER = "model.layers.1.mlp.experts"
GATE = Gate("swiglu_oai", 1.702, 1.0, 7.0)
Load = Callable[..., dict[str, Any]]
MonkeyPatch = pytest.MonkeyPatch
DATE = "2026-11-30T09:00:00+00:00"


@pytest.fixture
def asked(monkeypatch: MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(settings.SELECT, settings.MEASURED)
    monkeypatch.setenv(settings.CACHE, str(tmp_path))


@pytest.fixture
def warned(monkeypatch: MonkeyPatch) -> list[str]:
    """The warnings of the choice."""
    found: list[str] = []
    monkeypatch.setattr(
        backends.logger, "warning_once", lambda text, *args: found.append(text % args)
    )
    return found


def key(weights_only: bool = False) -> dict[str, Any]:
    """Of the layers of ``shallow``, by their sizes in tests.quantize.checkpoints."""
    return measured.key_of(str(GATE), 32, 384, 128, 4, False, weights_only)


def keep(ms: dict[str, dict[int, float]]) -> None:
    measured.save(key(), Table(DATE, ms))


# Tables.


def test_the_best_is_by_geometric_mean_of_what_all_have() -> None:
    table = Table(DATE, {"a": {1: 1.0, 64: 9.0, 8192: 1e-9}, "b": {1: 2.0, 64: 4.0}})
    assert table.ranked() == ["b", "a"]
    assert Table(DATE, {"a": {1: 1.0}, "b": {2: 1.0}}).ranked() == []
    assert Table(DATE, {}).ranked() == []


def test_the_best_by_tokens() -> None:
    table = Table(DATE, {"a": {1: 1, 16: 2, 64: 9, 256: 9}, "b": {1: 2, 16: 3, 64: 4, 256: 4}})
    assert table.best_by_tokens(["a", "b", "c"]) == [(32, "a"), (math.inf, "b")]
    assert table.best_by_tokens(["a"]) == [(math.inf, "a")]
    assert table.best_by_tokens(["c"]) == []
    # Where the time ran out, what was timed takes nothing that only the others were.
    table = Table(DATE, {"a": {1: 2, 16: 3, 64: 4}, "b": {1: 1}})
    assert table.best_by_tokens(["a", "b"]) == [(4, "b"), (math.inf, "a")]


def test_a_table_comes_back_and_only_for_its_own(asked: None) -> None:
    keep({"a": {1: 1.0, 64: 2.5}})
    assert measured.load(key()) == Table(DATE, {"a": {1: 1.0, 64: 2.5}})
    assert measured.load(key(weights_only=True)) is None
    for name, other in (("vllm", "0.1"), ("plugin", "9"), ("device", "x"), ("driver", "1"),
                        ("experts", 31), ("gate", "silu")):  # fmt: skip
        assert measured.load({**key(), name: other}) is None


@pytest.mark.parametrize(
    "damage",
    [
        "", "{", "[]", '{"key": {}, "date": "", "ms": {}}', '{"ms": {"a": {"1": "x"}}}',
        '{"key": KEY, "date": "", "ms": {"a": {"1": NaN}}}',
        '{"key": KEY, "date": "", "ms": {"a": {"1": 0}}}',
    ],
)  # fmt: skip
def test_a_damaged_table_is_no_table(asked: None, damage: str) -> None:
    keep({"a": {1: 1.0}})
    file = measured.file_of(key())
    assert file is not None
    file.write_text(damage.replace("KEY", json.dumps(key())))
    with pytest.raises(ValueError, match=str(file)):
        measured.load(key())


def test_what_doctor_keeps(asked: None) -> None:
    """Right kernels alone, for the sizes of the checkpoint, even if fewer experts were run."""
    shape = {
        "name": "m", "experts": 32, "hidden": 384, "intermediate": 128, "top_k": 4, "tp": 1,
        "gate": GATE.fields(), "biased": False, "router": "sigmoid",
    }  # fmt: skip

    def kernel(name: str, status: str, ms: float, same_as: str | None = None) -> dict[str, Any]:
        timed = [] if same_as else [{"tokens": 1, "ms": ms}]
        return {"name": name, "status": status, "timed": timed, "same_as": same_as}

    alone = [kernel("a", "right", 1.0), kernel("b", "wrong", 0.1), kernel("c", "failed", 0.1)]
    other = [kernel("a", "right", 0.0, "weights only"), kernel("d", "right", 3.0)]
    layers = [
        {"place": "whole", "variant": variant, "shape": shape, "kernels": kernels}
        for variant, kernels in (("weights only", alone), ("4-bit activations", other))
    ]
    (note,) = save({"about": {"date": DATE, "quick": False}, "layers": layers})
    assert note == "2 tables kept for NVFP4_MOE_SELECT=measured"
    assert measured.load(key(True)) == Table(DATE, {"a": {1: 1.0}})
    assert measured.load(key()) == Table(DATE, {"a": {1: 1.0}, "d": {1: 3.0}})
    # --quick does not replace what took minutes; what did, replaces everything.
    alone[0]["timed"][0]["ms"] = 2.0
    other.pop()
    notes = save({"about": {"date": DATE, "quick": True}, "layers": layers})
    assert [note.partition(" ")[0] for note in notes] == ["1", "1"]
    assert measured.load(key(True)) == Table(DATE, {"a": {1: 2.0}})
    assert measured.load(key()) == Table(DATE, {"a": {1: 1.0}, "d": {1: 3.0}})
    save({"about": {"date": DATE, "quick": False}, "layers": layers})
    assert measured.load(key()) == Table(DATE, {"a": {1: 2.0}})


# On a CPU, where kernels share their weights.


def test_the_cpu_takes_each_kernel_for_its_tokens(
    load: Load, shallow: dict[str, Path], asked: None, summary_lines: list[str],
    monkeypatch: MonkeyPatch,
) -> None:  # fmt: skip
    (fastest, *_) = [v.instructions.name for v in VARIANTS if lacking(v) is None]
    keep({"cpu numba": {1: 1.0, 64: 9.0}, f"cpu {fastest}": {1: 2.0, 64: 1.0}})
    layer = load(shallow["modelopt"])[LAYER].routed_experts
    method = layer.quant_method
    assert isinstance(method, CpuMethod)
    assert method.by_tokens == f"8=numba;inf={fastest}"
    (line,) = summary_lines
    told = f"kernel the CPU kernel (numba up to 8 tokens, then {fastest})"
    assert f"; {told}; chosen by doctor's table of {DATE} (NVFP4_MOE_SELECT=measured); " in line
    named: list[str] = []
    by_name = forward.named
    monkeypatch.setattr(forward, "named", lambda name: (named.append(name), by_name(name))[1])
    outs = []
    for tokens in (8, 9):
        x = torch.ones(tokens, 384).bfloat16()
        ids = torch.zeros(tokens, 4, dtype=torch.int32)
        outs.append(method.apply(layer, x, torch.ones(tokens, 4), ids, None, None))
    assert named == [fastest]
    torch.testing.assert_close(outs[0], outs[1][:8], rtol=0.02, atol=0.02 * float(outs[0].std()))


def test_kernels_for_bfloat16_take_nothing_else(
    load: Load, shallow: dict[str, Path], asked: None
) -> None:
    """Doctor measures with bfloat16. Others would be rounded to it."""
    names = [v.instructions.name for v in VARIANTS if lacking(v) is None]
    (exact, *_) = [
        v.instructions.name for v in VARIANTS if lacking(v) is None and torch.float16 in v.takes
    ]
    keep({f"cpu {name}": {1: 1.0 + place} for place, name in enumerate(names)})
    layer = load(shallow["modelopt"], dtype="float16")[LAYER].routed_experts
    assert layer.quant_method.by_tokens == f"inf={exact}"


def test_what_was_compiled_is_gone_and_so_is_the_compiler(
    load: Load, shallow: dict[str, Path], asked: None, monkeypatch: MonkeyPatch, tmp_path: Path
) -> None:
    """Since doctor measured. One line says so, however many layers there are."""
    (fastest, *_) = [v.instructions.name for v in VARIANTS if lacking(v) is None]
    keep({"cpu numba": {1: 1.0, 64: 9.0}, f"cpu {fastest}": {1: 2.0, 64: 1.0}})

    def nobody() -> tuple[str, ...]:
        raise jit.KernelError("no C++ compiler")

    monkeypatch.setattr(jit, "cxx", nobody)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    said: list[str] = []
    monkeypatch.setattr(forward.logger, "warning", lambda text, *args: said.append(text % args))
    for cached in (forward.named, kernel_named):
        cached.cache_clear()
    try:
        for _ in range(2):
            layer = load(shallow["modelopt"])[LAYER].routed_experts
            assert layer.quant_method.by_tokens == "inf=numba"
    finally:
        forward.named.cache_clear()
    assert said == [f"{fastest}, which doctor has measured, is not used: no C++ compiler"]


@pytest.mark.usefixtures("numba")
def test_no_cpp_where_the_user_wants_none(
    load: Load, shallow: dict[str, Path], asked: None
) -> None:
    (fastest, *_) = [v.instructions.name for v in VARIANTS if lacking(v) is None]
    keep({"cpu numba": {1: 2.0}, f"cpu {fastest}": {1: 1.0}})
    layer = load(shallow["modelopt"])[LAYER].routed_experts
    assert layer.quant_method.by_tokens == "inf=numba"


def test_without_a_table_the_usual_order_and_one_warning(
    load: Load, shallow: dict[str, Path], asked: None, warned: list[str], summary_lines: list[str]
) -> None:
    method = load(shallow["modelopt"])[LAYER].routed_experts.quant_method
    assert method.by_tokens == "" and "kernel the CPU kernel; " in summary_lines[0]
    (warning,) = warned
    assert "there is no table of this machine" in warning
    assert f"32 experts, 384 x 128, top 4, {GATE}. Make one with: nvfp4-moe doctor" in warning


def test_a_damaged_table_is_told_of(
    load: Load, shallow: dict[str, Path], asked: None, warned: list[str]
) -> None:
    keep({"a": {1: 1.0}})
    file = measured.file_of(key())
    assert file is not None
    file.write_text("{")
    load(shallow["modelopt"])
    assert len(warned) == 1 and f"the table cannot be read ({file} is no table" in warned[0]


def test_a_table_of_other_kernels(
    load: Load, shallow: dict[str, Path], asked: None, warned: list[str]
) -> None:
    keep({"hopper bf16": {1: 1.0}, "nobodys": {1: 0.5}})
    load(shallow["modelopt"])
    assert len(warned) == 1 and "doctor's table (nobodys, hopper bf16) can run here" in warned[0]


def test_nobody_asked(load: Load, shallow: dict[str, Path], asked: None, warned: list[str],
                      monkeypatch: MonkeyPatch) -> None:  # fmt: skip
    keep({"cpu numba": {1: 1.0}})
    monkeypatch.delenv(settings.SELECT)
    assert load(shallow["modelopt"])[LAYER].routed_experts.quant_method.by_tokens == ""
    monkeypatch.setenv(settings.SELECT, settings.MEASURED)
    config = {"kernel_config": {"moe_backend": "marlin"}}  # which says more
    assert load(shallow["modelopt"], **config)[LAYER].routed_experts.quant_method.by_tokens == ""
    assert warned == []


def test_what_else_is_asked_is_refused(monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setenv(settings.SELECT, "fastest")
    with pytest.raises(ValueError, match="NVFP4_MOE_SELECT=fastest: must be measured, or not set"):
        settings.measured()


# vLLM's kernels, with its choice pretended.


@pytest.mark.parametrize("works", [True, False], ids=["the first", "the first cannot run"])
def test_one_of_vllms_kernels(
    load: Load, shallow: dict[str, Path], asked: None, monkeypatch: MonkeyPatch, works: bool
) -> None:
    tried: list[str] = []

    def select(
        config: Any, weight_key: Any, activation_key: Any, gate: Gate, weighs_input: bool
    ) -> Selection:
        tried.append(config.moe_backend)
        if config.moe_backend == "humming" and not works:
            raise ValueError("it cannot")
        experts: Any = SimpleNamespace(is_monolithic=lambda: False, __name__="Stub")
        return Selection(map_nvfp4_backend(config.moe_backend), experts, [])

    method = vllm_kernels.VllmKernelsMethod
    monkeypatch.setattr(vllm_kernels, "select", select)
    monkeypatch.setattr(method, "unsupported", classmethod(lambda cls, layer: None))
    monkeypatch.setattr(method, "prepare", lambda self, layer: None)
    monkeypatch.setenv(settings.SELF_CHECK, "0")  # nothing computes here
    times = {"marlin": 2.0, "humming": 1.0, "hopper bf16": 0.5}
    keep({name: {1: ms, 64: ms} for name, ms in times.items()})
    layer = load(shallow["modelopt"])[LAYER].routed_experts
    assert tried == (["humming"] if works else ["humming", "marlin"])
    name = "HUMMING" if works else "MARLIN"
    assert layer.quant_method.kernel.startswith(name) and layer.quant_method.measured is not None
    assert layer.moe_config.moe_backend == "auto"


def test_ranks_that_exchange_experts_choose_alike(asked: None, warned: list[str]) -> None:
    """Their machines' tables might differ, and weights would then lie in another order."""
    keep({"cpu numba": {1: 1.0}})
    parallel = SimpleNamespace(enable_eplb=True, ep_size=2)
    config = SimpleNamespace(moe_backend="auto", moe_parallel_config=parallel)
    context: Any = SimpleNamespace(format=SimpleNamespace(per_token=False))
    layer: Any = SimpleNamespace(moe_config=config)
    assert backends._by_table(context, layer, False) is None
    assert len(warned) == 1 and "not with --enable-eplb" in warned[0]
