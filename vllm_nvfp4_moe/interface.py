"""What a backend, which runs NVFP4 experts with one family of kernels, must say and do.

:mod:`vllm_nvfp4_moe.method` has the part of a layer's life that all backends share, and
:mod:`vllm_nvfp4_moe.backends` the backends. The self-check and the line that is logged after
loading know a backend only as this class.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    from quantize.experts.gates import Gate


class ExpertsBackend(FusedMoEMethodBase):
    """One layer's method, as vLLM calls it, with what this package asks of it besides.

    Attributes:
        gate: the contract's, of this layer.
        weight_only: the checkpoint's experts come without input scales.
    """

    gate: Gate
    weight_only: bool

    passed_over: Sequence[tuple[str, str]] = ()
    """(kernel, reason) of each kernel that would have been preferred to this one."""

    global_input_scales = False
    """Whether the kernels take the input scales of all experts, not only of this rank's."""

    input_scales_by_expert = False
    """Whether the kernel takes each expert's own input scale. If not, it takes the largest."""

    measured: str | None = None
    """Of which table of measurements it was chosen by, if it was (``NVFP4_MOE_SELECT``)."""

    takes_per_token = False
    """Whether the backend can be asked for activations in NVFP4 with a scale for each token."""

    per_token_activation = False
    """Whether that was asked for. The kernel then uses no input scales of the checkpoint's."""

    @classmethod
    @abstractmethod
    def unsupported(cls, layer: RoutedExperts) -> str | None:
        """Why this backend cannot run ``layer`` here, None if it can.

        Args:
            layer: already set to the contract's gate.
        """

    @classmethod
    def kernel_names(cls) -> Iterable[str]:
        """What ``nvfp4-moe doctor`` calls its kernels, on any machine, in tables that
        ``NVFP4_MOE_SELECT`` reads."""
        return [cls.__name__]

    @classmethod
    def missed(cls, layer: RoutedExperts) -> str | None:
        """The kernel's name, if the user should know that it is ``unsupported``: it is made for
        this device, and nobody asked for another. None if not."""
        return None

    @property
    @abstractmethod
    def kernel(self) -> str:
        """The kernel's name, for messages."""

    @property
    def variant(self) -> str:
        """What the kernel's name leaves open, for ``/metrics``."""
        return f"{self.activation_bits}-bit activations"

    @property
    def quantizes_activations(self) -> bool:
        """Whether the kernel rounds both GEMMs' inputs to NVFP4, by the input scales."""
        return False

    @property
    def activation_bits(self) -> int:
        """Bits of a number in the GEMMs' inputs, as the kernel multiplies it."""
        return 4 if self.quantizes_activations else 16

    @property
    def rounds_weights(self) -> bool:
        """Whether the kernel multiplies by other numbers than those that the checkpoint's tensors
        mean: by weights that it has rounded again."""
        return False

    def every_kernel(self) -> Iterable[tuple[str, AbstractContextManager[None]]]:
        """What it chooses among in each call: a name of each, and within what that one is taken.

        The self-check runs each of them, with few tokens and with many. If only the kernels know
        what they choose by, this is one entry without a name.
        """
        return [("", nullcontext())]

    def prepare_router(self, layer: RoutedExperts) -> None:
        """Change what keeps vLLM's router from routing ``layer`` on this platform, before
        :meth:`prepare` and the self-check."""
        return

    @abstractmethod
    def prepare(self, layer: RoutedExperts) -> None:
        """Convert the layer's weights to what the kernels read.

        Args:
            layer: its weights are checked, and lie as :mod:`vllm_nvfp4_moe.method` describes.
        """
