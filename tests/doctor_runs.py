"""Doctor in a process of its own, with a fault put into kernels: as the owner of a machine with
wrong kernels would see it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from tests.conftest import ROOT
from tests.gpu import broken
from tests.hardware_results import problems_of
from tests.quantize.checkpoints import minimax_m3
from vllm_nvfp4_moe.doctor.shape import CLAMPED

# It lies on the path of modules. Only its first process imports `run`; those that are begun anew
# import `work` alone.
_PUT_IN = """
import os
from vllm_nvfp4_moe.registration import when_imported
def put_in():
    from tests import doctor_runs
    from tests.gpu.broken import ForGood
    doctor_runs.FAULTS[os.environ["FAULT"]].put_in(ForGood())
when_imported("vllm_nvfp4_moe.doctor.work", put_in)
"""


class Fault(NamedTuple):
    """What is put in, and the name that doctor must give it: its beginning and its end."""

    put_in: broken.Break
    begins: str
    ends: str

    def is_named(self, words: str) -> bool:
        return words.startswith(self.begins) and words.endswith(self.ends)


_ZEROED = f"a block scale of expert {broken.ZEROED_EXPERT}: w2's, row {broken.ZEROED_ROW}, block "

FAULTS = {
    "another alpha": Fault(
        broken.other_numbers(swiglu_alpha=1.0),
        f"the gate {replace(CLAMPED, alpha=1.0)} in place of {CLAMPED}",
        "",
    ),
    "swapped halves": Fault(
        broken.before_conversion(broken.swap_halves), "gate and up swapped: ", ""
    ),
    "one zeroed scale": Fault(
        broken.before_conversion(broken.zero_a_scale), _ZEROED, ", is left out (counts as 0)"
    ),
}


class Ran(NamedTuple):
    """How it ended.

    Attributes:
        found: its JSON.
        seconds: from its beginning to its end.
    """

    code: int
    said: str
    found: Any
    seconds: float

    def kernels(self, status: str | None = None) -> dict[str, list[dict[str, Any]]]:
        """By name, in each layer, those that could run here, or those of a status."""
        every: dict[str, list[dict[str, Any]]] = {}
        for layer in self.found["layers"]:
            for kernel in layer["kernels"]:
                if kernel["reason"] is None and status in (None, kernel["status"]):
                    every.setdefault(kernel["name"], []).append(kernel)
        return every


def doctor(folder: Path, *arguments: str, fault: str = "", cache: Path, **variables: str) -> Ran:
    """``python -m vllm_nvfp4_moe.doctor --quick`` with ``arguments``.

    Args:
        folder: for files.
        fault: of ``FAULTS``.
        cache: of compiled kernels and of doctor's tables.
        variables: more of the environment.
    """
    folder.mkdir(exist_ok=True)
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    if fault:
        (folder / "sitecustomize.py").write_text(_PUT_IN)
        path.insert(0, str(folder))
    out = folder / "out.json"
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    # Humming chooses other kernels where it sees that pytest runs, unless this says not to.
    told = {"HUMMING_TEST_TUNING_SOURCE": "", "FAULT": fault, "NVFP4_MOE_CACHE": str(cache)}
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "vllm_nvfp4_moe.doctor", *arguments, "--quick", "--json", str(out)],
        env={**env, **told, **variables, "PYTHONPATH": os.pathsep.join(path)},
        capture_output=True, text=True,
    )  # fmt: skip
    seconds = time.monotonic() - begin
    said = done.stdout + done.stderr
    assert out.exists(), said
    found = json.loads(out.read_text())
    assert problems_of(found) == []
    return Ran(done.returncode, said, found, seconds)


def small_checkpoint(folder: Path) -> Path:
    """MiniMax-M3's config with small experts, of sizes that every kernel takes."""
    folder.mkdir(exist_ok=True)
    config = minimax_m3(
        hidden_size=512, intermediate_size=256, num_local_experts=16, num_experts_per_tok=4
    )
    (folder / "config.json").write_text(config.to_json_string(use_diff=False))
    return folder


def check_found(ran: Ran, fault: Fault, kernels: Iterable[str], hidden: Iterable[str] = ()) -> None:
    """Each of ``kernels`` is wrong by ``fault`` and by nothing else, the command says so, and ends
    with 1. (Where a kernel does the same as in another variant, it is tried there again briefly,
    and need not show it; on a busy machine, not at all.)

    Args:
        hidden: kernels that may also be right, since they round by more than the fault changes.
    """
    assert ran.code == 1, ran.said
    assert set(ran.kernels()) == set(kernels), ran.said
    for name, layers in ran.kernels().items():
        for number, kernel in enumerate(layers):
            may_pass = kernel["same_as"] or name in hidden
            statuses = {"wrong", *(["right"] if may_pass else []), *(["no time"] if number else [])}
            assert kernel["status"] in statuses, f"{name}: {kernel['status']}\n{ran.said}"
            told = kernel.get("faults", [])
            assert bool(told) == (kernel["status"] == "wrong")
            assert all(map(fault.is_named, told)), f"{name}: {told}"
    assert f"is WRONG: {fault.begins}" in ran.said
    assert all(fault.begins in problem for problem in ran.found["verdict"]["problems"])
