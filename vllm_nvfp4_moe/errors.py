"""The error that stops a model from being served wrong."""

from __future__ import annotations


class RefusedError(ValueError):
    """The checkpoint, or the kernel that was chosen for it, would not have given the model's text.

    vLLM shows the message and stops. It names the layer, and the expert and tensor where one is at
    fault, and says what to do.
    """
