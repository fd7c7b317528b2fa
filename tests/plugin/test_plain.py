"""Parameters that are not quantized, in vLLM's own classes: one that nothing was loaded into is
refused, and a checkpoint that has all loads as it is.

What is expected is what is in the files, by name.
"""

from __future__ import annotations

import logging
import multiprocessing
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.engine.family_models import RENAMED
from tests.plugin import draft_heads, others
from tests.plugin.conftest import Damage
from tests.quantize import families
from vllm_nvfp4_moe.errors import RefusedError
from vllm_nvfp4_moe.loading import plain

Load = Callable[..., dict[str, Any]]
LAYOUTS = ("modelopt", "compressed-tensors")
FAMILIES = (
    "axk1", "deepseek_v3", "ernie4_5_moe", "exaone_moe", "glm4_moe", "gpt_oss", "granitemoe",
    "mixtral", "olmoe", "qwen2_moe", "qwen3_moe",
)  # fmt: skip
SPECULATE = {"method": "mtp", "num_speculative_tokens": 1}
MISSING = (
    "model.norm.weight",
    "model.embed_tokens.weight",
    "lm_head.weight",
    "model.layers.1.input_layernorm.weight",
    "model.layers.0.self_attn.o_proj.weight",
    "model.layers.1.mlp.gate.weight",
    "model.layers.1.mlp.gate.e_score_correction_bias",
)
"""Tensors of a GLM-4.5, of each kind that is not quantized."""


def write(family: str, folder: Path) -> None:
    """A tiny model as Transformers saves it, and quantized in each layout."""
    sizes = families.SMALL | {"hidden_size": 64, "head_dim": 32}
    dense = {"first_k_dense_replace": 1} if family == "axk1" else {}
    special = families.SPECIAL.get(family, {})
    config = families.sized(family, sizes, special, {"head_dim": 32}, dense)
    if family == "deepseek_v3":  # as published, for vLLM's class
        config.topk_method = "noaux_tc"
    others.written(config, folder, LAYOUTS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {family: tmp_path_factory.mktemp(family) for family in FAMILIES}
    # In another process: where vLLM has loaded a model, Transformers' classes cannot be built.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(write, found, found.values()))
    return found


@pytest.fixture(scope="module")
def with_head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("Glm4Moe")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        pool.submit(draft_heads.make, "Glm4Moe", folder).result()
    return folder


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many parameters were looked at, of each model that was loaded."""
    found: list[int] = []
    stock = plain._left

    def left(model: torch.nn.Module, marks: list[Any]) -> Any:
        found.append(len(marks))
        return stock(model, marks)

    monkeypatch.setattr(plain, "_left", left)
    yield found


def lacking(source: Path, folder: Path, *names: str) -> Path:
    """A copy without those tensors."""

    def take(tensors: dict[str, torch.Tensor]) -> None:
        for name in names:
            del tensors[name]

    return Damage(source, folder).tensors(take)


@pytest.mark.parametrize("stored", [*LAYOUTS, "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_has_all_loads(
    load: Load, folders: dict[str, Path], checked: list[int], family: str, stored: str
) -> None:
    """Offline and on the fly. Nothing is left of the marks: what has a name in the files is what
    is in them, and all else is a number."""
    folder = folders[family] / stored
    model = load(folder, skip_tokenizer_init=True)["model"]
    (count,) = checked
    assert count > 10
    tensors = load_file(folder / "model.safetensors")
    compared = 0
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            assert not parameter.isnan().any(), name
        if name in tensors and tensors[name].shape == parameter.shape:
            compared += torch.equal(parameter.to(tensors[name].dtype), tensors[name])
    assert compared >= 5


@pytest.mark.parametrize("layout", [*LAYOUTS, "bf16"])
@pytest.mark.parametrize("name", MISSING)
def test_one_tensor_that_is_not_there(
    load: Load, folders: dict[str, Path], tmp_path: Path, layout: str, name: str
) -> None:
    folder = lacking(folders["glm4_moe"] / layout, tmp_path / "lacking", name)
    message = rf"{re.escape(str(folder))}: nothing was loaded into {re.escape(name)}: "
    with pytest.raises(RefusedError, match=message):
        load(folder, skip_tokenizer_init=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_vllms_transformers_backend(
    load: Load, shallow: dict[str, Path], tmp_path: Path, layout: str
) -> None:
    for number, name in enumerate(
        ("model.layers.1.post_attention_layernorm.weight", "model.embed_tokens.weight")
    ):
        folder = lacking(shallow[layout], tmp_path / str(number), name)
        with pytest.raises(RefusedError, match=f"nothing was loaded into {re.escape(name)}: "):
            load(folder)


def test_many(load: Load, folders: dict[str, Path], tmp_path: Path) -> None:
    """An error names a few."""
    source = folders["olmoe"] / "modelopt"
    names = [n for n in load_file(source / "model.safetensors") if "norm" in n]
    assert len(names) > 5
    folder = lacking(source, tmp_path / "lacking", *names)
    with pytest.raises(
        RefusedError, match=rf"weight and {len(names) - 4} more: the checkpoint"
    ) as e:
        load(folder, skip_tokenizer_init=True)
    assert sum(name in str(e.value) for name in names) == 4


def test_a_name_that_the_class_does_not_know(
    load: Load, folders: dict[str, Path], tmp_path: Path
) -> None:
    """As HY-V4's under the names of Transformers' saving. GPT-OSS's, too, says nothing."""

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if n.endswith(".post_attention_layernorm.weight")]:
            tensors[name.replace("post_attention", "attention_post")] = tensors.pop(name)

    folder = Damage(folders["gpt_oss"] / "modelopt", tmp_path / "renamed").tensors(rename)
    message = r"nothing was loaded into \S+\.0\.post_attention_layernorm\.weight, \S+\.1\.post_"
    with pytest.raises(RefusedError, match=message):
        load(folder, skip_tokenizer_init=True)


class NoAttention(torch.nn.Module):
    """In the place of HY-V4's, which no CPU runs."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()


def test_hy_v4(
    load: Load, tmp_path: Path, checked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's own class, with what Transformers saves, and with the published names."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        pool.submit(write, "hy_v4", tmp_path).result()
    monkeypatch.setattr("vllm.models.hy_v4.nvidia.model.HYV4MLAAttention", NoAttention)

    def named(patterns: dict[str, str]) -> Path:
        folder = tmp_path / str(len(patterns))

        def rename(tensors: dict[str, torch.Tensor]) -> None:
            for name in list(tensors):
                tensor, new = tensors.pop(name), name
                for pattern, published in patterns.items():
                    new = re.sub(pattern, published, new)
                if ".self_attn." not in name:
                    tensors[new] = tensor

        source = Damage(tmp_path / "bf16", folder / "bf16").tensors(rename)
        return others.quantized(source, folder / "nvfp4")

    published = RENAMED["hy_v4"]
    saved = named({each: name for each, name in published.items() if "hc_pre" not in each})
    renamed = named(published)
    message = r"nothing was loaded into model\.hc_head\.hc_head_base, "
    with pytest.raises(RefusedError, match=message):
        load(saved, skip_tokenizer_init=True)
    model = load(renamed, skip_tokenizer_init=True)["model"]
    assert len(checked) == 2
    tensors = load_file(renamed / "model.safetensors")
    for name in [n for n in tensors if n.endswith(("hc_base", "hc_scale"))]:
        assert torch.equal(model.get_parameter(name), tensors[name].float()), name


def test_a_norm_that_the_class_does_not_use(
    load: Load, folders: dict[str, Path], tmp_path: Path
) -> None:
    """vLLM's class for A.X-K1 makes one for dense layers, too, which no checkpoint of Transformers
    has."""
    source, name = folders["axk1"] / "modelopt", "model.layers.{}.post_mlp_layernorm.weight"
    assert name.format(0) not in load_file(source / "model.safetensors")
    load(source, skip_tokenizer_init=True)
    folder = lacking(source, tmp_path / "lacking", name.format(1))
    with pytest.raises(
        RefusedError, match=f"nothing was loaded into {re.escape(name.format(1))}: "
    ):
        load(folder, skip_tokenizer_init=True)


def test_a_tied_head(load: Load, tmp_path: Path) -> None:
    """There is no tensor for it, and nothing lacks."""
    source = others.plain(tmp_path / "bf16", tie_word_embeddings=True)
    folder = others.quantized(source, tmp_path / "nvfp4")
    tensors = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in tensors
    model = load(folder, skip_tokenizer_init=True)["model"]
    assert torch.equal(model.model.embed_tokens.weight, tensors["model.embed_tokens.weight"])
    without = lacking(folder, tmp_path / "lacking", "model.embed_tokens.weight")
    with pytest.raises(RefusedError, match=r"nothing was loaded into \S*(embed_tokens|lm_head)"):
        load(without, skip_tokenizer_init=True)


def test_reloads_may_bring_a_part(load: Load, folders: dict[str, Path]) -> None:
    model = load(folders["glm4_moe"] / "modelopt", skip_tokenizer_init=True)["model"]
    name = "model.norm.weight"
    new = torch.full_like(model.model.norm.weight, 0.5)
    model.load_weights([(name, new)])
    assert torch.equal(model.model.norm.weight, new)


def test_dummy_weights(
    load: Load, folders: dict[str, Path], tmp_path: Path, checked: list[int]
) -> None:
    """They are in no file, and what a trainer pushes later may be a part."""
    source = folders["glm4_moe"] / "modelopt"
    folder = lacking(source, tmp_path / "lacking", "model.norm.weight")
    model = load(folder, skip_tokenizer_init=True, load_format="dummy")["model"]
    new = torch.full_like(model.model.norm.weight, 0.5)
    model.load_weights([("model.norm.weight", new)])
    assert torch.equal(model.model.norm.weight, new)
    assert checked == []


def test_other_models(load: Load, folders: dict[str, Path], checked: list[int]) -> None:
    """Nothing of vLLM's changes for them."""
    model = load(folders["glm4_moe"] / "bf16", None, skip_tokenizer_init=True)["model"]
    assert checked == [] and "load_weights" not in vars(model)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_draft_without_a_norm_is_said(
    load: Load, with_head: Path, tmp_path: Path, checked: list[int], layout: str,
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The text stays right. Its embedding and head vLLM has from the model."""
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    source = with_head / f"{layout}-plain"
    load(source, speculative_config=SPECULATE)
    assert len(checked) == 2 and "nothing was loaded" not in caplog.text
    last = draft_heads.LAST
    shared = (f"{last}embed_tokens.weight", f"{last}shared_head.head.weight")
    load(lacking(source, tmp_path / "shared", *shared), speculative_config=SPECULATE)
    assert "nothing was loaded" not in caplog.text
    load(lacking(source, tmp_path / "lacking", f"{last}enorm.weight"), speculative_config=SPECULATE)
    assert re.search(r"nothing was loaded into \S*\.enorm\.weight: ", caplog.text)
    assert "hardly any draft would be right" in caplog.text


class Plain(torch.nn.Module):
    """As one of vLLM's classes, that loads and reports as it is told."""

    def __init__(self, load: Callable[[Plain], Any]) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(4)
        self.scale = torch.nn.Parameter(torch.full((), 3.0))
        self.table = torch.nn.Parameter(torch.zeros(2, dtype=torch.int32), requires_grad=False)
        self._load = load

    def load_weights(self, weights: Any) -> Any:
        return self._load(self)


def fill(model: Plain, *names: str) -> None:
    for name in names:
        model.get_parameter(name).data.fill_(7.0)


ALL = ("norm.weight", "norm.bias", "scale")


def test_what_is_reported_and_stays_as_it_was_made() -> None:
    def load(model: Plain) -> set[str]:
        fill(model, "norm.weight")
        return set(ALL)

    model = Plain(load)
    plain.guard(model, "folder", draft=False)
    assert model.load_weights([]) == set(ALL)
    assert torch.equal(model.scale, torch.tensor(3.0))
    assert torch.equal(model.norm.bias, torch.zeros(4))
    assert torch.equal(model.norm.weight, torch.full((4,), 7.0))


def test_what_is_loaded_and_not_reported() -> None:
    def load(model: Plain) -> set[str]:
        fill(model, "norm.weight")
        model.norm.bias.data = torch.ones(4)  # another tensor
        model.scale = torch.nn.Parameter(torch.tensor(2.0))  # another parameter
        return set()

    model = Plain(load)
    plain.guard(model, "folder", draft=False)
    model.load_weights([])
    assert torch.equal(model.norm.bias, torch.ones(4)) and model.scale == 2


def test_a_class_that_reports_nothing() -> None:
    """Then vLLM does not look either, and what was made is there again."""
    model = Plain(lambda model: None)
    plain.guard(model, "folder", draft=False)
    assert model.load_weights([]) is None
    assert model.scale == 3 and torch.equal(model.norm.weight, torch.ones(4))


def test_a_class_that_fails() -> None:
    """Its own error is said, and nothing stays marked."""

    def load(model: Plain) -> set[str]:
        raise KeyError("its own")

    model = Plain(load)
    plain.guard(model, "folder", draft=False)
    with pytest.raises(KeyError, match="its own"):
        model.load_weights([])
    assert model.scale == 3


def test_an_adapters_class_is_the_one_that_it_is_derived_from() -> None:
    """vLLM's pooling models are made so, with other names: A.X-K1's has the same norms in vain."""

    class AXK1ForCausalLM(Plain):
        def __init__(self) -> None:
            super().__init__(lambda model: set(ALL))
            self.layers = torch.nn.ModuleList([torch.nn.Module()])
            self.layers[0].post_mlp_layernorm = torch.nn.RMSNorm(4)
            self.layers[0].mlp = torch.nn.Module()

    class AXK1ForEmbedding(AXK1ForCausalLM):
        pass

    for kind in (AXK1ForCausalLM, AXK1ForEmbedding):
        model = kind()
        plain.guard(model, "folder", draft=False)
        model.load_weights([])
    model.layers[0].mlp.experts = torch.nn.Module()  # with experts it is used
    plain.guard(model, "folder", draft=False)
    with pytest.raises(RefusedError, match="post_mlp_layernorm"):
        model.load_weights([])


def test_memory_of_several_ranks_is_let_alone() -> None:
    """As of DeepSeek-V4.1's tables, into which one rank writes for all."""
    seen: list[torch.Tensor] = []

    def load(model: Plain) -> set[str]:
        seen.append(model.norm.weight.detach().clone())
        return set(ALL)

    model = Plain(load)
    model.norm._shared_memory = object()
    plain.guard(model, "folder", draft=False)
    model.load_weights([])
    assert torch.equal(seen[0], torch.ones(4))


@pytest.mark.parametrize("name", ALL)
def test_each_is_looked_at(name: str) -> None:
    def load(model: Plain) -> set[str]:
        fill(model, *set(ALL) - {name})
        return set(ALL) - {name}

    model = Plain(load)
    plain.guard(model, "folder", draft=False)
    with pytest.raises(RefusedError, match=rf"folder: nothing was loaded into {name}: .* Plain "):
        model.load_weights([])
