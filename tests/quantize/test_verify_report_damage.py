"""``verify`` and a report that was changed, though its page agrees with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from tests.quantize.damages import (
    DATA,
    Good,
    damaged,
    following,
    good_checkpoints,
    problems,
    remade,
)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Good]]:
    with good_checkpoints(tmp_path_factory.mktemp("good")) as get:
        yield get


TOGETHER: dict[str, Callable[[dict[str, Any]], Any]] = {
    "files": lambda r: r["files"].clear(),
    "one file less": lambda r: r["files"].remove("tokenizer.json"),
    "one file more": lambda r: r["files"].insert(0, "config.json"),
    "another file": lambda r: r["files"].__setitem__(0, "zzz.safetensors"),
    "digests": lambda r: r["digests"].clear(),
    "a digest": lambda r: r["digests"].__setitem__("tokenizer.json", "0" * 64),
    "activations": lambda r: r.__setitem__("activations", "fp8"),
    "no activations": lambda r: r.__setitem__("activations", "bf16"),
    "layout": lambda r: r.__setitem__("layout", "modelopt-"),
    "scales": lambda r: r.__setitem__("scales", "four-six"),
    "version": lambda r: r["versions"].__setitem__("vllm-nvfp4-moe", "9.9"),
    "a version less": lambda r: r["versions"].pop("torch"),
    "a version more": lambda r: r["versions"].__setitem__("numpy", "1"),
    "bytes before": lambda r: r.__setitem__("bytes_before", 1 + r["bytes_before"]),
    "bytes after": lambda r: r.__setitem__("bytes_after", 1 + r["bytes_after"]),
    "a layer's gate": lambda r: r["layers"][-1].__setitem__("gate", "swiglu_oai"),
    "a layer's projections": lambda r: r["layers"][-1].__setitem__("projections", ["w1"] * 3),
    "a layer's names": lambda r: r["layers"][-1].__setitem__("names", ["a"]),
    "a layer's bytes before": lambda r: r["layers"][-1].__setitem__("bytes_before", 7),
    "a layer's bytes after": lambda r: r["layers"][-1].__setitem__("bytes_after", 7),
    "a layer's errors": lambda r: r["layers"][-1]["errors"][0].__setitem__(0, 0.5),
    "a layer's counts": lambda r: r["layers"][-1]["scale_counts"].__setitem__(3, 5),
    "a layer less": lambda r: r["layers"].pop(),
    "a layer twice": lambda r: r["layers"].append(r["layers"][-1]),
    "a layer more": lambda r: r["layers"].append(r["layers"][-1] | {"prefix": "model.x.experts"}),
}
"""Changes of the report; the page is made of it again."""

LOST = ("bytes before", "a layer's bytes before", "a layer's errors", "a layer's counts")
"""Of these nothing is known without the source."""

INVISIBLE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "source": lambda r: r.__setitem__("source", "/elsewhere"),
    "target": lambda r: r.__setitem__("target", "x"),
    "command": lambda r: r.__setitem__("command", "nvfp4-moe"),
    "fingerprint": lambda r: r.__setitem__("fingerprint", "0"),
    "another torch": lambda r: r["versions"].__setitem__("torch", "1.0"),
}


@pytest.mark.parametrize(
    ("what", "alone"),
    [(what, False) for what in TOGETHER] + [(what, True) for what in TOGETHER if what not in LOST],
)
def test_a_report_that_was_changed_with_its_page(
    what: str, alone: bool, good: Callable[[str], Good]
) -> None:
    whole = good("compressed-tensors")
    damage = remade(whole, TOGETHER[what])
    with ExitStack() as stack:
        for file, content in following(whole.folder, damage).items():
            stack.enter_context(damaged(whole.folder, file, content))
        found = problems(whole, alone)
    assert any("report" in problem or "tokenizer" in problem for problem in found), found
    assert all(problem[-1] != "\n" for problem in found)


@pytest.mark.parametrize("what", INVISIBLE)
def test_what_a_report_may_say_otherwise(what: str, good: Callable[[str], Good]) -> None:
    """Nothing else knows it: it is on the list, and without the page it is seen."""
    whole = good("modelopt")
    damage = remade(whole, INVISIBLE[what])
    with damaged(whole.folder, DATA, damage.content):
        assert problems(whole)
    with ExitStack() as stack:
        for file, content in following(whole.folder, damage).items():
            stack.enter_context(damaged(whole.folder, file, content))
        assert problems(whole) == []


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "LICENSE"])
def test_what_was_edited_is_seen_without_the_source(name: str, good: Callable[[str], Good]) -> None:
    whole = good("modelopt")
    with damaged(whole.folder, name, (whole.folder / name).read_bytes() + b" "):
        (problem,) = problems(whole, alone=True)
    assert problem.startswith(f"{whole.folder / name} was changed since it was written")


def test_weights_only_says_bf16(good: Callable[[str], Good]) -> None:
    """Compressed-tensors for weights alone, whose report says that activations are quantized."""
    whole = good("weights only")
    assert problems(whole) == []
    for value in ("nvfp4", "gelu"):
        damage = remade(whole, lambda r, v=value: r.__setitem__("activations", v))
        with ExitStack() as stack:
            for file, content in following(whole.folder, damage).items():
                stack.enter_context(damaged(whole.folder, file, content))
            assert any("activations" in problem for problem in problems(whole))
