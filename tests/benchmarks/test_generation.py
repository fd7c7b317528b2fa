"""Greedy text and brackets: beside Transformers' generate and Python's tokenizer."""

from __future__ import annotations

import io
import token
import tokenize
from pathlib import Path

import pytest
import torch

from benchmarks.generation import PAIRS, Scanner, agreement, closed, closes, find_prompts, greedy
from examples.perplexity import standard_library
from tests.benchmarks import tiny


def openings(text: str) -> list[int]:
    """Where Python's own tokenizer sees opening brackets, as offsets; none in f-strings."""
    starts = [0]
    for line in io.StringIO(text):
        starts.append(starts[-1] + len(line))
    found, inside = [], 0
    for item in tokenize.generate_tokens(io.StringIO(text).readline):
        inside += item.type == getattr(token, "FSTRING_START", -1)
        inside -= item.type == getattr(token, "FSTRING_END", -1)
        if item.type == token.OP and item.string in PAIRS and not inside:
            found.append(starts[item.start[0] - 1] + item.start[1])
    return found


@pytest.mark.parametrize("pieces", [None, 1, 7])
def test_brackets_are_where_pythons_tokenizer_sees_them(pieces: int | None) -> None:
    scanned = 0
    for file in standard_library()[1][:25]:
        text = file.read_text(encoding="utf-8")
        scanner, found, offset = Scanner(), [], 0
        step = pieces or len(text)
        for start in range(0, len(text), step):
            depth = len(scanner.open)
            for taken in scanner.feed(text[start : start + step]):
                if len(scanner.open) > depth:
                    found.append(offset + taken - 1)
                depth = len(scanner.open)
            offset += step
        assert not scanner.broken and not scanner.open, file
        assert found == openings(text), file
        scanned += len(found)
    assert scanned > 1000


@pytest.mark.parametrize(
    ("before", "text", "expected"),
    [
        ("f(", "a, b)", True),
        ("f(", "a, [b]) }", True),
        ("f(", "a, b]", False),
        ("f(", "a, b", False),
        ("f(", "')', (", False),
        ("f(", "'\\')')", True),
        ("f(", "'\n)", False),
        ("f(", "'''\n)''')", True),
        ("f(", "# )\n)", True),
        ("f(", "'', \"\")", True),
        ("x = {a: [", "1]", True),
        ("x = {a: [", "(1])", False),
        ("x = {a: [", "1}", False),
    ],
)
def test_what_closes_a_bracket(before: str, text: str, expected: bool) -> None:
    state = Scanner()
    assert list(state.feed(before))
    assert closes(state, text) is expected
    assert closes(state, text) is expected  # the state is not used up


def test_prompts_end_with_an_opening_bracket_and_are_spread_over_files() -> None:
    tokenizer, (_, held_out) = tiny.tokenizer(), standard_library()
    prompts = find_prompts(tokenizer, held_out, 60, context=40)
    assert len(prompts) == 60
    texts = [tokenizer.decode(prompt.ids) for prompt in prompts]
    assert len(set(texts)) > 55  # files may begin alike
    assert all(len(prompt.ids) == 40 for prompt in prompts)
    assert all(
        PAIRS[text[-1]] == prompt.state.open[-1]
        for text, prompt in zip(texts, prompts, strict=True)
    )


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_greedy_text_is_transformers_generate(architecture: str) -> None:
    model = tiny.model(architecture)
    prompts = find_prompts(tiny.tokenizer(), standard_library()[1], 70, context=24)
    written = greedy(model, prompts, 12)
    ids = torch.tensor([prompt.ids for prompt in prompts])
    expected = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=12,
        min_new_tokens=12,
        eos_token_id=None,
    )
    # The batches differ, and with them sums: the least of gaps between two tokens may turn.
    same = (written == expected[:, ids.shape[1] :]).all(1)
    assert same.float().mean() > 0.95


def test_agreement_counts_up_to_the_first_difference() -> None:
    reference = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8], [1, 1, 1, 1]])
    written = torch.tensor([[1, 2, 9, 4], [5, 6, 7, 8], [2, 1, 1, 1]])
    assert agreement(written, reference) == pytest.approx((2 + 4 + 0) / 3)


def test_closed_is_judged_by_the_text_up_to_its_end(tmp_path: Path) -> None:
    tokenizer, file = tiny.tokenizer(), tmp_path / "some.py"
    file.write_text("total = sum(x * [1, 2][0] for x in range(9))\n")
    prompts = find_prompts(tokenizer, [file], 1, context=8)
    assert tokenizer.decode(prompts[0].ids) == "l = sum("
    eos = tokenizer.eos_token_id

    def written(text: str, end: bool = False) -> torch.Tensor:
        ids = tokenizer(text)["input_ids"]
        return torch.tensor([[*ids[:2], *([eos] * end), *ids[2:]]])

    assert closed(tokenizer, prompts, written("a, [b])")) == 1
    assert closed(tokenizer, prompts, written("a, [b])", end=True)) == 0
    assert closed(tokenizer, prompts, written("a, [b)")) == 0
