"""`sprompt env` (or `python -m sprompt.env`) prints what a bug report needs: versions, build, CPU, GPUs, switches, backends of ops.

`--markdown` prints the support matrix and the switches instead; `--write docs/support.md` writes these tables into that page.
"""

import argparse
import ctypes.util
import importlib.metadata
import os
import platform
import sys
from pathlib import Path

import torch

import sprompt
from sprompt import backends, native
from sprompt.machine import cpu

#: Every environment switch, and what it does. docs/support.md has this table.
SWITCHES = {
    "SPROMPT_BACKEND": "`reference`, `native`, `triton` or `cuda`: every op runs on it, or raises and says why it cannot",
    "SPROMPT_CPU": "`avx512`, `avx2` or `portable`: the instruction set of the kernels; default: the best of this CPU",
    "SPROMPT_NO_EXT": "`1` at install: build no kernels; at run time: do not warn that they are missing",
    "SPROMPT_TRACEBACK": "`1`: errors of the command line show where they arose",
    "SPROMPT_SANITIZE": "`1` at build: AddressSanitizer and UndefinedBehaviorSanitizer",
    "SPROMPT_WERROR": "`1` at build: compiler warnings are errors",
    "SPROMPT_CUDA": "`auto`, `on` or `off` at build: the CUDA kernels where nvcc is found (default), or an error without it, or none",
    "SPROMPT_CUDA_ARCHS": "at build: GPU architectures of the CUDA kernels; default `80;90;100`",
    "SPROMPT_EMULATE_CUDA": "`1` at build, for tests: the CUDA kernels as C++ on the host (tests/emulation); at run time: tensors "
    "on the CPU take the backends that a GPU would",
    "SPROMPT_EMULATION_SEED": "for tests: another order of the emulated CUDA threads and blocks",
    "SPROMPT_EMULATE_AVX512": "`1` at build, for tests: the avx512 level on an AVX2 machine, its instructions emulated",
    "SPROMPT_TEST_OPS": "ops whose slow levels `make test` and `make sanitize` run: `mask_nms masks`, `all` or `none`; default: those "
    "that changed",
    "SPROMPT_BASE": "the commit since which ops count as changed; default: the one in .ci/base",
    "SPROMPT_SANITIZE_LEVELS": "instruction sets of `make sanitize`; default `avx512 avx2 portable`",
    "SPROMPT_FUZZ_INPUTS": "inputs of the fuzz driver of `make sanitize`; default 300000",
    "SPROMPT_BUILD_JOBS": "compilers that `make sanitize` runs at once",
    "SPROMPT_TEST_WORKERS": "processes of `make test`; default 2",
}


def report() -> str:
    """The whole report, as plain text."""
    import sprompt.ops  # noqa: F401  # fills the table of backends

    sections = [("versions", _versions()), ("build", _build()), ("machine", _machine()), ("switches", _switches())]
    lines = []
    for title, rows in sections:
        width = max(len(name) for name, _ in rows)
        lines += [title, *(f"  {name:<{width}}  {value}" for name, value in rows), ""]
    return "\n".join([*lines, *_backends()])


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _versions() -> list[tuple[str, str]]:
    return [
        ("sprompt", f"{sprompt.__version__}, {Path(sprompt.__file__).parent}"),
        ("Python", f"{platform.python_version()}, {sys.executable}"),
        ("torch", f"{torch.__version__}" + (f", CUDA {torch.version.cuda}" if torch.version.cuda else "")),
        ("triton", _version("triton")),
        ("numpy", _version("numpy")),
        ("system", platform.platform()),
    ]


def _build() -> list[tuple[str, str]]:
    if native._C is None:
        return [("kernels", f"none: {native.why_missing}")]
    source = {"openmp": "torch's OpenMP runtime", "pool": "own pool"}.get(native._C.thread_source(), "")
    return [
        ("kernels", native._C.build),
        ("level", f"{native._C.level()} (the best of this CPU: {native._C.best_level()})"),
        ("threads", f"{native.threads()}, from {source}"),
    ]


def _machine() -> list[tuple[str, str]]:
    name, features = cpu()
    rows = [("CPU", f"{name}, {os.cpu_count()} logical cores"), ("features", features)]
    if not torch.cuda.is_available():
        driver = "a driver is there, but this torch cannot use it" if ctypes.util.find_library("cuda") else "no driver"
        return [*rows, ("GPUs", f"none ({driver})")]
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        rows.append((f"GPU {i}", f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB"))
    return rows


def _switches() -> list[tuple[str, str]]:
    set_here = [(name, value) for name, value in sorted(os.environ.items()) if name.startswith("SPROMPT_")]
    known = [(name, value if name in SWITCHES else f"{value}  (not a switch of sprompt)") for name, value in set_here]
    return known or [("none set", "")]


def _backends() -> list[str]:
    """A line for each op: its backends on each device, in the order of trying. Below them: why other backends cannot serve."""
    reasons: dict[str, list[str]] = {}
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    ops = backends.ops()
    width = max(map(len, ops), default=0)
    lines = ["backends, in the order of trying"]
    for op in ops:
        served = []
        for device in devices:
            table = backends.available(op, device)
            served.append(f"{device}: " + (", ".join(name for name, why in table.items() if not why) or "none"))
            for name, why in table.items():
                if why:
                    reasons.setdefault(f"{device} {name}: " + why.replace(f" of {op}", ""), []).append(op)
        lines.append(f"  {op:<{width}}  " + "   ".join(served))
    for reason, which in reasons.items():
        lines.append(f"  {reason} ({'every op' if len(which) == len(ops) else ', '.join(which)})")
    return lines


def support_matrix() -> str:
    """The table of docs/support.md with the support of each op, as Markdown. It comes from the registry and the specs, so it is the
    same on every machine."""
    from sprompt.testing.specs import SPECS

    def kernels(ops: tuple[str, ...], device: str) -> str:
        if device == "cuda" and ops[0] in backends.HOST_ONLY:
            return "– (works on the CPU)"
        return ", ".join(name for name in backends.automatic(device, ops[0]) if name in backends.registered(ops[0]))

    short = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    rows = [
        "| function | CPU | CUDA | floats | gradient to | `torch.compile` | autocast |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    public = (spec for spec in SPECS if spec.function.__module__.startswith("sprompt.ops."))  # not methods of BitMasks
    for spec in sorted(public, key=lambda spec: spec.name):
        compiles = "no (returns Python objects)" if not spec.compiles else "yes"
        rows.append(
            f"| `{spec.name}` | {kernels(spec.ops, 'cpu')} | {kernels(spec.ops, 'cuda')} "
            f"| {', '.join(short.get(d, str(d)) for d in spec.dtypes) or '–'} "
            f"| {', '.join(f'`{g}`' for g in spec.gradients) or '–'} "
            f"| {compiles} | {spec.autocast if spec.dtypes else '–'} |"
        )
    return "\n".join(rows)


def switch_table() -> str:
    """The table of docs/support.md with the environment switches, as Markdown."""
    return "\n".join(["| switch | what it does |", "| --- | --- |", *(f"| `{k}` | {v} |" for k, v in SWITCHES.items())])


def write_tables(path: Path) -> None:
    """Replaces the text between the marks <!-- support --> and <!-- /support --> by the table, and likewise for switches."""
    text = path.read_text()
    for mark, table in (("support", support_matrix()), ("switches", switch_table())):
        head, found, rest = text.partition(f"<!-- {mark} -->\n")
        _, closed, tail = rest.partition(f"\n<!-- /{mark} -->")
        if not (found and closed):
            raise SystemExit(f"{path}: there is no <!-- {mark} --> ... <!-- /{mark} -->")
        text = head + found + table + closed + tail
    path.write_text(text)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="sprompt env", description=__doc__)
    parser.add_argument("--markdown", action="store_true", help="print the support matrix and the switches as Markdown")
    parser.add_argument(
        "--write", type=Path, metavar="FILE", help="write these tables into a page, between their marks"
    )
    args = parser.parse_args(argv)
    if args.write:
        write_tables(args.write)
    elif args.markdown:
        print(support_matrix(), switch_table(), sep="\n\n")
    else:
        print(report())


if __name__ == "__main__":
    main()
