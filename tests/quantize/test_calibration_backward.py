"""Running a model backward layer by layer gives the gradients that Transformers' model has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from benchmarks.activations import forward_backward
from quantize.calibration import backward
from quantize.calibration.layerwise import LayerwiseModel
from quantize.calibration.model_end import ModelEnd
from quantize.calibration.routing import Routing
from quantize.calibration.store import Store
from quantize.calibration.visitor import NullVisitor
from quantize.checkpoint.reader import Checkpoint
from quantize.errors import QuantizeError
from quantize.experts.find import find
from quantize.experts.group import ExpertGroup
from tests.quantize import families
from tests.quantize.test_calibration_forward import CPU, FAMILIES, NOT_RUN, rows_of


class Gradients(NullVisitor):
    """A visitor that keeps what it is shown: by layer, the gradients by its experts' output."""

    def __init__(self) -> None:
        self.found: dict[int, torch.Tensor] = {}

    def begin(self, layer: int, group: ExpertGroup, routing: Routing) -> None:
        self.found[layer] = torch.zeros(len(routing.x), group.hidden)
        for chunk in routing.all():
            assert chunk.gradient is not None
            self.found[layer][chunk.tokens] = chunk.gradient


def run_backward(
    folder: Path, store: Store, rows: torch.Tensor
) -> tuple[Gradients, LayerwiseModel]:
    visitor = Gradients()
    return visitor, forward_backward(folder, store, rows, visitor, torch.float64)


def transformers_gradients(
    folder: Path, ours: LayerwiseModel, rows: torch.Tensor, by_logits: Any
) -> dict[int, torch.Tensor]:
    """By layer, of Transformers' own model, loaded and run as its users do."""
    model: Any = type(ours.model).from_pretrained(
        folder, dtype=torch.float64, experts_implementation="eager",
        attn_implementation=ours.model.config._attn_implementation,
    ).eval()  # fmt: skip
    outputs: dict[int, torch.Tensor] = {}

    def hook(number: int) -> Any:
        def keep(module: Any, inputs: Any, output: torch.Tensor) -> None:
            output.retain_grad()
            outputs[number] = output

        return keep

    for number, path, _ in ours.sites:
        model.get_submodule(path).register_forward_hook(hook(number))
    logits = model(input_ids=rows, use_cache=False).logits
    logits.backward(torch.cat([by_logits(logits[i : i + 1].detach(), i) for i in range(len(rows))]))
    found = {}
    for number, output in outputs.items():
        assert output.grad is not None
        found[number] = output.grad.reshape(-1, output.shape[-1])
    return found


def any_gradient(logits: torch.Tensor, seed: int) -> torch.Tensor:
    """One that needs nothing of what the code under test does."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(logits.shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("family", sorted(FAMILIES - NOT_RUN))
def test_as_autograd(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = families.save(families.build(family), family, families.LAYOUTS[0], tmp_path / "m")
    rows = rows_of(3, 16)
    monkeypatch.setattr(backward, "_logits_gradient", any_gradient)
    found, ours = run_backward(folder, Store(tmp_path / "store"), rows)
    truth = transformers_gradients(folder, ours, rows, any_gradient)
    assert found.found.keys() == truth.keys()
    for layer, expected in truth.items():
        # The store keeps gradients in float32.
        assert (found.found[layer] - expected).norm() <= 1e-5 * expected.norm(), layer
    left = {file.name.split(".")[0] for file in (tmp_path / "store").iterdir()}
    assert not [n for n in left if n.startswith(("x", "ids", "weights", "grad_", "grad-"))]
    assert len([name for name in left if name.startswith("gradients")]) <= 1


def small(folder: Path, tied: bool, **more: Any) -> Path:
    """A Qwen3-MoE with experts in every other layer, and dense ones after the last."""
    torch.manual_seed(2)
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=5,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, moe_intermediate_size=16,
        num_experts=4, num_experts_per_tok=2, decoder_sparse_step=2, tie_word_embeddings=tied,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    stored = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(stored | more))
    return folder


@pytest.mark.parametrize(
    ("tied", "more"),
    [
        (True, {}),
        (False, {}),
        (False, {"tie_word_embeddings": True}),  # but the file has a head of its own
        (False, {"output_router_logits": True}),
        (False, {"return_dict": False}),
    ],
)
def test_dense_layers_between_and_after(
    tied: bool, more: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They pass gradients on, too; the head may be the embedding; a config may ask for more."""
    folder = small(tmp_path / "m", tied, **more)
    monkeypatch.setattr(backward, "_logits_gradient", any_gradient)
    rows = rows_of(2, 9)
    found, ours = run_backward(folder, Store(tmp_path / "store"), rows)
    plain = small(tmp_path / "plain", tied) if more.keys() - {"tie_word_embeddings"} else folder
    truth = transformers_gradients(plain, ours, rows, any_gradient)
    assert found.found.keys() == truth.keys() == {1, 3}
    for layer, expected in truth.items():
        assert (found.found[layer] - expected).norm() <= 1e-5 * expected.norm(), layer


def test_a_model_without_a_head_is_refused(tmp_path: Path) -> None:
    folder = families.save(families.build("qwen3_moe"), "qwen3_moe", families.LAYOUTS[0], tmp_path)
    with Checkpoint(folder) as checkpoint:
        ours = LayerwiseModel(checkpoint, find(checkpoint), CPU)
        ours.model = ours.model.model
        ours.model.get_output_embeddings = lambda: None
        with pytest.raises(QuantizeError, match=r"makes no logits.*take another rounding"):
            ModelEnd(ours).check()


def test_a_head_that_is_not_there_is_refused(tmp_path: Path) -> None:
    folder = small(tmp_path / "m", True)
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": False}))
    with Checkpoint(folder) as checkpoint:
        ours = LayerwiseModel(checkpoint, find(checkpoint), CPU)
        with pytest.raises(QuantizeError, match=r"lm_head\.weight is not there"):
            ModelEnd(ours).check()


def test_what_is_drawn_is_what_the_model_predicts() -> None:
    """The mean over draws of gradients is zero, and their second moments are those of the softmax:
    ``diag(p) - p p^T``."""
    generator = torch.Generator().manual_seed(1)
    logits = 2 * torch.randn(1, 1, 5, generator=generator)
    draws = [backward._logits_gradient(logits, seed) for seed in range(4000)]
    assert torch.equal(draws[7], backward._logits_gradient(logits, 7))
    p = logits.double().softmax(-1).flatten()
    found = torch.cat(draws).double().flatten(0, 1)
    assert found.mean(0).abs().max() < 0.03
    truth = torch.diag(p) - torch.outer(p, p)
    assert (found.T @ found / len(found) - truth).abs().max() < 0.03
    tokens = found.argmin(1)
    expected = p.repeat(len(found), 1)
    expected[torch.arange(len(found)), tokens] -= 1
    assert torch.allclose(found, expected, atol=1e-6)
