"""Values of options: what a user writes, parsed."""

from __future__ import annotations

from quantize.errors import QuantizeError


def parse_size(text: str) -> int:
    """Bytes in ``5GB``, ``500 MB``, ``2GiB`` or a plain number.

    Raises:
        QuantizeError: if ``text`` is none of these, or not positive.
    """
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    units |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
    number = text.strip().rstrip("BbIiKkMmGgTt ")
    unit = text.strip()[len(number) :].strip().upper()
    try:
        size = int(float(number) * units[unit])
    except (KeyError, ValueError, OverflowError):
        raise QuantizeError(f"{text!r} is not a size such as 5GB or 500MB") from None
    if size <= 0:
        raise QuantizeError(f"{text!r}: a shard must be larger than nothing")
    return size
