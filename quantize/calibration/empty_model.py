"""Transformers' model of a checkpoint, without weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch

from quantize.checkpoint.reader import Checkpoint
from quantize.errors import QuantizeError, first_line
from quantize.experts.model import build, config_of, offline, parameters_on_meta


def empty_model(checkpoint: Checkpoint, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    """Build the checkpoint's model in evaluation mode, its parameters on the meta device.

    Args:
        dtype: of its parameters.

    Raises:
        QuantizeError: if Transformers does not know the model.
    """
    try:
        config = config_of(checkpoint.folder, trust_remote_code)
        for part in (config, config.get_text_config()):
            # A config may ask for what training needs; stand-ins have no routers.
            if getattr(part, "output_router_logits", False):
                part.output_router_logits = False
            if not getattr(part, "return_dict", True):
                part.return_dict = True
    except Exception as error:  # Transformers raises many kinds here
        raise QuantizeError(
            f"{checkpoint.folder / 'config.json'}: calibration runs the model, and Transformers "
            f"does not know it ({first_line(error)}); leave --calibrate out"
        ) from error

    def place() -> ExitStack:
        stack = ExitStack()
        stack.enter_context(parameters_on_meta())
        stack.enter_context(_default_dtype(dtype))
        return stack

    with nullcontext() if trust_remote_code else offline():
        try:  # the faster attention, if the class has it
            model: Any = build(config, trust_remote_code, place, "sdpa")
        except QuantizeError:
            model = build(config, trust_remote_code, place)
    model.eval()
    return model


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
