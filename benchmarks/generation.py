"""What a model writes, greedily, after held-out Python cut behind an opening bracket.

Two figures come of one generation:

* **agreement**: tokens until the text leaves the reference model's, at most all that are written;
  the mean over prompts. It says how soon a user would see any difference.
* **closed**: the share of prompts whose last bracket is closed, within the tokens written, by a
  bracket of its kind, with every bracket between properly nested and no string running over the
  end of its line. It needs no reference: a model that loses the thread forgets what is open.

Brackets in strings and comments do not count; a string that is an f-string is a string. A prompt
is the ``context`` tokens that end with the bracket; brackets opened before them count as well, so
that closing more than was opened since is no mistake in itself, but only after the one asked for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

PAIRS = {"(": ")", "[": "]", "{": "}"}
STRIDE = 256
"""Tokens of a file between prompts, at least, so that they differ."""
BATCH = 64
"""Prompts at a time. The reference and the others see the same batches."""

_STRING = re.compile(r"'''|\"\"\"|'|\"")


class Scanner:
    """Which brackets are open, character by character, in Python's lexical rules.

    Attributes:
        open: the closing brackets that are due, the innermost last.
        quote: of the string that is open; "#" in a comment, "" in neither.
        broken: whether a bracket did not match, or a string ran over the end of its line.
    """

    def __init__(self) -> None:
        self.open: list[str] = []
        self.quote = ""
        self.broken = False
        self._pending = ""

    def copy(self) -> Scanner:
        """One that goes on from here by itself."""
        other = Scanner()
        other.open, other.quote = list(self.open), self.quote
        other.broken, other._pending = self.broken, self._pending
        return other

    def feed(self, text: str) -> Iterator[int]:
        """Go on over ``text``; yields after each character that counts how many were taken.

        What can only be understood with the next characters (a quote that may be the first of
        three, a backslash) waits for the next call.
        """
        kept, text = len(self._pending), self._pending + text
        self._pending = ""
        place = 0
        while place < len(text) and not self.broken:
            taken = self._step(text, place)
            if not taken:
                self._pending = text[place:]
                return
            place += taken
            yield place - kept

    def _step(self, text: str, place: int) -> int:
        """Take what begins at ``place``; 0 if that cannot be told yet."""
        char = text[place]
        if self.quote == "#":
            self.quote = "" if char == "\n" else "#"
        elif self.quote:
            if char == "\\":
                return 2 if place + 1 < len(text) else 0
            if text.startswith(self.quote, place):
                taken = len(self.quote)
                self.quote = ""
                return taken
            if len(self.quote) == 3 and self.quote.startswith(text[place:]):
                return 0
            self.broken = char == "\n" and len(self.quote) == 1
        elif match := _STRING.match(text, place):
            if len(match[0]) == 1 and (match[0] * 3).startswith(text[place:]):
                return 0
            self.quote = match[0]
            if text.startswith(match[0] * 2, place):  # an empty string
                self.quote = ""
                return 2
            return len(match[0])
        elif char == "#":
            self.quote = "#"
        elif char in PAIRS:
            self.open.append(PAIRS[char])
        elif char in PAIRS.values():
            self.broken = not self.open or self.open.pop() != char
        return 1


class Prompt(NamedTuple):
    """Token ids that end with an opening bracket, and the scanner's state after it."""

    ids: list[int]
    state: Scanner


def find_prompts(
    tokenizer: Any, files: Sequence[Path], count: int, context: int = 96
) -> list[Prompt]:
    """Up to ``count`` prompts from ``files`` in their order, spread over them.

    The first from each file, then the second, and so on. Files that do not scan (f-strings with
    quotes in quotes) end where that shows.
    """
    each = [list(_of_file(tokenizer, file, context)) for file in files]
    longest = max(map(len, each), default=0)
    rounds = (found[turn] for turn in range(longest) for found in each if turn < len(found))
    return [prompt for _, prompt in zip(range(count), rounds, strict=False)]


def _of_file(tokenizer: Any, file: Path, context: int) -> Iterator[Prompt]:
    text = file.read_text(encoding="utf-8", errors="replace")
    coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, ends = coded["input_ids"], {end: k for k, (_, end) in enumerate(coded["offset_mapping"])}
    scanner, depth, last = Scanner(), 0, -STRIDE
    for place in scanner.feed(text):
        opened, depth = len(scanner.open) > depth, len(scanner.open)
        token = ends.get(place)
        if opened and token is not None and token + 1 >= context and token >= last + STRIDE:
            last = token
            yield Prompt(ids[token + 1 - context : token + 1], scanner.copy())


@torch.inference_mode()
def greedy(model: Any, prompts: Sequence[Prompt], tokens: int) -> torch.Tensor:
    """The most likely continuations, int64 ``[prompts, tokens]`` on the CPU.

    With a cache, in batches; an end-of-text token is one like any other.
    """
    parts = []
    for start in range(0, len(prompts), BATCH):
        batch = [prompt.ids for prompt in prompts[start : start + BATCH]]
        given = torch.tensor(batch, device=model.device)
        cache, written = None, []
        for _ in range(tokens):
            out = model(input_ids=given, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = out.past_key_values
            given = out.logits[:, -1:].argmax(-1)
            written.append(given)
        parts.append(torch.cat(written, dim=1).cpu())
    return torch.cat(parts)


def agreement(written: torch.Tensor, reference: torch.Tensor) -> float:
    """Mean over prompts of the tokens before the first that differs; both ``[prompts, tokens]``."""
    return (written == reference).cumprod(dim=1).sum(dim=1).double().mean().item()


def closed(tokenizer: Any, prompts: Sequence[Prompt], written: torch.Tensor) -> float:
    """The share of prompts whose bracket is closed, see the module's docstring."""
    done = 0
    for prompt, ids in zip(prompts, written.tolist(), strict=True):
        if tokenizer.eos_token_id in ids:
            ids = ids[: ids.index(tokenizer.eos_token_id)]
        # Decoded together: some tokenizers drop a space at the beginning.
        before = tokenizer.decode(prompt.ids, clean_up_tokenization_spaces=False)
        text = tokenizer.decode(prompt.ids + ids, clean_up_tokenization_spaces=False)
        done += closes(prompt.state, text[len(before) :])
    return done / len(prompts)


def closes(state: Scanner, text: str) -> bool:
    """Whether ``text`` closes the innermost bracket that is open in ``state``, and does it well."""
    scanner = state.copy()
    depth = len(scanner.open)
    return any(len(scanner.open) < depth and not scanner.broken for _ in scanner.feed(text))
