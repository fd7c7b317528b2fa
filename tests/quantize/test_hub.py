"""Models on the hub: only headers are read for a look, and every file at one commit."""

import errno
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from rich.filesize import decimal
from safetensors.torch import load_file, save_file

from quantize.checkpoint import hub_weights
from quantize.checkpoint.companions import companions
from quantize.checkpoint.hub import look_up, resolve
from quantize.checkpoint.identity import identity_of
from quantize.checkpoint.opened import opened
from quantize.checkpoint.reader import Checkpoint
from quantize.errors import QuantizeError
from quantize.run.fetch import fetch
from quantize.run.finish import written_names
from quantize.run.leftovers import replaced_by_new
from quantize.run.plan import plan
from quantize.run.target import FOLDER
from tests.hub_server import Hub, Stored, serving, use
from tests.quantize.checkpoints import contents, write_index
from tests.quantize.test_cli import refusal, run

Folders = Callable[[str], Path]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(hub_weights.time, "sleep", lambda _: None)
    with serving() as found:
        use(found, tmp_path / "cache", monkeypatch)
        yield found


def in_shards(source: Path, folder: Path, count: int) -> Path:
    """``source`` with its tensors in some files, and an index."""
    folder.mkdir()
    for file in source.iterdir():
        if file.name != "model.safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(source / "model.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for number in range(count):
        name = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        part = names[number * len(names) // count : (number + 1) * len(names) // count]
        save_file({n: tensors[n] for n in part}, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    write_index(folder, weight_map)
    return folder


def enlarged(file: Path, factor: int) -> None:
    """Multiply all tensors' first dimension in the header, and the file with holes."""
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    end = 0
    for name, entry in header.items():
        if name != "__metadata__":
            entry["shape"][-1] *= factor
            entry["data_offsets"] = [n * factor for n in entry["data_offsets"]]
            end = max(end, entry["data_offsets"][1])
    encoded = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little") + encoded)
        stream.truncate(8 + len(encoded) + end)


def test_inspect_reads_headers_alone(hub: Hub, saved: Folders, tmp_path: Path) -> None:
    """Of a model of some hundred gigabytes, by holes, it is sent a few kilobytes a file; what it
    says is what it says of the same folder on disk."""
    folder = in_shards(saved("qwen3_moe"), tmp_path / "model", 3)
    config = json.loads((folder / "config.json").read_text())
    files = sorted(folder.glob("*.safetensors"))
    factor = 2**21
    for key in ("hidden_size", "moe_intermediate_size"):
        assert key in config
    for file in files:
        enlarged(file, factor)
    hub.publish("org/large", tmp_path / "none")
    named = {
        f.name: Stored(f, hashlib.sha256(f.name.encode()).hexdigest())
        if f in files
        else Stored(f.read_bytes())
        for f in folder.iterdir()
    }
    hub.models["org/large"].commit(named)
    total = sum(file.stat().st_size for file in files)
    assert total > 100e9
    with opened(look_up("org/large")) as there, Checkpoint(folder) as here:
        assert there.nbytes == here.nbytes > 100e9
        plain = [[t._replace(file=t.file.name) for t in c.stored.values()] for c in (there, here)]
        assert plain[0] == plain[1]
    headers = {file.name: hub.sent[file.name] for file in files}
    assert all(0 < sent <= 16 * 2**10 for sent in headers.values()), headers
    assert sum(hub.sent.values()) < 200e3
    assert not {"tokenizer.json", "README.md"} & hub.sent.keys()


def test_inspect_says_of_the_hub_what_it_says_of_a_folder(
    hub: Hub, saved: Folders, tmp_path: Path
) -> None:
    folder = in_shards(saved("qwen3_moe"), tmp_path / "model", 3)
    commit = hub.publish("org/moe", folder)
    there = json.loads(run("inspect", "org/moe", "--json").stdout)
    here = json.loads(run("inspect", folder, "--json").stdout)
    assert there.pop("source") != here.pop("source")
    assert there.pop("revision") == f"org/moe@{commit}"
    assert here.pop("revision") is None
    assert there == here
    weights = [name for name in hub.sent if name.endswith(".safetensors")]
    assert len(weights) == 3
    cache = tmp_path / "cache"
    assert not list(cache.rglob("*.safetensors"))


def test_a_commit_that_is_published_meanwhile_changes_nothing(
    hub: Hub, source: Path, tmp_path: Path
) -> None:
    """Once its number is known, main moves on, to other weights and a broken config."""
    first = hub.publish("org/moe", source)
    others = tmp_path / "others"
    others.mkdir()
    (others / "config.json").write_text("{}")
    moved = []

    def move(request: str) -> None:
        if not moved and "/tree/" in request:
            moved.append(hub.publish("org/moe", others))

    hub.before = move
    out = tmp_path / "out"
    result = run("quantize", "org/moe", out)
    assert result.exit_code == 0, result.output
    assert moved
    config = json.loads((out / "config.json").read_text())
    assert config["nvfp4_moe"]["made"]["revision"] == f"org/moe@{first}"
    report = json.loads((out / "nvfp4_moe_report.json").read_text())
    assert report["revision"] == f"org/moe@{first}"
    # verify asks for the commit that DST was made of; and says so if that is another one.
    assert run("verify", "org/moe", out).exit_code == 0
    assert "holds no" in refusal("verify", "org/moe", out, "--revision", "main")
    assert run("verify", "org/moe", out, "--revision", first).exit_code == 0


def test_a_revision(hub: Hub, source: Path, tmp_path: Path) -> None:
    """A branch, a commit, and one that is not there; only what belongs to the model comes."""
    (source / "adapter_model.safetensors").write_bytes(b"not the model")
    (source / "consolidated.safetensors").write_bytes(b"not the model")
    (source / "pytorch_model.bin").write_bytes(b"not the model")
    wanted = hub.publish("org/moe", source, "refs/pr/3")
    (source / "config.json").write_text("{}")
    hub.publish("org/moe", source)
    for revision in ("refs/pr/3", wanted):
        folder = resolve("org/moe", revision)
        assert folder.name == wanted
    (source / "config.json").unlink()
    assert {f.name for f in folder.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    # The hub takes no part of a commit's number, as `git` does.
    for unknown in ("v9", wanted[:7]):
        said = refusal("inspect", "org/moe", "--revision", unknown)
        assert "org/moe" in said
        assert "pass one that it has with --revision: a branch, a tag, or a commit's 40" in said
    said = refusal("inspect", source, "--revision", "main")
    assert "is a folder here" in said
    assert refusal("verify", source, "--revision", "main", code=2)


def test_going_on_needs_the_same_commit(
    hub: Hub, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another commit with the same model is another source: config.json says which it was."""
    first = hub.publish("org/moe", source)
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("quantize.execute.finish", _stopped)
        assert "stopped" in refusal("quantize", "org/moe", out)
    (source / ".gitattributes").write_text("")
    second = hub.publish("org/moe", source)
    said = refusal("quantize", "org/moe", out, "--resume")
    assert f"revision org/moe@{first} to org/moe@{second}" in said
    assert "--revision" in said
    result = run("quantize", "org/moe", out, "--resume", "--revision", first)
    assert result.exit_code == 0, result.output


def _stopped(*_: object) -> None:
    raise KeyError("stopped")


REVISIONS = ("main", "v1.0", "a/branch", "refs/pr/3", "commit")


@pytest.mark.parametrize("stream", [[], ["--stream"]], ids=["whole", "stream"])
@pytest.mark.parametrize("revision", REVISIONS)
def test_a_revision_becomes_a_commit(
    revision: str, stream: list[str], hub: Hub, source: Path, tmp_path: Path
) -> None:
    """In whatever is written down, whatever it was called, and whatever that becomes later."""
    commits = {}
    for name in REVISIONS[:-1]:
        (source / "README.md").write_text(name)
        commits[name] = hub.publish("org/moe", source, name)
    commit = commits.get(revision, commits["v1.0"])
    asked = revision if revision != "commit" else commit
    (source / "README.md").write_text("later")
    out = tmp_path / "out"
    words = ("quantize", "org/moe", out, "--revision", asked)
    assert run(*words, *stream).exit_code == 0
    hub.publish("org/moe", source, revision)  # it moves on
    expected = f"org/moe@{commit}"
    assert (
        json.loads((out / "config.json").read_text())["nvfp4_moe"]["made"]["revision"] == expected
    )
    assert json.loads((out / "nvfp4_moe_report.json").read_text())["revision"] == expected
    assert run("verify", "org/moe", out).exit_code == 0
    if revision != "commit":
        said = refusal(*words, *stream, "--resume")
        moved = hub.models["org/moe"].branches[revision]
        assert f"holds a checkpoint that was made of {expected}, and SRC is org/moe@{moved}" in said
        assert "--revision" in said
    again = ("quantize", "org/moe", out, "--revision", commit, *stream, "--resume")
    assert run(*again).exit_code == 0


@pytest.mark.parametrize("left", ["interrupted", "finished", "streamed"])
@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["run", "dry"])
def test_another_source_is_seen_before_it_is_downloaded(
    left: str,
    dry: list[str],
    hub: Hub,
    saved: Folders,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its hundreds of gigabytes. Where many files differ, the commit is named first."""
    folder = in_shards(saved("qwen3_moe"), tmp_path / "model", 2)
    first = hub.publish("org/moe", folder)
    out = tmp_path / "out"
    words = ("quantize", "org/moe", out)
    with monkeypatch.context() as patch:
        if left != "finished":
            patch.setattr("quantize.execute.finish", _stopped)
        code = run(*words, *["--stream"] * (left == "streamed")).exit_code
        assert code == int(left != "finished")
    if left != "streamed":
        shutil.rmtree(tmp_path / "model")
        second = hub.publish("org/moe", in_shards(saved("qwen3_moe"), tmp_path / "model", 4))
    shutil.rmtree(tmp_path / "cache")
    said = refusal(*words, "--resume", *dry)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    if left == "streamed":
        assert "was started with --stream; go on so" in said
    else:
        assert first in said and second in said and "--revision" in said
    # The same source is no other one, before it is downloaded once more and after.
    before = contents(out)
    again = (*words, "--resume", "--revision", first)
    if left == "interrupted":
        assert run(*again, "--dry-run").exit_code == 0
    result = run(*again, *["--stream"] * (left == "streamed"))
    assert result.exit_code == 0, result.output
    assert left != "finished" or contents(out) == before


def test_what_is_in_the_cache_comes_without_a_bar(
    hub: Hub, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client's own, in logs of many lines: of files that are there, it counts them."""
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
    hub.publish("org/moe", source)
    assert run("quantize", "org/moe", tmp_path / "out").exit_code == 0
    result = run("verify", "org/moe", tmp_path / "out")
    assert result.exit_code == 0
    assert "Fetching" not in result.output


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (403, "GatedRepo", "accept its terms on its page there"),
        (401, "GatedRepo", "accept its terms on its page there"),
        (401, "RepoNotFound", "check the name"),
        (404, "RepoNotFound", "check the name"),
        (418, "", "418"),
        (401, "", "correct HF_TOKEN"),
        (403, "", "correct HF_TOKEN"),
        (429, "", "try again later"),
        (500, "", "try again later"),
        (503, "", "try again later"),
    ],
)
def test_a_model_that_cannot_be_read(
    status: int, code: str, expected: str, hub: Hub, source: Path
) -> None:
    hub.publish("org/moe", source)
    hub.refused["org/moe"] = status, code
    said = refusal("inspect", "org/moe")
    assert "org/moe is not a folder here, and reading it from the hub failed" in said
    assert expected in said


PAGE = "text/html", b"<html><title>Log in to the proxy</title></html>"


@pytest.mark.parametrize(
    "answer",
    [PAGE, ("application/json", b'{"error": "sorry"}'), ("application/json", b"[1]")],
    ids=["a page", "an object", "a list"],
)
@pytest.mark.parametrize("asked", ["GET /api/models/org/moe", "GET /api/models/org/moe/tree/.*"])
def test_what_answers_is_no_hub(
    asked: str, answer: tuple[str, bytes], hub: Hub, source: Path
) -> None:
    """A proxy that wants to be logged in to, say, with status 200."""
    hub.publish("org/moe", source)
    hub.instead[asked] = answer
    said = refusal("inspect", "org/moe")
    assert "org/moe is not a folder here, and reading it from the hub failed" in said
    assert said.endswith("; what answered is not the hub, but a proxy or a login page: look at "
                         "HF_ENDPOINT")  # fmt: skip


@pytest.mark.parametrize("asked", ["HEAD /org/moe/resolve/.*", "GET /org/moe/resolve/.*safetens.*"])
def test_a_page_in_place_of_a_file(asked: str, hub: Hub, source: Path) -> None:
    hub.publish("org/moe", source)
    hub.instead[asked] = PAGE
    said = refusal("inspect", "org/moe")
    assert "config.json is missing the 'X-Repo-Commit' header" in said or (
        "model.safetensors: the hub lists" in said
    )


@pytest.mark.parametrize("token", ["hf_abcdefghijkl", "another-secret", "hf_s\xe9cret"])
@pytest.mark.parametrize("what", ["inspect", "push"])
def test_secrets_are_in_no_message(
    what: str, token: str, hub: Hub, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens, passwords in addresses, signatures: whatever the client says of them."""
    hub.publish("org/moe", source)
    monkeypatch.setenv("HF_TOKEN", token)
    log = tmp_path / "log"
    signed = "https://me:password@cdn.hub/file?X-Amz-Signature=abc123&Expires=1"

    def fails(*_: object, **__: object) -> None:
        raise ConnectionError(f"no answer from '{signed}' to Authorization: Bearer {token}")

    if what == "inspect":
        monkeypatch.setattr("huggingface_hub.snapshot_download", fails)
        said = refusal("inspect", "org/moe")
    else:
        monkeypatch.setattr("huggingface_hub.HfApi.repo_exists", fails)
        words = ("quantize", source, tmp_path / "out", "--push-to", "me/moe", "--log-file", log)
        said = refusal(*words) + log.read_text()
    assert not [s for s in (token, "password", "abc123", "Expires") if s in said], said
    if token.isascii() or what == "push":
        assert "no answer from 'https://cdn.hub/file?…'" in said
    else:
        assert "the token that HF_TOKEN or `hf auth login` gave is none" in said


def test_weights_that_are_gated_though_the_list_is_not(hub: Hub, source: Path) -> None:
    """As the hub does it: anyone may see which files there are."""
    hub.publish("org/moe", source)
    for name in ("config.json", "model.safetensors"):
        hub.refused[name] = 403, "GatedRepo"
        assert "accept its terms" in refusal("inspect", "org/moe")
        del hub.refused[name]


def test_connections_that_break(hub: Hub, source: Path) -> None:
    """Within headers: they are read again, up to five times."""
    hub.publish("org/moe", source)
    expected = run("inspect", source, "--json").stdout
    hub.cut["model.safetensors"] = [0, 3, 8, 500]
    result = run("inspect", "org/moe", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    same = {"source": "", "revision": ""}
    assert found | same == json.loads(expected) | same
    assert not hub.cut["model.safetensors"]
    hub.cut["model.safetensors"] = [5] * 5
    assert "reading it from the hub failed" in refusal("inspect", "org/moe")


def test_a_server_that_always_says_later(hub: Hub, source: Path) -> None:
    """The client asks six times, half a minute; that is not multiplied by our own tries."""
    hub.publish("org/moe", source)
    hub.refused["model.safetensors"] = 429, ""
    assert "429" in refusal("inspect", "org/moe")
    assert 1 < len([r for r in hub.requests if "model.safetensors" in r and "GET" in r]) <= 6


def test_a_model_without_a_config(hub: Hub, source: Path, tmp_path: Path) -> None:
    """As those in GGUF are: it is no file of the cache's that is missing."""
    (source / "config.json").unlink()
    hub.publish("org/moe", source)
    for words in (("inspect", "org/moe"), ("quantize", "org/moe", tmp_path / "out", "--stream")):
        said = refusal(*words)
        assert "org/moe on the hub has no config.json at main" in said and "cache" not in said
    assert not hub.sent


@pytest.mark.parametrize("lacks", ["a file of the index", "safetensors"])
def test_weights_that_the_hub_lacks(lacks: str, hub: Hub, source: Path, tmp_path: Path) -> None:
    """To download it again is of no use, nor is the cache's folder."""
    folder = in_shards(source, tmp_path / "model", 3)
    if lacks == "safetensors":
        for file in folder.glob("*.safetensors*"):
            file.unlink()
        (folder / "pytorch_model.bin").write_bytes(b"pickle")
    else:
        (folder / "model-00002-of-00003.safetensors").unlink()
    hub.publish("org/moe", folder)
    for words in (("inspect",), ("quantize", tmp_path / "out"), ("verify", tmp_path)):
        said = refusal(words[0], "org/moe", *words[1:])
        assert said.startswith("error: org/moe on the hub, at main, ")
        assert "cache" not in said and "download" not in said
        expected = {"safetensors": "holds no *.safetensors files"}
        assert expected.get(lacks, "names model-00002-of-00003.safetensors, which the hub") in said


NO_WRITING = "; set HF_HUB_CACHE to a folder that you can write to"
FULL = "; the hub's cache is {cache}: free some space there, or set HF_HUB_CACHE"


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (OSError(errno.EROFS, "Read-only file system", "{cache}/models--org--moe"), NO_WRITING),
        (PermissionError(errno.EACCES, "Permission denied", "{cache}"), NO_WRITING),
        (FileExistsError(errno.EEXIST, "File exists", "{cache}"), NO_WRITING),
        (OSError(errno.ENOSPC, "No space left on device"), FULL),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "{cache}/models--org--moe/blobs/1"), FULL),
        (RuntimeError("Task error: IO Error: No space left on device (os error 28)"), FULL),
        (RuntimeError("Task error: IO Error: Permission denied (os error 13)"), NO_WRITING),
        # What has nothing to do with the cache.
        (PermissionError(errno.EACCES, "Permission denied", "/home/me/huggingface/token"), ""),
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), ""),
        (RuntimeError("Task error: the service is away (os error 111)"), ""),
    ],
    ids=str,
)
def test_a_cache_that_cannot_be_written(
    error: Exception, advice: str, hub: Hub, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client's error has, at most, a path; what to do depends on what went wrong."""
    cache = constants.HF_HUB_CACHE
    if isinstance(error, OSError) and error.filename:
        error.filename = error.filename.format(cache=cache)

    def fails(*_: object, **__: object) -> None:
        raise error

    hub.publish("org/moe", source)
    monkeypatch.setattr("huggingface_hub.snapshot_download", fails)
    said = refusal("inspect", "org/moe")
    assert said.endswith(f"{' '.join(str(error).split())}{advice.format(cache=cache)}")


def test_a_size_that_is_not_the_listed_one(hub: Hub, source: Path) -> None:
    hub.publish("org/moe", source)
    size = (source / "model.safetensors").stat().st_size
    hub.sizes["model.safetensors"] = size + 1
    said = refusal("inspect", "org/moe")
    assert (
        f"org/moe/model.safetensors: the hub lists {size + 1} bytes, but the file has {size}"
        in (said)
    )


def test_a_header_that_is_none(hub: Hub, source: Path) -> None:
    whole = (source / "model.safetensors").read_bytes()
    for content in (b"", b"{}", b"\xff" * 8 + whole[8:], whole[:-1]):
        (source / "model.safetensors").write_bytes(content)
        hub.publish("org/moe", source)
        said = refusal("inspect", "org/moe")
        assert "model.safetensors" in said
        assert "not a complete safetensors file" in said


def test_a_header_that_is_long(hub: Hub, tmp_path: Path) -> None:
    """It is read in two ranges; so is that of a server without ranges."""
    folder = tmp_path / "model"
    folder.mkdir()
    tensors = {f"a.rather.long.name.of.a.tensor.{n}": torch.ones(2) for n in range(1000)}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    hub.publish("org/long", folder)
    with opened(look_up("org/long")) as there, Checkpoint(folder) as here:
        assert there.stored.keys() == here.stored.keys()
    requests = [line for line in hub.requests if line.startswith("GET /org/long/resolve")]
    assert len([line for line in requests if "model.safetensors" in line]) == 2


def test_without_the_hub_the_cache_is_enough(hub: Hub, source: Path, tmp_path: Path) -> None:
    """And identities are equal, whether a model's weights are there or only its headers."""
    (source / "pytorch_model.bin").write_bytes(b"not of the model")
    commit = hub.publish("org/moe", source)
    with opened(look_up("org/moe"), whole=True) as headers:
        known = {file.name: headers.weights.digest(file) for file in headers.files}
        assert not headers.weights.here
    folder = resolve("org/moe")
    with opened(look_up("org/moe"), whole=True) as cached:
        assert cached.weights.here
        assert cached.folder == folder
        identity = identity_of(cached)
        assert identity.files == known
        assert identity.revision == f"org/moe@{commit}"
    hub.publish("org/part", source)
    assert run("inspect", "org/part").exit_code == 0
    hub.refused |= {"org/moe": (500, ""), "org/part": (500, "")}
    assert resolve("org/moe") == folder
    assert run("inspect", "org/moe").exit_code == 0
    for name in ("org/other", "org/part"):
        assert "reading it from the hub failed" in refusal("inspect", name)


def test_all_that_belongs_comes(hub: Hub, source: Path, tmp_path: Path) -> None:
    """Quantizing from the hub gives what quantizing the folder gives."""
    (source / "README.md").write_text("of the source")
    (source / "notes.zip").write_bytes(b"not of the model")
    hub.publish("org/moe", source)
    for name, what in (("one", "org/moe"), ("two", source)):
        assert run("quantize", what, tmp_path / name).exit_code == 0
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert one.keys() == two.keys()
    same = {name for name in one if one[name] == two[name]}
    assert one.keys() - same == {"config.json"}
    assert "notes.zip" not in hub.sent


def test_nothing_is_downloaded_for_nothing(hub: Hub, source: Path, tmp_path: Path) -> None:
    """What can refuse a run is asked first: here a pattern, an option, and a model without a gate
    that is known."""
    hub.publish("org/moe", source)
    out = tmp_path / "out"
    assert refusal("quantize", "org/moe", out, "--exclude", "*")
    assert refusal("quantize", "org/moe", out, "--scales", "max", "--include", "no.such.module")
    config = json.loads((source / "config.json").read_text())
    config |= {"model_type": "brand_new", "architectures": ["BrandNew"]}
    (source / "config.json").write_text(json.dumps(config))
    hub.publish("org/moe", source)
    assert "--gate" in refusal("quantize", "org/moe", out)
    assert not any("HEAD" in line and "safetensors" in line for line in hub.requests)
    assert not out.exists()


@pytest.mark.filterwarnings("ignore:Not enough free disk space")  # the client's own word
def test_disks_have_room_for_all_of_it(
    hub: Hub, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Downloads, output, copies and hidden states on one disk are added up, before the first of
    them; what an old checkpoint frees is counted, and what is in the cache is not downloaded."""
    (source / "LICENSE").write_text("x" * 1000)
    hub.publish("org/moe", source)
    size = (source / "model.safetensors").stat().st_size
    room: list[int] = []
    real = shutil.disk_usage

    def usage(path: object) -> object:
        found = real(path)  # type: ignore[call-overload]
        return found._replace(free=room[0]) if room else found

    monkeypatch.setattr(shutil, "disk_usage", usage)
    out = tmp_path / "out"
    with opened(look_up("org/moe"), whole=True) as checkpoint:
        steps = plan(checkpoint)
        copied = sum(map(len, map(Path.read_bytes, map(source.joinpath, companions(source)))))
        needed = size + steps.nbytes + copied
        for states in (0, 12345):
            room[:] = [needed + states - 1]
            with pytest.raises(QuantizeError, match="are still to be written") as caught:
                fetch(checkpoint, steps, out, states, None, False)
            assert ("--work-dir" in str(caught.value)) == bool(states)
            assert ("--stream" in str(caught.value)) == (not states)
            assert "HF_HUB_CACHE" in str(caught.value)
            # However small it is: sizes that look alike would say nothing.
            assert f"{decimal(needed + states)} are still" in str(caught.value)
            assert "free, 1 byte too little" in str(caught.value)
        room[:] = [needed - 1]
        assert "are still to be written" in refusal("quantize", "org/moe", out)
        assert not any("HEAD" in line and "safetensors" in line for line in hub.requests)
        assert not out.exists()
        room[:] = [needed]
        fetch(checkpoint, steps, out, 0, None, False)
    assert hub.sent["model.safetensors"] >= size
    room[:] = [steps.nbytes + copied]
    result = run("quantize", "org/moe", out)
    assert result.exit_code == 0, result.output
    # verify downloads, too.
    shutil.rmtree(tmp_path / "cache")
    room[:] = [size - 1]
    said = refusal("verify", "org/moe", out)
    assert f"{decimal(size)} are still to be downloaded" in said and "1 byte too little" in said
    # Again over it: the old checkpoint goes, though not before the download is here.
    room[:] = [size]
    with opened(look_up("org/moe"), whole=True) as checkpoint:
        with pytest.raises(QuantizeError, match="are still to be written"):
            fetch(checkpoint, steps, tmp_path / "other", 0, None, False)
        freed = replaced_by_new(out, out / FOLDER, written_names(steps, companions(source)))
        enough = max(size, needed - freed.nbytes(out))
        assert enough < needed
        room[:] = [enough - 1]
        with pytest.raises(QuantizeError, match="are still to be"):
            fetch(checkpoint, steps, out, 0, None, True)
        room[:] = [enough]
        fetch(checkpoint, steps, out, 0, None, True)


@pytest.mark.parametrize("more", [[], ["--stream"]])
def test_a_dry_run_downloads_nothing(
    more: list[str], hub: Hub, source: Path, tmp_path: Path
) -> None:
    """It says what would be; and what refuses the run refuses it."""
    hub.publish("org/moe", source)
    result = run("quantize", "org/moe", tmp_path / "out", "--dry-run", *more)
    assert result.exit_code == 0, result.output
    size = (source / "model.safetensors").stat().st_size
    assert f"{size / 1000:.1f} kB to be downloaded" in result.stdout or more
    assert "Time: of downloading" in result.stdout
    assert not any("HEAD" in line and "safetensors" in line for line in hub.requests)
    assert not (tmp_path / "out").exists()
    out = ("quantize", "org/moe", tmp_path / "out", "--push-to", "me/moe", "--dry-run")
    assert run(*out).exit_code == 0
    assert "me/moe" not in hub.models


@pytest.mark.parametrize("more", [[], ["--bits", "5"], ["--weight-only", "1"]], ids=str)
def test_a_dry_run_of_a_calibration_downloads_nothing(
    more: list[str], hub: Hub, trained: Path, tmp_path: Path
) -> None:
    """Memory and disk are arithmetic on headers; time would take weights."""
    (tmp_path / "a.txt").write_text("".join(f"x{n} = {n}\n" for n in range(999)))
    hub.publish("org/moe", trained)
    size = ("--calibration-rows", "4", "--calibration-length", "64")
    command = ("quantize", "org/moe", tmp_path / "out", "--input-scales", tmp_path / "a.txt", *size)
    result = run(*command, *more, "--dry-run")
    assert result.exit_code == 0, result.output
    assert "Calibration: about" in result.stderr and "of memory" in result.stderr
    assert "are known once" in result.stderr or "is known once" in result.stderr or not more
    assert "Time: of downloading" in result.stdout
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
