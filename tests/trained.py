"""The models with trained weights that tests use.

``own_model`` is there on any machine: it is what ``examples.make_checkpoint`` trains on Python's
standard library, in a fixed number of steps. It takes about a minute and a half on two cores, once:
it is kept in ``.test-cache``, by a hash of all that it comes from. m3-nano is larger and better,
and cannot be made on the spot; it is used beside the own model where it lies.
"""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import os
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from examples.perplexity import standard_library

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".test-cache"
SOURCES = ("examples/make_checkpoint.py", "examples/perplexity.py")
OWN, NANO = "own", "m3-nano"


@dataclass(frozen=True)
class Sizes:
    """What a MiniMax-M3 measures, as its config.json says: one dense layer, then sparse ones."""

    layers: int
    experts: int
    hidden: int
    intermediate: int
    vocabulary: int

    @classmethod
    def of(cls, folder: Path) -> Sizes:
        config = json.loads((folder / "config.json").read_text())
        layers = config["num_hidden_layers"]
        assert config["mlp_layer_types"] == ["dense"] + ["sparse"] * (layers - 1)
        return cls(
            layers,
            config["num_local_experts"],
            config["hidden_size"],
            config["intermediate_size"],
            config["vocab_size"],
        )

    @property
    def sparse(self) -> range:
        """The numbers of the layers with routed experts."""
        return range(1, self.layers)

    @property
    def expert_weights(self) -> int:
        """How many weights all routed experts have."""
        return len(self.sparse) * self.experts * 3 * self.hidden * self.intermediate


def nano() -> Path | None:
    """m3-nano's folder: ``M3_NANO``, else where its evidence was made; None if it is not there."""
    folder = Path(os.environ.get("M3_NANO") or ROOT.parent / "shared" / "models" / "m3-nano")
    return folder if (folder / "config.json").exists() else None


def available() -> list[str]:
    """Names of the trained models that there are here."""
    return [OWN, NANO] if nano() else [OWN]


def recipe() -> str:
    """A hash of what decides the own model's weights: code, text and libraries."""
    found = hashlib.sha256()
    for source in SOURCES:
        found.update((ROOT / source).read_bytes())
    for file in itertools.chain(*standard_library()):
        found.update(file.read_bytes())
    for package in ("torch", "transformers", "tokenizers"):
        found.update(f"{package} {version(package)} ".encode())
    found.update(sysconfig.get_platform().encode())
    return found.hexdigest()[:16]


def own_model() -> Path:
    """The own model's folder, trained first if it is not there.

    Of several processes that want it one trains, and the others wait for that; the folder appears
    whole or not at all.
    """
    CACHE.mkdir(exist_ok=True)
    out = CACHE / f"trained-{recipe()}"
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not out.exists():
            # A process of its own: how it sets up OpenMP is not for the tests. And on the
            # CPU, so that the same seed gives the same model with and without a GPU.
            done = subprocess.run(
                [sys.executable, "-m", "examples.make_checkpoint", str(out)],
                cwd=ROOT, capture_output=True, text=True, check=False,
                env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
            )  # fmt: skip
            assert done.returncode == 0, done.stdout + done.stderr
    return out
