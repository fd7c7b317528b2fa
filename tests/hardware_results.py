"""The results of ``nvfp4-moe doctor`` that are kept, and what their schema says of one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema

from tests.conftest import ROOT

FOLDER = ROOT / "docs" / "evidence" / "hardware"
SCHEMA: Any = json.loads((FOLDER / "schema.json").read_text(encoding="utf-8"))


def kept() -> list[Path]:
    """All files of results."""
    return sorted(file for file in FOLDER.glob("*.json") if file.name != "schema.json")


def problems_of(result: Any) -> list[str]:
    """Where ``result`` is not what the schema describes."""
    validator = jsonschema.Draft202012Validator(SCHEMA)
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(result)]
