"""A run of ``nvfp4-moe evaluate``: what it prints, what it leaves behind, how it goes on, and how
much memory it takes."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from quantize.checkpoint.reader import Checkpoint
from quantize.evaluate import Result, evaluate
from quantize.evaluate.side import Side
from quantize.evaluate.work import Progress
from tests.quantize import evaluated, families, processes
from tests.quantize.checkpoints import ONE_THREAD, convert
from tests.quantize.test_calibration_forward import rows_of
from tests.quantize.test_cli import refusal
from tests.quantize.test_cli import run as command

module = importlib.import_module("quantize.evaluate.evaluate")  # its function hides it
WORDS = [f"w{number}" for number in range(64)]


def give_tokenizer(folder: Path, words: list[str] = WORDS) -> None:
    """A tokenizer of a word a token."""
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"})
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``src``, ``dst`` and ``text.txt``; not to be changed."""
    folder = tmp_path_factory.mktemp("evaluate")
    model = families.build("qwen3_moe", max_position_embeddings=32)
    families.save(model, "qwen3_moe", families.LAYOUTS[1], folder / "src")
    give_tokenizer(folder / "src")
    convert(folder / "src", folder / "dst")
    numbers = torch.randint(0, 64, (200,), generator=torch.Generator().manual_seed(1)).tolist()
    (folder / "text.txt").write_text(" ".join(WORDS[number] for number in numbers))
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path) -> Path:
    """A copy of ``made``."""
    return Path(shutil.copytree(made, tmp_path / "here"))


def words(folder: Path, *more: object) -> list[object]:
    how = ("--text", folder / "text.txt", "--samples", 3, "--length", 16, "--device", "cpu")
    return ["evaluate", folder / "src", folder / "dst", *how, *more]


def files(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


# -- what it prints --------------------------------------------------------------------------------


def test_what_is_printed(here: Path) -> None:
    before = files(here)
    result = command(*words(here))
    assert result.exit_code == 0, result.output
    data = json.loads(command(*words(here, "--json")).stdout)
    assert files(here) == before
    assert [path.name for path in here.iterdir() if path.name.startswith(".")] == []
    # 200 tokens are 12 whole rows, of which three are taken at equal distances.
    tokens = [WORDS.index(word) for word in (here / "text.txt").read_text().split()]
    rows = torch.tensor([tokens[start : start + 16] for start in (0, 64, 128)])
    model = evaluated.replaced(here / "src", here / "dst", evaluated.silu_gate)
    truth = evaluated.compare(evaluated.model_of(here / "src"), model, rows)
    first, kl, top1, how, *_ = result.stdout.splitlines()
    change = 100 * (truth.after / truth.before - 1)
    assert first == f"perplexity {truth.before:.3f} -> {truth.after:.3f} ({change:+.2f} %)"
    assert kl == f"KL(SRC || DST) {truth.kl:.5f} ± {truth.kl_error:.5f} nats a token"
    assert top1 == f"top-1 agreement {truth.top1:.2%}"
    assert how.startswith("45 tokens in 3 rows of 16; activations bf16; ")
    for layer, (error, median) in enumerate(truth.depth):
        assert any(
            [part.strip() for part in line.split("│")[1:4]]
            == [str(layer), f"{error:.4f}", f"{median:.4f}"]
            for line in result.stdout.splitlines()
        )
    assert data["perplexity"]["source"] == pytest.approx(truth.before, rel=1e-4)
    assert data["perplexity"]["target"] == pytest.approx(truth.after, rel=1e-4)
    assert data["kl"]["mean"] == pytest.approx(truth.kl, rel=1e-3)
    assert data["top1_agreement"] == truth.top1
    assert [each["layer"] for each in data["depth"]] == [0, 1]
    assert (data["tokens"], data["samples"], data["length"]) == (45, 3, 16)
    assert (data["activations"], data["dtype"]) == ("bf16", "float32")
    assert len(data["text_digest"]) == 64
    assert data["machine"]["device"] == "cpu"
    assert {"torch", "transformers", "vllm-nvfp4-moe"} <= set(data["versions"])
    assert data["seconds"] > 0


@pytest.mark.parametrize(
    ("change", "more", "says"),
    [
        (None, ("--length", 64), "takes 32 tokens"),
        (None, ("--text", "nowhere.txt"), "there is no such file"),
        (
            lambda dst: give_tokenizer(dst, WORDS[::-1]),
            (),
            "its tokenizer makes other tokens",
        ),
        (lambda dst: (dst / "model.safetensors").unlink(), (), "dst"),
    ],
    ids=["length", "text", "tokenizer", "no weights"],
)
def test_refusals(
    change: Callable[[Path], None] | None, more: tuple[object, ...], says: str, here: Path
) -> None:
    if change is not None:
        change(here / "dst")
    assert says in refusal(*words(here, *more))


@pytest.mark.parametrize("more", [(), ("--work-dir", "work")])
def test_too_little_disk_is_said_before_anything_is_run(
    more: tuple[str, ...], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(here)
    hidden = json.loads((here / "src" / "config.json").read_text())["hidden_size"]
    before = files(here)
    # Of both models a layer's input and output, of one its experts' input and output; float32.
    nbytes = 3 * 16 * hidden * 6 * 4
    monkeypatch.setattr(module, "free", lambda _: nbytes - 1)
    said = refusal(*words(here, *more))
    assert f"free, and hidden states need {nbytes / 1e3:.1f} kB; give another disk" in said
    assert "Evaluating" not in said and "agrees with" not in said
    assert files(here) == before
    monkeypatch.setattr(module, "free", lambda _: nbytes)
    assert command(*words(here, *more)).exit_code == 0


def test_words_are_not_a_calibration_s(here: Path) -> None:
    few = here / "few.txt"
    for text, length, least in (("", 16, 16), ("w1", 16, 16), ("w1 w2", 32, 32), ("w1", 2, 2)):
        few.write_text(text)
        said = refusal(*words(here, "--text", few, "--length", length))
        count = len(text.split())
        assert f"few.txt: {count} token{'s' * (count != 1)}, and fewer than {least} say" in said
        assert "calibrat" not in said.replace(str(here), "")
    (here / "src" / "tokenizer.json").write_text("{")
    said = refusal(*words(here))
    assert "no tokenizer could be loaded" in said and "evaluation needs one" in said


def test_a_target_without_a_tokenizer_takes_the_source_s(here: Path) -> None:
    for file in (here / "dst").glob("tokenizer*"):
        file.unlink()
    assert command(*words(here)).exit_code == 0


# -- going on --------------------------------------------------------------------------------------


def figures(output: str) -> Any:
    """The JSON without what differs from run to run."""
    data = json.loads(output[output.index("\n{") :])
    for each in data["depth"]:
        del each["seconds"]
    return {key: value for key, value in data.items() if key not in ("seconds", "source", "target")}


def test_a_killed_run_goes_on(here: Path) -> None:
    """At moments from its first change of a file to its last."""
    work = here / "work"
    work.mkdir()
    (work / "mine.txt").write_text("a user's")
    line = words(here, "--work-dir", work, "--json")
    whole = processes.run(here, *line)
    assert whole.code == 0, whole.output
    assert whole.calls > 60
    assert files(work) == {"mine.txt": b"a user's"}
    seen = set()
    for moment in (3, *range(60, whole.calls - 20, whole.calls // 4), whole.calls - 20):
        killed = processes.run(here, *line, at=moment)
        assert killed.code == -9
        (own,) = work.glob("nvfp4_moe-*")
        progress = own / "evaluation.json"
        seen.add(progress.read_text().count('"layer":') if progress.exists() else -1)
        if progress.exists():
            again = processes.run(here, *line)
            assert again.code == 1
            assert "say --resume to go on with it" in " ".join(again.output.split())
        resumed = processes.run(here, *line, "--resume")
        assert resumed.code == 0, resumed.output
        assert figures(resumed.output) == figures(whole.output)
        assert files(work) == {"mine.txt": b"a user's"}
    assert seen == {-1, 1, 2}


def run(folder: Path, work: Path, resume: bool = False) -> Result:
    with Checkpoint(folder / "src") as first, Checkpoint(folder / "dst") as second:
        return evaluate(
            first, second, rows_of(4, 16), dtype=torch.float64, work_dir=work, resume=resume
        )


def test_what_is_done_is_not_done_again(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted after each layer and each row; states that are damaged are made again."""
    whole = run(here, tmp_path / "work").figures
    layers: list[int] = []
    plain_layer, plain_write = Side.layer_forward, Progress.write

    def layer_forward(self: Side, layer: int, *more: Any) -> None:
        layers.append(layer)
        plain_layer(self, layer, *more)

    def write(self: Progress, *args: Any) -> None:
        plain_write(self, *args)
        raise KeyboardInterrupt

    monkeypatch.setattr(Side, "layer_forward", layer_forward)
    monkeypatch.setattr(Progress, "write", write)
    for _ in range(2 + 4):
        with pytest.raises(KeyboardInterrupt):
            run(here, tmp_path / "work", resume=True)
    assert layers == [0, 0, 1, 1]
    (progress,) = (tmp_path / "work").glob("*/evaluation.json")
    assert len(json.loads(progress.read_text())["rows"]) == 4
    monkeypatch.setattr(Progress, "write", plain_write)
    assert run(here, tmp_path / "work", resume=True).figures == whole
    assert layers == [0, 0, 1, 1]
    monkeypatch.setattr(Progress, "write", write)
    with pytest.raises(KeyboardInterrupt):
        run(here, tmp_path / "work")
    (states,) = (tmp_path / "work").glob("*/states/target/states-00001.000")
    states.write_bytes(b"")
    monkeypatch.setattr(Progress, "write", plain_write)
    assert run(here, tmp_path / "work", resume=True).figures == whole
    assert layers[4:] == [0, 0, 0, 0, 1, 1]


def test_another_target_does_not_go_on_with_it(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Progress.write

    def write(self: Progress, *args: Any) -> None:
        plain(self, *args)
        raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "write", write)
    with pytest.raises(KeyboardInterrupt):
        run(here, tmp_path / "work")
    monkeypatch.setattr(Progress, "write", plain)
    convert(here / "src", here / "dst", scales="max", overwrite=True)
    fresh = run(here, tmp_path / "elsewhere").figures
    assert run(here, tmp_path / "work", resume=True).figures == fresh
    assert len(list((tmp_path / "work").iterdir())) == 1  # the interrupted one's


# -- memory ----------------------------------------------------------------------------------------

MEASURE = """
import sys
from pathlib import Path
import torch
from quantize.calibration import forward, routing
from quantize.checkpoint.reader import Checkpoint
from quantize.evaluate import depth, evaluate
from tests.quantize.own_memory import Watch

# Tokens at a time: so few that the shorter text has more.
routing.CHUNK = 256
forward.TOKENS_PER_RUN = depth._TOKENS = 1024

def run(folder, rows):
    rows = torch.randint(0, 4000, (rows, 64), generator=torch.Generator().manual_seed(0))
    with Checkpoint(folder / "src") as first, Checkpoint(folder / "dst") as second:
        evaluate(first, second, rows)

small, deep = map(Path, sys.argv[1:3])
for folder, rows in ((small, 20), (small, 20), (deep, 20), (small, 320)):
    with Watch() as watch:
        run(folder, rows)
    print(watch.peak)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_memory_grows_neither_with_layers_nor_with_tokens(tmp_path: Path) -> None:
    """Eight layers more are 75 MB as floats; 19,200 tokens more have 20 MB of states a layer in
    each model, and 307 MB of logits."""
    for name, layers in (("small", 2), ("deep", 10)):
        model = families.build(
            "qwen3_moe", num_hidden_layers=layers, hidden_size=256, moe_intermediate_size=384,
            vocab_size=4000, num_experts=8, num_local_experts=8, max_position_embeddings=64,
        )  # fmt: skip
        families.save(model, "qwen3_moe", families.LAYOUTS[1], tmp_path / name / "src")
        convert(tmp_path / name / "src", tmp_path / name / "dst")
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path / "small", tmp_path / "deep"],
        check=True, stdout=subprocess.PIPE, text=True, timeout=600,
        # What is freed goes back to the system at once.
        env=ONE_THREAD | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"},
    )  # fmt: skip
    _, base, deep, long = map(int, result.stdout.split())
    assert deep - base < 15e6
    assert long - base < 15e6
    shutil.rmtree(tmp_path)
