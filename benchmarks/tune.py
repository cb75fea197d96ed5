"""Times other tile sizes of the Triton kernels on this GPU, and writes the faster ones to sprompt/ops/<op>/configs.json.

The triton.py of each op folder lists CANDIDATES for each kernel. Kernels are tuned one at a time, on the benchmark rows for a
GPU. Candidates are timed in turn with the current configuration. A candidate must give the same result and be 3 % faster in the
median. The new entry holds for this architecture and element size; a diff of the file shows the change. User programs never
tune kernels.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure
from benchmarks.row import agree, timed
from sprompt.ops import triton_launch
from sprompt.testing.spec import Bench, Sample
from sprompt.testing.specs import BENCHES

#: A candidate is kept if its time is at most this share of the time of the current configuration.
WORTH = 0.97
Config = dict[str, int]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tune", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--op", action="append", help="only this folder of an op (may be repeated)")
    parser.add_argument("--seconds", type=float, default=0.2, help="seconds of timing of each candidate (default 0.2)")
    parser.add_argument("--dry-run", action="store_true", help="print what would change, write nothing")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("torch finds no CUDA device: there is nothing to time on")
    major, minor = torch.cuda.get_device_capability()
    for op in options.op or ops():
        changed = False
        table = {kernel: list(entries) for kernel, entries in triton_launch.entries(op).items()}
        for kernel, bits, best, ratio in tuned(op, options.seconds):
            print(f"{op}.{kernel}, {bits} bits: {best}, {ratio:.2f} of the time")
            table[kernel] = with_entry(table[kernel], 10 * major + minor, bits, best)
            changed = True
        if changed and not options.dry_run:
            write(triton_launch.OPS_FOLDER / op / "configs.json", table)
    return 0


def ops() -> list[str]:
    return sorted(path.parent.name for path in triton_launch.OPS_FOLDER.glob("*/configs.json"))


def tuned(op: str, seconds: float) -> Iterator[tuple[str, int, Config, float]]:
    """(kernel, bits of an element, best candidate, its share of the time) of the op folder, for candidates that are kept."""
    candidates = importlib.import_module(f"sprompt.ops.{op}.triton").CANDIDATES
    for kernel, configs in candidates.items():
        for bits, dtype in ((32, torch.float32), (16, torch.bfloat16)):
            shares = [
                shares_of(bench, dtype, f"{op}.{kernel}", configs, seconds) for bench in BENCHES if fits(bench, dtype)
            ]
            shares = [share for share in shares if share is not None]
            if not shares:
                continue
            # geometric mean over the rows that launch the kernel
            means = [math.prod(row[i] for row in shares) ** (1 / len(shares)) for i in range(len(configs))]
            best = min(range(len(configs)), key=means.__getitem__)
            if means[best] <= WORTH:
                yield kernel, bits, configs[best], means[best]


def fits(bench: Bench, dtype: torch.dtype) -> bool:
    return bench.device == "cuda" and dtype in bench.dtypes


def shares_of(bench: Bench, dtype: torch.dtype, name: str, configs: list[Config], seconds: float) -> list[float] | None:
    """Time of a row with each candidate, as a share of the current time; None if the row does not launch the kernel."""
    with measure.side_stream():  # a graph can be captured on it
        sample = bench.make(torch.device("cuda"), dtype, 0)
        mode = "full" if bench.gradients else "forward"
        triton_launch.looked_up.clear()
        timed(bench, bench.function, sample, mode)()
        if name not in triton_launch.looked_up:
            return None
        expected = bench.function(*sample.args, **sample.kwargs)
        return [share_of(bench, dtype, sample, mode, name, candidate, expected, seconds) for candidate in configs]


def share_of(
    bench: Bench,
    dtype: torch.dtype,
    sample: Sample,
    mode: str,
    name: str,
    candidate: Config,
    expected: Any,
    seconds: float,
) -> float:
    """The candidate's share of the current time; infinite if it does not run or gives another result."""
    samples = measure.copies(sample)
    calls = [timed(bench, bench.function, s, mode) for s in samples]
    now = measure.replay(calls)
    try:
        triton_launch.trial[name] = candidate
        agree(bench, sample, dtype, bench.function(*sample.args, **sample.kwargs), expected)
        tried = measure.replay(calls)
    except Exception as failure:  # out of resources, or wrong
        print(f"{name} {candidate}: {type(failure).__name__}: {str(failure).splitlines()[0][:120]}", file=sys.stderr)
        return math.inf
    finally:
        triton_launch.trial.clear()
    if now is None or tried is None:
        return math.inf
    times = measure.interleaved({"now": now, "tried": tried}, torch.device("cuda"), seconds)
    return measure.median_ratio(times["tried"], times["now"])


def with_entry(entries: list[Config], arch: int, bits: int, best: Config) -> list[Config]:
    """The entries with a new first entry for this architecture and element size; the entries that it replaces are removed."""
    kept = [entry for entry in entries if (entry.get("arch"), entry.get("bits")) != (arch, bits)]
    return [{"arch": arch, "bits": bits, **best}, *kept]


def write(file: Path, table: dict[str, list[Config]]) -> None:
    """Writes one entry on each line, with kernels in the order of the file."""
    kernels = [
        f"  {json.dumps(kernel)}: [\n" + ",\n".join(f"    {json.dumps(entry)}" for entry in entries) + "\n  ]"
        for kernel, entries in table.items()
    ]
    file.write_text("{\n" + ",\n".join(kernels) + "\n}\n")


if __name__ == "__main__":
    sys.exit(main())
