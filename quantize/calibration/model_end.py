"""The end of a model: what comes after the last layer with experts, up to the logits."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from quantize.calibration.layerwise import LayerwiseModel, States
from quantize.calibration.loading import drop_weights
from quantize.errors import QuantizeError


class ModelEnd:
    """The layers after the last one with experts, the final norm and the head.

    Args:
        layerwise: the model; no layer of it is loaded while its end is.
    """

    def __init__(self, layerwise: LayerwiseModel) -> None:
        self._layerwise = layerwise

    def check(self) -> None:
        """See that :meth:`loaded` will find what it needs.

        Raises:
            QuantizeError: if the model's class makes no logits, the checkpoint has no weights for
                them, or a layer has two groups of experts.
        """
        if lacks := self.lacks():
            raise QuantizeError(
                f"{self._layerwise.folder}: {lacks}, and --rounding two-sided needs the model's "
                "logits; take another rounding"
            )
        sites = self._layerwise.sites
        numbers = [site.layer for site in sites]
        for site in sites:
            if numbers.count(site.layer) > 1:
                raise QuantizeError(
                    f"{site.group.prefix}: its layer has another group of experts, and --rounding "
                    "two-sided knows layers with one; take another rounding"
                )

    def lacks(self) -> str | None:
        """Why there are no logits: the model's class makes none, or a weight that they need is not
        in the checkpoint. None if there are."""
        model = self._layerwise.model
        if not self._heads():
            return f"{type(model).__name__} makes no logits"
        tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
        missing = [] if tied else self._missing_parameters()
        return f"{missing[0]} is not there" if missing else None

    @contextmanager
    def loaded(self) -> Iterator[None]:
        """Load the end: within the context it has weights, and :meth:`logits` runs it."""
        layerwise = self._layerwise
        after = layerwise.last + 1
        layerwise.replay_before(after)
        parts = {
            f"{layerwise.layers_path}.{n}.": layerwise.layers[n]
            for n in range(after, len(layerwise.layers))
        }
        parts |= {f"{name}.": module for name, module in self._heads()}
        for path in parts:
            layerwise.loader.load(path)
        if any(
            tensor.is_meta for _, head in self._heads() for tensor in head.state_dict().values()
        ):
            layerwise.model.tie_weights()
        for path, module in parts.items():
            layerwise.loader.check_loaded(module, path)
            module.to(layerwise.device)
        try:
            yield
        finally:
            for module in parts.values():
                drop_weights(module)

    def logits(
        self, tokens: torch.Tensor, states: States, positions: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the model's logits ``[texts, sequence_length, vocabulary]``.

        Args:
            tokens: int64 ``[texts, sequence_length]``.
            states: what the last layer with experts returned for them.
            positions: int64 ``[n]``: only those of these positions, ``[texts, n, vocabulary]``. The
                head then runs for them alone, if the model's class can do so.

        Raises:
            QuantizeError: if they are NaN or infinite.
        """
        layerwise = self._layerwise
        layerwise.set_input(states)
        more = {}
        if positions is not None:
            positions = positions.to(layerwise.device)
            if "logits_to_keep" in inspect.signature(layerwise.model.forward).parameters:
                more["logits_to_keep"] = positions
        found: torch.Tensor = layerwise.call(tokens, lambda output: output.logits, **more)
        # Those of what is impossible, such as a padded vocabulary, may be -inf.
        if not (found < torch.inf).all():
            raise QuantizeError(
                f"{layerwise.folder}: what comes after the model's layers, its norm and head, "
                f"makes NaN or infinite logits of the text in {found.dtype}; the weights are "
                "damaged, or need another precision (--device cpu)"
            )
        if positions is not None and found.shape[1] != len(positions):
            return found[:, positions]
        return found

    def _heads(self) -> list[tuple[str, torch.nn.Module]]:
        """Return the module that makes logits with its name, or nothing if there is none."""
        model = self._layerwise.model
        head = model.get_output_embeddings()
        return [(name, part) for name, part in model.named_modules() if part is head]

    def _missing_parameters(self) -> list[str]:
        """Return the head's parameters that the checkpoint has no tensor for."""
        names = (f"{name}.{own}" for name, head in self._heads() for own in head.state_dict())
        return [name for name in names if not self._layerwise.loader.is_stored(name)]
