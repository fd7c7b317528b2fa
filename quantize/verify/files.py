"""The target's files: is each there that must be, the source's byte for byte, and none too many?

The names are those that engines and Transformers read, and do not come from the quantizer.
"""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from quantize.checkpoint.companions import configs, folders_named
from quantize.checkpoint.headers import read_metadata
from quantize.checkpoint.json_files import INDEX, read_json
from quantize.checkpoint.reader import Checkpoint
from quantize.errors import QuantizeError
from quantize.layouts import config_files
from quantize.run.report_files import REPORT, REPORT_DATA
from quantize.verify.claims import Claims

READ = (
    *("tokenizer*", "*.model", "*.tiktoken", "tekken.json", "vocab*.json", "vocab.txt"),
    *("merges.txt", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.bpe", "bpe.codes", "normalizer.json"),
    *("chat_template*", "*.jinja", "additional_chat_templates/*.jinja"),
    *("generation_config.json", "*processor_config.json", "LICENSE*", "NOTICE*"),
)
"""Files beside the weights that engines read, and what must go with the weights."""

CARD = "README.md"

_PIECE = 2**20


def file_problems(source: Checkpoint | None, target: Checkpoint, claims: Claims) -> Iterator[str]:
    """What is wrong with the files of ``target``."""
    yield from _index_problems(target)
    if claims.made is not None:
        yield from _metadata_problems(target)
    written = claims.run.files if claims.run else []
    for name in written:
        if not (target.folder / name).is_file():
            yield f"{target.folder / name} is missing, which the run wrote; quantize again"
    if source is None:
        return
    ours, theirs = _names(target.folder), _names(source.folder)
    rewritten = {"config.json", INDEX, REPORT, REPORT_DATA, *config_files()}
    for name in sorted(theirs - rewritten):
        if name not in ours:
            if _is_read(name) and name not in written:
                yield f"{target.folder / name} is missing; copy it from the source"
        elif name == CARD and claims.run and name not in claims.run.digests:
            continue  # a model card of its own, with which it was uploaded
        elif not _same_bytes(target.folder / name, source.folder / name):
            yield f"{target.folder / name} differs from the source's; copy it again"
    for name in sorted(ours - theirs - rewritten):
        if _is_read(name):
            yield (
                f"{target.folder / name} is not in the source, but engines read it; remove it, or "
                "quantize into an empty folder"
            )


def _index_problems(target: Checkpoint) -> Iterator[str]:
    """That the index, or the folder without one, says of each tensor where it is."""
    index = target.folder / INDEX
    if not index.exists():
        names = {file.name for file in target.files}
        if len(names) > 1:
            yield f"{index} is missing, but the tensors are in {len(names)} files; quantize again"
        for file in sorted(target.folder.glob("*.safetensors")):
            if file.name not in names:
                yield (
                    f"{file} is not of this checkpoint, but without an index engines load it; "
                    "move it away"
                )
        return
    content = read_json(index)
    for name, info in target.stored.items():
        if name not in content["weight_map"]:
            yield f"{index} lacks {name}, which is in {info.file.name}; quantize again"
    metadata = content.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    if total is not None and total != target.nbytes:
        yield f"{index}: total_size is {total}, but the tensors have {target.nbytes} bytes"


def _metadata_problems(target: Checkpoint) -> Iterator[str]:
    """That each file says, as this package writes it, that its tensors are PyTorch's."""
    for file in target.files:
        metadata = read_metadata(file)
        if metadata != {"format": "pt"}:
            yield f"{file}: its __metadata__ is {metadata}, not a format of pt; quantize again"


def _names(folder: Path) -> set[str]:
    """Relative paths of the files in ``folder`` and in those that its configs name."""
    found = {file.name for file in folder.iterdir() if file.is_file()}
    for named in map(folder.joinpath, folders_named(configs(folder))):
        if named.is_dir():
            inside = (f for f in named.rglob("*") if f.is_file())
            found |= {file.relative_to(folder).as_posix() for file in inside}
    return {
        name
        for name in found
        if not name.startswith(".") and not name.endswith((".safetensors", ".index.json", ".bin"))
    }


def _is_read(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in READ)


def _same_bytes(left: Path, right: Path) -> bool:
    try:
        if left.stat().st_size != right.stat().st_size:
            return False
        with left.open("rb") as ours, right.open("rb") as theirs:
            while piece := ours.read(_PIECE):
                if piece != theirs.read(_PIECE):
                    return False
        return True
    except OSError as error:
        raise QuantizeError(f"{error.filename}: {error.strerror}") from error
