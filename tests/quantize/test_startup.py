"""The command starts at once: what it imports, and what it reads, before and while it works.

Asserted by counting, not by a clock: which modules a process has loaded when it ends, and how often
it opened a file. Each case is a process of its own.
"""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from safetensors.torch import load_file

from quantize import inspection
from quantize.checkpoint.reader import Checkpoint
from quantize.run import jobs
from quantize.run.plan import plan
from tests.quantize.checkpoints import save

Folders = Callable[[str], Path]

LARGE = {
    *("torch", "transformers", "compressed_tensors", "numba", "ray"),
    *("numpy", "safetensors", "huggingface_hub", "triton"),
}

WORKING = ("quantize", "inspect", "verify", "evaluate")
"""Those that compute with PyTorch."""

COMMANDS = ("quantize", "inspect", "verify", "evaluate", "doctor")

# What the console script and ``python -m quantize`` do, and then a note of what happened.
PROBE = """
import atexit, collections, json, runpy, sys
note, how, *words = sys.argv[1:]
opened = collections.Counter()
def hook(event, args):
    if event == "open" and isinstance(args[0], str) and args[0].endswith(".safetensors"):
        opened[args[0]] += 1
sys.addaudithook(hook)
@atexit.register
def write():
    with open(note, "w") as file:
        json.dump({"modules": sorted(sys.modules), "opened": opened}, file)
if how == "script":
    sys.argv = ["nvfp4-moe", *words]
    from quantize.cli import main
    main()
elif how == "-m":
    sys.argv = ["", *words]
    runpy.run_module("quantize", run_name="__main__", alter_sys=True)
else:
    exec(how)
"""


class Ended(NamedTuple):
    """How a process ended; ``loaded``: names of modules; ``opened``: how often, by file name."""

    code: int
    stdout: str
    stderr: str
    loaded: set[str]
    opened: Counter[str]

    @property
    def large(self) -> set[str]:
        """The large libraries that it loaded."""
        return {name.partition(".")[0] for name in self.loaded} & LARGE


def process(note: Path, *words: object, how: str = "script", **env: str) -> Ended:
    """The command with these words, in a process of its own."""
    result = subprocess.run(
        [sys.executable, "-c", PROBE, note, how, *map(str, words)],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1", **env},
    )
    said: dict[str, Any] = json.loads(note.read_text())
    opened = Counter({Path(name).name: count for name, count in said["opened"].items()})
    return Ended(result.returncode, result.stdout, result.stderr, set(said["modules"]), opened)


# -- before a command runs -------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["script", "-m"])
@pytest.mark.parametrize("words", [[], *([command] for command in COMMANDS)], ids=str)
def test_help_loads_nothing_large(words: list[str], how: str, tmp_path: Path) -> None:
    ended = process(tmp_path / "note", *words, "--help", how=how)
    assert (ended.code, ended.stderr) == (0, "")
    assert all(name in ended.stdout for name in words or COMMANDS)
    assert ended.large == set()


def test_version_loads_nothing_large(tmp_path: Path) -> None:
    ended = process(tmp_path / "note", "--version")
    assert (ended.code, ended.stderr) == (0, "")
    assert ended.stdout == f"nvfp4-moe {version('vllm-nvfp4-moe')}\n"
    assert ended.large == set()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "Usage"),
        (["measure"], "No such command"),
        (["inspect"], "Missing argument 'SRC'"),
        (["inspect", "src", "--jason"], "No such option"),
        (["quantize", "src"], "Missing argument 'DST'"),
        (["quantize", "src", "dst", "--layout", "gguf"], "modelopt"),
        (["quantize", "src", "dst", "--scales", "best"], "four-six"),
        (["quantize", "src", "dst", "--threads", "0"], "--threads"),
        (["quantize", "src", "dst", "--overwrite", "--resume"], "exclude each other"),
        (["quantize", "src", "dst", "--rounding", "gptq"], "needs --calibrate"),
        (["quantize", "src", "dst", "--max-shard-size", "big"], "is not a size"),
        (["quantize", "src", "dst", "--max-shard-size", "0"], "larger than nothing"),
        (["quantize", "src", "dst", "--device", "tpu"], "neither cpu, nor cuda"),
        (["quantize", "src", "dst", "--device", "cpu", "--ray", "auto"], "--ray"),
        (["quantize", "src", "dst", "--gate", "swish9"], "unknown gate form 'swish9'"),
        (["evaluate", "src", "dst"], "--text"),
        (["evaluate", "src", "dst", "--text", "t", "--resume"], "--resume needs --work-dir"),
        (["evaluate", "src", "dst", "--text", "t", "--activations", "int4"], "nvfp4"),
        (["evaluate", "src", "dst", "--text", "t", "--device", "tpu"], "neither cpu, nor cuda"),
        (["evaluate", "src", "dst", "--text", "t", "--samples", "0"], "--samples"),
        (["verify", "src", "dst", "--gate", "{"], "neither a form's name nor its JSON"),
        (["inspect", "src", "--gate", '{"form": "silu", "gamma": 2}'], "gamma"),
        (["inspect", "src", "--gate", '{"form": "silu", "alpha": "big"}'], "must be a number"),
    ],
    ids=lambda value: " ".join(value)[-40:] if isinstance(value, list) else "",
)
def test_wrong_usage_loads_nothing_large(words: list[str], says: str, tmp_path: Path) -> None:
    ended = process(tmp_path / "note", *words)
    assert ended.code == 2
    assert says in ended.stdout + ended.stderr
    assert ended.large == set()


@pytest.mark.parametrize(
    ("line", "offers"),
    [
        ("nvfp4-moe ", set(COMMANDS)),
        ("nvfp4-moe quantize --layout ", {"modelopt", "compressed-tensors"}),
        ("nvfp4-moe quantize --scales m", {"max", "mse"}),
        ("nvfp4-moe quantize --rounding ", {"gptq", "descent", "two-sided"}),
        ("nvfp4-moe inspect --base ", {"keep", "fp8", "mxfp8"}),
        ("nvfp4-moe evaluate --activations ", {"nvfp4", "fp8", "bf16"}),
        ("nvfp4-moe verify --js", {"--json"}),
        ("nvfp4-moe quantize --dr", {"--dry-run"}),
    ],
)
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_loads_nothing_large(
    shell: str, line: str, offers: set[str], tmp_path: Path
) -> None:
    if shell == "bash":
        words = {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1)}
    else:
        words = {"_TYPER_COMPLETE_ARGS": line, "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    ended = process(tmp_path / "note", _NVFP4_MOE_COMPLETE=f"complete_{shell}", **words)
    assert (ended.code, ended.stderr) == (0, "")
    if shell == "zsh":  # _arguments '*: :(("one":"its help" "other":"its help"))'
        found = set(re.findall(r'(?:\(\(|^|\s)"([^":]+)"', ended.stdout))
    else:  # fish has help after a tab
        found = {entry.partition("\t")[0] for entry in ended.stdout.split("\n")} - {""}
    assert found == offers
    assert ended.large == set()


def test_a_source_that_is_not_there_loads_nothing_large(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("words")
    for words in (["inspect"], ["verify"], ["evaluate", "--text", text]):
        dst = [tmp_path / "out"] * (words != ["inspect"])
        ended = process(tmp_path / "note", *words, tmp_path / "nowhere", *dst)
        assert ended.code == 1
        assert "neither a folder nor a hub id" in ended.stderr
        assert ended.large == set()


def test_registries_know_names_without_what_they_name(tmp_path: Path) -> None:
    code = """
from quantize.experts.gates import FORMS
from quantize.layouts import LAYOUTS
from quantize.nvfp4.rounding import METHODS
from quantize.nvfp4.scales import RULES
for registry in (FORMS, LAYOUTS, METHODS, RULES):
    assert registry and all(name in registry for name in list(registry))
    assert "no such thing" not in registry
"""
    ended = process(tmp_path / "note", how=code)
    assert (ended.code, ended.stderr) == (0, "")
    assert ended.large == set()


# -- python -m quantize ----------------------------------------------------------------------------


def test_python_m_quantize_is_the_whole_command(saved: Folders, tmp_path: Path) -> None:
    source, out = saved("qwen3_moe"), tmp_path / "out"

    def run(*words: object) -> Ended:
        ended = process(tmp_path / "note", *words, how="-m")
        assert ended.code == 0, ended.stderr
        return ended

    assert "B/s" in run("quantize", source, out).stdout
    assert "gate: silu" in run("inspect", source).stdout
    assert "No problems found." in run("verify", source, out).stdout


@pytest.mark.parametrize("first", [True, False], ids=["options first", "options last"])
def test_python_m_quantize_src_dst(first: bool, saved: Folders, tmp_path: Path) -> None:
    options, folders = ("--layout", "compressed-tensors"), (saved("qwen3_moe"), tmp_path / "out")
    words = (*options, *folders) if first else (*folders, *options)
    ended = process(tmp_path / "note", *words, how="-m")
    assert ended.code == 0, ended.stderr
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"


def test_a_folder_called_like_a_command_is_given_with_its_path(
    saved: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "inspect").symlink_to(saved("qwen3_moe"))
    monkeypatch.chdir(tmp_path)
    ended = process(tmp_path / "note", "inspect", how="-m")
    assert ended.code == 2  # the command inspect, without its SRC
    ended = process(tmp_path / "note", "./inspect", "out", how="-m")
    assert ended.code == 0, ended.stderr
    assert (tmp_path / "out" / "config.json").exists()


# -- inspect ---------------------------------------------------------------------------------------


def test_inspect_loads_only_what_it_needs(saved: Folders, tmp_path: Path) -> None:
    """PyTorch for dtypes and Transformers for the gate; nothing that quantizes."""
    ended = process(tmp_path / "note", "inspect", saved("qwen3_moe"), "--json")
    assert (ended.code, ended.stderr) == (0, "")
    assert {"torch", "transformers"} <= ended.large
    assert ended.large.isdisjoint({"compressed_tensors", "numba", "ray"})
    ours = {name.split(".")[1] for name in ended.loaded if name.startswith("quantize.")}
    assert ours.isdisjoint({"calibration", "execute", "report", "verify"})


def test_inspect_opens_each_file_once(saved: Folders, tmp_path: Path) -> None:
    tensors = load_file(saved("qwen3_moe") / "model.safetensors")
    config = json.loads((saved("qwen3_moe") / "config.json").read_text())
    source = save(tmp_path / "source", tensors, config, lambda name: len(name) % 5)
    ended = process(tmp_path / "note", "inspect", source)
    assert (ended.code, ended.stderr) == (0, "")
    files = {file.name for file in source.glob("*.safetensors")}
    assert len(files) > 2
    assert ended.opened == dict.fromkeys(files, 1)


def test_a_plan_names_and_makes_everything_once(
    saved: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model may have tens of thousands of experts."""
    made, named = [], []

    def counting(target: object, attribute: str, calls: list[object]) -> None:
        function = getattr(target, attribute)

        def counted(*args: Any, **kwargs: Any) -> Any:
            calls.append(args)
            return function(*args, **kwargs)

        monkeypatch.setattr(target, attribute, counted)

    counting(jobs.QuantizeExpert, "__init__", made)
    counting(jobs, "stored_tensors", named)
    with Checkpoint(saved("qwen3_moe")) as checkpoint:
        steps = plan(checkpoint)
        assert inspection.as_json(checkpoint, steps)["bytes_after"] == steps.nbytes
        experts = sum(group.num_experts for group in steps.groups)
        assert experts == 8
        assert len(made) == 2 * experts  # gate and up; down
        assert len(named) == 3 * experts
        assert steps.nbytes == sum(
            out.nbytes for shard in range(len(steps.shards)) for out in steps.outputs(shard)
        )


# -- threads ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("said", [None, "active"])
@pytest.mark.parametrize("command", WORKING)
def test_threads_that_wait_soon_sleep(
    command: str, said: str | None, saved: Folders, tmp_path: Path
) -> None:
    """OpenMP itself says what it was told when it was loaded, and the user has the last word."""
    source = str(saved("qwen3_moe"))
    words = [command, source, *{
        "quantize": [str(tmp_path / "out"), "--dry-run"],
        "evaluate": [source, "--text", str(tmp_path / "none.txt")],
    }.get(command, [])]  # fmt: skip
    (tmp_path / "none.txt").write_text("")
    env = {
        key: value for key, value in os.environ.items() if not key.startswith(("OMP_WAIT", "GOMP"))
    }
    env |= {"OMP_DISPLAY_ENV": "verbose"} | ({"OMP_WAIT_POLICY": said} if said else {})
    done = subprocess.run(
        [sys.executable, "-c", PROBE, str(tmp_path / "note"), "script", *words],
        env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    # How often a thread looks before it sleeps. By default it is 300,000 times: milliseconds.
    (spins,) = {int(count) for count in re.findall(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)}
    assert spins > 10**9 if said else 1000 < spins < 50_000
