"""One of the two checkpoints, as a model that is run a layer at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from quantize.calibration.forward import LayerwiseForward, ShareDone
from quantize.calibration.layerwise import LayerwiseModel
from quantize.calibration.model_end import ModelEnd
from quantize.calibration.store import Store, states_name
from quantize.calibration.visitor import NullVisitor
from quantize.checkpoint.reader import Checkpoint
from quantize.checkpoint.sources.refusals import check_config
from quantize.errors import QuantizeError
from quantize.experts.find import find
from quantize.experts.gates import Gate, Gates
from quantize.experts.identify import identify
from quantize.experts.layers import check_layer_count, check_layers_are_there
from quantize.experts.strangers import check_no_strangers
from quantize.run.notes import left_over


class Side:
    """A checkpoint whose weights, in whatever format they are stored, run as floats.

    Args:
        gate: what the user says of its gate; else the model's class tells.
        dtype: to compute in.

    Attributes:
        checkpoint: the checkpoint.
        groups: its routed experts.
        gates: of their gates.
        model: the model. All of its layers are run one at a time, those after the last with
            experts too.
        end: its final norm and head.

    Raises:
        QuantizeError: if it is stored in a format that cannot be read, or the model cannot be run.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype,
        gate: Gate | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self.checkpoint = checkpoint
        where = str(checkpoint.folder / "config.json")
        if not left_over(checkpoint):
            check_config(checkpoint.config, where)
        self.groups = find(checkpoint)
        check_no_strangers(checkpoint, self.groups)
        check_layer_count(checkpoint.config, self.groups, where)
        prefixes = [group.prefix for group in self.groups]
        check_layers_are_there(checkpoint.text_config(), prefixes, checkpoint.tensors, where)
        self.gates = Gates.uniform(gate) if gate else identify(checkpoint.folder, trust_remote_code)
        for group in self.groups:
            group.check_gate(self.gates.of(group.prefix))
        self.model = LayerwiseModel(checkpoint, self.groups, device, dtype, trust_remote_code)
        self.model.last = len(self.model.layers) - 1
        self.end = ModelEnd(self.model)
        if lacks := self.end.lacks():
            raise QuantizeError(f"{checkpoint.folder}: {lacks}, and perplexity needs its logits")

    @property
    def folder(self) -> Path:
        """The checkpoint's folder."""
        return self.checkpoint.folder

    def begin(self, samples: torch.Tensor, store: Store, visitor: NullVisitor) -> None:
        """Say what goes through the model: tokens, int64 ``[num_samples, sequence_length]``.

        Args:
            store: where its states are kept.
            visitor: is shown each expert.
        """
        self.store = store
        self._visitor = visitor
        self._forward = LayerwiseForward(
            self.checkpoint, self.gates, self.model, samples, self.store
        )

    def layer_forward(self, layer: int, progress: ShareDone = lambda *_: None) -> None:
        """Run one layer on all texts, from the states in the store to those after it.

        Args:
            progress: is told of its experts.

        Raises:
            QuantizeError: naming the checkpoint, if its weights make NaN or cannot be run.
        """
        try:
            self._forward.layer_forward(layer, self._visitor, progress)
        except QuantizeError as error:
            if str(self.folder) in str(error):
                raise
            raise QuantizeError(f"{self.folder}: {error}") from error

    def hidden_states(self, layer: int) -> torch.Tensor:
        """A layer's input, ``[texts, sequence_length, ...]``."""
        every = self.store.open_all(states_name(layer))
        return next(part for part in every if part.is_floating_point())

    def remove_states(self, layer: int) -> None:
        """Remove a layer's inputs from the store."""
        self._forward.remove_states(layer)


def share(first: Side, second: Side) -> None:
    """Keep what both have in memory once, where it is the same: embeddings and heads are large."""
    own = dict(first.model.model.named_parameters())
    for path, module in second.model.model.named_modules():
        for name, parameter in module._parameters.items():
            other = own.get(f"{path}.{name}" if path else name)
            if parameter is None or other is None or parameter.is_meta or other.is_meta:
                continue
            if parameter.shape == other.shape and torch.equal(parameter, other):
                module._parameters[name] = other


@contextmanager
def in_own_words() -> Iterator[None]:
    """Within, errors of calibration's passes do not speak of calibration."""
    try:
        yield
    except QuantizeError as error:
        said = re.sub(r"; leave --calibrate out\b", "", str(error))
        said = re.sub(r"; start again with --overwrite", "; start again without --resume", said)
        said = said.replace("calibration", "evaluation")
        if said == str(error):
            raise
        raise QuantizeError(said) from error
