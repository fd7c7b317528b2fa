"""vLLM's real loader in this process: no server, no compilation, one rank."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from quantize.layouts import LAYOUTS
from tests.hub_layout import publish
from tests.plugin import nemotron
from tests.quantize import checkpoints

Loader = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def load(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loader]:
    """``load(folder, **engine_args)``: the model's MoE runners by layer name, as vLLM built them,
    and its draft model's, if ``engine_args`` ask for one.

    Everything up to the weights is vLLM's own code: argument parsing, config, model, loader.
    """
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    import torch._dynamo
    import vllm.model_executor.models.transformers  # noqa: F401
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model
    from vllm.v1.worker.cpu_model_runner import _set_torch_accelerator_to_noop

    _set_torch_accelerator_to_noop()  # as vLLM's CPU worker does
    # vLLM collects garbage twice in each load, and half of a load's time was the way through what
    # these modules have made.
    gc.collect()
    gc.freeze()
    rendezvous = tmp_path_factory.mktemp("rendezvous") / "file"

    def load(folder: Path, quantization: str | None = "nvfp4_moe", **more: Any) -> dict[str, Any]:
        more = {"max_model_len": 64, "enforce_eager": True} | more
        args = EngineArgs(model=str(folder), quantization=quantization, **more)
        config = args.create_engine_config()
        with set_current_vllm_config(config):
            if not torch.distributed.is_initialized():
                init_distributed_environment(1, 0, f"file://{rendezvous}", 0, "gloo")
                initialize_model_parallel(1, 1)
            model = get_model(vllm_config=config)
            if config.speculative_config is not None:  # as vLLM's proposers do
                draft = config.speculative_config.draft_model_config
                model.draft = get_model(vllm_config=config, model_config=draft)
        layers = config.compilation_config.static_forward_context
        runners = {n: layer for n, layer in layers.items() if hasattr(layer, "routed_experts")}
        runners["model"] = model  # keeps it alive
        return runners

    yield load
    gc.unfreeze()  # some libraries complain of what is left when the interpreter goes


@pytest.fixture
def numba(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The CPU's kernel as on a host without a C++ compiler."""
    from vllm_nvfp4_moe import settings
    from vllm_nvfp4_moe.backends.cpu import forward

    monkeypatch.setenv(settings.CPP, "0")
    forward.native.cache_clear()
    yield
    forward.native.cache_clear()


@pytest.fixture(params=["C++", "numba"])
def compiled_by(request: pytest.FixtureRequest) -> None:
    """Both ways to compile the CPU's kernel."""
    if request.param == "numba":
        request.getfixturevalue("numba")


@pytest.fixture
def mxfp8_on_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM 0.32 has no list of MXFP8 kernels for CPUs, though one of them is plain PyTorch."""
    from vllm.model_executor.kernels import linear
    from vllm.platforms import PlatformEnum

    kernels = [linear.EmulationMxfp8LinearKernel]
    monkeypatch.setitem(linear._POSSIBLE_MXFP8_KERNELS, PlatformEnum.CPU, kernels)


class Damage:
    """A copy of a checkpoint whose tensors and config can be changed before it is loaded."""

    def __init__(self, source: Path, folder: Path) -> None:
        self.folder = folder
        shutil.copytree(source, folder)

    def tensors(self, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
        file = self.folder / "model.safetensors"
        with safe_open(file, "pt") as handle:
            metadata = handle.metadata()
        tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
        change(tensors)
        save_file(tensors, file, metadata)
        return self.folder

    def config(self, change: Callable[[dict[str, Any]], None]) -> Path:
        file = self.folder / "config.json"
        config = json.loads(file.read_text())
        change(config)
        file.write_text(json.dumps(config))
        return self.folder


@pytest.fixture(scope="session")
def random_m3(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Random models of m3-nano's sizes, by their layers: one dense, and one or two sparse.

    What is compared here are tensors and a layer's sums, which random numbers are good enough for.
    The tests of whole engines have a trained model.
    """
    folders = {layers: tmp_path_factory.mktemp("random") / f"{layers}-layers" for layers in (2, 3)}
    # In another process: where vLLM has loaded a model, Transformers' classes cannot be built.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(checkpoints.save_m3_nano, folders.values(), folders))
    return folders


@pytest.fixture(scope="session")
def shallow_bf16(random_m3: dict[int, Path]) -> Path:
    """One dense and one sparse layer: loads in a second."""
    return random_m3[2]


@pytest.fixture(scope="session")
def shallow(shallow_bf16: Path, quantized_of: Callable[[Path], dict[str, Path]]) -> dict[str, Path]:
    """The same quantized, in each layout."""
    return quantized_of(shallow_bf16)


@pytest.fixture(scope="session")
def shallow_hub(shallow_bf16: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, not quantized, as the hub publishes MiniMax-M3."""
    return publish(shallow_bf16, tmp_path_factory.mktemp("shallow") / "hub")


@pytest.fixture(scope="session")
def ungated_bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nemotron-H: a layer of attention and one of latent experts without a gate."""
    return nemotron.write(tmp_path_factory.mktemp("ungated") / "bf16")


@pytest.fixture(scope="session")
def ungated(ungated_bf16: Path) -> dict[str, Path]:
    """The same quantized, in each layout; treat as read-only."""
    folder = ungated_bf16.parent
    return {name: nemotron.quantized(ungated_bf16, folder / name, name) for name in LAYOUTS}


@pytest.fixture
def damage(shallow: dict[str, Path], tmp_path: Path) -> Callable[[str], Damage]:
    """``damage(layout)``: a fresh copy of ``shallow`` to be damaged."""
    return lambda layout="modelopt": Damage(shallow[layout], tmp_path / f"damaged-{layout}")


@pytest.fixture
def summary_lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the summary says once of each model."""
    from vllm_nvfp4_moe import summary

    found: list[str] = []
    # Not by a handler: importing vLLM's modules configures logging again.
    monkeypatch.setattr(
        summary.logger, "info_once", lambda text, *args, scope: found.append(text % args)
    )
    return found
