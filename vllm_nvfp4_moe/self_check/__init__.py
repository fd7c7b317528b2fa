"""At load: a few random tokens through the chosen kernel, against a plain float32 computation.

A kernel that applies another gate, or weights that were converted wrongly for it, give text that is
fluent and wrong. Both show in one small batch (:mod:`.sample`). One layer of each kind is checked,
with all kernels that the backend may choose among and with one token, a few and many. That takes
less than two seconds a model; ``NVFP4_MOE_SELF_CHECK=0`` in the environment turns it off.

Half of the tokens are scaled so that the gate's limit is exceeded often, half so that its curve
around zero matters. The output must be within ``BOUNDS`` of the reference, and nearer to it than to
what any other gate would have given. If activations have 4 bits, this cannot tell a number of the
gate that is slightly off: a limit of 8 where 7 is meant, say.
"""

from __future__ import annotations

import logging
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from vllm.utils.torch_utils import set_default_torch_dtype

from quantize.native.jit import KernelError
from vllm_nvfp4_moe import settings
from vllm_nvfp4_moe.errors import RefusedError
from vllm_nvfp4_moe.self_check.alone import run_alone
from vllm_nvfp4_moe.self_check.sample import TOKENS, Sample, make_sample

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    from vllm_nvfp4_moe.interface import ExpertsBackend

logger = logging.getLogger("vllm.nvfp4_moe.self_check")


class Error(NamedTuple):
    """How far one output ``[tokens, hidden]`` is from another.

    Attributes:
        token: the worst token's error: its L2 norm, relative to the L2 norm of the token's output.
        value: the worst single error, relative to the root mean square of its token's output.
        total: L2 norm of all errors.
    """

    token: float
    value: float
    total: float = 0.0


BOUNDS = {16: Error(0.02, 0.15), 8: Error(0.1, 0.6), 4: Error(0.25, 1.5)}
"""The largest errors that are roundings, by the bits of the kernel's activations.

With 16 bits only roundings differ, 0.6 % in bfloat16. The reference does not round activations to 8
bits. It rounds them to 4 bits, but a kernel may do that at another place."""
ROUNDED_WEIGHTS = Error(0.15, 1.0)
"""The same for 8 bits where weights are rounded too: 0.10 and 0.67 were seen, for experts of few
columns."""

_TELLING = 0.2
"""A gate is compared only if its output differs from the contract's by this part of the error, so
that the error can tell the two apart."""
_FEW = 512
"""Values of a gate, of which a kernel with 4-bit activations may round enough another way for the
output to be nearer to another gate's: of one token and 48 columns, it was for 5 of 200 layers. So
little has only a rank with one expert and fewer than 32 columns."""


class SelfCheck:
    """Decides which layers to check, and remembers how long that took.

    Attributes:
        enabled: whether layers are checked at all.
        seconds: that the checks have taken so far.
        worst: the largest relative error of a token so far; None if nothing was checked.
        skipped: why a check could not be made; None if none was skipped.
    """

    def __init__(self) -> None:
        self.enabled = settings.self_check()
        self.seconds = 0.0
        self.worst: float | None = None
        self.skipped: str | None = None
        self._seen: set[object] = set()

    def told(self) -> str:
        """The result of the checks so far, in a few words."""
        if self.skipped is not None:
            return f"self-check impossible ({self.skipped})"
        if self.worst is None:
            return "no self-check"
        return f"self-check passed, relative error {self.worst:.2g}, {self.seconds:.1f} s"

    def before(self, layer: RoutedExperts, method: ExpertsBackend) -> Sample | None:
        """A sample for ``layer``, to be given to :meth:`after` once its weights are converted; None
        if the layer needs no check.

        Args:
            layer: its weights still have the names and shapes that the docstring of
                ``vllm_nvfp4_moe.method`` gives.
            method: the layer's.
        """
        if not self.enabled or not len(layer.w13_weight):
            return None
        kind = (
            method.kernel, method.gate, layer.w13_weight.shape, layer.w2_weight.shape,
            layer.params_dtype, layer.top_k, layer.apply_router_weight_on_input,
            method.weight_only, method.is_monolithic, layer.moe_config.has_bias,
        )  # fmt: skip
        if kind in self._seen:
            return None
        self._seen.add(kind)
        with self._guarded(layer, method):
            return make_sample(layer, method)
        return None

    def after(self, sample: Sample, layer: RoutedExperts, method: ExpertsBackend) -> None:
        """Compare what the kernel makes of the sample with what it should.

        Raises:
            RefusedError: if the kernel does not compute what the checkpoint means.
        """
        with self._guarded(layer, method):
            for name, taking in method.every_kernel():
                with taking:
                    # A single token says too little where activations have 4 bits.
                    for part in sample.batches(TOKENS if method.activation_bits == 4 else 1):
                        outputs = [
                            run_alone(layer, method, call.x, call.weights, call.ids, call.logits)
                            for call in part.calls()
                        ]
                        output = torch.cat(outputs)[:, : part.x.shape[1]]
                        self._judge(output.float(), part, layer, method, name)

    @contextmanager
    def _guarded(self, layer: RoutedExperts, method: ExpertsBackend) -> Iterator[None]:
        """Within, an error is logged and serving goes on: a check that cannot be made is no reason
        not to serve. Only a refusal is passed on, and a kernel that cannot run, or that has broken
        the device for all that follows, is one."""
        begin = time.perf_counter()
        try:
            # vLLM loads under the model's dtype and device as defaults, and runs under PyTorch's.
            with torch.no_grad(), torch.device("cpu"), set_default_torch_dtype(torch.float32):
                yield
        except RefusedError:
            raise
        except Exception as error:
            problem = " ".join(f"{type(error).__name__}: {error}".split())
            if isinstance(error, KernelError) or not _device_works(layer):
                raise RefusedError(
                    f"{layer.layer_name}: self-check: {method.kernel} cannot run here: {problem}. "
                    "Use another --moe-backend, and please report this"
                ) from None
            self.skipped = textwrap.shorten(problem, 300, placeholder=" ...")
            logger.warning(
                "%s: the self-check of %s could not be made: %s",
                layer.layer_name,
                method.kernel,
                self.skipped,
            )
        self.seconds += time.perf_counter() - begin

    def _judge(
        self,
        output: torch.Tensor,
        sample: Sample,
        layer: RoutedExperts,
        method: ExpertsBackend,
        name: str,
    ) -> None:
        bound = ROUNDED_WEIGHTS if method.rounds_weights else BOUNDS[method.activation_bits]
        own = sample.truth[method.gate]
        error = error_of(output, own)
        nearer = {
            gate: nearer_to(output, own, truth)
            for gate, truth in sample.truth.items()
            if float((truth - own).norm()) > _TELLING * error.total
        }
        if method.activation_bits == 4 and sample.values < _FEW:
            nearer = {}
        nearest = max(nearer, key=lambda gate: nearer[gate], default=method.gate)
        # Written so that NaN fails.
        right = error.token <= bound.token and error.value <= bound.value
        other = nearer.get(nearest, 0.0) > 0
        if right and not other:
            self.worst = max(self.worst or 0.0, error.token)
            return
        alone = ", each alone" if sample.apart and len(output) > 1 else ""
        hint = f" It is nearer to what {nearest} would give." if other else ""
        raise RefusedError(
            f"{layer.layer_name}: self-check: {method.kernel} does not compute what the checkpoint "
            f"means{f' ({name})' if name else ''}, of {len(output)} token(s){alone}: "
            f"relative error {error.token:.3g} for a token and {error.value:.3g} for a "
            f"value, at most {bound.token:g} and {bound.value:g} are roundings.{hint} Use another "
            f"--moe-backend, and please report this; {settings.SELF_CHECK}=0 serves it all the same"
        )


def _device_works(layer: RoutedExperts) -> bool:
    """Whether the layer's device still runs anything: after some errors of a kernel, none does."""
    try:
        return bool((torch.ones(2, device=layer.w2_weight.device).sum() == 2).item())
    except RuntimeError:
        return False


def nearer_to(output: torch.Tensor, own: torch.Tensor, other: torch.Tensor) -> float:
    """Above 0 if ``output`` is nearer to ``other`` than to ``own``, all ``[tokens, hidden]``.

    Each token counts alike: with 4-bit activations, one block of a large token that was rounded
    another way can be more than all else, and says nothing about the gate.
    """
    here, there = ((output - truth).square().sum(1) for truth in (own, other))
    return float(((here - there) / (here + there).clamp_min(1e-30)).sum())


def error_of(output: torch.Tensor, truth: torch.Tensor) -> Error:
    """How far ``output`` is from ``truth``, both float32 ``[tokens, hidden]``."""
    difference = output - truth
    norm = truth.norm(dim=1).clamp_min(1e-30)
    token = difference.norm(dim=1) / norm
    value = difference.abs().amax(1) / (norm / truth.shape[1] ** 0.5)
    return Error(float(token.max()), float(value.max()), float(difference.norm()))
