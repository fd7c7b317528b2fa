"""A model on a hub, to be quantized and pushed there; and what is there then."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from quantize.push import upload
from tests.hub_server import Hub, serving, use

NAME = "me/moe-NVFP4"
OPTIONS = ("--max-shard-size", "20KB")
CARD = """---
license: other
license_name: of-its-own
license_link: LICENSE
language: [en, de]
pipeline_tag: text-generation
tags:
- conversational
- moe
library_name: transformers
base_model: org/pretrained
model-index:
- name: moe
  results: []
---

# Moe

A model | of the test.
"""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(upload.time, "sleep", lambda _: None)
    monkeypatch.setattr(upload, "_BATCH_FILES", 3)
    with serving() as found:
        use(found, tmp_path / "cache", monkeypatch, found.token)
        yield found


@pytest.fixture
def model(hub: Hub, source: Path) -> str:
    (source / "README.md").write_text(CARD)
    (source / "LICENSE").write_text("a license")
    return hub.publish("org/moe", source)


def of_hub(hub: Hub) -> dict[str, bytes]:
    return {path: file.read(0, file.size) for path, file in hub.models[NAME].files.items()}


def front_and_text(card: bytes) -> tuple[dict[str, object], str]:
    _, front, text = card.decode().split("---\n", 2)
    return yaml.safe_load(front), text
