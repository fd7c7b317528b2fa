"""The results of ``nvfp4-moe doctor`` that are kept: each is whole, and agrees with itself."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.hardware_results import FOLDER, SCHEMA, kept, problems_of
from vllm_nvfp4_moe.doctor.table import text
from vllm_nvfp4_moe.doctor.verdict import verdict

FILES = kept()


def read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_each_result(file: Path) -> None:
    found = read(file)
    assert problems_of(found) == []
    assert verdict(found) == found["verdict"]  # as today's code judges it
    assert text(found)
    for layer in found["layers"]:
        names = [kernel["name"] for kernel in layer["kernels"]]
        assert len(set(names)) == len(names)
        assert {layer["chosen"], layer["stock"]} <= {*names, None}
        for kernel in layer["kernels"]:
            for check in kernel.get("checks", ()):
                within = None not in (check["token_error"], check["value_error"]) and (
                    check["token_error"] <= kernel["bound"][0]
                    and check["value_error"] <= kernel["bound"][1]
                )
                assert check["right"] == within, (kernel["name"], check)
            for row in kernel.get("timed", ()):
                low, high = row["quartiles"]
                assert low <= row["ms"] <= high


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_each_result_is_in_the_pages_table(file: Path) -> None:
    assert f"({file.name})" in (FOLDER / "README.md").read_text(encoding="utf-8")


def test_there_is_one_of_a_cpu() -> None:
    assert any(not read(file)["about"]["gpus"] for file in FILES)


DAMAGES: dict[str, Callable[[Any], None]] = {
    "another format": lambda r: r.update(format=2),
    "no verdict": lambda r: r.pop("verdict"),
    "an unknown status": lambda r: r["layers"][0]["kernels"][0].update(status="fine"),
    "a time of zero": lambda r: timed(r).update(ms=0),
    "right without a check": lambda r: right(r).update(checks=[]),
    "cannot run, and no reason": lambda r: right(r).update(status="cannot run"),
    "an unknown routing": lambda r: right(r)["checks"][0].update(routing="zipf"),
    "no sizes": lambda r: r["layers"][0]["shape"].pop("hidden"),
}


def right(result: Any) -> Any:
    """The first kernel that is right."""
    return next(k for layer in result["layers"] for k in layer["kernels"] if k["status"] == "right")


def timed(result: Any) -> Any:
    """The first time that was measured."""
    every = (k for layer in result["layers"] for k in layer["kernels"])
    return next(row for kernel in every for row in kernel.get("timed", ()))


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_schema_sees_what_is_wrong(damage: str) -> None:
    found = copy.deepcopy(read(FILES[0]))
    DAMAGES[damage](found)
    assert problems_of(found)
    assert SCHEMA["properties"]["format"]["const"] == 1
