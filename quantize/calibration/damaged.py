"""The error that an expert's weights in the source are damaged."""

from __future__ import annotations

from quantize.checkpoint.reader import Checkpoint
from quantize.errors import DamagedWeightsError
from quantize.experts.group import ExpertGroup

OF_TEXT = "makes NaN or infinite numbers of the text"


def damaged(
    checkpoint: Checkpoint,
    group: ExpertGroup,
    number: int,
    what: str = "holds NaN or infinite weights",
) -> DamagedWeightsError:
    """The error that expert ``number`` of ``group`` does ``what``: files and tensors by name."""
    names = group.weights_of(number)
    files = checkpoint.files_of(names)
    return DamagedWeightsError(
        f"{', '.join(sorted(files))}: expert {number} of {group.prefix} ({', '.join(names)}) "
        f"{what}; the source is damaged: get it again, and go on with --resume",
        files,
    )
