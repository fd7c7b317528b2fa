"""The serving benchmark's own reasoning: what it asks, what it believes, what it concludes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import parallel, serving_check
from benchmarks.serve import Load, bench_options, first_error, hollow, parser, plan, variants
from benchmarks.serving_table import KEPT, BenchmarkError, Run, table, verdicts


def result(throughput: float = 100.0, **changes: Any) -> dict[str, Any]:
    """As ``vllm bench serve`` gives it, of 8 requests for 16 tokens at concurrency 4."""
    numbers: dict[str, Any] = dict.fromkeys(KEPT, 10.0)
    numbers |= {"max_concurrency": 4, "completed": 8, "failed": 0, "total_output_tokens": 128}
    return numbers | {"duration": 1.5, "output_throughput": throughput} | changes


def runs(**throughputs: list[float]) -> list[Run]:
    return [
        Run.of(variant, number, result(value), 8, 16)
        for variant, values in throughputs.items()
        for number, value in enumerate(values, 1)
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"completed": 7, "failed": 1}, "7 of 8 requests answered"),
        ({"total_output_tokens": 127}, "127 tokens generated where 8 x 16 were asked for"),
    ],
)
def test_runs_that_would_flatter_a_server_are_refused(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(BenchmarkError, match=f"ours, concurrency 4, round 2: {message}"):
        Run.of("ours", 2, result(**changes), 8, 16)


@pytest.mark.parametrize(
    ("ours", "stock", "word"),
    [
        ([101, 100], [100, 100], "not slower"),
        ([98, 98], [100, 100.5], "slower"),
        ([99.5, 98.5], [100, 99], "within noise"),
        ([99, 99], [90, 110], "undecided"),  # stock's rounds differ by a fifth
        ([99], [100], "undecided"),  # one round says nothing about noise
    ],
)
def test_verdict(ours: list[float], stock: list[float], word: str) -> None:
    (verdict,) = verdicts(runs(ours=ours, stock=stock), "ours", "stock")
    assert verdict.word == word


def test_no_verdict_without_both() -> None:
    assert verdicts(runs(ours=[1.0]), "ours", "stock") == []


def test_table_has_medians_of_rounds_and_their_spread() -> None:
    text = table(runs(ours=[90.0, 100.0, 120.0]))
    assert text.splitlines()[2].startswith("| 4 | ours | 100.0 | ")
    assert text.splitlines()[2].endswith("| 30.0% |")


def arguments(folder: Path, *more: str) -> Any:
    config = {"quantization_config": {"quant_method": "modelopt"}, "hidden_size": 64}
    (folder / "config.json").write_text(json.dumps(config))
    return parser().parse_args([str(folder), "--results", str(folder / "out"), *more])


def test_every_other_round_goes_backwards(tmp_path: Path) -> None:
    args = arguments(tmp_path, "--keep-running", "--concurrency", "1", "16")
    forwards, backwards = ["ours", "stock", "bf16"], ["bf16", "stock", "ours"]
    assert plan(args) == [
        (1, 1, forwards), (1, 16, forwards), (2, 1, backwards), (2, 16, backwards)
    ]  # fmt: skip


def test_stock_and_bf16_run_without_the_plugin_and_ours_with(tmp_path: Path) -> None:
    ours, stock, bf16 = variants(arguments(tmp_path, "--stock-args=--enforce-eager"))
    assert ours.folder == stock.folder == tmp_path
    assert dict(ours.variables) == {"NVFP4_MOE_ACTIVATIONS": "bf16"}
    (eight,) = variants(arguments(tmp_path, "--variants", "ours-fp8"))
    assert eight.options == ours.options
    assert dict(eight.variables) == {"NVFP4_MOE_ACTIVATIONS": "fp8"}
    log = tmp_path / "log"
    log.write_text("quantization=nvfp4_moe, ... kernel HUMMING (HummingIndexedExperts); ...")
    ours.check(log)
    with pytest.raises(BenchmarkError, match="does not say `kernel HOPPER FP8`"):
        eight.check(log)
    assert dict(stock.variables) == dict(bf16.variables) == {"VLLM_PLUGINS": ""}
    assert ours.options[-2:] == ("--quantization", "nvfp4_moe")
    # Else a shell with another level has logs that do not say which kernels run.
    assert ours.environment() == {"NVFP4_MOE_ACTIVATIONS": "bf16", "VLLM_LOGGING_LEVEL": "INFO"}
    assert stock.options[-3:] == ("--quantization", "modelopt_fp4", "--enforce-eager")
    assert "quantization_config" not in json.loads((bf16.folder / "config.json").read_text())
    assert bf16.options[-2:] == ("--load-format", "dummy")


@pytest.mark.parametrize(
    ("log", "problem"),
    [
        ("... quantization=nvfp4_moe, quantization_config=None, ...", None),
        ("... quantization=modelopt_fp4, quantization_config=None, ...", "modelopt_fp4"),
        ("...", "nothing"),
    ],
)
def test_ours_is_not_stock_in_disguise(tmp_path: Path, log: str, problem: str | None) -> None:
    ours = variants(arguments(tmp_path))[0]
    (tmp_path / "log").write_text(log)
    if problem is None:
        ours.check(tmp_path / "log")
    else:
        with pytest.raises(BenchmarkError, match=f"says quantization={problem}, not nvfp4_moe"):
            ours.check(tmp_path / "log")


def test_hollow_model_keeps_tokenizer_and_leaves_weights(tmp_path: Path) -> None:
    arguments(tmp_path)
    for name in ("tokenizer.json", "model.safetensors", "model.safetensors.index.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "hf_quant_config.json").write_text("{}")
    made = hollow(tmp_path, tmp_path / "bf16")
    assert {file.name for file in made.iterdir()} == {"config.json", "tokenizer.json"}


def test_vllm_accepts_what_is_asked_of_it(tmp_path: Path) -> None:
    from vllm.benchmarks.serve import add_cli_args
    from vllm.entrypoints.cli.serve import make_arg_parser  # which moves between versions
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    args = arguments(tmp_path, "--keep-running")
    bench = FlexibleArgumentParser()
    add_cli_args(bench)
    asked = bench.parse_args(bench_options(args, 8001, 16, 48, 128))
    assert (asked.num_prompts, asked.max_concurrency, asked.ignore_eos) == (48, 16, True)
    for variant in variants(args):
        serve = make_arg_parser(FlexibleArgumentParser())
        served = serve.parse_args([str(variant.folder), *variant.options])
        assert served.enable_prefix_caching is False
        assert served.max_model_len >= args.input_len + args.output_len


def test_vllm_accepts_what_other_benchmarks_ask_of_it() -> None:
    from vllm.entrypoints.cli.serve import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    ways = [[*way.options] for way in parallel.WAYS.values()]
    ways += [options for way in ways if way for options in parallel.nodes(way)]
    ways += [[*variant.options] for variant in (*serving_check.VARIANTS, serving_check.REFERENCE)]
    assert len(ways) > 15
    parser = make_arg_parser(FlexibleArgumentParser())
    for options in ways:
        asked = parser.parse_args(["MODEL", "--quantization", "nvfp4_moe", *options])
        assert asked.quantization == "nvfp4_moe"


def test_requests_fill_every_place_several_times() -> None:
    load = Load((1, 16), 512, 128, waves=3, least=4)
    assert [load.requests(c) for c in (1, 16)] == [4, 48]


def test_first_error_is_the_cause(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(
        "WARNING 11-23 [utils.py:2] This may end in `OSError: too many files`\n"
        "(Worker pid=9) ERROR 11-23 09:33:08 [executor.py:953] ValueError: the cause\n"
        "RuntimeError: Engine core initialization failed\n"
    )
    assert first_error(log) == "ValueError: the cause"
