"""Reading the JSON files of a checkpoint. They may come from anywhere and are not trusted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from quantize.errors import QuantizeError

INDEX = "model.safetensors.index.json"
"""The file that says which tensor is in which file."""

_MAX_DEPTH = 100
"""Most levels of nesting in a JSON file. Python's own functions fail at some hundreds."""


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object from ``file``.

    Raises:
        QuantizeError: if the file is missing, is not JSON, does not hold an object, or is nested
            too deep.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise QuantizeError(f"{file} does not exist") from None
    except (OSError, ValueError, RecursionError) as error:
        raise QuantizeError(f"{file}: cannot be read as JSON ({error})") from error
    if not isinstance(value, dict):
        raise QuantizeError(f"{file}: expected a JSON object, found {type(value).__name__}")
    if _nests_deeper(value, _MAX_DEPTH):
        raise QuantizeError(f"{file}: nested more than {_MAX_DEPTH} levels deep")
    return value


def _nests_deeper(value: Any, depth: int) -> bool:
    level = [value]
    while level and depth:
        depth -= 1
        nested = (v.values() if isinstance(v, dict) else v for v in level)
        level = [v for values in nested for v in values if isinstance(v, dict | list)]
    return bool(level)
