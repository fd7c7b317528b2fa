"""Whether stacked experts are stored as ``[experts, out, in]`` or as ``[experts, in, out]``.

A joined gate and up has twice the rows, or the columns, that down leads to expect: its shape tells.
Separate tensors fit together either way. Then the format that their names belong to tells, or the
sizes in the config, or the parameters of the model's class in Transformers. If none of these does,
that is an error. It is never guessed: the wrong reading has no error of its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quantize.checkpoint.reader import Checkpoint
from quantize.checkpoint.tensors import TensorInfo
from quantize.errors import QuantizeError
from quantize.experts.stated import stated

Orientation = tuple[int, int, bool]
"""Hidden size, intermediate size, and whether tensors are ``[experts, in, out]``."""

_OUT_IN = (".moe.down_proj.weight", ".output_linear.weight")
"""How names of down end in formats that are known as ``[experts, out, in]``: Step-3.7, Granite."""


def settled(
    prefix: str,
    weights: list[TensorInfo],
    fitting: list[Orientation],
    checkpoint: Checkpoint,
    config: dict[str, Any],
) -> Orientation:
    """The orientation of the experts at the module path ``prefix``.

    Args:
        weights: the tensors of gate, up and down.
        fitting: those that the shapes allow, at least one.
        config: the config of the part of the model that the experts are in.

    Raises:
        QuantizeError: if nothing tells which of ``fitting`` it is.
    """
    if len(fitting) == 1:
        return fitting[0]
    if weights[-1].name.endswith(_OUT_IN):
        return next(one for one in fitting if not one[2])
    said = stated(config, prefix)
    agreeing = [one for one in fitting if said.fits(*one[:2])]
    if not agreeing:
        return fitting[0]  # the config then disagrees with both, which is reported for the group
    if len(agreeing) == 1:
        return agreeing[0]
    transposed = _of_class(checkpoint.folder, [info.name for info in weights])
    for one in agreeing:
        if one[2] is transposed:
            return one
    raise QuantizeError(
        f"{weights[0].file.name}: {' and '.join(f'{i.name} {list(i.shape)}' for i in weights)} may "
        "be [experts, out, in] or [experts, in, out]: neither config.json "
        f"({str(said) or 'no sizes'}) nor a class of Transformers tells; store each expert in "
        f"tensors of its own ({prefix}.0.down_proj.weight is [hidden, intermediate])"
    )


def _of_class(folder: Path, names: list[str]) -> bool | None:
    """Whether the model's class in Transformers has these tensors as ``[experts, in, out]``.

    None if Transformers has no class for the model, or if its experts have other parameters.
    """
    from quantize.experts.model import build, config_of, offline  # slow, and seldom needed

    wanted = {name.removesuffix(".weight").rpartition(".")[2] for name in names}
    try:
        with offline():
            model = build(config_of(folder))
    except Exception:  # Transformers raises many kinds here; identifying the gate reports them
        return None
    found = {
        bool(getattr(module, "is_transposed", False))
        for module in model.modules()
        if {n for n, p in module.named_parameters(recurse=False) if p.dim() == 3} == wanted
    }
    return found.pop() if len(found) == 1 else None
