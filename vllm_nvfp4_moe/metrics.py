"""What ``/metrics`` says of a model's NVFP4 experts: on each rank, which kernel runs them, and how
far its self-check was off.

Layers are loaded by workers, and ``/metrics`` is answered by API servers, which are other
processes; vLLM takes no numbers of a plugin from the ones to the others. So each rank leaves a
file. The folder is made by the process that makes vLLM's config, which is the first one, and named
in the environment, which the others on this machine inherit. Once the engine is ready
(``exchanged.show_metrics``), each API server sets gauges from the files, by prometheus_client and
beside vLLM's own. So it does not matter whether there are several API servers, which vLLM then has
share a folder (``PROMETHEUS_MULTIPROC_DIR``).

Ranks on other machines do not show, since they have no such folder. Without vLLM's statistics
(``--disable-log-stats``) there are none of ours.
"""

from __future__ import annotations

import atexit
import functools
import json
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from vllm_nvfp4_moe import settings

if TYPE_CHECKING:
    from prometheus_client import Gauge

INFO = ("layers", "experts", "layout", "gate", "kernel", "variant", "passed_over", "self_check")
"""Labels of ``nvfp4_moe_experts_info``, beside the model's name and the rank."""


_made: list[str] = []
"""The folder, in the process that has made it."""


def share() -> None:
    """Make the folder for this server's ranks, unless the server's first process has."""
    # vLLM starts its processes by multiprocessing. One that is started otherwise is another server,
    # which may have inherited this one's environment.
    if _made or (settings.run_folder() is not None and multiprocessing.parent_process()):
        return
    with suppress(OSError):  # nothing can be written: no metrics then
        _made.append(tempfile.mkdtemp(prefix="nvfp4_moe-run-"))
        settings.set_run_folder(_made[0])
        atexit.register(_remove, _made[0], os.getpid())


def _remove(folder: str, process: int) -> None:
    if process == os.getpid():  # and not one that was forked off
        shutil.rmtree(folder, ignore_errors=True)


def report(rank: int, told: Mapping[str, str], error: float | None) -> None:
    """Leave what is to be said of the experts that have been loaded on this rank.

    Args:
        told: by :data:`INFO`.
        error: the self-check's relative error; None if there was no check.
    """
    folder = settings.run_folder()
    if folder is None:
        return
    with suppress(OSError):  # on another machine, or full
        # A rank may load a draft model, too.
        part = folder / f"{rank}-{os.getpid()}-{len(list(folder.iterdir()))}.part"
        part.write_text(json.dumps({"rank": str(rank), "told": dict(told), "error": error}))
        part.rename(part.with_suffix(".json"))


def show(model_name: str) -> bool:
    """Set the gauges from what the ranks have left so far; whether there was anything."""
    folder = settings.run_folder()
    files = sorted(folder.glob("*.json")) if folder else []
    for file in files:
        found: dict[str, Any] = json.loads(file.read_text())
        told, rank, error = found["told"], found["rank"], found["error"]
        _info().labels(model_name, rank, *(told[name] for name in INFO)).set(1)
        if error is not None:
            _error().labels(model_name, rank, told["layers"], told["kernel"]).set(error)
    return bool(files)


@functools.cache
def _info() -> Gauge:
    return _gauge(
        "nvfp4_moe_experts_info",
        "NVFP4 experts of a model on a rank: always 1; the labels say what runs them.",
        INFO,
    )


@functools.cache
def _error() -> Gauge:
    return _gauge(
        "nvfp4_moe_self_check_error",
        "The largest relative error of a token's output in the self-check at load.",
        ("layers", "kernel"),
    )


def _gauge(name: str, text: str, labels: tuple[str, ...]) -> Gauge:
    from prometheus_client import Gauge

    # Each API server says the same: one of them is enough.
    return Gauge(name, text, ("model_name", "rank", *labels), multiprocess_mode="mostrecent")
