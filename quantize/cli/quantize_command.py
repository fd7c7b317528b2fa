"""``nvfp4-moe quantize``: writes the NVFP4 checkpoint."""

from __future__ import annotations

import shlex
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from quantize.checkpoint.hub import look_up
from quantize.cli.before_it_starts import say, say_activations, summary
from quantize.cli.dry_run import DryOption, show
from quantize.cli.errors import UsageError, reporting_errors
from quantize.cli.large_imports import large_imports
from quantize.cli.options import (
    DESCENT,
    KEPT,
    LARGEST,
    MODELOPT,
    MSE,
    Activations,
    BaseOption,
    BitsOption,
    ExcludeOption,
    GateOption,
    IncludeOption,
    InputScaleOption,
    KvCache,
    KvCacheOption,
    LayoutOption,
    LinearsOption,
    LogOption,
    MethodName,
    QuietOption,
    RuleName,
    Source,
    Target,
    TrustOption,
    WeightOnlyOption,
    check_device,
    device_of,
    shard_size,
    stated_base,
    stated_bits,
    stated_gate,
    stated_weight_only,
)
from quantize.cli.output import err
from quantize.cli.progress import Bar, Shown, downloading, progress_bar
from quantize.cli.push_options import (
    EvaluationOption,
    PushOption,
    check_push,
    push_finished,
    reserve_for,
)
from quantize.cli.signals import ending_at_once
from quantize.cli.source_options import RevisionOption, StreamOption, check_stream
from quantize.cli.text_options import check_text_options, said
from quantize.cli.when_done import say_done
from quantize.errors import QuantizeError
from quantize.run.options import Calibration, Options


def quantize(
    context: typer.Context,
    source: Source,
    target: Target,
    revision: RevisionOption = None,
    stream: StreamOption = False,
    layout: LayoutOption = MODELOPT,
    scales: Annotated[
        RuleName,
        typer.Option(
            "--scales",
            help="How block scales are chosen, e.g. --scales max: faster on CPUs, and less close.",
        ),
    ] = MSE,
    max_shard_size: Annotated[
        str,
        typer.Option(
            "--max-shard-size", metavar="SIZE", help="Largest output file, e.g. 500MB or 5GiB."
        ),
    ] = "5GB",
    include: IncludeOption = None,
    exclude: ExcludeOption = None,
    all_linears: LinearsOption = False,
    base: BaseOption = KEPT,
    bits: BitsOption = None,
    kv_cache: KvCacheOption = None,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Replace the checkpoint in a non-empty DST, e.g. --scales max --overwrite.",
        ),
    ] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on with an interrupted run in DST, e.g. by the same command with --resume; "
            "start if there is none, and do nothing if it is complete already.",
        ),
    ] = False,
    device: Annotated[
        list[str] | None,
        typer.Option(
            "--device",
            metavar="DEVICE",
            help="What computes, e.g. --device cpu or --device cuda:1; can be given several times. "
            "All GPUs by default, the CPU where there is none.",
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            "--threads",
            min=1,
            help="CPU threads, e.g. --threads 16; by default as many as cores, but no more than "
            "fit in 400 MB. Each needs memory for one expert.",
        ),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            "--ray",
            metavar="ADDRESS",
            help="Spread shards over a Ray cluster, e.g. --ray auto or --ray ray://head:10001; "
            "SRC and DST must be on storage that all its machines share.",
        ),
    ] = None,
    gate: GateOption = None,
    trust_remote_code: TrustOption = False,
    activations: Annotated[
        Activations | None,
        typer.Option(
            "--activations",
            help="bf16: weights only. nvfp4: kernels that can may quantize activations too, by "
            "input scales. By default nvfp4 where --calibrate or --input-scales finds the input "
            "scales of all that is quantized, else bf16; e.g. --activations bf16.",
        ),
    ] = None,
    weight_only: WeightOnlyOption = None,
    input_scales: Annotated[
        list[str] | None,
        typer.Option(
            "--input-scales",
            metavar="TEXT",
            help="Run the model over a little of this text, and find nothing but the input scales "
            "of its experts: minutes instead of hours, e.g. --input-scales texts.jsonl. What TEXT "
            "may be: see --calibrate.",
        ),
    ] = None,
    input_scale_rule: InputScaleOption = LARGEST,
    text: Annotated[
        list[str] | None,
        typer.Option(
            "--calibrate",
            metavar="TEXT",
            help="Run the model over this text, a layer at a time, and quantize each expert for "
            "what it is given: much closer, hours instead of minutes. A file (text, JSON, JSON "
            "lines, Parquet), a folder, or a data set on the hub, e.g. --calibrate texts.jsonl or "
            "--calibrate ORG/NAME:train; several are mixed evenly.",
        ),
    ] = None,
    calibration_rows: Annotated[
        int | None,
        typer.Option(
            "--calibration-rows",
            min=1,
            help="Pieces of text, e.g. --calibration-rows 512; by default 128, and 32 with "
            "--input-scales.",
        ),
    ] = None,
    calibration_length: Annotated[
        int,
        typer.Option(
            "--calibration-length", min=2, help="Tokens of each, e.g. --calibration-length 1024."
        ),
    ] = 2048,
    rounding: Annotated[
        MethodName,
        typer.Option(
            "--rounding",
            help="How calibrated weights are rounded, e.g. --rounding gptq: faster, not as close; "
            "two-sided: closest, with the loss's gradients, reading experts three times.",
        ),
    ] = DESCENT,
    every_expert: Annotated[
        bool,
        typer.Option(
            "--every-expert",
            help="Calibrate each expert with all tokens, not only with those that the router sends "
            "it, e.g. --calibrate texts.jsonl --every-expert: for texts too few for some experts.",
        ),
    ] = False,
    check_text: Annotated[
        bool,
        typer.Option(
            "--check-text/--no-check-text",
            help="Before any expert is rounded, run the model over the text once more, and list "
            "experts that get too little of it; e.g. --no-check-text saves that pass.",
        ),
    ] = True,
    yes: Annotated[
        bool,
        typer.Option(
            "--yes",
            help="Calibrate even if that takes more than three days, or more memory than there is, "
            "e.g. --calibrate texts.jsonl --yes.",
        ),
    ] = False,
    work_dir: Annotated[
        Path | None,
        typer.Option(
            "--work-dir",
            metavar="DIR",
            help="Keep calibration's hidden states in a folder of the run's own in DIR, not in "
            "DST, e.g. --calibrate texts.jsonl --work-dir /scratch.",
        ),
    ] = None,
    push_to: PushOption = None,
    evaluation: EvaluationOption = None,
    dry_run: DryOption = False,
    log_file: LogOption = None,
    quiet: QuietOption = False,
) -> None:
    """Write SRC to DST with its routed experts in NVFP4, everything else byte for byte."""
    again = "--resume instead of --overwrite" if overwrite else "--resume"
    advice = "nothing was changed" if dry_run else f"run the same command with {again} to go on"
    with reporting_errors(advice, quiet, log_file, [Path(source), target]):
        if overwrite and resume:
            raise UsageError("--overwrite and --resume exclude each other")
        check_text_options(context, text, input_scales, activations, all_linears)
        read = text or input_scales or []
        check_stream(stream, bool(read), ray)
        check_push(push_to, source, evaluation, overwrite or resume)
        command = _command(context)
        patterns, floats = stated_weight_only(weight_only, bool(read))
        if read:
            from quantize.calibration.sources import check_there

            for one in read:
                check_there(one)
        found = bool(read)
        # Calibration sees the inputs of experts alone.
        default = Activations.NVFP4 if found and not all_linears else Activations.BF16
        chosen = activations or default
        options = Options(
            layout=layout.value,
            scales=scales.value,
            # Without either, an NVFP4 source decides.
            activations=chosen is Activations.NVFP4 if activations or found else None,
            weight_only=patterns,
            max_shard_size=shard_size(max_shard_size),
            gate=stated_gate(gate),
            include=tuple(include or ()),
            exclude=tuple(exclude or ()),
            linears=all_linears,
            base=stated_base(base, all_linears),
            bits=stated_bits(bits),
            kv_cache=kv_cache.value if kv_cache else None,
            kv_scales=kv_cache is KvCache.FP8 and found,
            trust_remote_code=trust_remote_code,
        )
        for name in device or ():
            check_device(name)
        if ray and device:
            raise UsageError("--device is for this machine, and --ray uses a cluster's devices")
        with large_imports():
            from quantize.calibration.bits import plan_before, within_bits
            from quantize.calibration.budget import needed
            from quantize.calibration.samples import digest_of, load_samples
            from quantize.checkpoint.opened import opened
            from quantize.execute import execute
            from quantize.run.apart import check_apart
            from quantize.run.cluster import connected, room_on_ray
            from quantize.run.fetch import fetch
            from quantize.run.lock import check_unlocked
            from quantize.run.plan import plan
            from quantize.run.target import FOLDER, check_folder, check_target, check_writable
            from quantize.run.work_dir import WorkDir
            from quantize.run.workers import all_devices

        # Two names may be of one device: cuda and cuda:0.
        devices = list(dict.fromkeys(map(device_of, device))) if device else None
        computing = devices or all_devices()
        check_folder(target)  # all of this before anything is downloaded
        check_writable(target, "DST")
        if work_dir is not None:
            WorkDir(work_dir, target).check()
        check_unlocked(target / FOLDER)
        goes_on = push_to is not None and not (overwrite or resume or dry_run)
        if goes_on and push_finished(push_to, target, command, evaluation):
            return
        check_target(target, overwrite, resume)
        with ending_at_once():
            there = opened(look_up(source, revision), whole=True, stream=stream)
        with connected(ray) if ray else nullcontext(), there as checkpoint:
            check_apart(checkpoint, target)
            steps = plan(checkpoint, replace(options, bits=None))
            if said(context, "scales") and not steps.quantizes:
                raise QuantizeError(
                    f"--scales: {source} is NVFP4 already, and its scales are kept; leave it out"
                )
            err.print(summary(steps), highlight=False)
            for note in steps.notes:
                say(note)
            say_activations(steps, found, activations is None)
            tokens = needs = None
            if read:
                steps.check_can_calibrate()
                wanted = calibration_rows or (128 if text else 32), calibration_length
                with ending_at_once():
                    folder = checkpoint.folder
                    tokens = load_samples(read, folder, *wanted, trust_remote_code, say)
                rows, length = tokens.shape
                calibration = Calibration(
                    ", ".join(read),
                    rows,
                    length,
                    digest_of(tokens),
                    rounding.value if text else None,
                    every_expert,
                    input_scale_rule.value,
                )
                steps = replace(steps, options=replace(steps.options, calibration=calibration))
            if tokens is not None:
                needs = needed(checkpoint, steps, computing[0])
                err.print(f"Calibration: {needs}", highlight=False)
            if push_to and not dry_run:
                reserve_for(push_to, checkpoint, steps)
            states = needs.states if needs else 0
            later = bits is not None or floats is not None
            known = (
                plan_before(checkpoint, steps, options, target, floats)
                if later and resume
                else None
            )
            with ending_at_once():
                fetch(
                    checkpoint,
                    known or steps,
                    target,
                    states,
                    work_dir,
                    overwrite,
                    resume,
                    known is not None or not later,
                    dry_run,
                    downloading,
                )
            with (
                nullcontext(Bar(Shown(), "Quantizing"))
                if dry_run
                else progress_bar("Quantizing", checkpoint.nbytes, lambda: checkpoint.nbytes_read)
            ) as bar:
                if later:
                    assert tokens is not None
                    steps = within_bits(
                        checkpoint,
                        steps,
                        options,
                        tokens,
                        target,
                        computing[0],
                        weight_only=floats,
                        resume=resume,
                        work_dir=work_dir,
                        limited=not yes,
                        counting=check_text,
                        devices=room_on_ray(ray, threads) if ray else len(computing),
                        dry=dry_run,
                        progress=bar.measuring,
                        say=bar.say,
                    )
                done = execute(
                    checkpoint,
                    steps,
                    target,
                    overwrite=overwrite,
                    resume=resume,
                    devices=devices,
                    threads=threads,
                    ray=ray,
                    command=command,
                    progress=bar.advance,
                    samples=tokens,
                    calibrating=bar.calibrating,
                    counting=bar.counting if check_text else None,
                    limited=not yes,
                    work_dir=work_dir,
                    say=bar.say,
                    dry=show if dry_run else None,
                )
        if not dry_run:
            say_done(done, target, trust_remote_code)
        if push_to and not dry_run:
            push_finished(push_to, target, command, None, anew=True)


def _command(context: typer.Context) -> str:
    """The command line that determines the output, without what only says how it is made."""
    how = {"overwrite", "resume", "device", "threads", "ray", "source", "target", "work_dir"}
    how |= {"check_text", "yes", "dry_run", "log_file", "quiet", "stream", "push_to", "evaluation"}
    words = ["nvfp4-moe", "quantize", context.params["source"], str(context.params["target"])]
    for parameter in context.command.params:
        value = context.params.get(parameter.name or "")
        if parameter.name in how or not value or value == parameter.default:
            continue
        for one in value if isinstance(value, list | tuple) else [value]:
            words.append(parameter.opts[0])
            if one is not True:
                words.append(getattr(one, "value", str(one)))
    return shlex.join(words)
