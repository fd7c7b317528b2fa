"""What follows from doctor's results: problems, warnings, and whether all is right."""

from __future__ import annotations

from typing import Any

import pytest

from vllm_nvfp4_moe.doctor.verdict import verdict


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
