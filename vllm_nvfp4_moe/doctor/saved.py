"""What of a result ``NVFP4_MOE_SELECT=measured`` reads later."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_nvfp4_moe import measured, settings
from vllm_nvfp4_moe.doctor.kernels import VARIANTS
from vllm_nvfp4_moe.doctor.shape import restored


def save(result: Mapping[str, Any]) -> list[str]:
    """Keep a table for each layer; what the user should know of that."""
    saved, longer = [], []
    for layer in result["layers"]:
        shape = restored(layer["shape"])
        ms = times_of(layer, result["layers"])
        if not ms:
            continue
        key = measured.key_of(
            str(shape.gate), shape.experts, shape.hidden, shape.intermediate, shape.top_k,
            shape.biased, layer["variant"] == VARIANTS[0],
        )  # fmt: skip
        table = measured.Table(result["about"]["date"], ms)
        try:
            if result["about"]["quick"] and _has_more(key, table):
                longer.append(layer)
                continue
            file = measured.save(key, table)
        except OSError as error:
            return [f"the table of this machine cannot be kept: {error}"]
        if file is None:
            return [f"the table of this machine is not kept: say where by {settings.CACHE}"]
        saved.append(file)
    notes = []
    if saved:
        notes.append(f"{len(saved)} tables kept for {settings.SELECT}={settings.MEASURED}")
    if longer:
        notes.append(f"{len(longer)} tables of earlier results stay: they have more than --quick's")
    return notes


def _has_more(key: Mapping[str, Any], table: measured.Table) -> bool:
    """Whether a table is kept that has more figures."""
    try:
        there = measured.load(key)
    except ValueError:
        return False
    return there is not None and there.figures > table.figures


def times_of(
    layer: Mapping[str, Any], layers: list[Mapping[str, Any]]
) -> dict[str, dict[int, float]]:
    """Milliseconds by kernel and number of tokens, of those that are right. A kernel that does
    the same in the other variant was timed there."""
    found = {}
    for kernel in layer["kernels"]:
        if kernel["status"] != "right":
            continue
        timed = kernel["timed"]
        if kernel["same_as"]:
            (other,) = (
                each
                for twin in layers
                if (twin["place"], twin["variant"]) == (layer["place"], kernel["same_as"])
                for each in twin["kernels"]
                if each["name"] == kernel["name"]
            )
            timed = other["timed"] if other["status"] == "right" else []
        if timed:
            found[kernel["name"]] = {row["tokens"]: row["ms"] for row in timed}
    return found
