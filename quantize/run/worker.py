"""What one thread needs to run jobs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from quantize.checkpoint.memory import Arena
from quantize.checkpoint.reader import Checkpoint
from quantize.nvfp4.kernels import for_device
from quantize.nvfp4.kernels.kernel import Kernel


class Worker:
    """What one thread needs to run jobs: memory, a device and that device's kernel.

    The tensors that a worker loads are on ``device``. They are valid until its arena is reset.

    Args:
        memory: how many bytes the worker's largest job needs. With a GPU they are allocated at
            once, page-locked, because that is too slow to be done for each job.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device, memory: int = 0) -> None:
        self.checkpoint = checkpoint
        self.device = device
        self.kernel: Kernel = for_device(device)
        pinned = device.type == "cuda"
        self.arena = Arena(memory if pinned else 0, pinned)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """The context that jobs must run in: the worker's GPU, and a stream of its own."""
        with torch.inference_mode():
            if self.device.type != "cuda":
                yield
                return
            with torch.cuda.device(self.device), torch.cuda.stream(torch.cuda.Stream()):
                yield

    def load(self, name: str) -> torch.Tensor:
        """See ``Checkpoint.load``."""
        return self.checkpoint.load(name, self.arena, self.device)

    def load_expert(self, name: str, expert: int, experts: int | None = None) -> torch.Tensor:
        """See ``Checkpoint.load_expert``."""
        return self.checkpoint.load_expert(name, expert, experts, self.arena, self.device)

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """The bytes of ``tensor``, uint8 ``[nbytes]``, in main memory."""
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        return flat if flat.device.type == "cpu" else self.arena.take(flat.numel()).copy_(flat)
