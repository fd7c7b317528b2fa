"""The model card: what was made of which model, by which command, what it lost, how to serve it.

SRC's own card is kept below. Its front matter is merged: its license, languages and what it is for
are this model's too; its results are not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.filesize import decimal

from quantize.duration import duration
from quantize.errors import QuantizeError
from quantize.layouts import LAYOUTS
from quantize.push.checkpoint import CARD, Finished
from quantize.push.report import command

_NOT_INHERITED = ("model-index", "base_model", "base_model_relation", "library_name", "tags")
"""Of SRC's front matter: its measured results, and what is said anew."""


def card(made: Finished, name: str, evaluation: dict[str, Any] | None = None) -> str:
    """The card of ``made`` as ``name`` on the hub.

    Args:
        evaluation: what ``evaluate --json`` printed.

    Raises:
        QuantizeError: if ``evaluation`` is something else.
    """
    fields, text = _split(made.folder / CARD)
    parts = [
        f"# {name.rpartition('/')[2]}",
        _what(made),
        _table(_facts(made)),
        *(["## What it lost", _figures(evaluation)] if evaluation is not None else []),
        "## How to serve it",
        _serving(made, name),
    ]
    if text.strip():
        parts += ["---", "The card of the model that this one was made of:", text.strip()]
    front = _yaml(_front_matter(made, fields))
    return f"---\n{front}---\n\n" + "\n\n".join(parts) + "\n"


def _what(made: Finished) -> str:
    base = made.base
    of = f"[{base[0]}](https://huggingface.co/{base[0]})" if base else "a model"
    gate = ", ".join(sorted({layer.gate for layer in made.report.layers if layer.gate}))
    also = ""
    if made.report.dense:
        also = f" So are {len(made.report.dense.errors)} dense linears."
    if made.report.base:
        also += f" {len(made.report.base.names)} linears beside them are in "
        also += f"{made.report.base.format.upper()}."
    return (
        f"{of} with its routed experts in NVFP4 (4-bit values, an FP8 scale for each 16 of them)."
        f"{also} Everything else is as it was. The experts' gate, as `config.json` states it: "
        f"{gate}."
    )


def _facts(made: Finished) -> dict[str, str]:
    report, base = made.report, made.base
    facts: dict[str, str] = {}
    if base:
        facts |= {"base model": f"`{base[0]}`", "revision": f"`{base[1]}`"}
    facts |= {
        "recipe": ", ".join(_recipe(made)),
        "command": f"`{command(made)}`",
        "versions": ", ".join(f"{package} {v}" for package, v in report.versions.items()),
        "size": f"{decimal(report.bytes_before)} before, {decimal(report.bytes_after)} after",
    }
    return facts


def _recipe(made: Finished) -> list[str]:
    report = made.report
    activations = "weights and activations" if report.activations == "nvfp4" else "weights only"
    found = [f"{activations} in NVFP4", f"layout `{report.layout}`", f"scales `{report.scales}`"]
    if used := report.calibration or report.input_scales:
        what = f"rounding `{used.method}`" if used.method else "input scales"
        found.append(f"{what} by {used.num_samples} x {used.sequence_length} tokens of text")
    if report.bits:
        found.append(f"{report.bits.asked} bits a weight at most")
    if report.kv_cache:
        found.append(f"key-value cache `{report.kv_cache}`")
    if report.converted:
        found.append("converted from NVFP4")
    return found


def _figures(evaluation: dict[str, Any]) -> str:
    try:
        perplexity = evaluation["perplexity"]
        rows = {
            "perplexity": f"{perplexity['source']:.3f} before, {perplexity['target']:.3f} after "
            f"({perplexity['change_percent']:+.2f} %)",
            "KL divergence to the original": f"{evaluation['kl']['mean']:.5f} nats a token",
            "top-1 agreement": f"{evaluation['top1_agreement']:.2%}",
            "text": f"{Path(evaluation['text']).name}, {evaluation['samples']} rows of "
            f"{evaluation['length']} tokens",
            "activations": str(evaluation["activations"]),
            "computed in": f"{evaluation['dtype']}, {duration(evaluation['seconds'])}",
        }
    except (LookupError, TypeError, ValueError) as error:
        raise QuantizeError(
            f"--evaluation: this is not what evaluate --json prints ({error!r})"
        ) from error
    return _table(rows) + "\n\nBy `nvfp4-moe evaluate`, original and quantized side by side."


def _serving(made: Finished, name: str) -> str:
    lines = (
        "With the plugin of vllm-nvfp4-moe, which applies the gate that `config.json` states and "
        f"checks every tensor:\n\n```\nvllm serve {name} --quantization nvfp4_moe\n```\n\n"
    )
    gates = {layer.gate for layer in made.report.layers}
    if any("post_norm" in gate for gate in gates):
        return (
            f"{lines}On Hopper GPUs add `--moe-backend marlin`. vLLM does not load it without the "
            "plugin: its class for such a model, whose experts have a norm after down (Muse "
            "Spark), loads stacks of all experts alone."
        )
    if gates <= {"silu", "silu(interleaved)"}:
        return f"{lines}vLLM reads it without the plugin, too: `vllm serve {name}`."
    return (
        f"{lines}vLLM reads this layout without the plugin, too; whether it then applies this gate "
        "depends on its class of the model, and it does not check."
    )


def _table(rows: dict[str, str]) -> str:
    lines = [f"| {key} | {value.replace('|', chr(92) + '|')} |" for key, value in rows.items()]
    return "\n".join(["| | |", "| --- | --- |", *lines])


# -- front matter ----------------------------------------------------------------------------------


def _front_matter(made: Finished, of_source: dict[str, Any]) -> dict[str, Any]:
    found = {key: value for key, value in of_source.items() if key not in _NOT_INHERITED}
    if made.base:
        found |= {"base_model": made.base[0], "base_model_relation": "quantized"}
    tags = of_source.get("tags")
    tags = [str(tag) for tag in tags] if isinstance(tags, list) else []
    layout = LAYOUTS[made.report.layout].name
    ours = ["nvfp4", "fp4", "moe", layout, "vllm"]
    found["library_name"] = "vllm"
    found["tags"] = [*tags, *(tag for tag in ours if tag not in tags)]
    return found


def _split(file: Path) -> tuple[dict[str, Any], str]:
    """A card's front matter and its text; nothing, if there is no card. What is between the dashes
    and cannot be read stays in the text."""
    import yaml

    try:
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        return {}, ""
    except (OSError, ValueError) as error:
        raise QuantizeError(f"{file}: cannot be read as text ({error})") from error
    lines = text.splitlines(keepends=True)
    if not lines or lines[0].strip() != "---":
        return {}, text
    end = next((n for n, line in enumerate(lines[1:], 1) if line.strip() == "---"), None)
    if end is None:
        return {}, text
    try:
        fields = yaml.safe_load("".join(lines[1:end]))
    except yaml.YAMLError:
        return {}, "```yaml\n" + "".join(lines[1:end]) + "```\n" + "".join(lines[end + 1 :])
    return (fields if isinstance(fields, dict) else {}), "".join(lines[end + 1 :])


def _yaml(fields: dict[str, Any]) -> str:
    import yaml

    return str(yaml.safe_dump(fields, sort_keys=False, allow_unicode=True, width=10**6))
