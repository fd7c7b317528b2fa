"""``nvfp4-moe verify``: is a quantized checkpoint what its source makes it, and whole?

:func:`verify` is the whole of it. Rooms: ``claims`` (what the target says of itself), ``compare``
(tensors beside the source's), ``structure`` (the target alone), ``stored``, ``weights`` and
``blocks`` (one quantized weight), ``configs`` and ``files`` (everything else).
"""

from quantize.verify.results import LayerError, Report, Worst
from quantize.verify.verify import verify

__all__ = ["LayerError", "Report", "Worst", "verify"]
