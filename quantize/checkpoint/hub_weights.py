"""Weights that are on the hub: their headers are read by ranges of bytes, and nothing else.

A safetensors file begins with its header, so a few kilobytes of each file say everything about the
tensors of a model of any size.
"""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from quantize.checkpoint.headers import header_length, header_of
from quantize.checkpoint.hub import HubModel, asking
from quantize.checkpoint.tensors import TensorInfo
from quantize.checkpoint.weights import Weights, header_digest
from quantize.errors import QuantizeError

_FIRST = 16 * 2**10
"""Bytes that are read of each file at first: most headers of large models fit."""

_THREADS = 8
_TRIES = 5
"""How often a range is asked for, if the connection breaks. Where a server answers that it cannot
now, the client has asked again by itself, for half a minute or as long as the server says."""

_XET = re.compile(r"CAS Client Error(?!.*HTTP status client error \((?!408|429))", re.S)
"""What hf_xet 1.8.0 says of its server and the way there, once it has tried again by itself for
minutes; but for what that server refuses."""


class HubWeights(Weights):
    """Some files of a model on the hub, of which only headers can be read.

    Args:
        names: of the files.

    Raises:
        QuantizeError: if a header cannot be read.
    """

    here = False

    def __init__(self, model: HubModel, names: Sequence[str]) -> None:
        self.model = model
        self._names = list(names)
        with asking(model.name), ThreadPoolExecutor(_THREADS, "header") as pool:
            self._beginnings = dict(zip(names, pool.map(self._beginning, names), strict=True))

    @property
    def names(self) -> Collection[str]:
        return self._names

    def header(self, file: Path) -> list[TensorInfo]:
        return header_of(file, self._beginnings[file.name], self.model.files[file.name].size)

    def open(self, file: Path) -> int:
        raise QuantizeError(f"{file} is still on the hub, and nothing of it was downloaded")

    def is_here(self, file: Path) -> bool:
        return False

    def times(self, files: Iterable[Path]) -> dict[str, int]:
        return {}  # a commit's files never change

    def digest(self, file: Path) -> str:
        known = self.model.files[file.name]
        return header_digest(self._beginnings[file.name], known.size, known.digest)

    def _beginning(self, name: str) -> bytes:
        """A file's bytes up to the end of its header."""
        size = self.model.files[name].size
        found = read_range(self.model, name, 0, min(_FIRST, size)) if size else b""
        length = header_length(Path(f"{self.model.name}/{name}"), found, size)
        if length > len(found):
            found += read_range(self.model, name, len(found), length)
        return found[:length]


def read_range(model: HubModel, name: str, begin: int, end: int) -> bytes:
    """The bytes from ``begin`` up to ``end`` of a file on the hub.

    Raises:
        QuantizeError: if the file has another size than the hub's list says.
        Exception: as the hub's client raises them, if it cannot be read.
    """
    from huggingface_hub.errors import HfHubHTTPError

    for attempt in range(_TRIES):
        try:
            return _read_range(model, name, begin, end)
        except Exception as error:
            answered = isinstance(error, HfHubHTTPError)
            if attempt == _TRIES - 1 or answered or not is_passing(error):
                raise
            time.sleep(0.5 * 2**attempt)
    raise AssertionError("not reached")


def _read_range(model: HubModel, name: str, begin: int, end: int) -> bytes:
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        build_hf_headers,
        hf_raise_for_status,
        http_stream_backoff,
    )

    headers = build_hf_headers() | {
        "range": f"bytes={begin}-{end - 1}",
        "accept-encoding": "identity",  # a range of compressed bytes would be of no use
    }
    url = hf_hub_url(model.name, name, revision=model.commit)
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    found = b""
    # Broken connections are tried again by read_range alone; what a server answers with 429 or 5xx
    # by the client first.
    with http_stream_backoff(
        "GET", url, headers=headers, timeout=timeout, retry_on_exceptions=()
    ) as response:
        hf_raise_for_status(response)
        ranged = response.status_code == 206
        total = response.headers.get("content-range", "").rpartition("/")[2]
        total = total if ranged else response.headers.get("content-length", "")
        if total.isdecimal() and int(total) != model.files[name].size:
            raise QuantizeError(
                f"{model.name}/{name}: the hub lists {model.files[name].size} bytes, but the file "
                f"has {total}; try again later"
            )
        skipped = 0 if ranged else begin  # a server may know no ranges, and send everything
        for chunk in response.iter_bytes():
            found += chunk
            if len(found) >= skipped + end - begin:
                break  # and never the weights
    found = found[skipped : skipped + end - begin]
    if len(found) < end - begin:
        raise ConnectionError(f"{model.name}/{name} ended after {begin + len(found)} bytes")
    return found


def is_passing(error: BaseException) -> bool:
    """Whether an error of the hub's client may be gone in a moment: a connection, or a server."""
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code if error.response is not None else 0
        return status in (408, 429) or status >= 500
    if isinstance(error, OSError) and error.errno is None:
        return True  # so the client says that it was sent too little, or too much
    if isinstance(error, RuntimeError) and _XET.search(str(error)):
        return True
    of_connection = type(error).__module__.partition(".")[0].startswith(("httpx", "httpcore"))
    return of_connection or isinstance(error, ConnectionError | TimeoutError)
