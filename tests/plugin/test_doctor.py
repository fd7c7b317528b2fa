"""Doctor from outside: its processes, what it makes of a checkpoint, its result, its exit code."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from quantize.cli.errors import UsageError
from quantize.errors import QuantizeError
from quantize.experts.gates import Gate
from tests import doctor_runs
from tests.conftest import ROOT
from tests.gpu import reference as independent
from tests.hardware_results import problems_of
from vllm_nvfp4_moe.doctor import children, command, compiling
from vllm_nvfp4_moe.doctor.cases import (
    TOKENS,
    Case,
    all_cases,
    judged,
    make_batch,
    make_weights,
    together,
)
from vllm_nvfp4_moe.doctor.checkpoint import shape_of
from vllm_nvfp4_moe.doctor.compiling import preparing
from vllm_nvfp4_moe.doctor.layer import one_rank
from vllm_nvfp4_moe.doctor.reference import Rounding, outputs
from vllm_nvfp4_moe.doctor.routing import KINDS, correction_bias
from vllm_nvfp4_moe.doctor.shape import CLAMPED, Shape
from vllm_nvfp4_moe.doctor.table import text
from vllm_nvfp4_moe.doctor.verdict import verdict
from vllm_nvfp4_moe.doctor.work import alone

CPU = torch.device("cpu")
TINY = Shape("tiny", 8, 256, 128, 2, CLAMPED, router="sigmoid")


# Inputs, and what they should give.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("router", ["sigmoid", "softmax"])
def test_logits_are_what_they_are_called(kind: str, router: str) -> None:
    shape = replace(TINY, experts=64, top_k=4, router=router)
    given = make_batch(shape, Case(400, kind), CPU)
    assert given.logits is not None
    chosen = given.logits.gather(1, given.ids.long())
    others = given.logits.scatter(1, given.ids.long(), -100.0).amax(1)
    assert bool((chosen.amin(1) > others + 1).all())
    assert bool((given.logits < 0).all()) == (kind == "all-negative")
    assert (len(chosen.unique()) == 1) == (kind == "tied")
    loads = given.ids.flatten().long().bincount(minlength=64).sort(descending=True).values
    assert (float(loads[0]) > 0.4 * 400) == (kind == "skewed")


def test_plain_arithmetic_is_that_of_another_implementation() -> None:
    """``tests.gpu.reference`` shares no code with the package: experts, gate and router."""
    for gate, router in (
        (CLAMPED, "sigmoid"),
        (Gate("silu"), "softmax"),
        (Gate("relu2"), "softmax"),
    ):
        shape = replace(TINY, gate=gate, router=router)
        weights = make_weights(shape, CPU)
        given = make_batch(shape, Case(64, "uniform"), CPU)
        logits = given.logits
        assert logits is not None
        scores = logits.sigmoid() if router == "sigmoid" else logits.softmax(-1)
        bias = correction_bias(8) if router == "sigmoid" else 0.0
        ids = (scores + bias).topk(2).indices
        factor = scores.gather(1, ids) / scores.gather(1, ids).sum(1, keepdim=True)
        torch.testing.assert_close(given.weights, factor)
        assert torch.equal(given.ids.long(), ids)
        w13, w2 = (independent.Stored(*part) for part in (weights.w13, weights.w2))
        if not gate.gated:  # theirs drops a second half
            w13 = independent.Stored(*(torch.cat([p, p], 1) if p.ndim > 1 else p for p in w13))
        truth = independent.routed(given.x, w13, w2, factor, ids.int(), gate.form, torch.float64)
        (ours,) = outputs(weights, given, Rounding())
        assert float((ours - truth).norm() / truth.norm()) < 1e-5


def test_four_bit_activations_are_those_of_another_implementation() -> None:
    weights = make_weights(TINY, CPU)
    ones = torch.ones(8)
    weights = replace(weights, input_scales=(ones, ones))
    given = make_batch(TINY, Case(64, "uniform"), CPU)
    w13, w2 = (independent.Stored(*part) for part in (weights.w13, weights.w2))
    truth = independent.routed(
        given.x, w13, w2, given.weights, given.ids, "swiglu_oai", emulated=True
    )
    (ours,) = outputs(weights, given, Rounding(nvfp4=True))
    (plain,) = outputs(weights, given, Rounding())
    # Theirs also rounds to bfloat16 in between, which puts some values on the other side.
    assert float((ours - truth).norm()) < 0.5 * float((plain - truth).norm())


def test_whose_input_scale_shows() -> None:
    weights, given = make_weights(TINY, CPU), make_batch(TINY, Case(64, "uniform"), CPU)
    own, largest = (outputs(weights, given, Rounding(True, by))[0] for by in (True, False))
    assert float((own - largest).norm() / own.norm()) > 0.02


def test_judged_tokens_are_first_last_and_some_between() -> None:
    assert judged(8, 12).tolist() == list(range(8))
    some = judged(8192, 12).tolist()
    assert some[0] == 0 and some[-1] == 8191 and 10 <= len(set(some)) <= 12
    assert len(all_cases(TOKENS)) == 36
    batch = together([make_batch(TINY, Case(n, "tied"), CPU) for n in (2, 3)])
    assert (batch.x.shape, batch.ids.shape) == ((5, 256), (5, 2))


# Processes.


def _dies(how: str, emit: Callable[[Any], None]) -> None:
    emit({"what": "begins", "at": "a step"})
    if how == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if how == "hang":
        time.sleep(60)
    if how == "raise":
        raise RuntimeError("the device is gone")
    if how == "exit":
        os._exit(3)
    emit({"what": "done"})


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("segfault", "its process died of SIGSEGV, a step"),
        ("hang", "it was ended after 1 s, a step"),
        ("raise", "exit status 1, a step: Traceback"),
        ("exit", "its process ended with exit status 3, a step"),
        ("", None),
    ],
)
def test_a_process_that_dies_is_told_of(how: str, words: str | None) -> None:
    records, problem = children.run(_dies, how, seconds=1 if how == "hang" else 30)
    assert [r["what"] for r in records] == (["begins"] if words else ["begins", "done"])
    assert problem is None if words is None else words in str(problem)
    if how == "raise":
        assert "RuntimeError: the device is gone" in str(problem)


def _compiles(seconds: float, emit: Callable[[Any], None]) -> None:
    with preparing(0.2, emit):
        time.sleep(seconds)
    emit({"what": "done"})


@pytest.mark.parametrize("ends", [True, False])
def test_compiling_is_said_and_ends(monkeypatch: pytest.MonkeyPatch, ends: bool) -> None:
    """A process may take longer than its time by what it compiles, and by no more than a bound."""
    monkeypatch.setattr(compiling, "MOST", 60.0 if ends else 1.0)
    said: list[str] = []
    started = children.Started(_compiles, 4.0 if ends else 60.0)
    begin = time.monotonic()
    records, problem = started.finish(1.0, compiling.listener(said.append, "a kernel"))
    assert said == ["a kernel: compiling what never was compiled here; checks lose no time by that"]
    if ends:
        assert problem is None and records[-1] == {"what": "done"}
        assert compiling.compiled(records) == pytest.approx(3.8, abs=2)
    else:
        assert problem == "it was ended after 2 s" and time.monotonic() - begin < 30


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("seconds", [0.0, 0.01, 7.0])
def test_time_for_compiling_is_given_once(slow: bool, seconds: float) -> None:
    """Whether or not the record that it is slow came before the end, which is a matter of
    milliseconds."""
    hear = compiling.listener(lambda _: None, "a kernel")
    records: list[dict[str, Any]] = [{"what": compiling.SLOW}] if slow else []
    records.append({"what": compiling.PREPARED, "compiling": seconds})
    for _ in range(2):
        assert sum(map(hear, records)) == pytest.approx(seconds)


def test_who_takes_times_waits_for_others_so_long_and_no_longer(tmp_path: Path) -> None:
    with alone(tmp_path) as first, alone(tmp_path, 0.3) as second:
        assert first < 0.3 <= second < 30


def _waits(folder: Path, told: Any, emit: Callable[[Any], None]) -> None:
    with alone(folder):
        emit({"what": "ready"})
        emit({"what": "told", "of": told.get()})
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_makes_ready_before_it_is_told_what_to_do(tmp_path: Path) -> None:
    """And whoever takes times waits for it; not for ever, should it die."""
    started = children.Started(_waits, tmp_path, waits=True)
    eventually(lambda: "ready" in started.found.read_text())
    started.tell({"a": "job"})
    with alone(tmp_path):
        assert '"told"' in started.found.read_text()
        records, problem = started.finish(60)
    assert records == [{"what": "ready"}, {"what": "told", "of": {"a": "job"}}]
    assert "SIGKILL" in str(problem)
    assert not started.found.exists()


def _is_killed(_: Any) -> None:
    with one_rank(CPU):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_is_killed_leaves_no_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert "SIGKILL" in str(children.run(_is_killed, seconds=60).problem)
    assert list(tmp_path.iterdir()) == []


# Checkpoints.


def hangs(emit: Callable[[Any], None]) -> None:
    emit({"number": os.getpid()})
    time.sleep(60)


ORPHANS = """
import sys
from tests.plugin.test_doctor import hangs
from vllm_nvfp4_moe.doctor import children
children.How.name = sys.argv[1]
children.run(hangs, seconds=60)
"""


def test_no_kernel_outlives_doctor(tmp_path: Path) -> None:
    """Not even one that is killed: the GPU is free again."""
    env = os.environ | {"TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", ORPHANS, "fork"]
    with subprocess.Popen(command, cwd=ROOT, env=env) as process:
        try:
            found = eventually(lambda: [f for f in tmp_path.glob("*/found") if f.read_text()])
            number = json.loads(found[0].read_text())["number"]
            assert Path(f"/proc/{number}").exists()
        finally:
            process.kill()
    eventually(lambda: not Path(f"/proc/{number}").exists() or _is_zombie(number))


def _is_zombie(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def eventually(found: Callable[[], Any]) -> Any:
    """What the function gives, once that is something."""
    deadline = time.monotonic() + 60
    while not (value := found()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return value


FIRST_SECOND = """
import os, runpy, signal, sys
which = sys.argv.pop(1)

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "typer":
            os.kill(os.getpid(), signal.Signals[which])  # and go on with the import

sys.meta_path.insert(0, Finder())
runpy.run_module("vllm_nvfp4_moe.doctor", run_name="__main__")
"""


@pytest.mark.parametrize("which", ["SIGINT", "SIGTERM"])
def test_doctor_stopped_in_the_first_second(which: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", FIRST_SECOND, which], cwd=ROOT, capture_output=True, text=True,
        check=False, timeout=120,
    )  # fmt: skip
    assert (ended.returncode, ended.stdout) == (130, "")
    assert ended.stderr == "interrupted: nothing was changed\n"


def test_shape_of_a_checkpoint(trained: Path, quantized: dict[str, Path], tmp_path: Path) -> None:
    config = json.loads((trained / "config.json").read_text())
    for folder in (trained, *quantized.values()):
        shape, gates = shape_of(str(folder))
        assert (shape.experts, shape.top_k) == (
            config["num_local_experts"], config["num_experts_per_tok"],
        )  # fmt: skip
        assert (shape.hidden, shape.intermediate) == (
            config["hidden_size"], config["intermediate_size"],
        )  # fmt: skip
        assert (shape.gate, gates.layers, shape.router, shape.biased) == (
            CLAMPED,
            {},
            "sigmoid",
            False,
        )
    # Without its weights: config alone.
    shutil.copy(trained / "config.json", tmp_path)
    assert shape_of(str(tmp_path))[0].gate == CLAMPED


def test_what_is_no_checkpoint_with_experts(tmp_path: Path) -> None:
    with pytest.raises(QuantizeError, match="neither a folder nor a hub id"):
        shape_of("nowhere")  # and nobody asks the hub for it
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(QuantizeError, match="states no routed experts; leave") as told:
        shape_of(str(tmp_path))
    assert "--gate" not in str(told.value)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(QuantizeError, match="cannot be read") as told:
        shape_of(str(tmp_path))
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(("load", "told"), [(0.1, False), (5.7, True)])
def test_where_the_result_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load: float, told: bool
) -> None:
    """Refused before the minutes; a link (such as /dev/stdout) stays one. And it says if others
    kept the processors busy: a table made so had numba chosen."""
    for wrong in (tmp_path, tmp_path / "none" / "result.json"):
        with pytest.raises(UsageError, match=r"such folder|give a file"):
            command._check_writable(wrong)
    file, link = tmp_path / "file", tmp_path / "link"
    link.symlink_to(file)
    found = {"verdict": {"right": True}}
    monkeypatch.setattr(command, "_shape", lambda *_: (None, []))
    monkeypatch.setattr("vllm_nvfp4_moe.doctor.run.run", lambda *_: dict(found))
    monkeypatch.setattr("vllm_nvfp4_moe.doctor.saved.save", lambda _: [])
    monkeypatch.setattr("vllm_nvfp4_moe.doctor.table.text", lambda _: "a table")
    monkeypatch.setattr("os.getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    command.doctor(None, False, None, link)
    assert link.is_symlink()
    written = json.loads(file.read_text())
    assert ["times are not to be trusted" in note for note in written.pop("notes")] == [True] * told
    assert written == found
    assert sorted(tmp_path.iterdir()) == [file, link]


def test_what_cannot_be_found_out_is_no_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 1 says that a kernel is wrong, and nothing else does."""

    def ended() -> int:
        with pytest.raises((SystemExit, typer.Exit)) as code:
            command.doctor(str(tmp_path), False, None, None)
        found = code.value
        return int(found.code if isinstance(found, SystemExit) else found.exit_code)

    assert ended() == 2  # there is no checkpoint
    assert "error:" in capsys.readouterr().err
    monkeypatch.setattr(command, "_shape", lambda *_: (None, []))
    monkeypatch.setattr("vllm_nvfp4_moe.doctor.saved.save", lambda _: [])
    monkeypatch.setattr("vllm_nvfp4_moe.doctor.table.text", lambda _: "a table")
    verdict = {"verdict": {"right": False}}
    monkeypatch.setattr("vllm_nvfp4_moe.doctor.run.run", lambda *_: dict(verdict))
    assert ended() == 1

    def breaks(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vllm_nvfp4_moe.doctor.run.run", breaks)
    assert ended() == 2


# The result.


def kernel(name: str, status: str, **more: Any) -> dict[str, Any]:
    reason = "no" if status == "cannot run" else None
    return {"name": name, "status": status, "reason": reason, "faults": [], "message": None, **more}


def result(*kernels: dict[str, Any], chosen: str | None, stock: str | None = None) -> Any:
    layer = {
        "place": "whole", "variant": "weights only", "chosen": chosen, "stock": stock,
        "problem": None, "kernels": [*kernels],
    }  # fmt: skip
    return {"about": {"unseen": None}, "problems": [], "layers": [layer]}


WRONG = kernel("b", "wrong", faults=["gate and up swapped"])
FAILED = kernel("b", "failed", message="its process died of SIGILL")


@pytest.mark.parametrize("bad", [WRONG, FAILED], ids=["wrong", "failed"])
def test_only_what_would_be_chosen_is_a_problem(bad: dict[str, Any]) -> None:
    words = bad["faults"] or [bad["message"]]
    told = verdict(result(kernel("a", "right"), bad, chosen="a"))
    assert told["right"] and words[0] in told["warnings"][0] and not told["problems"]
    for by in ({"chosen": "b"}, {"chosen": "a", "stock": "b"}):
        told = verdict(result(kernel("a", "right"), bad, **by))
        assert (
            not told["right"]
            and words[0] in told["problems"][0]
            and "chosen by" in told["problems"][0]
        )


def test_what_is_not_known_is_said() -> None:
    told = verdict(result(kernel("a", "no time"), chosen="a"))
    assert told["right"] and "was not tried" in told["warnings"][0]
    told = verdict(result(kernel("a", "right"), kernel("c", "cannot run"), chosen="a", stock="c"))
    assert told["right"] and "c (chosen by vLLM) is not run here: no" in told["warnings"][0]
    nothing = {"about": {"unseen": "no"}, "problems": ["it was ended"], "layers": []}
    assert not verdict(nothing)["right"] and len(verdict(nothing)["warnings"]) == 2


# The command, in processes of its own. What a fault is put in with lies on the path of modules.

SWAP = """
import sys
from vllm_nvfp4_moe.registration import when_imported
def put_in():
    from vllm_nvfp4_moe.backends.cpu.method import CpuMethod
    {fault}
when_imported("vllm_nvfp4_moe.doctor.run", put_in)
"""
AHEAD = "__import__('vllm_nvfp4_moe.doctor.run').doctor.run._AHEAD['cpu'] = True"
"""As on a GPU."""
CRASH = "CpuMethod.apply = lambda *_: __import__('os').kill(__import__('os').getpid(), 4)"


def doctor(tmp_path: Path, folder: Path, fault: str = "pass") -> tuple[int, str, Any]:
    """Exit code, output and JSON of ``doctor --quick`` on a checkpoint."""
    (tmp_path / "sitecustomize.py").write_text(SWAP.format(fault=fault))
    out = tmp_path / "out.json"
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-m", "vllm_nvfp4_moe.doctor", str(folder), "--quick", "--json", out],
        env={**os.environ, "PYTHONPATH": path, "NVFP4_MOE_CACHE": str(tmp_path / "cache")},
        capture_output=True, text=True,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr, json.loads(out.read_text())


@pytest.mark.parametrize("ahead", ["pass", AHEAD], ids=["one", "one and the next"])
def test_a_machine_that_is_right(tmp_path: Path, quantized: dict[str, Path], ahead: str) -> None:
    code, said, found = doctor(tmp_path, quantized["modelopt"], ahead)
    assert code == 0 and found["verdict"]["right"], said
    assert problems_of(found) == []
    assert [(layer["place"], layer["variant"]) for layer in found["layers"]] == [
        (place, variant) for place in ("whole", "slice")
        for variant in ("weights only", "4-bit activations")
    ]  # fmt: skip
    names = {k["name"]: k for k in found["layers"][0]["kernels"]}
    assert names["marlin"]["reason"] == "the platform is a CPU"
    assert names["hopper bf16"]["reason"] == "the device is not an NVIDIA GPU"
    ran = [k for k in names.values() if k["reason"] is None]
    assert {"cpu numba", found["layers"][0]["chosen"]} <= {k["name"] for k in ran}
    assert all(k["status"] == "right" for k in ran)
    assert all(row["floor"]["ms"] > 0 for k in ran for row in k["timed"])
    assert "| whole, weights only" in said and "VERDICT: what would be chosen here is right" in said
    # A busy machine leaves times out; both variants of a place share them.
    timed = {o["place"] for o in found["layers"] for k in o["kernels"] if k.get("timed")}
    assert "whole" in timed
    assert len(list((tmp_path / "cache" / "doctor").iterdir())) == 2 * len(timed)
    assert text(found)


@pytest.mark.parametrize("ahead", ["pass", AHEAD], ids=["one", "one and the next"])
def test_a_kernel_that_kills_its_process(
    tmp_path: Path, quantized: dict[str, Path], ahead: str
) -> None:
    code, said, found = doctor(tmp_path, quantized["modelopt"], f"{CRASH}; {ahead}")
    assert code == 1
    assert "its process died of SIGILL" in found["verdict"]["problems"][0], said
    assert problems_of(found) == []
    assert {k["status"] for layer in found["layers"] for k in layer["kernels"]} == {
        "failed", "cannot run",
    }  # fmt: skip


@pytest.mark.parametrize("fault", doctor_runs.FAULTS)
def test_a_fault_is_named_and_ends_with_1(tmp_path: Path, fault: str) -> None:
    """As tests/gpu/test_doctor.py has it of a GPU's kernels; here of numba's alone, for which a
    busy machine has the time."""
    small = doctor_runs.small_checkpoint(tmp_path / "small")
    cache = tmp_path / "cache"
    ran = doctor_runs.doctor(
        tmp_path / "run", str(small), "--tp", "1", fault=fault, cache=cache, CXX="/bin/false"
    )
    doctor_runs.check_found(ran, doctor_runs.FAULTS[fault], ["cpu numba"])
    assert not (cache / "doctor").exists()  # no table of a wrong kernel
