"""Does a tiny model of each family start in vLLM, and say what Transformers says?

    python -m tests.engine.every_family OUT.json [FAMILY...] [--device cpu|cuda] [--workers N]
        [--left]

Each family of tests/quantize/families.py is built, quantized, and loaded with
``--quantization nvfp4_moe``. Log-probabilities of fixed prompts are compared with those of
Transformers' own class in float32 on the dequantized weights: whole; where that does not do, its
language model alone; and then with ``--model-impl transformers``. What does not do runs once more
as it was before it was quantized, in vLLM without this package. OUT.json gets a row for each
family, in the place of an older one of the same platform, with one of these results:

- ``same``: the mean difference of log-probabilities is below :data:`BOUND` of what a fault in the
  experts makes. The fault is SiLU for another gate; or, where SiLU is right, gate and up exchanged.
  Or the difference is less than a tenth of that, and no more than twice what vLLM makes of the
  checkpoint that is not quantized: then ``difference_without_plugin`` is in the row.
- ``vllm``: vLLM cannot run it here without this package either, or says something else than
  Transformers then, too.
- ``ours``: it can without this package; or it cannot, and what runs with it says something else
  than Transformers. This is to be mended.
- ``transformers``: there is nothing to compare with.

If the whole with vLLM's default class did not do, ``default`` in a row that is ``same`` says what
vLLM makes of that without this package.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import sys
import tempfile
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Any

from quantize.experts.gates import KEY, Gate, Gates, from_contract, to_contract
from tests.engine import family_models
from tests.engine.family_models import TOKENS, difference, prompts, read
from tests.engine.forks import Outcome, run_all
from tests.quantize import families

BOUND = {"cpu": 1 / 1000, "cuda": 1 / 4}
"""Of what a fault makes. On CPUs all computes in float32 (:func:`exact`), and 1e-6 to 1e-5 are seen
where a fault makes 0.3. On GPUs the engine computes in bfloat16; there, close calls of routers go
the other way now and then, and one of 141 tokens is then far off."""

ENGINE: dict[str, dict[str, Any]] = {
    # As without enforce_eager, which turns on vLLM's own operators. The one for rotary embeddings
    # on CPUs is wrong for MLA's slices of queries and keys: it takes them for contiguous.
    "cpu": {"dtype": "float32", "compilation_config": {"custom_ops": ["none"]}},
    "cuda": {"dtype": "bfloat16", "gpu_memory_utilization": 0.1},
}
IN_BFLOAT16 = ("deepseek_v4", "glm5_next", "muse_spark")
"""Families that vLLM's own classes compute in no other type, on CPUs as on GPUs."""
KERNELS = {"muse_spark": "marlin"}
"""By family: the ``moe_backend`` that vLLM's own class must be told on Hopper, for NVFP4 alone."""

PART = 16
"""Families that go through all steps together; the file is then written."""

LIMIT = 120
"""Seconds for one engine, start and prompts, if not said otherwise; and to build one model."""


def all_families() -> list[str]:
    """Those that are quantized."""
    found = families.classes().items()
    return sorted({family for name, family in found if name not in families.UNSUPPORTED})


def left_to_run(file: Path, device: str) -> list[str]:
    """The families that no row of ``file`` says are the ``same`` on this platform."""
    rows = json.loads(file.read_text()) if file.exists() else []
    here = platform(device)
    same = {r["family"] for r in rows if r["platform"] == here and r["result"] == "same"}
    return [family for family in all_families() if family not in same]


def exact(key: str, device: str) -> bool:
    """Whether the engine computes a family's model in float32."""
    return device == "cpu" and re.split("[.@]", key)[0] not in IN_BFLOAT16


def scores(
    folder: Path, device: str, ours: bool, model_impl: str = "auto", dtype: str | None = None,
    moe_backend: str = "auto",
) -> list[float]:  # fmt: skip
    """As ``family_models.log_probabilities``, from vLLM; once in a process.

    Args:
        ours: with this package. Else vLLM does not even load it.
        model_impl: vLLM's option.
        dtype: vLLM's option; by default as ``ENGINE`` has it.
        moe_backend: vLLM's option.
    """
    if not ours:
        os.environ["VLLM_PLUGINS"] = ""
    from vllm import LLM, SamplingParams

    settings = ENGINE[device] | ({"quantization": "nvfp4_moe"} if ours else {})
    settings |= {"dtype": dtype} if dtype else {}
    without = not (folder / "tokenizer.json").exists()
    llm = LLM(
        str(folder), skip_tokenizer_init=without, max_model_len=TOKENS + 16, max_num_seqs=4,
        enforce_eager=True, enable_prefix_caching=False, kv_cache_memory_bytes=1 << 28,
        language_model_only=True, model_impl=model_impl, moe_backend=moe_backend, **settings,
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
        # A GPU that this process has looked at cannot be used by its forks.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        from tests.quantize import warm  # noqa: F401

        return {k: asdict(out) for k, out in run_all(calls, folder, LIMIT, workers).items()}

    outcome = run_all({"make": call}, folder.parent, LIMIT * len(calls), 1)["make"]
    if outcome.error:
        raise SystemExit(f"{folder.parent}/make.log: {outcome.error}")
    return {key: Outcome(**fields) for key, fields in outcome.value.items()}


def spoil_contract(file: Path) -> None:
    """Have the checkpoint ask for SiLU; or for GELU, where that is right."""
    config = json.loads(file.read_text())
    silu = from_contract(config[KEY]).default.form == "silu"
    config[KEY] = to_contract(Gates.uniform(Gate("gelu_tanh" if silu else "silu")))
    file.write_text(json.dumps(config))


class Run:
    """All steps, with what each gave.

    A key is a family; with ``.text`` its language model alone, and with ``@transformers`` served so
    (``--model-impl``).
    """

    def __init__(self, folder: Path, args: argparse.Namespace) -> None:
        self.folder, self.device = folder, str(args.device)
        self.workers, self.limit, self.wrong = args.workers, args.limit, args.wrong_gate
        self.made: dict[str, Outcome] = {}
        self.ours: dict[str, Outcome] = {}
        self.stock: dict[str, Outcome] = {}

    def make(self, families: list[str], text: bool = False) -> list[str]:
        """Build models; the keys of those that there are."""
        calls = {}
        for family in families:
            key = f"{family}.text" if text else family
            calls[key] = partial(family_models.make, family, self.folder / key, text)
        made = make_all(calls, self.folder / "logs" / "make", self.workers) if calls else {}
        self.made |= {k: out for k, out in made.items() if out.error or out.value}
        there = [key for key, outcome in made.items() if outcome.value]
        for key in there if self.wrong else ():
            spoil_contract(self.folder / key / "nvfp4" / "config.json")
        return there

    def serve(self, keys: list[str], ours: bool = True) -> None:
        """Serve what was quantized with this package, or its source without."""
        calls = {}
        for key in keys:
            folder = self.place(key) / ("nvfp4" if ours else "source")
            impl = key.partition("@")[2] or "auto"
            dtype = None if exact(key, self.device) else "bfloat16"
            backend = KERNELS.get(re.split("[.@]", key)[0], "auto") if ours else "auto"
            backend = backend if self.device == "cuda" else "auto"
            calls[key] = partial(scores, folder, self.device, ours, impl, dtype, backend)
        name, outcomes = ("ours", self.ours) if ours else ("stock", self.stock)

        def tell(key: str, outcome: Outcome) -> None:
            print(f"{name} {key}: {outcome.error or 'done'}, {outcome.seconds} s", flush=True)

        found = run_all(calls, self.folder / "logs" / name, self.limit, self.workers, tell)
        for key, outcome in found.items():  # where the model lies is nobody's business
            error = outcome.error and outcome.error.replace(str(self.place(key)), "MODEL")
            outcomes[key] = replace(outcome, error=error)

    def keys(self, family: str) -> list[str]:
        """Those of a family that were served, in the order in which they were tried."""
        return [key for key in self.ours if re.split("[.@]", key)[0] == family]

    def left(self, families: list[str]) -> list[str]:
        """The families of which nothing says what Transformers says."""
        return [family for family in families if not any(map(self.same, self.keys(family)))]

    def place(self, key: str) -> Path:
        """The folder of its model."""
        return self.folder / key.partition("@")[0]

    def fault(self, key: str) -> float:
        """How much a fault in the experts makes."""
        return difference(read(self.place(key), "right"), read(self.place(key), "wrong"))

    def off(self, key: str) -> float:
        """How much the engine with this package is off."""
        return difference(read(self.place(key), "right"), self.ours[key].value)

    def off_without(self, key: str) -> float:
        """How much vLLM without it is off on the checkpoint that is not quantized; 0 if it was not
        run, or did not run."""
        outcome = self.stock.get(key)
        if outcome is None or outcome.error:
            return 0.0
        return difference(read(self.place(key), "source"), outcome.value)

    def bound(self, key: str) -> float:
        """The difference below which log-probabilities are the same."""
        return BOUND["cpu" if exact(key, self.device) else "cuda"] * self.fault(key)

    def same(self, key: str) -> bool:
        """Whether the engine says what Transformers says."""
        if self.ours[key].error:
            return False
        as_theirs = min(2 * self.off_without(key), self.fault(key) / 10)
        return self.off(key) < max(self.bound(key), as_theirs)

    def problem(self, key: str) -> str | None:
        """What is wrong without this package, None if nothing is."""
        if error := self.stock[key].error:
            return error
        off, fault = self.off_without(key), self.fault(key)
        return None if off < self.bound(key) else _off(off, fault)

    def to_mend(self, key: str) -> bool:
        """Whether nothing but this package can be what is wrong, as far as is known."""
        runs_with_it_alone = self.stock[key].error and not self.ours[key].error
        return bool(runs_with_it_alone) or self.problem(key) is None

    def row(self, family: str) -> dict[str, Any]:
        """The result of a family."""
        keys = self.keys(family)
        if not keys:
            return {"result": "transformers", "reason": self.made[family].error}
        for key in keys:
            if key in self.stock and not self.same(key) and self.to_mend(key):
                reason = self.ours[key].error or _off(self.off(key), self.fault(key))
                return {"result": "ours", "reason": reason, **self.what(key)}
        for key in keys:
            if self.same(key):
                default = {} if key == family else {"default": self.problem(family)}
                return {"result": "same", **self.what(key), **default}
        return {"result": "vllm", "reason": self.problem(keys[0]), **self.what(keys[0])}

    def what(self, key: str) -> dict[str, Any]:
        """Which model that was, and its numbers."""
        model, _, impl = key.partition("@")
        found = {
            "model": "language model" if model.endswith(".text") else "whole",
            "model_impl": impl or "auto",
            **self.made[model].value,
            "fault_difference": self.fault(key),
        }
        if self.ours[key].error:
            return found | {"error": self.ours[key].error}
        if without := self.off_without(key):
            found["difference_without_plugin"] = without
        return found | {"difference": self.off(key), "seconds": self.ours[key].seconds}


def _off(off: float, fault: float) -> str:
    return f"its log-probabilities are {off:.2g} off; a fault in the experts makes {fault:.2g}"


def run(names: list[str], state: Run) -> list[dict[str, Any]]:
    """A row for each family."""
    whole = state.make(names)
    import vllm.entrypoints.llm  # noqa: F401, all forks have it then

    state.serve(whole)
    state.serve(state.make(state.left(names), text=True))
    made = [key for key, outcome in state.made.items() if outcome.value]
    state.serve([f"{k}@transformers" for k in made if k.partition(".")[0] in state.left(names)])
    state.serve([key for f in state.left(names) for key in state.keys(f) if key != f], ours=False)
    state.serve([key for key in whole if not state.same(key)], ours=False)
    about = {
        "platform": platform(state.device),
        "vllm": version("vllm"),
        "transformers": version("transformers"),
        "date": str(datetime.date.today()),
    }
    return [{"family": name, **about, **state.row(name)} for name in names]


def platform(device: str) -> str:
    """The name of the device, as the table has it."""
    if device == "cpu":
        return "CPU"
    from vllm.platforms import current_platform

    # Not PyTorch's: CUDA would begin in this process, and forks could not use it.
    return str(current_platform.get_device_name()).removeprefix("NVIDIA ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("families", nargs="*", metavar="FAMILY")
    parser.add_argument("--device", choices=BOUND, default="cpu")
    parser.add_argument("--workers", type=int, default=1, help="engines at once")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for one engine")
    parser.add_argument("--left", action="store_true", help="those that OUT.json has not as same")
    parser.add_argument("--folder", type=Path, help="where models and logs go, and stay")
    parser.add_argument("--wrong-gate", action="store_true", help="to see that this is found")
    args = parser.parse_args()
    if not entry_points(group="vllm.general_plugins", name="nvfp4_moe"):
        # Its quantization would be known, since this imports it; what it does to vLLM would not.
        parser.error("vLLM does not see this package; pip install --no-deps --editable .")
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    names = args.families or (left_to_run(args.out, args.device) if args.left else all_families())
    failed = False
    with tempfile.TemporaryDirectory() as scratch:
        for part in (names[i : i + PART] for i in range(0, len(names), PART)):
            folder = args.folder or Path(scratch)
            rows = run(part, Run(folder, args))
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
