"""Others' NVFP4 of the same experts: ModelOpt in this process, llm-compressor in its own.

**ModelOpt** quantizes a model in memory ("fake quantization"), which its own kernels compute on a
GPU only; on a CPU, two of them are replaced (``benchmarks.modelopt_on_cpu``). Its recipes are for
whole models; here all keep to routed experts, with the quantizers of its MiniMax-M3 recipe and the
algorithm of the named one. It shares an input scale among the experts of a layer as it calibrates.

**llm-compressor** writes a folder, from an environment of its own (``quantize_speed.peer_python``).
Its data-free way is weights alone, since nothing gives it input scales. MiniMax-M3's gate it can
only run with help: it calls the class's ``_apply_gate`` on an object of its own that has no
``swiglu_alpha`` (AttributeError in 0.14.0.1), so the numbers are put there.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import modelopt_on_cpu, quantize_speed
from examples.perplexity import Rows

LLM_COMPRESSOR_VERSION = quantize_speed.PEERS[0]
MODELOPT = "nvidia-modelopt==0.47.0"

_M3_RECIPE = "huggingface/minimax_m3_vl/ptq/nvfp4_experts_only"


class PeerError(Exception):
    """Why a peer gave no result."""


def _m3_recipe() -> dict[str, Any]:
    from modelopt.recipe import load_recipe

    config: dict[str, Any] = load_recipe(_M3_RECIPE).quantize.model_dump()
    return config


def _experts_with(name: str) -> Callable[[], dict[str, Any]]:
    """The MiniMax-M3 recipe's quantizers, with the algorithm of another of ModelOpt's configs."""

    def config() -> dict[str, Any]:
        import modelopt.torch.quantization as mtq

        return _m3_recipe() | {"algorithm": getattr(mtq, name)["algorithm"]}

    return config


def _experts_only() -> dict[str, Any]:
    import modelopt.torch.quantization as mtq

    config: dict[str, Any] = mtq.NVFP4_EXPERTS_ONLY_CFG
    return config


RECIPES: dict[str, Callable[[], dict[str, Any]]] = {
    "max": _experts_only,
    "MiniMax-M3 recipe": _m3_recipe,
    "FP8 scale sweep": _experts_with("NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG"),
    "local Hessian": _experts_with("NVFP4_W4A4_WEIGHT_LOCAL_HESSIAN_CFG"),
}
"""ModelOpt's, by the name in the table."""


def modelopt_version(device: torch.device) -> str:
    """ModelOpt's version, and what computes if that is not itself.

    Raises:
        PeerError: if it cannot run here.
    """
    if importlib.util.find_spec("modelopt") is None:
        raise PeerError(f"ModelOpt is not installed: pip install {MODELOPT}")
    try:
        importlib.import_module("modelopt.torch.quantization")
    except ImportError as error:  # what it needs and does not always ask for
        raise PeerError(f"ModelOpt cannot be imported: {error}") from error
    version = importlib.metadata.version("nvidia-modelopt")
    if device.type == "cuda":
        return version
    modelopt_on_cpu.install()
    return f"{version} (its kernels in PyTorch)"


def modelopt(model: Any, recipe: str, rows: Rows, batch: int = 4) -> Any:
    """``model`` with its routed experts fake-quantized, weights and inputs; it is changed.

    Args:
        recipe: a key of ``RECIPES``.
        rows: text that calibrates.

    Raises:
        PeerError: if ModelOpt fails, or quantizes no weight or no input.
    """
    import modelopt.torch.quantization as mtq

    def loop(model: Any) -> None:
        with torch.inference_mode():
            for part in torch.tensor(rows).split(batch):
                model(input_ids=part.to(model.device), use_cache=False)

    try:
        model = mtq.quantize(model, RECIPES[recipe](), loop)
    except Exception as error:  # whatever fails in there, the table goes on
        raise PeerError(f"{type(error).__name__}: {error}") from error
    on = [name for name, module in model.named_modules() if getattr(module, "is_enabled", False)]
    for what in ("weight_quantizer", "input_quantizer"):
        if not any(what in name for name in on):
            raise PeerError(f"ModelOpt quantized nothing: no {what} is enabled")
    if other := [name for name in on if "experts" not in name or "shared" in name]:
        raise PeerError(f"ModelOpt quantized more than routed experts: {other[0]}")
    return model


def without_inputs(model: Any) -> None:
    """From now on, :func:`modelopt`'s model rounds weights alone."""
    import modelopt.torch.quantization as mtq

    mtq.disable_quantizer(model, "*input_quantizer")


def auto_quantize(
    model: Any, bits: float, rows: Rows, recipe: str, scores: Path, batch: int = 4
) -> tuple[Any, dict[str, str], float]:
    """``model`` as ModelOpt's ``auto_quantize`` makes it, its routed experts alone.

    Args:
        bits: a weight of the experts may take on average.
        rows: text that calibrates, and whose gradients score.
        recipe: the name of ModelOpt's config for NVFP4; for 8 bits it has ``FP8_DEFAULT_CFG``.
        scores: a file of its scores, which are the same for all budgets: it is made, or read.

    Returns:
        the model; by the experts' module path, ``nvfp4``, ``fp8`` or ``bf16``; and the bits that a
        weight of the experts takes.

    Raises:
        PeerError: if ModelOpt fails.
    """
    import modelopt.torch.quantization as mtq

    weights = {
        name: sum(p.numel() for p in module.parameters(recurse=False))
        for name, module in model.named_modules()
        if name.endswith(".experts")
    }
    others = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    beside = sum(model.get_submodule(name).weight.numel() for name in others)
    total = sum(weights.values())

    def loss(output: Any, ids: torch.Tensor) -> torch.Tensor:
        logits = output.logits[:, :-1].flatten(0, 1).float()
        return torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten())

    parts = [part.to(model.device) for part in torch.tensor(rows).split(batch)]
    try:
        model, state = mtq.auto_quantize(
            model,
            # It counts all linears.
            constraints={"effective_bits": (bits * total + 16 * beside) / (total + beside) + 1e-9},
            quantization_formats=[recipe, "FP8_DEFAULT_CFG"],
            data_loader=parts,
            forward_step=lambda model, ids: model(input_ids=ids, use_cache=False),
            loss_func=loss,
            disabled_layers=others,
            num_calib_steps=len(parts),
            num_score_steps=len(parts),
            checkpoint=str(scores),
        )
    except Exception as error:  # whatever fails in there, the table goes on
        raise PeerError(f"{type(error).__name__}: {error}") from error
    names = {recipe: "nvfp4", "FP8_DEFAULT_CFG": "fp8", "NONE": "bf16"}
    found = {}
    for key, chosen in state["best"]["recipe"].items():
        name = key.removesuffix(".quant_recipe")
        if name in weights:
            found[name] = names[str(chosen).partition("(")[0]]
    if found.keys() != weights.keys():
        raise PeerError(f"ModelOpt chose for {', '.join(found) or 'no experts'} alone")
    taken = {"nvfp4": 4.5, "fp8": 8.0, "bf16": 16.0}
    return model, found, sum(taken[found[n]] * weights[n] for n in weights) / total


LLM_COMPRESSOR = ("data-free", "GPTQ")

_SCRIPT = r"""
import importlib.util, json, sys, torch, types
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modeling.moe.linearize import get_linearized_moes, load_quantizable_moe
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM

if importlib.util.find_spec("torchvision") is None:
    # To patch Qwen3-MoE, Transformers imports all its modules; image processors' need torchvision.
    class Anything(types.ModuleType):
        __path__, __spec__ = [], None
        def __getattr__(self, name):
            return type(name, (), {})
    parts = ("io", "ops", "ops.boxes", "transforms", "transforms.functional", "transforms.v2")
    sys.modules["torchvision"] = Anything("torchvision")
    for name in (*parts, "transforms.v2.functional"):
        module = sys.modules["torchvision." + name] = Anything(name)
        parent, _, last = ("torchvision." + name).rpartition(".")
        setattr(sys.modules[parent], last, module)
source, target, method, rows = sys.argv[1:]
with load_quantizable_moe():
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
for _, experts in get_linearized_moes(model):
    for name in ("swiglu_alpha", "swiglu_limit"):
        if hasattr(model.config, name):
            setattr(type(experts), name, getattr(model.config, name))
experts = [r"re:.*\.experts\.\d+\.(gate|up|down)_proj$"]
if method == "data-free":
    oneshot(model=model, recipe=QuantizationModifier(targets=experts, scheme="NVFP4A16"))
else:
    ids = json.load(open(rows))
    data = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(r) for r in ids]})
    oneshot(
        model=model, dataset=data, recipe=GPTQModifier(targets=experts, scheme="NVFP4"),
        num_calibration_samples=len(ids), max_seq_length=len(ids[0]),
    )
model.save_pretrained(target, save_compressed=True)
"""


def llm_compressor(source: Path, target: Path, method: str, rows: Rows, work: Path) -> None:
    """Let llm-compressor write ``target``.

    Args:
        method: of ``LLM_COMPRESSOR``.
        rows: text that calibrates, where the method does.
        work: where its environment is, or is made.

    Raises:
        PeerError: if it cannot be installed, or fails.
    """
    try:
        version = LLM_COMPRESSOR_VERSION
        python = quantize_speed.peer_python(work / f"peer-{version}", version)
    except (subprocess.CalledProcessError, OSError) as error:
        raise PeerError(f"llm-compressor {version} cannot be installed: {error}") from error
    target.mkdir(parents=True, exist_ok=True)
    calibration = target.with_name(f"{target.name}-rows.json")
    calibration.write_text(json.dumps(rows))
    # Its interpreter has packages of its own; ours must not come before them.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [str(python), "-c", _SCRIPT, str(source), str(target), method, str(calibration)],
        capture_output=True,
        text=True,
        check=False,
        cwd=target.parent,  # it leaves logs where it runs
        env=environment | {"HF_HUB_OFFLINE": "1"},
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise PeerError(f"llm-compressor failed: {lines[-1] if lines else done.returncode}")
