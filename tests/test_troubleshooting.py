"""docs/users/troubleshooting.md has an entry for every message of the plugin, and no others."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.messages import HOLE, Message, Source, has_words

PAGE = ROOT / "docs" / "users" / "troubleshooting.md"
QUANTIZER = ROOT / "quantize"
PLUGIN = (ROOT / "vllm_nvfp4_moe", QUANTIZER / "native", QUANTIZER / "nvfp4" / "kernels")
"""The plugin, and what compiles and quantizes for it, too."""
SOURCE = Source(PLUGIN[0], QUANTIZER)

UNREACHABLE = {"never built"}
"""Raised by methods of a class whose constructor raises."""


def entries(*titles: str) -> list[str]:
    """Phrases in the first column of the tables below headings that begin with ``titles``."""
    found = []
    for section in re.split(r"^## ", PAGE.read_text(), flags=re.M)[1:]:
        if section.startswith(titles):
            rows = re.findall(r"^\| (.*?) \|", section, flags=re.M)
            found += [phrase for row in rows for phrase in re.findall(r"`([^`]+)`", row)]
    assert found, titles
    return found


def matches(phrase: str, text: str) -> bool:
    """Whether the parts of ``phrase`` around its holes come in ``text`` in that order."""
    return re.search(".*".join(map(re.escape, phrase.split(HOLE))), text, re.S) is not None


def messages(*folders: Path) -> list[Message]:
    found = [m for f in folders for m in SOURCE.messages(f) if m.text not in UNREACHABLE]
    assert len(found) > 20
    return found


def test_every_message_can_be_read_off_the_source() -> None:
    """One that cannot has no entry to look for: make it a string where it is raised."""
    assert [m.where for m in messages(*PLUGIN) if not has_words(m.text)] == []


def test_every_message_of_the_plugin_has_an_entry() -> None:
    phrases = entries("From the plugin")
    missing = [m for m in messages(*PLUGIN) if not any(matches(p, m.text) for p in phrases)]
    assert missing == []


@pytest.mark.parametrize("phrase", entries("From the plugin"))
def test_every_entry_for_the_plugin_is_a_message_of_it(phrase: str) -> None:
    assert has_words(phrase)
    assert any(matches(phrase, m.text) for m in messages(*PLUGIN))


@pytest.mark.parametrize("phrase", entries("From nvfp4-moe"))
def test_every_entry_for_the_quantizer_is_a_message_of_it(phrase: str) -> None:
    assert any(matches(phrase, m.text) for m in messages(QUANTIZER))


@pytest.mark.parametrize("phrase", entries("From vLLM"))
def test_every_entry_for_vllm_is_a_string_in_it(phrase: str) -> None:
    part = max(phrase.split(HOLE), key=len).strip()
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.origin is not None
    command = ["grep", "-rlF", "--include=*.py", "--", part, str(Path(spec.origin).parent)]
    assert subprocess.run(command, capture_output=True, check=False).stdout


def test_messages_are_read_off_source(tmp_path: Path) -> None:
    (tmp_path / "settings.py").write_text('HOME = "NVFP4_HOME"\n')
    (tmp_path / "a.py").write_text(
        '_TEXT = "wants {x}"\n'
        "def why(n) -> str | None:\n"
        '    return f"because of {n}" if n else None\n'
        "def f(self, name, n):\n"
        '    logger.info("not this")\n'
        '    logger.warning("%s: %d of it", name, n)\n'
        "    if (problem := why(n)):\n"
        '        self.refuse(f"{name}: {problem}")\n'
        '    logger.warning("%s=%s is odd", settings.HOME, n)\n'
        '    logger.error("%s", why(n))\n'
        "    raise ValueError(_TEXT.format(x=n))\n"
    )
    (tmp_path / "b.cpp").write_text(
        'fail("%s: %lld "\n     "lost", name, n); failure("not this");\n'
        "void fail(const char* format, ...);\n"
    )
    found = {m.text for m in Source(tmp_path).messages(tmp_path)}
    assert found == {"…: … of it", "because of …", "NVFP4_HOME=… is odd", "wants …", "…: … lost"}


WITHOUT_PLUGIN = """
import sys
from vllm.engine.arg_utils import EngineArgs
for model in sys.argv[1:]:
    try:
        config = EngineArgs(model=model, quantization="nvfp4_moe").create_model_config()
        print("served as", config.quantization)
    except ValueError as error:
        print("refused:", " ".join(str(error).split())[:200])
"""


def test_what_vllm_makes_of_the_flag_without_the_plugin(
    quantized: dict[str, Path], trained: Path
) -> None:
    """The page warns of the first; only the others have a message."""
    folders = [quantized["modelopt"], quantized["compressed-tensors"], trained]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_PLUGIN, *map(str, folders)],
        env=os.environ | {"VLLM_PLUGINS": ""}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    answers = [line for line in done.stdout.splitlines() if line.startswith(("served", "refused"))]
    modelopt, compressed, plain = answers
    assert modelopt == "served as modelopt_fp4"
    assert "does not match the quantization" in compressed
    assert "Unknown quantization method: nvfp4_moe" in plain
