"""A calibrated run compares itself with Transformers' own model first, and stops if they differ."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import MixtralModel

from quantize.calibration import proof, reference
from quantize.calibration.layerwise import LayerwiseModel
from quantize.calibration.model_end import ModelEnd
from quantize.calibration.proof import prove
from quantize.calibration.stand_ins import CaptureLayer
from quantize.checkpoint.reader import Checkpoint
from quantize.errors import QuantizeError
from quantize.execute import execute
from quantize.experts.gates import Gate
from quantize.experts.group import ExpertGroup
from quantize.run.options import Calibration, Options
from quantize.run.plan import plan
from tests.quantize import checkpoints, experts_with_more, families
from tests.quantize.test_calibration_forward import CPU, FAMILIES, rows_of


def proved(
    folder: Path, work: Path, rows: torch.Tensor, method: str = "gptq", **options: Any
) -> str:
    """What a calibration says of its proof."""
    settings = Calibration("text", *rows.shape, "digest", method=method)
    said: list[str] = []
    with Checkpoint(folder) as checkpoint:
        steps = plan(checkpoint, replace(Options(**options), calibration=settings))
        prove(checkpoint, steps, rows, work, CPU, said.append)
    assert not work.exists()
    (line,) = said
    return line


@pytest.fixture
def four_layers(tmp_path: Path) -> Path:
    """Mixtral with a window shorter than the texts."""
    model = families.build("mixtral", num_hidden_layers=4, sliding_window=6)
    return families.save(model, "mixtral", families.LAYOUTS[0], tmp_path / "m")


LAYOUTS = (
    ("gpt_oss", families.LAYOUTS[0]),  # with biases, interleaved, [in, out]
    ("inkling", families.LAYOUTS[0]),
    ("minimax_m3_vl", families.LAYOUTS[0]),
    ("nemotron_h", families.LAYOUTS[0]),  # without a gate
    ("qwen3_vl_moe", "published"),  # [in, out]
    ("glm5_next", families.LAYOUTS[1]),
    ("deepseek_v3", families.LAYOUTS[1]),
    ("gemma4", families.LAYOUTS[0]),
    ("muse_spark", families.LAYOUTS[1]),  # a norm after down, and a hidden size of their own
)


@pytest.mark.parametrize(("family", "layout"), [case for case in LAYOUTS if case[0] in FAMILIES])
@pytest.mark.parametrize("alone", [False, True])
def test_families_agree(
    family: str, layout: str, alone: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the logits; with experts loaded together, and one at a time."""
    folder = families.save(families.build(family), family, layout, tmp_path / "m")
    if alone:
        monkeypatch.setattr(reference, "WHOLE_LAYER", 0)
    line = proved(folder, tmp_path / "proof", rows_of(3, 16), "two-sided")
    assert re.fullmatch(
        r"Calibration agrees with Transformers' own model: 2 texts, 2 of [24] layers, "
        r"median error at most [0-9.]+e[-+]0[0-8] \([0-9]+ s\)",
        line,
    )


@pytest.mark.parametrize("layout", families.LAYOUTS)
def test_experts_in_a_latent_space(tmp_path: Path, layout: str) -> None:
    """Nemotron-H's larger ones: the experts' hidden size is not the model's, and neither's
    projections into it are quantized."""
    model = families.build("nemotron_h", moe_latent_size=16)
    folder = families.save(model, "nemotron_h", layout, tmp_path / "m")
    proved(folder, tmp_path / "proof", rows_of(3, 16), "two-sided")
    with Checkpoint(folder) as checkpoint:
        steps = plan(checkpoint)
    assert {(g.hidden, g.intermediate, g.projections) for g in steps.groups} == {
        (16, 48, ("up_proj", "down_proj"))
    }


def test_one_expert_alone_takes_the_memory_of_one(
    four_layers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "WHOLE_LAYER", 0)
    seen: list[int] = []
    load_alone = reference.Reference._load_alone

    def watched(self: Any, site: Any, module: Any, expert: int) -> None:
        load_alone(self, site, module, expert)
        seen.extend(p.untyped_storage().nbytes() // 4 for p in module.parameters())

    monkeypatch.setattr(reference.Reference, "_load_alone", watched)
    proved(four_layers, tmp_path / "proof", rows_of(2, 16))
    assert set(seen) == {2 * 48 * 32, 48 * 32}


def test_mxfp4(tmp_path: Path) -> None:
    """Stored transposed; and where nobody could tell by shapes, since they are square."""
    for size in (64, 32):
        folder = gpt_oss_mxfp4(tmp_path / str(size), size)
        proved(folder, tmp_path / "proof", rows_of(2, 16))


def gpt_oss_mxfp4(folder: Path, intermediate: int) -> Path:
    """GPT-OSS with hidden size 32 as OpenAI stores it."""
    model: Any = families.build("gpt_oss", intermediate_size=intermediate)
    families.save(model, "gpt_oss", families.LAYOUTS[0], folder)
    config = json.loads((folder / "config.json").read_text())
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            tensors[name] = tensor
            continue
        experts, inputs, outputs = tensor.shape
        shape = (experts, outputs, inputs // 32)
        tensors[f"{name}_blocks"] = torch.randint(
            0, 256, (*shape, 16), generator=generator, dtype=torch.uint8
        )
        tensors[f"{name}_scales"] = torch.full(shape, 125, dtype=torch.uint8)
    config["quantization_config"] = {"quant_method": "mxfp4"}
    shutil.rmtree(folder)
    return checkpoints.save(folder, tensors, config)


# -- what it refuses -------------------------------------------------------------------------------


def refused(folder: Path, work: Path, match: str, **more: Any) -> None:
    with pytest.raises(QuantizeError, match=match) as error:
        proved(folder, work, rows_of(2, 16), **more)
    assert not work.exists()
    assert "leave --calibrate out" in str(error.value)


class Mixing(torch.nn.ModuleList):
    """Layers of Mixtral, each of which is also given what the layer before was given."""

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        if not isinstance(index, slice):
            return found
        seen: list[torch.Tensor] = []

        def run(layer: Any, x: torch.Tensor, *args: Any, **more: Any) -> torch.Tensor:
            seen.append(x)
            x, with_before = self.mixed(x, seen[-2:][0])
            return layer(x, *args, **more, **with_before)

        return [partial(run, layer) for layer in found]

    def mixed(self, x: torch.Tensor, before: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
        """What a layer is given of ``x`` and of what the layer before was given, ``x`` itself if
        there is none."""
        return x if before is x else x + 0.1 * before, {}


class Turning(Mixing):
    """Likewise, as the imaginary part of another argument alone."""

    def mixed(self, x: torch.Tensor, before: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
        before = before.float()
        return x, {"turned": torch.complex(torch.ones_like(before), before)}


class Looping(torch.nn.ModuleList):
    """Layers of Mixtral, of which the second runs twice."""

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, slice):
            return super().__getitem__(index)
        every = list(self)
        return [*every[:2], *every[1:]]


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize(
    ("layers", "match"),
    [
        (Mixing, "layer 2 of Mixtral.* is given more"),
        (Turning, "layer 2 of Mixtral.* is given more"),
        (Looping, "Mixtral.* runs layer 1 2 times"),
    ],
)
def test_layers_that_need_more_than_the_last_output(
    layers: type, match: str, small: bool, four_layers: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Inkling 2's attention residuals and loops. Of a large model, the first layers alone are
    compared, and these agree."""
    init = MixtralModel.__init__

    def changed(self: Any, config: Any) -> None:
        init(self, config)
        self.layers.__class__ = layers

    monkeypatch.setattr(MixtralModel, "__init__", changed)
    monkeypatch.setattr(proof, "SMALL_MODEL", 1e9 if small else 0)
    refused(four_layers, tmp_path / "proof", match)


def breaking(monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], None]) -> None:
    """Let the layerwise model, and not the reference, be another one."""
    init = LayerwiseModel.__init__

    def changed(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        change(self)

    monkeypatch.setattr(LayerwiseModel, "__init__", changed)


def test_an_embedding_that_is_not_there_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gemma4's layers take it up again; zeros were in its place here once."""
    model = families.build("gemma4", text_config={"hidden_size_per_layer_input": 16})
    folder = families.save(model, "gemma4", families.LAYOUTS[0], tmp_path / "m")
    proved(folder, tmp_path / "proof", rows_of(2, 16))
    replay_before = LayerwiseModel.replay_before

    def without(self: Any, layer: int) -> None:
        replay_before(self, layer)
        if layer:
            self._decoder.get_input_embeddings().weight.data.zero_()

    monkeypatch.setattr(LayerwiseModel, "replay_before", without)
    refused(folder, tmp_path / "proof", r"layer 1 of Gemma4.* other states in calibration than in")


def test_a_wrong_rotary(four_layers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(ours: Any) -> None:
        ours._decoder.rotary_emb.inv_freq.mul_(1.01)

    breaking(monkeypatch, change)
    refused(four_layers, tmp_path / "proof", r"layer 0 of Mixtral.* gives its experts other states")


def test_a_window_that_is_dropped(
    four_layers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few of the tokens are behind it."""

    def change(ours: Any) -> None:
        ours.model.config.sliding_window = 15

    breaking(monkeypatch, change)
    model = families.build("mixtral", sliding_window=14)
    folder = families.save(model, "mixtral", families.LAYOUTS[0], tmp_path / "late")
    for each in (four_layers, folder):
        refused(each, tmp_path / "proof", r"layer 0 of Mixtral.* gives its experts other states")


def test_a_mask_that_is_dropped(
    four_layers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = CaptureLayer.forward

    def without(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs | {"attention_mask": None})

    monkeypatch.setattr(CaptureLayer, "forward", without)
    refused(four_layers, tmp_path / "proof", r"layer 0 of Mixtral.* gives its experts other states")


def test_another_gate(four_layers: Path, tmp_path: Path) -> None:
    match = r"layer 0 .*experts are given the same, so they compute something else"
    refused(four_layers, tmp_path / "proof", match, gate=Gate("gelu"))


@pytest.mark.parametrize("kind", experts_with_more.KINDS, ids=lambda kind: kind.__name__)
def test_experts_that_do_more(
    kind: type[experts_with_more.Plain], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a gate that is stated, nobody looks at their code; Muse Spark's among them."""
    experts_with_more.install(monkeypatch, kind)
    folder = families.save(
        families.build("qwen3_moe"), "qwen3_moe", families.LAYOUTS[1], tmp_path / "m"
    )
    match = r"layer 0 .*compute something else"
    refused(folder, tmp_path / "proof", match, gate=Gate("silu"))


def test_gate_and_up_exchanged(
    four_layers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate_up = ExpertGroup.gate_up
    monkeypatch.setattr(ExpertGroup, "gate_up", lambda *args: gate_up(*args)[::-1])
    refused(four_layers, tmp_path / "proof", "layer 0 .*compute something else")


def test_what_differs_late_is_found_in_small_models(
    four_layers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And in large ones only the first layers are looked at: the line says how many."""

    def change(ours: Any) -> None:
        norm = ours.layers[3].input_layernorm
        norm.register_forward_hook(lambda module, given, output: 1.2 * output)

    breaking(monkeypatch, change)
    refused(four_layers, tmp_path / "proof", "layer 3 of Mixtral")
    monkeypatch.setattr(proof, "SMALL_MODEL", 0)
    assert "2 of 4 layers" in proved(four_layers, tmp_path / "proof", rows_of(2, 16))


def test_the_models_end(four_layers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the rounding needs it."""
    logits = ModelEnd.logits
    monkeypatch.setattr(ModelEnd, "logits", lambda *args: logits(*args) + 1)
    proved(four_layers, tmp_path / "proof", rows_of(2, 16))
    refused(four_layers, tmp_path / "proof", "end of Mixtral.* other logits", method="two-sided")


@pytest.mark.parametrize(
    ("family", "more", "count"),
    [
        ("mixtral", {"num_hidden_layers": 6}, 2),
        # Two dense layers, then the first two with experts.
        ("deepseek_v3", {"num_hidden_layers": 6, "first_k_dense_replace": 2}, 4),
        # The first layer of the second kind is the fourth.
        (
            "lfm2_moe",
            {"num_hidden_layers": 6,
             "layer_types": ["conv"] * 3 + ["full_attention"] + ["conv"] * 2},
            4,
        ),
    ],
)  # fmt: skip
def test_each_kind_of_layer_and_two_with_experts(
    family: str,
    more: dict[str, Any],
    count: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(proof, "SMALL_MODEL", 0)
    folder = families.save(
        families.build(family, **more), family, families.LAYOUTS[0], tmp_path / "m"
    )
    assert f"{count} of 6 layers" in proved(folder, tmp_path / "proof", rows_of(2, 16))


def test_layers_that_share_keys_and_values_are_refused(tmp_path: Path) -> None:
    """No later layer gets what an earlier one keeps beside its result."""
    text = {"num_hidden_layers": 4, "num_kv_shared_layers": 2}
    folder = families.save(
        families.build("gemma4", text_config=text), "gemma4", families.LAYOUTS[0], tmp_path / "m"
    )
    refused(folder, tmp_path / "proof", "fails on text.*calibration runs it")


def test_a_run_that_is_refused_leaves_nothing(
    four_layers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one that is not says so, and proves nothing a second time when it goes on."""
    rows = rows_of(2, 16)
    settings = Calibration("text", *rows.shape, "digest", method="gptq")
    wrong, right = (Options(gate=gate, calibration=settings) for gate in (Gate("gelu"), None))
    with Checkpoint(four_layers) as checkpoint:
        with pytest.raises(QuantizeError, match="compute something else"):
            execute(checkpoint, plan(checkpoint, wrong), tmp_path / "out", samples=rows)
        assert not list((tmp_path / "out").iterdir())

        def stop(done: float, steps: int, _: str) -> None:
            if done >= 2:
                raise KeyboardInterrupt

        said: list[str] = []
        common: Any = {"samples": rows, "say": said.append}
        steps = plan(checkpoint, right)
        with pytest.raises(KeyboardInterrupt):
            execute(checkpoint, steps, tmp_path / "out", calibrating=stop, **common)
        assert len(said) == 1
        execute(checkpoint, steps, tmp_path / "out", resume=True, **common)
        assert len(said) == 1


def test_texts_are_whole_and_few() -> None:
    assert [proof.number_of_texts(n) for n in (16, 2048, 2049, 100_000)] == [2, 2, 1, 1]
