"""Memory of one ``nvfp4-moe quantize`` over its time, against 1 GB plus the largest tensor.

    python -m benchmarks.m3_slice /tmp/slice20 --layers 11          # 20 GB
    python -m benchmarks.peak_memory /tmp/slice20 [--work DIR] [options for nvfp4-moe quantize]

Everything resident counts: libraries, mapped files, all processes of the command. The first line is
the floor: ``nvfp4-moe inspect``, which imports and plans the same and quantizes nothing. Exit code
1 if the peak is above the limit.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from benchmarks.measure import CommandError, Measured, Sample, measure
from quantize.checkpoint.reader import Checkpoint

LIMIT = 10**9


def main() -> None:
    """Parse the arguments, run, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="SRC", type=Path)
    parser.add_argument("--work", type=Path, default=Path("/tmp/nvfp4-moe-speed"), metavar="DIR")
    parser.add_argument("--parts", type=int, default=10, help="rows of the table")
    args, more = parser.parse_known_args()

    with Checkpoint(args.source) as checkpoint:
        largest = max(tensor.nbytes for tensor in checkpoint.stored.values())
        nbytes = checkpoint.nbytes
    command = str(Path(sys.executable).with_name("nvfp4-moe"))
    target = args.work / "out"
    args.work.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(target, ignore_errors=True)
    try:
        floor = measure([command, "inspect", str(args.source)])
        done = measure([command, "quantize", str(args.source), str(target), *more])
    except CommandError as error:
        raise SystemExit(str(error)) from None
    finally:
        shutil.rmtree(target, ignore_errors=True)

    print(done.output.strip())
    print(f"\n| {nbytes / 1e9:.2f} GB, seconds | RSS, MB | own, MB |")
    print("| --- | --- | --- |")
    print(_row("inspect", floor))
    for part in _parts(done, args.parts):
        rss, own = (max(getattr(s, key) for s in part) for key in ("rss", "anonymous"))
        print(f"| to {part[-1].seconds:.1f} | {rss / 1e6:.0f} | {own / 1e6:.0f} |")
    print(_row("**whole run**", done))
    limit = LIMIT + largest
    verdict = "below" if done.peak_rss < limit else "ABOVE"
    print(
        f"\nPeak {done.peak_rss / 1e6:.0f} MB, {verdict} 1 GB and the largest tensor "
        f"({largest / 1e6:.0f} MB) together"
    )
    sys.exit(done.peak_rss >= limit)


def _parts(done: Measured, count: int) -> list[list[Sample]]:
    """The samples in ``count`` parts of equal time, those without any left out."""
    parts: list[list[Sample]] = [[] for _ in range(count)]
    for sample in done.samples:
        parts[min(int(sample.seconds / done.seconds * count), count - 1)].append(sample)
    return [part for part in parts if part]


def _row(label: str, measured: Measured) -> str:
    return (
        f"| {label}, {measured.seconds:.1f} | {measured.peak_rss / 1e6:.0f} "
        f"| {measured.peak_anonymous / 1e6:.0f} |"
    )


if __name__ == "__main__":
    main()
