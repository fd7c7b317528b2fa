"""The whole way once: a checkpoint, its NVFP4 quantization, and vLLM serving it.

    make demo                      with a small model trained on the spot, no download
    make demo MODEL=FOLDER_OR_ID   with a mixture-of-experts model of yours

Exits with 0 only if every step worked.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import psutil  # type: ignore[import-untyped]
from openai import OpenAI
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import AutoTokenizer

from examples import server
from examples.perplexity import (
    Rows,
    context_length,
    held_out_rows,
    perplexity,
    server_perplexity,
)

HERE = Path(__file__).resolve().parent
SERVED_AS = "demo"
QUESTION = "Read a file and return its lines."
CODE = "import os\nimport sys\n\n\ndef read_file(path):\n"

console = Console()
seconds: dict[str, float] = {}  # by step, for the table at the end


@contextlib.contextmanager
def step(title: str) -> Iterator[None]:
    """Print a numbered heading and keep how long the step took."""
    console.rule(f"[bold]{len(seconds) + 1}. {title}", align="left")
    start = time.monotonic()
    seconds[title] = 0.0
    yield
    seconds[title] = time.monotonic() - start


def run_tool(*arguments: str) -> None:
    """Run our console script, the one beside this interpreter; raises CalledProcessError."""
    tool = Path(sys.executable).with_name("nvfp4-moe")
    console.print(f"[dim]$ nvfp4-moe {' '.join(arguments)}[/]", highlight=False)
    subprocess.run([str(tool), *arguments], check=True)


def own_model(work: Path) -> str:
    """The small MiniMax-M3 made on the spot; one made by an earlier demo is used again."""
    out = work.resolve() / "m3-tiny"
    if (out / "config.json").exists():
        console.print(f"{out} is there already")
    else:
        # A process of its own: its memory, and how it sets up OpenMP, are not for the rest of us.
        subprocess.run(
            [sys.executable, "-m", "examples.make_checkpoint", str(out)],
            cwd=HERE.parent,
            check=True,
        )
    return str(out)


def stored_bytes(model: str) -> int:
    """Bytes of a model's safetensors files, in a folder or on the hub."""
    if Path(model).is_dir():
        return sum(file.stat().st_size for file in Path(model).glob("*.safetensors"))
    from huggingface_hub import HfApi

    files = HfApi().model_info(model, files_metadata=True).siblings or []
    return sum(file.size or 0 for file in files if file.rfilename.endswith(".safetensors"))


def perplexity_before(model: str, rows: Rows) -> float | None:
    """Perplexity of the original through Transformers; None, said why, where that cannot be had."""
    config = source_config(model)
    if "quantization_config" in config or "quantization_config" in config.get("text_config", {}):
        console.print("the original is stored quantized: not computed in Transformers, left out")
        return None
    available = psutil.virtual_memory().available
    # bf16 on disk: as much again for float32, and some for a layer's activations and the logits.
    for dtype, factor in (("float32", 2.5), ("bfloat16", 1.3)):
        if factor * stored_bytes(model) < available:
            return perplexity(model, rows, dtype=dtype)
    console.print("the original does not fit into this machine's memory: left out")
    return None


def source_config(model: str) -> dict[str, Any]:
    """config.json of a model in a folder or on the hub."""
    if Path(model).is_dir():
        path = Path(model) / "config.json"
    else:
        from huggingface_hub import hf_hub_download

        path = Path(hf_hub_download(model, "config.json"))
    config: dict[str, Any] = json.loads(path.read_text())
    return config


def ask(client: OpenAI, chat: bool) -> str:
    """Ask for one chat answer (where the model has a chat template) and one piece of code.

    Both are shown as they come; the last is returned.
    """
    console.print("models:", ", ".join(model.id for model in client.models.list()))
    if chat:
        console.print(f"\n[bold]chat[/] [cyan]{QUESTION}")
        pieces = client.chat.completions.create(
            model=SERVED_AS,
            messages=[{"role": "user", "content": QUESTION}],
            max_tokens=120,
            temperature=0.5,
            seed=1,
            stream=True,
        )
        for piece in pieces:
            if piece.choices:
                delta = piece.choices[0].delta
                # What a reasoning model thinks comes in a field of its own.
                text = delta.content or (delta.model_extra or {}).get("reasoning") or ""
                console.print(text, end="", markup=False, highlight=False, soft_wrap=True)
        console.print()
    else:
        console.print("the model has no chat template: no chat")

    console.print(f"\n[bold]completion[/]\n[cyan]{CODE}", end="", highlight=False)
    answer = client.completions.create(
        model=SERVED_AS, prompt=CODE, max_tokens=120, temperature=0.5, seed=1
    )
    code = answer.choices[0].text
    console.print(code, markup=False, highlight=False)
    if not code.strip():
        fail("the completion is empty")
    return code


def fail(message: str) -> NoReturn:
    """Say what went wrong, and leave with 1; the server, if one runs, is stopped on the way."""
    console.print(f"[bold red]failed:[/] {escape(message)}", highlight=False)
    raise SystemExit(1)


def report(before: int, after: int, figures: tuple[float | None, float], answer: str) -> None:
    """The table at the end: bytes, perplexities, seconds, the answer."""
    original, served = figures
    table = Table(title="NVFP4 mixture of experts", title_justify="left", show_lines=True)
    table.add_column("")
    table.add_column("before")
    table.add_column("after")
    table.add_row("safetensors", f"{before / 1e6:,.1f} MB", f"{after / 1e6:,.1f} MB")
    table.add_row("perplexity", "-" if original is None else f"{original:.3f}", f"{served:.3f}")
    table.add_row("answer", "", escape("\n".join(answer.strip("\n").splitlines()[:6])))
    console.print(table)
    for title, took in seconds.items():
        console.print(f"{took:7.1f} s  {title}", highlight=False)
    console.print(f"[bold]{sum(seconds.values()):7.1f} s  in all", highlight=False)


def demo(args: argparse.Namespace) -> None:
    """Go through all steps; raises or exits at the first that fails."""
    args.work.mkdir(parents=True, exist_ok=True)
    if args.model:
        source = args.model
    else:
        with step("Make a small MiniMax-M3"):
            source = own_model(args.work)
    target = args.work / f"{Path(source).name}-nvfp4-{args.layout}"

    with step("Quantize the experts"):
        run_tool("quantize", source, str(target), "--layout", args.layout, "--overwrite")
    with step("Verify"):
        run_tool("verify", source, str(target))

    tokenizer = AutoTokenizer.from_pretrained(target)
    context = min(context_length(target) or 2048, 2048)
    # The server adds a token to each row of the text, so a row must leave room for it.
    rows = held_out_rows(tokenizer, args.rows, min(513, context - 1))
    with step("Perplexity of the original"):
        original = perplexity_before(source, rows)
        if original is not None:
            console.print(f"{original:.3f} over {len(rows)} rows of {len(rows[0])} tokens")

    options = ["--quantization", "nvfp4_moe", "--max-model-len", str(context)]
    options += ["--served-model-name", SERVED_AS]
    log = args.work / "server.log"
    port = args.port or server.free_port()
    with contextlib.ExitStack() as stack:
        with step("Start vLLM"):
            url = stack.enter_context(
                server.serving(
                    target, options, port=port, log=log, console=console, limit=args.start_limit
                )
            )
        with step("Ask"):
            answer = ask(OpenAI(base_url=url, api_key="none"), bool(tokenizer.chat_template))
        with step("Perplexity of the server"):
            served = server_perplexity(url, SERVED_AS, rows)
            console.print(f"{served:.3f} over the same rows")
        with step("Stop vLLM"):
            stack.close()

    report(stored_bytes(source), stored_bytes(str(target)), (original, served), answer)


def main() -> None:
    """Parse the arguments and run the demo."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a folder or hub id; default: make one on the spot")
    parser.add_argument("--layout", default="modelopt", choices=["modelopt", "compressed-tensors"])
    parser.add_argument("--port", type=int, default=0, help="default: any that is free")
    parser.add_argument("--work", type=Path, default=HERE.parent / "demo", help="for all files")
    parser.add_argument("--rows", type=int, default=6, help="held-out rows of 513 tokens")
    parser.add_argument("--start-limit", type=float, default=900, help="seconds to start in")
    args = parser.parse_args()
    # So that being told to end unwinds like Ctrl-C does, and takes the server along.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` would ignore it
    try:
        demo(args)
    except KeyboardInterrupt:
        console.print("\ninterrupted")
        raise SystemExit(130) from None
    except subprocess.CalledProcessError as error:
        fail(f"{Path(error.cmd[0]).name} {error.cmd[1]} ended with code {error.returncode}")
    except server.ServerError as error:
        fail(str(error))


if __name__ == "__main__":
    main()
