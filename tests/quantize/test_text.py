"""Texts to calibrate with: every form that they come in, the tokenizer's own tokens, even mixing.

The references are the tokenizer and its chat template themselves, ``datasets`` and PyArrow as
writers, and mixing in plain loops.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer

from quantize.calibration import documents, sources
from quantize.calibration.mixing import Mixture, Rows, Text, spread
from quantize.calibration.samples import load_samples
from quantize.errors import QuantizeError

TEXTS = [f"def f{n}(x):\n    return x + {n}\n" * 20 for n in range(12)]


@pytest.fixture(scope="module")
def tokenizer_with(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``tokenizer_with(form)``: a folder with the trained model's tokenizer, which puts special
    tokens around a text as ``form`` says (``<s> $A </s>``)."""

    def tokenizer_with(form: str, template: str | None = None) -> Path:
        folder: Path = tmp_path_factory.mktemp("tokenizer")
        tokenizer = AutoTokenizer.from_pretrained(trained)
        backend: Tokenizer = tokenizer.backend_tokenizer
        backend.add_special_tokens(["<s>", "</s>"])
        special = [(name, backend.token_to_id(name)) for name in ("<s>", "</s>")]
        backend.post_processor = processors.TemplateProcessing(form, None, special)
        backend.save(str(folder / "tokenizer.json"))
        config = json.loads((trained / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        if template:
            (folder / "chat_template.jinja").write_text(template)
        return folder

    return tokenizer_with


def all_tokens(source: Path, tokenizer: Path, count: int) -> list[int]:
    """So many tokens of one source, as one row."""
    (row,) = load_samples(source, tokenizer, 1, count).tolist()
    return row


# -- the tokenizer's own tokens --------------------------------------------------------------------


@pytest.mark.parametrize("form", ["$A", "<s> $A", "$A </s>", "<s> $A </s>"])
def test_special_tokens_are_where_the_tokenizer_puts_them(
    form: str, tokenizer_with: Any, tmp_path: Path
) -> None:
    folder = tokenizer_with(form)
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, TEXTS)))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    want = list(chain.from_iterable(tokenizer(text)["input_ids"] for text in TEXTS))
    ends = [tokenizer.convert_tokens_to_ids(name) for name in ("<s>", "</s>")]
    assert [want.count(end) for end in ends] == [12 * (end in form) for end in ("<s>", "</s>")]
    assert all_tokens(tmp_path / "a.jsonl", folder, len(want)) == want


def test_a_long_text_is_one_text(
    tokenizer_with: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is read in pieces, and has special tokens at its ends alone."""
    folder = tokenizer_with("<s> $A </s>")
    monkeypatch.setattr(documents, "_PIECE", 100)
    text = "".join(TEXTS)
    (tmp_path / "a.txt").write_text(text)
    assert len(list(documents.documents(tmp_path / "a.txt"))) > 10
    want = AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    assert all_tokens(tmp_path / "a.txt", folder, len(want)) == want


def test_messages_go_through_the_models_own_template(tokenizer_with: Any, tmp_path: Path) -> None:
    template = (
        "<s>{% for tool in tools or [] %}[{{ tool.name }}]{% endfor %}"
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}</s>"
    )
    folder = tokenizer_with("<s> $A </s>", template)
    rows = [
        {"prompt": "not this", "messages": [{"role": "user", "content": f"what is {n} + {n}?"},
                                            {"role": "assistant", "content": str(2 * n)}]}
        for n in range(8)
    ]  # fmt: skip
    rows[3]["tools"] = [{"name": "add"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    want: list[int] = []
    for row in rows:
        made = tokenizer.apply_chat_template(row["messages"], tools=row.get("tools"))
        want += made["input_ids"] if isinstance(made, dict) or hasattr(made, "input_ids") else made
    start = tokenizer.convert_tokens_to_ids("<s>")
    assert want.count(start) == len(rows)  # and no second one from the tokenizer
    assert all_tokens(tmp_path / "a.jsonl", folder, len(want)) == want


# -- every form ------------------------------------------------------------------------------------


def write_json(folder: Path) -> Path:
    (folder / "a.json").write_text(json.dumps([TEXTS[0], *({"text": t} for t in TEXTS[1:])]))
    return folder / "a.json"


def write_json_data(folder: Path) -> Path:
    value = {"version": 1, "data": [{"id": 1, "content": t} for t in TEXTS]}
    (folder / "a.json").write_text(json.dumps(value, indent=1))
    return folder / "a.json"


def write_lines(name: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        data = "\n\n".join(json.dumps({"text": t}) for t in ["", *TEXTS, " \n"]).encode()
        (folder / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return folder / name

    return write


def write_parquet(folder: Path) -> Path:
    table = pyarrow.table({"id": [*range(12)], "text": TEXTS})
    pyarrow.parquet.write_table(table, folder / "a.parquet", row_group_size=5)
    return folder / "a.parquet"


def write_saved(folder: Path) -> Path:
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(folder / "saved")
    return folder / "saved"


FORMS = {
    "json": write_json,
    "json, data": write_json_data,
    "lines called json": write_lines("a.json"),
    "lines": write_lines("a.jsonl"),
    "zipped lines": write_lines("a.jsonl.gz"),
    "parquet": write_parquet,
    "saved": write_saved,
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_tokens(form: str, trained: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(trained)
    want = list(chain.from_iterable(tokenizer(text)["input_ids"] for text in TEXTS))
    source = FORMS[form](tmp_path)
    sources.check_there(str(source))
    assert all_tokens(source, trained, len(want)) == want
    assert all_tokens(tmp_path, trained, len(want)) == want  # the folder that it is in


def test_a_saved_data_set_with_splits(trained: Path, tmp_path: Path) -> None:
    parts = {"train": TEXTS[:6], "test": TEXTS[6:]}
    made = {name: datasets.Dataset.from_dict({"text": t}) for name, t in parts.items()}
    datasets.DatasetDict(made).save_to_disk(tmp_path / "saved")
    tokenizer = AutoTokenizer.from_pretrained(trained)
    split = tokenizer.decode(load_samples(tmp_path / "saved", trained, 2, 200)[0])
    assert split in tokenizer.decode(tokenizer("".join(parts["test"]))["input_ids"])


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A hub with one data set, ``org/name``, as ``datasets`` loads it from a folder; and what it
    was asked for."""
    folder = tmp_path / "hub"
    for config, split, texts in (
        ("code", "train", TEXTS[:3]), ("code", "test", TEXTS[3:6]),
        ("chat", "valid", TEXTS[6:9]), ("chat", "test", TEXTS[9:]),
    ):  # fmt: skip
        (folder / config).mkdir(parents=True, exist_ok=True)
        lines = "\n".join(json.dumps({"text": text}) for text in texts)
        (folder / config / f"{split}.jsonl").write_text(lines)
    files = "".join(
        f"- config_name: {config}\n  data_files:\n"
        + "".join(f"  - split: {s}\n    path: {config}/{s}.jsonl\n" for s in splits)
        for config, splits in (("code", ["train", "test"]), ("chat", ["valid", "test"]))
    )
    (folder / "README.md").write_text(f"---\nconfigs:\n{files}---\n")
    asked: list[tuple[Any, ...]] = []
    load = datasets.load_dataset

    def load_dataset(name: str, *args: Any, **kwargs: Any) -> Any:
        asked.append((name, *args, kwargs))
        return load(str(folder), *args, **kwargs, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    return asked


@pytest.mark.parametrize(
    ("source", "texts"),
    [
        ("org/name/code", TEXTS[:3]),
        ("org/name:test/code", TEXTS[3:6]),
        ("org/name/chat", TEXTS[6:9]),  # there is no train
        ("org/name:test/chat", TEXTS[9:]),
    ],
)
@pytest.mark.parametrize("offline", [False, True])
def test_a_data_set_on_the_hub(
    source: str, texts: list[str], offline: bool, hub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", offline)
    sources.check_there(source)
    tree: Any = sources.open_source(source)
    assert [piece.text for piece in tree] == texts
    assert hub == [("org/name", source.rpartition("/")[2], {"streaming": not offline})]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("org/name", "org/name: cannot be loaded as a data set .*chat.*ORG/NAME"),
        ("org/name:all/code", "has no split all, only train, test"),
        ("org/name/wiki", "cannot be loaded as a data set .*wiki"),
        ("org/name.jsonl", "org/name.jsonl: there is no such file or folder"),
        ("name:train", "name:train: there is no such file or folder"),
        ("../org/name/x", "there is no such file or folder"),
    ],
)
@pytest.mark.usefixtures("hub")
def test_a_data_set_that_is_not_there(source: str, message: str) -> None:
    with pytest.raises(QuantizeError, match=message):
        list(sources.open_source(source))


def test_without_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path)
    saved = write_saved(tmp_path)
    monkeypatch.chdir(tmp_path)
    for name in ("datasets", "pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for read in (
        lambda: sources.check_there("org/name"),
        lambda: list(documents.documents(tmp_path / "a.parquet")),
        lambda: list(documents.documents(saved)),
    ):
        with pytest.raises(QuantizeError, match=r"pip install 'vllm-nvfp4-moe\[datasets\]'"):
            read()


# -- what is none ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("few.txt", "x = 1\n", r"few.txt: \d+ tokens, and fewer than 32 say nothing; give"),
        ("empty.txt", " \n", "empty.txt: 0 tokens"),
        ("empty.json", "[]", "empty.json: 0 tokens"),
        ("broken.jsonl", '"x"\n{', "broken.jsonl, line 2: cannot be read as JSON"),
        ("broken.jsonl", '"x"\n\n"\udcff"', "broken.jsonl, line 3: cannot be read as JSON"),
        ("deep.jsonl", "[" * 200000, "deep.jsonl, line 1: cannot be read as JSON"),
        ("fields.jsonl", '{"id": 1, "body": "x"}',
         "fields.jsonl, line 1: has none of the fields text, .* only id, body; call the one with"),
        ("fields.jsonl", '{"text": null}', "fields.jsonl, line 1: has none of the fields text"),
        ("fields.jsonl", "1", "fields.jsonl, line 1: has none of the fields text"),
        ("broken.json", '["x",\n"y"', "broken.json, line 2: cannot be read as JSON"),
        ("broken.json", '"x"\n{', "broken.json, line 2: cannot be read as JSON"),
        ("value.json", "1", "value.json: is neither a list"),
        ("data.json", '{"data": 1}', "data.json: is neither a list"),
        ("entry.json", '["x", {"id": 1}]', "entry.json, entry 2: has none of the fields"),
        ("binary.txt", "\udcff", "binary.txt: cannot be read as text"),
        ("plain.jsonl.gz", '"x"', "plain.jsonl.gz, line 1: cannot be read as JSON: Not a gzipped"),
        ("plain.txt.gz", "x", "plain.txt.gz: cannot be read as text: Not a gzipped"),
        ("bad.parquet", "x", "bad.parquet: cannot be read as a data set"),
        ("chat.jsonl", '{"messages": [{"role": "user", "content": "x"}]}',
         "chat.jsonl, line 1: has messages, and the model's tokenizer has no chat template; copy"),
    ],
)  # fmt: skip
def test_text_that_is_none(
    trained: Path, tmp_path: Path, name: str, content: str, message: str
) -> None:
    file = tmp_path / name
    file.write_text(content, errors="surrogateescape")
    for part in ("tokenizer.json", "tokenizer_config.json"):  # and no chat template
        shutil.copyfile(trained / part, tmp_path / part)
    with pytest.raises(QuantizeError, match=message):
        load_samples(file, tmp_path, 4, 64)


def test_a_zipped_file_that_is_cut_off(trained: Path, tmp_path: Path) -> None:
    lines = "\n".join(json.dumps(f"{n} {n * n % 977}") for n in range(10000))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode())[:-5000])
    with pytest.raises(QuantizeError, match=r"a.jsonl.gz, line \d+: cannot be read as JSON: .*end"):
        load_samples(tmp_path, trained, 1000, 64)


def test_a_template_that_fails(tokenizer_with: Any, tmp_path: Path) -> None:
    folder = tokenizer_with("$A", "{{ raise_exception('roles must alternate') }}")
    (tmp_path / "a.jsonl").write_text('"x"\n{"messages": [{"role": "user", "content": "x"}]}')
    with pytest.raises(QuantizeError, match=r"line 2: its messages do not fit .*must alternate"):
        load_samples(tmp_path, folder, 4, 64)


def test_a_missing_text_and_an_empty_folder(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(QuantizeError, match=r"nowhere.txt: there is no such file"):
        load_samples(tmp_path / "nowhere.txt", trained, 1, 16)
    (tmp_path / ".git" / "logs").mkdir(parents=True)
    (tmp_path / ".git" / "logs" / "hidden.txt").write_text("x = 1\n" * 1000)
    (tmp_path / "weights.bin").write_bytes(b"\0" * 100)
    with pytest.raises(QuantizeError, match=r"holds no \.txt.* files and no data set"):
        load_samples(tmp_path, trained, 1, 16)


def test_too_little_text_is_used_and_said(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXTS[0])
    tokens = AutoTokenizer.from_pretrained(trained)(TEXTS[0])["input_ids"]
    said: list[str] = []
    found = load_samples(tmp_path / "a.txt", trained, 1000, 64, say=said.append)
    whole = len(tokens) // 64
    assert whole > 1
    assert sorted(found.tolist()) == sorted(tokens[64 * n :][:64] for n in range(whole))
    assert len(said) == 1
    assert f"too little text. {whole} rows of 64 tokens are used instead of 1000 of 64" in said[0]
    short = load_samples(tmp_path / "a.txt", trained, 4, 100_000, say=said.append)
    assert short.tolist() == [tokens]
    assert f"1 row of {len(tokens)} tokens are used" in said[1]
    assert load_samples(tmp_path / "a.txt", trained, whole, 64, say=said.append).shape[0] == whole
    assert len(said) == 2


def test_columns_are_named_if_none_is_the_text(trained: Path, tmp_path: Path) -> None:
    table = pyarrow.table({"body": ["x = 1"], "number": [1]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(QuantizeError, match=r"a.parquet, row 0: .*, only body, number; call the"):
        load_samples(tmp_path / "a.parquet", trained, 1, 64)


# -- mixing ----------------------------------------------------------------------------------------

KINDS = {"code": "x = f(y)\n", "maths": "1 + 2 = 3\n", "wiki": "A town in Peru.\n"}


def kinds_of(rows: torch.Tensor, tokenizer: Any) -> list[str]:
    """Which text each row is from; all of a row is from one."""
    found = []
    for row in rows.tolist():
        text = tokenizer.decode(row)
        inside = [kind for kind, line in KINDS.items() if text.strip("\n") in line * 500]
        assert len(inside) == 1, text
        found += inside
    return found


@pytest.mark.parametrize("how", ["files", "folders", "options"])
def test_a_folder_of_code_maths_and_wiki(how: str, trained: Path, tmp_path: Path) -> None:
    texts: list[Path] = []
    for kind, line in KINDS.items():
        (tmp_path / kind).mkdir()
        for number in range({"code": 5, "maths": 1, "wiki": 2}[kind] if how == "folders" else 1):
            file = tmp_path / kind / f"{number}.txt" if how != "files" else tmp_path / f"{kind}.txt"
            file.write_text(line * 3000)
            texts.append(file)
    given = texts if how == "options" else tmp_path
    rows = load_samples(given, trained, 16, 32)
    assert torch.equal(rows, load_samples(given, trained, 16, 32))
    counts = Counter(kinds_of(rows, AutoTokenizer.from_pretrained(trained)))
    assert sorted(counts.values()) == [5, 5, 6]


def test_of_many_files_some_of_all_are_read(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(300):
        (tmp_path / f"{number:03}.txt").write_text(TEXTS[number % 12])
    opened: list[int] = []
    real = documents._opened
    monkeypatch.setattr(documents, "_opened", lambda f: opened.append(int(f.stem)) or real(f))
    load_samples(tmp_path, trained, 8, 64)
    assert len(opened) == 8
    there = sorted([*opened, 300])
    assert max(b - a for a, b in pairwise(there)) <= 2 * 300 / 8


def test_a_large_file_gives_rows_of_all_that_is_read(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        "\n".join(json.dumps(f"{n:04} = {n:04}") for n in range(9999))
    )
    tokenizer = AutoTokenizer.from_pretrained(trained)
    rows = load_samples(tmp_path / "a.jsonl", trained, 8, 32)
    numbers = sorted(int(tokenizer.decode(row).split(" = ")[1][:4]) for row in rows)
    steps = [b - a for a, b in pairwise(numbers)]
    assert min(steps) > 5 and numbers[-1] > 8 * min(steps)


Sizes: TypeAlias = "int | list[Sizes]"

LENGTH = 4


def build(sizes: Sizes, ahead: int, made: list[list[int]]) -> Rows:
    """Texts of so many tokens; no two tokens are the same. ``made`` gets them."""
    if isinstance(sizes, list):
        return Mixture([build(part, ahead, made) for part in sizes], LENGTH)
    tokens = [1000 * len(made) + n for n in range(sizes)]
    made.append(tokens)
    pieces = [tokens[n : n + 3] for n in range(0, sizes, 3)]
    return Text(pieces, LENGTH, ahead)


def rows_of(mixed: Rows, count: int) -> list[list[int]]:
    rows: list[list[int]] = []
    while len(rows) < count and len(row := mixed.row()) == LENGTH:
        rows.append(row)
    return rows


def whole(sizes: Sizes) -> int:
    return sum(map(whole, sizes)) if isinstance(sizes, list) else sizes // LENGTH


def shares(sizes: Sizes, count: int) -> list[int]:
    """How many rows each text gives: one after another gives one, as long as it has any."""
    if not isinstance(sizes, list):
        return [min(count, whole(sizes))]
    each = [0] * len(sizes)
    count = min(count, whole(sizes))
    while sum(each) < count:
        for n, part in enumerate(sizes):
            if each[n] < whole(part) and sum(each) < count:
                each[n] += 1
    return list(chain.from_iterable(shares(p, n) for p, n in zip(sizes, each, strict=True)))


def trees(sizes: st.SearchStrategy[int]) -> st.SearchStrategy[Any]:
    return st.recursive(sizes, lambda inner: st.lists(inner, max_size=5), max_leaves=12)


WHOLE_ROWS = st.integers(0, 12).map(lambda n: n * LENGTH)


@settings(deadline=None, max_examples=300)
@given(st.lists(trees(WHOLE_ROWS), max_size=4), st.integers(0, 60), st.integers(1, 9))
def test_each_text_gives_as_many_rows_as_any_other(
    sizes: list[Sizes], count: int, ahead: int
) -> None:
    made: list[list[int]] = []
    rows = rows_of(build(sizes, ahead, made), count)
    given_by = Counter(row[0] // 1000 for row in rows)
    assert [given_by[n] for n in range(len(made))] == shares(sizes, count)
    assert all(row == list(range(row[0], row[0] + LENGTH)) and row[0] % LENGTH == 0 for row in rows)
    assert len({row[0] for row in rows}) == len(rows)


@settings(deadline=None, max_examples=300)
@given(st.lists(trees(st.integers(0, 30)), max_size=4), st.integers(1, 9))
def test_no_token_is_lost_or_taken_twice(sizes: list[Sizes], ahead: int) -> None:
    made: list[list[int]] = []
    mixed = build(sizes, ahead, made)
    rows = rows_of(mixed, 10**6)
    there = sorted(chain.from_iterable(made))
    taken = sorted(chain.from_iterable(rows))
    assert len(rows) == len(there) // LENGTH
    assert len(set(taken)) == len(taken) and set(taken) <= set(there)
    # A row is a piece of one text, or consists of the ends of several.
    ends = set(chain.from_iterable(text[len(text) // LENGTH * LENGTH :] for text in made))
    for row in rows:
        piece = row == list(range(row[0], row[0] + LENGTH)) and row[0] % 1000 % LENGTH == 0
        assert piece or set(row) <= ends


@given(st.integers(0, 300))
def test_any_beginning_of_what_is_spread_is_from_all(count: int) -> None:
    order = spread(range(count))
    assert sorted(order) == list(range(count))
    for some in range(1, count + 1):
        gaps = sorted([-1, *order[:some], count])
        assert max(b - a for a, b in pairwise(gaps)) <= 4 * count / some + 1
