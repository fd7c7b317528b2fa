"""Tables of how fast each kernel is on this machine: ``nvfp4-moe doctor`` writes them, and
``NVFP4_MOE_SELECT=measured`` has them choose.

A table is for one machine with one driver, vLLM and version of this package, and for one layer's
sizes and gate (:func:`key_of`). It lies in the plugin's cache folder, under a hash of all that.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from quantize.native import environment
from vllm_nvfp4_moe import versions

_FORMAT = 1
"""Of the files."""


@dataclass(frozen=True)
class Table:
    """Milliseconds of a call, by kernel and number of tokens; of right kernels alone.

    Attributes:
        date: when it was measured.
        ms: by kernel, as backends' ``kernel_names`` have them.
    """

    date: str
    ms: Mapping[str, Mapping[int, float]]

    @property
    def figures(self) -> int:
        """How many it has."""
        return sum(map(len, self.ms.values()))

    def _common(self, names: Iterable[str]) -> list[int]:
        """Numbers of tokens at which all ``names`` were timed."""
        every = [set(self.ms[name]) for name in names]
        return sorted(set.intersection(*every)) if every else []

    def ranked(self) -> list[str]:
        """The fastest kernel first, by the geometric mean over the numbers of tokens at which all
        were timed."""
        tokens = self._common(self.ms)
        if not tokens:
            return []
        return sorted(
            self.ms, key=lambda name: statistics.geometric_mean(self.ms[name][n] for n in tokens)
        )

    def best_by_tokens(self, names: Iterable[str]) -> list[tuple[float, str]]:
        """The fastest of ``names`` by number of tokens: pairs of the most tokens that it takes, and
        its name. The last takes any number. Between two numbers that were measured, the change is
        at their geometric mean."""
        known = [name for name in names if name in self.ms]
        # Of a slow kernel, doctor may have timed small numbers alone: it stays out of the others.
        tokens = sorted({n for name in known for n in self.ms[name]})
        best = [
            min((name for name in known if n in self.ms[name]), key=lambda name: self.ms[name][n])
            for n in tokens
        ]
        found: list[tuple[float, str]] = []
        for place, name in enumerate(best):
            if place + 1 == len(best):
                found.append((math.inf, name))
            elif best[place + 1] != name:
                found.append((math.floor(math.sqrt(tokens[place] * tokens[place + 1])), name))
        return found


def device() -> dict[str, str]:
    """This machine's device and its driver, as tables know them."""
    from vllm.platforms import current_platform

    if current_platform.is_cuda():
        from vllm.third_party import pynvml

        pynvml.nvmlInit()
        driver = pynvml.nvmlSystemGetDriverVersion()
        pynvml.nvmlShutdown()
        return {"device": current_platform.get_device_name(), "driver": str(driver)}
    return {"device": f"{processor()}, {os.cpu_count()} cores", "driver": "none"}


def processor() -> str:
    """The CPU's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def key_of(
    gate: str, experts: int, hidden: int, intermediate: int, top_k: int, biased: bool, weights: bool
) -> dict[str, Any]:
    """What a table is for.

    Args:
        gate: the contract's, in words.
        experts: of this rank; intermediate: of this rank's slice.
        biased: the experts have biases.
        weights: the checkpoint's weights alone are quantized.
    """
    return {
        "format": _FORMAT,
        **device(),
        "vllm": versions.installed_version(),
        "plugin": version("vllm-nvfp4-moe"),
        "gate": gate,
        "experts": experts,
        "hidden": hidden,
        "intermediate": intermediate,
        "top_k": top_k,
        "biased": biased,
        "weights_only": weights,
    }


def file_of(key: Mapping[str, Any]) -> Path | None:
    """Where the table for ``key`` is kept; None if there is no cache folder."""
    folder = environment.cache()
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    return None if folder is None else folder / "doctor" / f"{name}.json"


def save(key: Mapping[str, Any], table: Table) -> Path | None:
    """Keep ``table``; where, or None if there is no cache folder.

    Raises:
        OSError: if it cannot be written.
    """
    file = file_of(key)
    if file is None:
        return None
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    ms = {name: {str(n): value for n, value in row.items()} for name, row in table.ms.items()}
    new = file.with_name(f"{file.name}.{os.getpid()}")
    new.write_text(json.dumps({"key": key, "date": table.date, "ms": ms}, indent=1))
    new.replace(file)
    return file


def load(key: Mapping[str, Any]) -> Table | None:
    """The table for ``key``; None if there is none.

    Raises:
        ValueError: if what is there is no such table.
    """
    file = file_of(key)
    if file is None or not file.exists():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        ms = {
            str(name): {int(n): float(value) for n, value in row.items()}
            for name, row in found["ms"].items()
        }
        if found["key"] != dict(key) or any(not v > 0 for row in ms.values() for v in row.values()):
            raise ValueError("its contents are not what its name says")
        return Table(str(found["date"]), ms)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is no table of measurements: {error}") from error
