"""Checks and kernels where a layer is split over two ranks, each a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from quantize.checkpoint.reader import Checkpoint
from quantize.execute import execute
from quantize.run.plan import plan
from tests.conftest import ROOT
from tests.plugin import biased, nemotron, others
from tests.plugin.conftest import Damage
from tests.plugin.rank import batch
from tests.plugin.reference import experts_of, relu2, routed
from tests.plugin.test_layer import relative
from tests.quantize import checkpoints

LAYERS = ("model.layers.0.mlp.experts", "model.layers.1.mlp.experts")
EXPERTS, TOP_K = 4, 2
Results = tuple[dict[str, Any], dict[str, Any]]


def silu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.silu(gate) * up


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3-MoE whose intermediate size is two blocks a rank."""
    folder = tmp_path_factory.mktemp("parallel")
    checkpoints.build("qwen3_moe", moe_intermediate_size=64).save_pretrained(folder / "bf16")
    with Checkpoint(folder / "bf16") as source:
        execute(source, plan(source), folder / "nvfp4")
    return folder


@pytest.fixture(scope="module")
def results(whole: Path) -> Results:
    """What each rank found, of all jobs: two processes, since each costs the imports."""

    def damaged(name: str, tensor: str, change: Any) -> str:
        copy = Damage(whole / "nvfp4", whole / name)
        return str(copy.tensors(lambda tensors: change(tensors, f"{LAYERS[1]}.{tensor}")))

    def drop(tensors: dict[str, torch.Tensor], name: str) -> None:
        del tensors[name]

    def cut(tensors: dict[str, torch.Tensor], name: str) -> None:
        tensors[name] = tensors[name][:, :-1].clone()

    narrow = whole / "narrow"
    checkpoints.build("qwen3_moe", moe_intermediate_size=48).save_pretrained(whole / "narrow-bf16")
    with Checkpoint(whole / "narrow-bf16") as source:
        execute(source, plan(source), narrow)

    # Without a gate, each rank has a part of up alone; and of latent experts.
    ungated = nemotron.write(whole / "ungated-bf16", moe_intermediate_size=64)
    for layout in ("modelopt", "compressed-tensors"):
        nemotron.quantized(ungated, whole / f"ungated {layout}", layout)

    biased.save(whole / "biased-bf16", layers=2)
    others.quantized(whole / "biased-bf16", whole / "biased")
    gpt_oss = str(whole / "biased")

    expert = {"enable_expert_parallel": True}
    nvfp4, bf16 = str(whole / "nvfp4"), str(whole / "bf16")
    lost = damaged("lost", "3.up_proj.weight_scale", drop)
    short = damaged("short", "0.down_proj.weight_scale", cut)
    table: list[tuple[str, str, bool, dict[str, Any]]] = [
        ("tensor", nvfp4, False, {}),
        ("expert", nvfp4, False, expert),
        ("expert, filtered", nvfp4, False, expert | {"enable_ep_weight_filter": True}),
        ("pipeline", nvfp4, True, {}),
        ("tensor, on the fly", bf16, False, {}),
        ("expert, on the fly", bf16, False, expert),
        ("dummy", nvfp4, False, {"load_format": "dummy"}),
        ("narrow", str(narrow), False, {}),
        ("narrow, expert", str(narrow), False, expert),
        ("lost, tensor", lost, False, {}),
        ("lost, expert", lost, False, expert),
        ("short, tensor", short, False, {}),
        ("ungated modelopt", str(whole / "ungated modelopt"), False, {}),
        ("ungated compressed-tensors", str(whole / "ungated compressed-tensors"), False, {}),
        ("ungated, expert", str(whole / "ungated modelopt"), False, expert),
        ("ungated, on the fly", str(ungated), False, {}),  # whose class says which gate
        ("biased, tensor", gpt_oss, False, {}),
        ("biased, expert", gpt_oss, False, expert),
        ("biased, on the fly", str(whole / "biased-bf16"), False, {}),
        ("biased, expert, on the fly", str(whole / "biased-bf16"), False, expert),
    ]
    jobs = whole / "jobs.json"
    jobs.write_text(
        json.dumps([{"name": n, "folder": f, "pipeline": p, "args": a} for n, f, p, a in table])
    )
    outs = [whole / f"rank-{rank}.pt" for rank in range(2)]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.plugin.rank", str(rank), jobs, out],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, out in enumerate(outs)
    ]
    for rank in ranks:
        output, _ = rank.communicate(timeout=600)
        assert rank.returncode == 0, output
    first, second = (torch.load(out) for out in outs)
    return first, second


def truth(folder: Path, layer: str) -> torch.Tensor:
    """The layer's output, in float64, of ``rank.batch``."""
    experts = experts_of(folder, layer, "modelopt", EXPERTS)
    x, weights, ids = batch(experts[0][0].shape[1], EXPERTS, TOP_K)
    return routed(x, experts, weights, ids, silu)


@pytest.mark.parametrize(
    "job",
    ["tensor", "expert", "expert, filtered", "tensor, on the fly", "expert, on the fly"],
)
def test_the_ranks_outputs_add_up(results: Results, whole: Path, job: str) -> None:
    """Scale rows split with their weights, global experts found in local places."""
    first, second = (rank[job]["outputs"] for rank in results)
    for layer in LAYERS:
        want = truth(whole / "nvfp4", layer)
        assert relative(first[layer] + second[layer], want) < 1e-5, layer
        assert relative(first[layer], want) > 0.1  # neither has it all
        assert relative(second[layer], want) > 0.1
    for rank in results:
        assert rank[job]["skipped"] is None
        assert 0 < rank[job]["worst"] < 1e-5


@pytest.mark.parametrize(
    "job",
    ["ungated modelopt", "ungated compressed-tensors", "ungated, expert", "ungated, on the fly"],
)
def test_experts_without_a_gate(results: Results, whole: Path, job: str) -> None:
    experts = experts_of(
        whole / "ungated modelopt", nemotron.STORED, "modelopt", nemotron.EXPERTS,
        ("up_proj", "down_proj"),
    )  # fmt: skip
    x, weights, ids = batch(nemotron.LATENT, nemotron.EXPERTS, nemotron.TOP_K)
    want = routed(x, experts, weights, ids, relu2)
    first, second = (rank[job]["outputs"][nemotron.LAYER] for rank in results)
    assert relative(first + second, want) < 1e-5
    assert relative(first, want) > 0.1 and relative(second, want) > 0.1  # neither has it all
    for rank in results:
        assert rank[job]["skipped"] is None and 0 < rank[job]["worst"] < 1e-5


@pytest.mark.parametrize("job", ["tensor", "expert", "on the fly", "expert, on the fly"])
def test_biases_are_added_once(results: Results, whole: Path, job: str) -> None:
    """Each rank has its rows of w13's; w2's, which are for the sum, only one of those that share an
    expert."""
    first, second = (rank[f"biased, {job}"]["outputs"] for rank in results)
    for layer in LAYERS:
        x, weights, ids = batch(biased.HIDDEN, biased.EXPERTS, TOP_K)
        want = biased.plainly(whole / "biased", layer, "modelopt", x, weights, ids)
        assert relative(first[layer] + second[layer], want) < 1e-5, layer
    for rank in results:
        assert rank[f"biased, {job}"]["skipped"] is None
        assert 0 < rank[f"biased, {job}"]["worst"] < 1e-5


def test_an_intermediate_size_that_experts_share_whole(results: Results, whole: Path) -> None:
    first, second = (rank["narrow, expert"]["outputs"] for rank in results)
    for layer in LAYERS:
        assert relative(first[layer] + second[layer], truth(whole / "narrow", layer)) < 1e-5


def test_a_block_that_ranks_would_have_to_share(results: Results) -> None:
    for rank in results:
        assert "intermediate size 48 cannot be split over 2 ranks" in rank["narrow"]["refused"]


def test_each_rank_has_its_own_layers(results: Results, whole: Path) -> None:
    first, second = (rank["pipeline"]["outputs"] for rank in results)
    assert [list(first), list(second)] == [[LAYERS[0]], [LAYERS[1]]]
    for layer, output in (first | second).items():
        assert relative(output, truth(whole / "nvfp4", layer)) < 1e-5


def test_dummy_weights_load_unchecked(results: Results) -> None:
    for rank in results:
        assert rank["dummy"]["worst"] is None
        assert set(rank["dummy"]["outputs"]) == set(LAYERS)


def test_what_is_missing_is_missed_where_it_is_needed(results: Results) -> None:
    """By both ranks where each takes a part of it, else by the one that has the expert."""
    problem = f"{LAYERS[1]}: missing from the checkpoint: expert 3, up (w3), weight_scale"
    for rank in results:
        assert problem in rank["lost, tensor"]["refused"]
    first, second = (rank["lost, expert"] for rank in results)
    assert "outputs" in first
    assert problem in second["refused"]


def test_a_short_row_of_scales(results: Results) -> None:
    for rank in results:
        message = rank["short, tensor"]["refused"]
        assert "expert 0, down (w2), weight_scale: shape [" in message
        assert message.startswith(LAYERS[1])
