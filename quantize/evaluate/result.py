"""What an evaluation finds, as data."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from quantize.evaluate.depth import Depth
from quantize.evaluate.predictions import Figures
from quantize.run.version import PACKAGE, VERSIONS, package_version


@dataclass(frozen=True)
class Result:
    """Everything that an evaluation says.

    Attributes:
        source, target: the two folders.
        text: where the tokens are from.
        text_digest: SHA-256 of the tokens.
        samples, length: rows of the text, and tokens of each.
        activations: how inputs of the target's quantized experts were rounded.
        figures, depth: see there.
        notes: what a reader should know, a sentence each.
        seconds: that it took, those before an interruption too.
        device, dtype: what computed, and in which precision.
    """

    source: Path
    target: Path
    text: str
    text_digest: str
    samples: int
    length: int
    activations: str
    figures: Figures
    depth: list[Depth]
    notes: tuple[str, ...]
    seconds: float
    device: torch.device
    dtype: torch.dtype

    def as_json(self) -> dict[str, Any]:
        """All of it for programs; perplexities of the source and the target, KL in nats."""
        figures = self.figures
        return {
            "source": str(self.source),
            "target": str(self.target),
            "perplexity": {
                "source": figures.before,
                "target": figures.after,
                "change_percent": figures.change,
                "change_percent_standard_error": figures.change_error,
            },
            "kl": {"mean": figures.kl, "standard_error": figures.kl_error},
            "top1_agreement": figures.top1,
            "tokens": figures.tokens,
            "depth": [each._asdict() for each in self.depth],
            "activations": self.activations,
            "text": self.text,
            "text_digest": self.text_digest,
            "samples": self.samples,
            "length": self.length,
            "notes": list(self.notes),
            "seconds": self.seconds,
            "dtype": str(self.dtype).removeprefix("torch."),
            "machine": asdict(machine(self.device)),
            "versions": {PACKAGE: package_version()} | {name: version(name) for name in VERSIONS},
        }


@dataclass(frozen=True)
class Machine:
    """What computed."""

    system: str
    cpus: int
    device: str


def machine(device: torch.device) -> Machine:
    """This machine, of which ``device`` computed."""
    name = str(device)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return Machine(f"{platform.system()} {platform.machine()}", os.cpu_count() or 1, name)
