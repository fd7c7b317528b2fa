"""Experts that get too little text are named before any is rounded, as Transformers routes it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from quantize.calibration.quantizer import Quantizer
from quantize.calibration.samples import digest_of
from quantize.calibration.token_counts import ranges
from quantize.checkpoint.reader import Checkpoint
from quantize.execute import execute
from quantize.run.options import MIN_TOKENS, Calibration, Options
from quantize.run.plan import plan
from tests.trained import Sizes

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def rows(trained: Path) -> torch.Tensor:
    """So few tokens that some experts get too little and others do not."""
    return torch.randint(3, 200, (3, 64), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def counts(trained: Path, rows: torch.Tensor) -> dict[str, list[int]]:
    """By experts' module path, the tokens of each, as Transformers' own model routes them."""
    model: Any = AutoModelForCausalLM.from_pretrained(
        trained, dtype=torch.float32, experts_implementation="eager"
    ).eval()
    found: dict[str, list[int]] = {}

    def count(path: str, experts: int) -> Any:
        def hook(_: Any, args: tuple[torch.Tensor, ...]) -> None:
            found[path] = [int((args[1] == e).sum()) for e in range(experts)]

        return hook

    for path, module in model.named_modules():
        if type(module).__name__.endswith("Experts"):
            module.register_forward_pre_hook(count(path, len(module.down_proj)))
    with torch.no_grad():
        model(input_ids=rows)
    assert found
    return found


def few_of(counts: list[int]) -> list[int]:
    return [expert for expert, count in enumerate(counts) if count < MIN_TOKENS]


SOME = Options(include=("*.layers.[13].*",))


@pytest.mark.parametrize("method", ["gptq", "two-sided", None])
def test_who_gets_too_little_is_said_first(
    method: str | None,
    trained: Path,
    rows: torch.Tensor,
    counts: dict[str, list[int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[str] = []
    before: list[int] = []
    expert = Quantizer.expert
    monkeypatch.setattr(
        Quantizer, "expert", lambda *args: before.append(len(warnings(said))) or expert(*args)
    )
    steps: list[float] = []
    settings = Calibration("text", *rows.shape, digest_of(rows), method)
    with Checkpoint(trained) as checkpoint:
        steps_ = plan(checkpoint, replace(SOME, calibration=settings, activations=True))
        execute(
            checkpoint, steps_, tmp_path / "out", samples=rows, say=said.append,
            counting=lambda done, *_: steps.append(done),
        )  # fmt: skip
        paths = [group.prefix for group in steps_.groups]
    few = {path: few_of(counts[path]) for path in paths}
    experts = Sizes.of(trained).experts
    assert all(0 < len(own) < experts for own in few.values())
    total = sum(map(len, few.values()))
    *each, whole = warnings(said)
    assert each == [
        f"Warning: {path}: {len(own)} of {experts} experts get fewer than {MIN_TOKENS} of "
        f"{rows.numel()} tokens: {ranges(own)}"
        for path, own in few.items()
    ]
    assert whole.startswith(f"Warning: {total} of {experts * len(paths)} experts get too little")
    assert len(warnings(said)) == 3
    # All of it before the first expert is rounded.
    assert set(before) == (set() if method is None else {3})
    assert bool(steps) == (method == "gptq")
    assert not list((tmp_path / "out").glob("**/counting"))


def warnings(said: list[str]) -> list[str]:
    return [line for line in said if "experts get" in line]


def test_enough_text_is_said_too(
    trained: Path, rows: torch.Tensor, counts: dict[str, list[int]], tmp_path: Path
) -> None:
    said: list[str] = []
    many = torch.cat([rows] * 20)
    common: dict[str, Any] = {"counting": lambda *_: None, "say": said.append, "samples": many}
    for every in (False, True):
        settings = Calibration("text", *many.shape, digest_of(many), "gptq", every)
        with Checkpoint(trained) as checkpoint:
            steps = plan(checkpoint, Options(include=("*.layers.1.*",), calibration=settings))
            execute(checkpoint, steps, tmp_path / f"{every}", **common)
    (line,) = [line for line in said if "xperts" in line or "experts get" in line]
    own = counts["model.layers.1.mlp.experts"]
    assert line == f"Each of {len(own)} experts gets at least {20 * min(own)} tokens of text"


def test_a_run_that_goes_on_does_not_count_again(
    trained: Path, rows: torch.Tensor, tmp_path: Path
) -> None:
    settings = Calibration("text", *rows.shape, digest_of(rows), "gptq")
    said: list[str] = []

    def stop(done: float, *_: Any) -> None:
        if done >= 2:
            raise KeyboardInterrupt

    common: dict[str, Any] = {"counting": lambda *_: None, "say": said.append, "samples": rows}
    with Checkpoint(trained) as checkpoint:
        steps = plan(checkpoint, replace(SOME, calibration=settings))
        with pytest.raises(KeyboardInterrupt):
            execute(checkpoint, steps, tmp_path / "out", calibrating=stop, **common)
        assert len(warnings(said)) == 3
        execute(checkpoint, steps, tmp_path / "out", resume=True, **common)
        assert len(warnings(said)) == 3


@pytest.mark.parametrize(
    ("numbers", "said"), [([], ""), ([3], "3"), ([0, 1, 2, 5, 7, 8], "0-2, 5, 7-8")]
)
def test_ranges(numbers: list[int], said: str) -> None:
    assert ranges(numbers) == said
