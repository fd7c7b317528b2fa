"""What is refused while experts load, each with its message.

vLLM's own loader copies what it is given. A tensor that never comes leaves uninitialised memory, a
short one fills part of its place, and a zero or NaN scale turns into wrong text. So every tensor is
checked and counted here before vLLM's loader gets it, where layer, expert and tensor are known and
messages can name them.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from vllm.distributed.eplb.eplb_state import EplbState

from quantize.nvfp4.format import BLOCK, E4M3_MIN, bad_scales, round_to_e4m3
from vllm_nvfp4_moe.errors import RefusedError
from vllm_nvfp4_moe.loading.tensors import EXPERT_TENSORS, TensorKind, name_of

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    from quantize.layouts.layout import Layout

logger = logging.getLogger("vllm.nvfp4_moe.checks")

_MATRICES = {"w1": "gate", "w3": "up", "w2": "down"}
_UNGATED = {"w1": "up", "w2": "down"}
"""The matrices of an expert, by vLLM's names for them; without a gate, w1 is up."""
_PLAIN = (torch.bfloat16, torch.float16, torch.float32)
"""Types of weights that are quantized as they load, and of biases."""

_NEEDED = (
    ". The chosen kernel quantizes activations by them; use a --moe-backend that does not, or "
    "leave input scales out: nvfp4-moe quantize THIS NEW --activations bf16"
)
"""What else helps than another checkpoint, if input scales are the problem."""


class ExpertLoads:
    """Checks and counts the tensors of one layer's experts.

    Args:
        layer: the layer, before its weights exist.
        layout: of the checkpoint.
        kinds: the tensors that must come for each matrix.
        global_input_scales: the kernels take the input scales of all experts, so those of other
            ranks' experts must come too.
        on_tensor: is called whenever a tensor has come.
        input_scales: whether the kernel uses them. If not, one that is missing, or is no scale, is
            no reason to refuse the layer.

    Attributes:
        matrices: of an expert: what each is, by vLLM's name for it.

    Raises:
        RefusedError: if the experts cannot be split over the ranks.
    """

    def __init__(
        self,
        layer: RoutedExperts,
        layout: Layout,
        kinds: tuple[TensorKind, ...],
        global_input_scales: bool,
        on_tensor: Callable[[], None],
        input_scales: bool = True,
    ) -> None:
        # Weakly: vLLM keeps weight loaders for reloading, and they must not keep the weights.
        self._layer = weakref.ref(layer)
        self.layout = layout
        self.kinds = kinds
        self.global_input_scales = global_input_scales
        self.seen: set[tuple[TensorKind, str, int]] = set()
        self.waiting: dict[int, tuple[str, torch.Tensor]] = {}
        """By expert, gate or up in plain floats until the other comes, and which of them."""
        self.on_tensor = on_tensor
        self.uses_input_scales = input_scales
        config = layer.moe_config
        # Sizes of the whole model, before tensor parallelism slices and before any padding.
        hidden = config.hidden_dim_unpadded or config.hidden_dim
        inner = config.intermediate_size
        if inner % (BLOCK * config.tp_size):
            self.refuse(
                f"intermediate size {inner} cannot be split over {config.tp_size} ranks in blocks "
                f"of {BLOCK}; use a smaller --tensor-parallel-size or --enable-expert-parallel"
            )
        redundant = config.num_experts - config.num_logical_experts
        self._logical = EplbState.build_initial_global_physical_to_logical_map(
            layer.global_num_experts - redundant, redundant
        )
        self.matrices = _MATRICES if config.is_act_and_mul else _UNGATED
        self._sizes = {"w1": (inner, hidden), "w3": (inner, hidden), "w2": (hidden, inner)}

    @property
    def layer(self) -> RoutedExperts:
        """The layer, which lives as long as anything is loaded into it."""
        layer = self._layer()
        assert layer is not None
        return layer

    @property
    def experts(self) -> int:
        """How many the checkpoint has."""
        return sum(each == logical for each, logical in enumerate(self._logical))

    def copies(self, expert: int) -> list[int]:
        """The experts that begin as the checkpoint's ``expert``: itself, and with EPLB its
        redundant copies. Empty for such a copy, which has come with the expert itself: of stacked
        experts, vLLM loads no copies.
        """
        if expert >= len(self._logical):
            self.refuse(f"the checkpoint has an expert {expert}, the model {len(self._logical)}")
        if self._logical[expert] != expert:
            return []
        return [copy for copy, logical in enumerate(self._logical) if logical == expert]

    def stacked(self, count: int) -> list[int]:
        """The experts that a stack of ``count`` holds: the whole checkpoint's, or those of this
        rank, which some of vLLM's models pick out."""
        all_experts = [each for each, logical in enumerate(self._logical) if each == logical]
        to_local = self.layer._map_global_expert_id_to_local_expert_id
        ours = [each for each in all_experts if to_local(each) >= 0]
        if count not in (len(all_experts), len(ours)):
            self.refuse(f"the checkpoint has {count} experts in one tensor, not {len(all_experts)}")
        return all_experts if count == len(all_experts) else ours

    def refuse(self, problem: str) -> NoReturn:
        """Stop loading, with ``problem`` and the layer's name as the message."""
        raise RefusedError(f"{self.layer.layer_name}: {problem}")

    def name(self, kind: TensorKind, shard: str, expert: int) -> str:
        """What messages call a tensor."""
        return f"expert {expert}, {self.matrices[shard]} ({shard}), {name_of(kind, self.layout)}"

    def check(
        self,
        kind: TensorKind,
        shard: str,
        expert: int,
        tensor: torch.Tensor,
        announced: bool = False,
    ) -> None:
        """Count ``tensor``, or refuse it if it cannot be what its name says. Values are looked at
        only if this rank needs them.

        Args:
            shard: the matrix, "w1", "w2" or "w3".
            expert: global expert number.
            tensor: as stored, of the whole model: not yet sliced for a rank.
            announced: it will come again, to be loaded. It is not counted, and forgets all that
                came before: a reload begins.

        Raises:
            RefusedError: if its dtype or shape is another, or a scale that the kernel uses is not
                positive and finite. One that it does not use counts as missing.
        """
        name = self.name(kind, shard, expert)
        stored = EXPERT_TENSORS[kind]
        if tensor.dtype != stored.dtype:
            self.refuse(f"{name}: dtype {tensor.dtype}, expected {stored.dtype}")
        if stored.per_matrix:
            if tensor.numel() != 1:
                self.refuse(f"{name}: shape {list(tensor.shape)}, expected one number")
        else:
            expected = stored.shape(*self._sizes[shard])
            if tuple(tensor.shape) != expected:
                self.refuse(f"{name}: shape {list(tensor.shape)}, expected {list(expected)}")
        loaded = not announced and self._needs(kind, expert)
        if loaded and kind != TensorKind.CODES and (problem := bad_scales(tensor)):
            if kind != TensorKind.INPUT_SCALE:
                self.refuse(f"{name}: {problem}")
            if self.uses_input_scales:
                self.refuse(f"{name}: {problem}{_NEEDED}")
            self.on_tensor()
            return
        self._count(kind, shard, expert, announced)

    def check_plain(
        self, shard: str, expert: int, tensor: torch.Tensor, announced: bool = False
    ) -> None:
        """As :meth:`check`, for a whole weight in plain floats, which is to be quantized."""
        name = self.name(TensorKind.CODES, shard, expert)
        if tensor.dtype not in _PLAIN:
            self.refuse(
                f"{name}: dtype {tensor.dtype}, but the checkpoint's config does not say that it "
                "is quantized; plain floats are expected"
            )
        expected = self._sizes[shard]
        if tuple(tensor.shape) != expected:
            self.refuse(f"{name}: shape {list(tensor.shape)}, expected {list(expected)}")
        self._count(TensorKind.CODES, shard, expert, announced)

    def check_bias(
        self, shard: str, expert: int, tensor: torch.Tensor, announced: bool = False
    ) -> None:
        """As :meth:`check`, for a matrix's biases ``[out]``; they must be finite floats."""
        name = self.name(TensorKind.BIAS, shard, expert)
        if tensor.dtype not in _PLAIN:
            self.refuse(f"{name}: dtype {tensor.dtype}, floats are expected")
        rows = self._sizes[shard][0]
        if tuple(tensor.shape) != (rows,):
            self.refuse(f"{name}: shape {list(tensor.shape)}, expected {[rows]}")
        loaded = not announced and self._needs(TensorKind.BIAS, expert)
        if loaded and not tensor.isfinite().all():
            self.refuse(f"{name}: some are NaN or infinite; the checkpoint is damaged")
        self._count(TensorKind.BIAS, shard, expert, announced)

    def _count(self, kind: TensorKind, shard: str, expert: int, announced: bool) -> None:
        self.on_tensor()
        if announced:
            self.seen.clear()
            self.waiting.clear()
        else:
            self.seen.add((kind, shard, expert))

    def complete(self) -> list[str]:
        """Refuse the layer if a tensor that this rank needs has not come.

        Returns:
            What messages call the input scales that have not come, or were none, though the
            checkpoint's config speaks of them. The kernel does not use them.

        Raises:
            RefusedError: naming the first three that are missing; or if one came twice, so that a
                gate may have been quantized with another's up.
        """
        seen, waiting = self.seen, self.waiting
        self.seen, self.waiting = set(), {}  # a reload is counted anew
        missing = [
            (kind, self.name(kind, shard, expert))
            for expert in range(self.layer.global_num_experts)
            for shard in self.matrices
            for kind in self.kinds
            if (kind, shard, expert) not in seen and self._needs(kind, expert)
        ]
        input_scales = [name for kind, name in missing if kind == TensorKind.INPUT_SCALE]
        if not self.uses_input_scales:
            missing = [each for each in missing if each[0] != TensorKind.INPUT_SCALE]
        if missing:
            names = [name for _, name in missing]
            more = f" and {len(names) - 3} more tensors" if len(names) > 3 else ""
            needed = _NEEDED if names == input_scales else ""
            self.refuse(f"missing from the checkpoint: {'; '.join(names[:3])}{more}{needed}")
        for expert, (shard, _) in waiting.items():
            self.refuse(
                f"{self.name(TensorKind.CODES, shard, expert)} came twice, and quantized with "
                "which of the other matrix's is not certain; load the whole checkpoint again"
            )
        return input_scales

    def _needs(self, kind: TensorKind, expert: int) -> bool:
        """Whether this rank needs that tensor of the expert with this global number."""
        if kind == TensorKind.INPUT_SCALE and self.global_input_scales:
            return True
        return self.layer._map_global_expert_id_to_local_expert_id(expert) >= 0


def fold_global_scales(layer: Any) -> None:
    """Give each expert's gate and up one global scale, since vLLM's fused layer keeps only one.

    Where they differ, the smaller one is folded into its block scales, which is exact up to E4M3's
    rounding; the side with the larger one stays as it is. One line is logged if any differed.

    Args:
        layer: with ``w13_weight_scale`` e4m3 ``[experts, 2 * n, hidden / 16]`` and
            ``w13_weight_scale_2`` float32 ``[experts, 2]``; both are changed in place. Without a
            gate there is but one scale, and nothing to do.

    Raises:
        RefusedError: if two differ by more than block scales can take.
    """
    scales: torch.Tensor = layer.w13_weight_scale_2.data
    larger = scales.amax(1, keepdim=True)
    differs = (scales != larger).any(1)
    if not differs.any():
        return
    ratio = scales / larger
    blocks: torch.Tensor = layer.w13_weight_scale.data
    half = blocks.shape[1] // 2
    for expert in differs.nonzero().flatten().tolist():
        for side in range(2):
            rows = blocks[expert, side * half : (side + 1) * half]
            folded = rows.float() * ratio[expert, side]
            if folded.amin() < E4M3_MIN:
                raise RefusedError(
                    f"{layer.layer_name}: expert {expert}: the global scales of gate and up differ "
                    f"by a factor of {1 / float(ratio[expert, side]):.3g}, too much for one to be "
                    "folded into E4M3 block scales; quantize again with one scale for both"
                )
            rows.copy_(round_to_e4m3(folded))
    scales.copy_(larger.expand_as(scales))
    logger.warning(
        "%s: gate and up have different global scales in %d of %d experts (smallest ratio %.4g); "
        "the difference was folded into the block scales",
        layer.layer_name,
        int(differs.sum()),
        len(scales),
        float(ratio.min()),
    )
