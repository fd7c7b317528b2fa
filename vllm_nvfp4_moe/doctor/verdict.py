"""What follows from a result: whether what would be chosen is right, and what else to know."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def verdict(result: Mapping[str, Any]) -> dict[str, Any]:
    """``right``: whether each kernel that vLLM or this package would choose is right, as far as
    anything was tried. ``problems`` say why it is not; ``warnings`` are for the rest."""
    problems: list[str] = []
    warnings: list[str] = list(result["problems"])
    if unseen := result["about"]["unseen"]:
        warnings.append(f"vLLM does not see the plugin: {unseen}")
    for layer in result["layers"]:
        where = f"{layer['place']}, {layer['variant']}"
        if layer["problem"]:
            warnings.append(f"{where}: no kernel is chosen: {layer['problem']}")
        for kernel in layer["kernels"]:
            told = _told(kernel)
            by = _chosen_by(layer, kernel["name"])
            if told:
                (problems if by else warnings).append(f"{where}: {kernel['name']}{by} {told}")
            elif by and kernel["status"] == "cannot run":
                warnings.append(
                    f"{where}: {kernel['name']}{by} is not run here: {kernel['reason']}"
                )
            elif by and kernel["status"] == "no time":
                warnings.append(f"{where}: {kernel['name']}{by} was not tried: no time was left")
    if not result["layers"]:
        problems.append("nothing could be asked of vLLM: see the problems above")
    return {"right": not problems, "problems": problems, "warnings": warnings}


def _told(kernel: Mapping[str, Any]) -> str | None:
    if kernel["status"] == "wrong":
        return f"is WRONG: {'; '.join(kernel['faults']) or 'it does not give the right output'}"
    if kernel["status"] == "failed":
        return f"FAILED: {kernel['message']}"
    return None


def _chosen_by(layer: Mapping[str, Any], name: str) -> str:
    who = [w for w, key in (("this package", "chosen"), ("vLLM", "stock")) if layer[key] == name]
    return f" (chosen by {' and by '.join(who)})" if who else ""
