"""Files of a source that are copied, and those that are not the model's."""

import json
import os
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest

from quantize.checkpoint import companions, hub
from quantize.checkpoint.companions import configs, folders_named
from quantize.checkpoint.json_files import read_json
from tests.hub_server import serving, use
from tests.quantize.checkpoints import contents, convert
from tests.quantize.test_cli import refusal, run
from tests.quantize.user_files import Folders, tree

COPIED = {
    "tokenizer.json": "{}",
    "tokenizer_config.json": '{"tokenizer_file": "sp/spm.model"}',
    "tokenizer.model.v3": "x",
    "tekken.json": "{}",
    "vocab.json": "{}",
    "merges.txt": "a b",
    "spiece.model": "x",
    "qwen.tiktoken": "x",
    "special_tokens_map.json": "{}",
    "chat_template.jinja": "{{ messages }}",
    "chat_template.json": "{}",
    "preprocessor_config.json": "{}",
    "video_preprocessor_config.json": "{}",
    "processor_config.json": "{}",
    "LICENSE": "x",
    "LICENSE-MODEL": "x",
    "NOTICE.txt": "x",
    "README.md": "# x",
    "USE_POLICY.md": "# x",
    "modeling_x.py": "x = 1",
    "helpers.py": "x = 2",
    "additional_chat_templates/tool_use.jinja": "{{ tools }}",
    "sp/spm.model": "x",
    "sp/words.txt": "x",
}
NOT_COPIED = {
    ".env": "TOKEN=1",
    "consolidated.safetensors": "x",
    "consolidated.safetensors.index.json": "{}",
    "params.json": "{}",
    "pytorch_model-00001-of-00001.bin": "x",
    "pytorch_model.bin.index.json": "{}",
    "training_args.bin": "x",
    "model-Q4_K_M.gguf": "GGUF",
    "adapter_config.json": "{}",
    "adapter_model.safetensors": "x",
    "backup.tar.gz": "x",
    "id_rsa": "key",
    "server.key": "key",
    "trainer_state.json": "{}",
    "original/params.json": "{}",
    "lora-adapter/adapter_model.safetensors": "x",
    "additional_chat_templates/.env": "x",
    "additional_chat_templates/run.sh": "x",
    "sp/spm.bin": "x",
    "sp/adapter_config.json": "{}",
    "sp/x.index.json": "{}",
    "sp/.netrc": "x",
}


def fill(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def named_in_its_config(folder: Path) -> None:
    """As a model with code of its own."""
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "modeling_x.Config"}
    (folder / "config.json").write_text(json.dumps(config))


def test_what_belongs_to_a_checkpoint_is_copied(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(source, tmp_path / "bare")
    fill(source, COPIED | NOT_COPIED)
    named_in_its_config(source)
    result = run("quantize", source, out)
    assert result.exit_code == 0, result.output
    found = contents(out)
    assert {name: found[name].decode() for name in COPIED} == COPIED
    own = {"config.json", "generation_config.json", "hf_quant_config.json", "model.safetensors"}
    assert set(found) == set(COPIED) | own
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("not copied")]
    assert ".env" in line
    assert "and " in line  # of so many, some names and how many more
    resumed = run("quantize", source, out, "--resume")
    assert resumed.exit_code == 0


def test_modules_of_a_model_without_any(source: Path, tmp_path: Path) -> None:
    """A script that lies there is not the model's."""
    (source / "upload.py").write_text("token = 1")
    result = run("quantize", source, tmp_path / "out")
    assert "not copied from SRC: upload.py" in result.stderr
    assert not (tmp_path / "out" / "upload.py").exists()


def test_a_checkpoint_of_which_all_is_copied_says_nothing(saved: Folders, tmp_path: Path) -> None:
    result = run("quantize", saved("qwen3_moe"), tmp_path / "out")
    assert "not copied" not in result.stderr


TEMPLATE = "additional_chat_templates/a.jinja"


@pytest.mark.parametrize("name", ["NOTICE.txt", "tokenizer.json", TEMPLATE])
def test_a_link_that_leaves_the_source(name: str, source: Path, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "id_rsa").write_text("a private key")
    (source / name).unlink(missing_ok=True)
    (source / name).parent.mkdir(exist_ok=True)
    (source / name).symlink_to(tmp_path / "home" / "id_rsa")
    message = refusal("quantize", source, tmp_path / "out")
    assert f"{source / name} is a link that leads out of the checkpoint" in message
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_a_link(source: Path, tmp_path: Path) -> None:
    """Nothing of it is copied, and that is said."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / Path(TEMPLATE).name).write_text("a private key")
    (source / TEMPLATE).parent.symlink_to(tmp_path / "home")
    result = run("quantize", source, tmp_path / "out")
    assert "not copied from SRC: additional_chat_templates/" in result.stderr
    assert b"a private key" not in tree(tmp_path / "out").values()


def test_a_folder_of_templates_with_one_that_is_a_link(source: Path, tmp_path: Path) -> None:
    """As above."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "a.jinja").write_text("a private key")
    fill(source, {TEMPLATE: "{{ tools }}"})
    ((source / TEMPLATE).parent / "more").symlink_to(tmp_path / "home")
    convert(source, tmp_path / "out")
    assert (tmp_path / "out" / TEMPLATE).exists()
    assert b"a private key" not in tree(tmp_path / "out").values()


@pytest.mark.parametrize("to", ["../../blobs/aa", "../../refs/main", "../other/NOTICE.txt"])
def test_a_link_to_what_only_a_hub_cache_may_share(to: str, source: Path, tmp_path: Path) -> None:
    """A folder of a cache's shape that is none; and in one, what is none of the model's files."""
    where = "folders" if "blobs" in to else "snapshots"
    folder = Path(shutil.copytree(source, tmp_path / "models--org--name" / where / "0123abcd"))
    fill(folder, {to: "a private key"})
    (folder / "NOTICE.txt").symlink_to(to)
    message = refusal("quantize", folder, tmp_path / "out")
    assert f"{folder / 'NOTICE.txt'} is a link that leads out of the checkpoint" in message


@pytest.mark.parametrize("to", ["NOTICE.txt", "gone.txt"])
def test_a_link_that_leads_nowhere(to: str, source: Path, tmp_path: Path) -> None:
    (source / "NOTICE.txt").symlink_to(to)
    message = refusal("quantize", source, tmp_path / "out")
    assert f"{source / 'NOTICE.txt'}: the link leads nowhere; download" in message


def test_a_file_that_is_too_large_for_its_name(source: Path, tmp_path: Path) -> None:
    """What lies there under a tokenizer's name is no tokenizer."""
    with (source / "vocab.json").open("wb") as file:
        file.truncate(2**28 + 1)
    message = refusal("quantize", source, tmp_path / "out")
    assert f"{source / 'vocab.json'} has 268435457 bytes, too many" in message
    os.truncate(source / "vocab.json", 2**20)
    assert run("quantize", source, tmp_path / "out").exit_code == 0


def test_a_folder_of_too_many_files(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None of them is left out without a word."""
    monkeypatch.setattr(companions, "_MAX_FOLDER", 10)
    fill(source, {f"additional_chat_templates/{n}.jinja": "x" for n in range(11)})
    message = refusal("quantize", source, tmp_path / "out")
    assert f"{source / 'additional_chat_templates'} has more than 10 files" in message
    (source / "additional_chat_templates" / "7.jinja").unlink()
    convert(source, tmp_path / "out")
    assert len(list((tmp_path / "out" / "additional_chat_templates").iterdir())) == 10


def test_what_is_neither_file_nor_link(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading it would fail, or wait for ever."""
    monkeypatch.chdir(source)  # the path of a socket may not be long
    with socket.socket(socket.AF_UNIX) as open_:
        open_.bind("tokenizer.model")
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out" / "tokenizer.model").exists()


def test_a_pipe_that_is_called_as_a_config(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody writes into it, so reading it would wait for ever."""
    name = "preprocessor_config.json"
    (source / name).unlink(missing_ok=True)
    os.mkfifo(source / name)

    def read_files(file: Path) -> Any:
        assert file.is_file()
        return read_json(file)

    monkeypatch.setattr(companions, "read_json", read_files)
    assert name not in companions.companions(source)


@pytest.mark.parametrize("named", ["../private/key.json", "/private/key.json", ".ssh/key.json"])
def test_a_config_that_names_what_is_not_the_checkpoints(
    named: str, source: Path, tmp_path: Path
) -> None:
    fill(source, {"tokenizer_config.json": json.dumps({"tokenizer_file": named})})
    fill(source, {"../private/key.json": "a private key", ".ssh/key.json": "a private key"})
    assert folders_named(configs(source)) == ["additional_chat_templates"]
    convert(source, tmp_path / "out")
    assert b"a private key" not in tree(tmp_path / "out").values()


def test_links_within_the_source_and_its_hub_cache(source: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--name" / "snapshots" / "0123abcd"
    shutil.copytree(source, snapshot)
    blobs = snapshot.parent.parent / "blobs"
    blobs.mkdir()
    (blobs / "aa").write_text("{{ tools }}")
    (snapshot / "additional_chat_templates").mkdir()
    (snapshot / "additional_chat_templates" / "a.jinja").symlink_to("../../../blobs/aa")
    (snapshot / "chat_template.jinja").symlink_to("additional_chat_templates/a.jinja")
    convert(snapshot, tmp_path / "out")
    for name in ("additional_chat_templates/a.jinja", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_text() == "{{ tools }}"
        assert not (tmp_path / "out" / name).is_symlink()
    (blobs / "aa").unlink()
    (blobs / "aa").symlink_to(tmp_path / "secret")  # out of the cache again
    (tmp_path / "secret").write_text("a private key")
    assert "leads out of the checkpoint" in refusal("quantize", snapshot, tmp_path / "other")


def test_what_is_downloaded(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What belongs, with folders that configs name, and no byte of anything else."""
    fill(source, COPIED | NOT_COPIED)
    named_in_its_config(source)
    with serving() as server:
        use(server, tmp_path / "cache", monkeypatch)
        commit = server.publish("org/name", source)
        folder = hub.resolve("org/name")
    assert folder.name == commit
    found = {f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()}
    assert found == {*COPIED, "model.safetensors", "config.json", "generation_config.json"}
    assert server.sent.keys() <= found  # what is equal comes once
