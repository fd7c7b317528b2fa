"""What the hub's client says of an error, without what must not be in messages and logs: tokens,
passwords in addresses, and the signatures of those that the hub redirects to."""

from __future__ import annotations

import re

from quantize.errors import first_line

_USER = re.compile(r"(?<=://)[^/\s'\"@]+@")
_QUERY = re.compile(r"(\b\w+://[^\s?'\"]+)\?[^\s'\"]+")
_BEARER = re.compile(r"\b(Bearer |hf_)[^\s'\"]{4,}")


def client_words(error: BaseException, whole: bool = True) -> str:
    """The error's text, in one line.

    Args:
        whole: all of it; else its first line.
    """
    text = " ".join(str(error).split()) if whole else first_line(error)
    for secret in _tokens():
        text = text.replace(secret, "…")
    return _BEARER.sub(r"\1…", _QUERY.sub(r"\1?…", _USER.sub("", text)))


def _tokens() -> list[str]:
    """This user's, if there is one."""
    from huggingface_hub import get_token

    try:
        found = get_token()
    except OSError:
        return []
    return [found] if found else []
