"""One weight of the target: its tensors, where they are, and how they differ from what they must
be."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from quantize.checkpoint.reader import Checkpoint
from quantize.checkpoint.tensors import TensorInfo
from quantize.layouts.layout import Layout
from quantize.nvfp4.format import BLOCK, NvFp4, bad_scales
from quantize.run.worker import Worker
from quantize.verify.blocks import place
from quantize.verify.results import Lost


@dataclass
class Part:
    """What one task found."""

    prefix: str | None = None
    lost: list[Lost] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class StoredWeight:
    """A weight in NVFP4, all of whose tensors are there and sane.

    Attributes:
        module: its module path.
        tensors: by suffix.
    """

    target: Checkpoint
    layout: Layout
    module: str
    tensors: dict[str, torch.Tensor]

    @classmethod
    def read(
        cls,
        target: Checkpoint,
        layout: Layout,
        wanted: tuple[TensorInfo, ...],
        worker: Worker,
        problems: list[str],
    ) -> StoredWeight | None:
        """Read the tensors ``wanted``; None, with the ``problems`` noted, if they are not sane."""
        wrong = list(misfits(target, wanted))
        loaded = {} if wrong else {o.name: target.load(o.name, worker.arena) for o in wanted}
        for name, tensor in list(loaded.items())[1:]:  # all but the codes
            if problem := bad_scales(tensor):
                wrong.append(f"{place_of(target, name)}: {problem}; quantize again")
        problems += wrong
        if wrong:
            return None
        by_suffix = {name.rpartition(".")[2]: tensor for name, tensor in loaded.items()}
        return cls(target, layout, wanted[0].name.rpartition(".")[0], by_suffix)

    @property
    def weight(self) -> NvFp4:
        return self.layout.restore(self.tensors)[0]

    @property
    def input_scale(self) -> float:
        """NaN if there is none."""
        scale = self.layout.restore(self.tensors)[1]
        return float("nan") if scale is None else float(scale)

    def where(self, suffix: str) -> str:
        """The file and the name of one of the tensors."""
        return place_of(self.target, f"{self.module}.{suffix}")

    def lost(self, noise: float, signal: float, counts: Any) -> Lost:
        """See ``Lost``."""
        file = self.target.tensors[f"{self.module}.{self.layout.suffixes[0]}"].file
        return Lost(self.module, noise, signal, counts, file.name)

    def differences(
        self, suffix: str, wanted: torch.Tensor, rule: str | None = None
    ) -> Iterator[str]:
        """Where a tensor's bits are not those that it must have.

        Args:
            rule: the scale rule that makes them; None if they are the source's own.
        """
        found = self.tensors[suffix]
        size = found.element_size()
        ours, theirs = (
            tensor.contiguous().reshape(-1).view(torch.uint8).view(-1, size)
            for tensor in (found, wanted.to(found.device))
        )
        if torch.equal(ours, theirs):
            return
        if found.numel() == 1:
            but = f"the rule {rule!r} makes" if rule else "the source's own is"
            of = " of the source's weights" if rule else ""
            yield (
                f"{self.where(suffix)} is {float(found):.9g}, but {but} {float(wanted):.9g}{of}; "
                "quantize again"
            )
            return
        wrong = (ours != theirs).any(1).nonzero().flatten()
        row, column = divmod(int(wrong[0]), found.shape[-1])
        block = column * 2 // BLOCK if found.dtype == torch.uint8 else column
        whose = f"what the rule {rule!r} makes of the source's weights" if rule else "the source's"
        yield (
            f"{self.where(suffix)}: {len(wrong)} of {found.numel()} bytes are not {whose}, first "
            f"in row {row}, {place(block)}: an error; quantize again"
        )


def place_of(target: Checkpoint, name: str) -> str:
    """The file and the name of a tensor of the target."""
    return f"{target.tensors[name].file.name}: {name}"


def not_finite(source: Checkpoint, names: Iterable[str], modules: Iterable[str]) -> str:
    """The message that weights of the source are NaN or infinite.

    Args:
        names: of the source's tensors that the weights ``modules`` are read from.
    """
    return (
        f"{source_place(source, names)}: of {' and '.join(modules)}, weights are NaN or infinite; "
        "the source is damaged: get it again"
    )


def source_place(source: Checkpoint, names: Iterable[str]) -> str:
    """The files and the names of tensors of the source."""
    files = sorted(str(source.folder / name) for name in source.files_of(names))
    return f"{', '.join(files)}: {', '.join(names)}"


def misfits(target: Checkpoint, wanted: Iterable[TensorInfo]) -> Iterator[str]:
    """Which tensors are missing, or of another dtype or shape."""
    for name, dtype, dims, *_ in wanted:
        info = target.tensors.get(name)
        if info is None:
            yield f"{target.folder}: {name} is missing; complete the download, or quantize again"
        elif (info.dtype, info.shape) != (dtype, dims):
            yield (
                f"{info.file.name}: {name} is {info.dtype} {list(info.shape)}, "
                f"expected {dtype} {list(dims)}; quantize again"
            )


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors hold the same bytes, whatever their shapes."""
    left, right = (x.contiguous().reshape(-1).view(torch.uint8) for x in (left, right))
    return torch.equal(left, right)
