"""The documentation is true: doctests, the README's examples, generated tables, commands and links."""

import contextlib
import dataclasses
import doctest
import inspect
import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import torch
from PIL import Image

import sprompt
from benchmarks import programs, table
from sprompt import cli, env, masks, ops
from sprompt.commands import parsing
from sprompt.engine import trained
from sprompt.models.knet import KNet, KNetConfig
from sprompt.models.saved import save_model

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
SUPPORT = (ROOT / "docs" / "support.md").read_text()
BENCHMARKS = (ROOT / "docs" / "benchmarks.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCUMENTED = {
    **{name: getattr(ops, name) for name in ops.__all__},
    "BitMasks": masks.BitMasks,
    **{f"BitMasks.{name}": f for name, f in vars(masks.BitMasks).items() if isinstance(f, FunctionType)},
}


def _globals(thing: object) -> dict[str, object]:
    """Doctests see the names of their module, every op and torch."""
    module = sys.modules[getattr(thing, "__module__", "sprompt")]
    return {**vars(module), **vars(ops), "torch": torch, "BitMasks": masks.BitMasks}


@pytest.mark.parametrize("name", DOCUMENTED)
def test_doctest(name: str) -> None:
    thing = DOCUMENTED[name]
    found = doctest.DocTestFinder(recurse=False).find(thing, name, globs=_globals(thing))
    report = io.StringIO()
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    for example in found:
        runner.run(example, out=report.write)
    assert runner.failures == 0, report.getvalue()


@pytest.mark.parametrize("name", [n for n in ops.__all__ if isinstance(getattr(ops, n), FunctionType)])
def test_every_function_says_what_a_user_must_know(name: str) -> None:
    function = getattr(ops, name)
    text = " ".join((inspect.getdoc(function) or "").split())
    assert ">>>" in text, f"{name} has no example"
    for parameter, form in inspect.signature(function).parameters.items():
        spoken_of = re.search(rf"\b{parameter}\b", text) or (isinstance(form.default, str) and form.default in text)
        assert spoken_of, f"the docstring of {name} does not speak of {parameter}"
    assert re.search("differentiable|gradient", text, re.IGNORECASE), f"{name} does not say what is differentiable"
    assert re.search("determinis|exact|the same on every run", text, re.IGNORECASE), (
        f"{name} does not say whether it is deterministic"
    )


def between(mark: str) -> str:
    """The text of docs/support.md between <!-- mark --> and <!-- /mark -->."""
    found = re.search(rf"<!-- {mark} -->\n(.*?)\n<!-- /{mark} -->", SUPPORT, re.DOTALL)
    assert found, f"docs/support.md has no <!-- {mark} --> ... <!-- /{mark} -->"
    return found.group(1)


def test_example_of_the_readme_prints_what_it_says() -> None:
    code = re.search(r"```python\n(.*?)```\n+It prints:\n+```text\n(.*?)```", README, re.DOTALL)
    assert code, "README.md has no example followed by what it prints"
    assert len(code.group(1).strip().splitlines()) <= 14
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code.group(1), "README.md", "exec"), {})
    assert out.getvalue().strip() == code.group(2).strip()


def test_program_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lines that load a model and find objects, with a tiny model of random weights."""
    code = re.search(r"```python\n(import sprompt\n.*?)```", README, re.DOTALL)
    assert code, "README.md has no program that begins with import sprompt"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sprompt, "load", trained.load, raising=False)
    torch.manual_seed(0)
    config = KNetConfig(num_classes=2, depth=18, backbone_width=8, channels=16, kernels=4, heads=2, feedforward=32)
    folder = tmp_path / "runs" / "finetune"
    folder.mkdir(parents=True)
    save_model(folder / trained.MODEL, KNet(config), ["cat", "dog"], {"short": 64, "long": 64})
    for name in ("a.jpg", "b.jpg"):
        Image.new("RGB", (48, 32), "teal").save(tmp_path / name)
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(code.group(1), "README.md", "exec"), {})
    assert (tmp_path / "objects.png").stat().st_size > 0


def test_support_matrix_is_current() -> None:
    assert between("support") == env.support_matrix(), "type `make support`"


def test_switches_are_current() -> None:
    assert between("switches") == env.switch_table(), "type `make support`"


def test_tables_are_written_between_their_marks(tmp_path: Path) -> None:
    page = tmp_path / "support.md"
    page.write_text(SUPPORT.replace(between("switches"), "old"))
    env.main(["--write", str(page)])
    assert page.read_text() == SUPPORT


def test_no_switch_is_missing() -> None:
    """The table holds exactly the SPROMPT_ names that sources read from the environment."""
    read = set()
    reads = re.compile(
        r"""(?:environ(?:\.get\(|\[)|getenv\(|switch\()\s*["'](SPROMPT_[A-Z_0-9]+)["']|\$[{(]?(SPROMPT_[A-Z_0-9]+)"""
    )
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    names = listed.stdout.split("\n") if listed.returncode == 0 else [str(p.relative_to(ROOT)) for p in ROOT.rglob("*")]
    for name in names:
        path = ROOT / name
        wanted = path.suffix in (".py", ".cpp", ".h", ".cu", ".sh") or name in ("Makefile", ".ci/run")
        if path.is_file() and wanted:
            read |= {next(filter(None, groups)) for groups in reads.findall(path.read_text())}
    assert read == set(env.SWITCHES)


def test_report_names_everything() -> None:
    text = env.report()
    for word in ("sprompt", "Python", "torch", "triton", "numpy", "kernels", "CPU", "GPU", "features"):
        assert word in text
    for op in ops.__all__:
        if op in sprompt.backends.ops():
            assert op in text
    assert text.isascii() or all(ord(c) < 0x2500 for c in text), "the report is plain text"


# -- docs/benchmarks.md


def rows_of(text: str, first: str) -> list[list[str]]:
    """The cells of the rows of each table whose header begins with this cell."""
    tables = re.findall(rf"^\| {re.escape(first)} \|.*\n\|[-| ]+\|\n((?:\|.*\n)+)", text, re.MULTILINE)
    return [[cell.strip() for cell in line.strip("|").split("|")] for part in tables for line in part.splitlines()]


@pytest.mark.parametrize("markers", [table.MARKERS, programs.MARKERS])
def test_benchmarks_have_a_place_in_the_page(markers: tuple[str, str]) -> None:
    assert BENCHMARKS.index(markers[0]) < BENCHMARKS.index(markers[1])


def test_benchmark_rows_of_the_readme_are_rows_of_the_page() -> None:
    known = [*rows_of(BENCHMARKS, "op"), *rows_of(BENCHMARKS, "program")]
    chosen = rows_of(README, "op or program")
    assert len(chosen) == 8
    for op, shape, *_, theirs, ours, ratio in chosen:
        figures = (theirs, ours, ratio.strip("*"))
        rows = [" ".join(row) for row in known if row[:2] == [op, shape]]
        assert any(all(figure in row for figure in figures) for row in rows), (
            f"{op}, {shape}: not in docs/benchmarks.md"
        )
    assert any(float(row[-1].strip("*×")) < 1 for row in chosen), "a row that loses must stay in"


def test_gpu_rows_of_the_page_are_rows_of_the_report() -> None:
    report = (ROOT / "benchmarks/results/nvidia-h100-80gb-hbm3/report.md").read_text()
    measured = [set(row) for row in rows_of(report, "op")]
    rows = rows_of(BENCHMARKS.partition("## Ops on a GPU")[2], "op")
    assert rows
    for row in rows:
        assert any(set(row) <= found for found in measured), f"{row}: is not in the report"


# -- commands and links


def options(command: str) -> set[str]:
    """Every option of a command, with the options of each model, method and evaluator."""
    kind = parsing.command(command)
    chosen = parsing.registries(kind)
    found = {"--help", "--preset", "--config", *(f"--{name}" for name in chosen)}

    def add(settings: Any, start: str) -> None:
        for field in dataclasses.fields(settings):
            value = getattr(settings, field.name)
            name = start + field.name.replace("_", "-")
            if dataclasses.is_dataclass(value):
                add(value, f"{name}.")
            else:
                found.add(f"--{name}")

    add(parsing.required_missing(kind), "")
    for name, registry in chosen.items():
        for choice in registry.names():
            add(registry.get(choice).Config(), f"{name}.")
    return found


def commands_of(page: Path) -> list[list[str]]:
    """The words behind `sprompt` of every command line of a page, in blocks of shell code and in code within sentences."""
    text = page.read_text()
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line.partition(" #")[0] for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`(sprompt [a-z][^`\n]*)`", text)
    found = [re.search(r"(?:^|-m )sprompt(?:\.cli)? (.+)", line) for line in lines]
    return [match.group(1).split() for match in found if match]


def test_every_command_and_option_in_the_docs_exists() -> None:
    known = {command: options(command) for command in cli.COMMANDS if command != "env"}
    own_model = "--model.queries"  # of docs/adding_a_model.md
    everything = {own_model}.union(*known.values())
    for page in PAGES:
        if page.name == "CHANGELOG.md":  # it names options of earlier versions
            continue
        for command, *words in commands_of(page):
            assert command in cli.COMMANDS, f"{page.name}: there is no command {command}"
            given = {word for word in words if word.startswith("--")} - {own_model}
            assert given <= known[command], f"{page.name}: {command} has no {', '.join(given - known[command])}"
        named = set(re.findall(r"(?<![\w-])--[a-z]+\.[a-z0-9.-]*[a-z0-9]", page.read_text()))
        assert named <= everything, f"{page.name}: there is no {', '.join(named - everything)}"


def test_links_of_the_docs_lead_to_files() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: there is no {target}"


def test_index_of_the_docs_has_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    missing = [page.name for page in PAGES[2:] if page.name != "README.md" and f"]({page.name})" not in index]
    assert not missing


# -- docs/adding_an_op.md


def files_of(page: str) -> dict[str, str]:
    """{path: text} of the files that a page shows in full. The path is in bold, and a code block with the text follows."""
    return dict(
        re.findall(r"^\*\*`(\S+)`\*\*\n\n```\w+\n(.*?)^```$", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
    )


def write_files_of(page: str, folder: Path) -> None:
    for name, text in files_of(page).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def test_op_of_the_page_works(tmp_path: Path) -> None:
    """Runs the op's own tests, and the tests of its spec for the reference, in a copy of the package without compiled
    kernels."""
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "weights")
    shutil.copytree(ROOT / "sprompt", tmp_path / "sprompt", ignore=ignored)
    write_files_of("docs/adding_an_op.md", tmp_path)
    for name in ("test_contract.py", "variants.py"):
        shutil.copy(ROOT / "tests" / name, tmp_path / "tests")
    with (tmp_path / "sprompt/ops/__init__.py").open("a") as exports:
        exports.write('from sprompt.ops.padded_mean import padded_mean\n__all__ += ["padded_mean"]\n')
    chosen = "padded_mean and (reference or bad_input or test_padded_mean)"
    command = [sys.executable, "-m", "pytest", "-q", "tests", "-k", chosen]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("SPROMPT_")}
    options = {"SPROMPT_NO_EXT": "1", "SPROMPT_BACKEND": "reference", "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=inherited | options, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_kernel_of_the_page_compiles(tmp_path: Path) -> None:
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if not compiler:
        pytest.skip("there is no C++ compiler")
    write_files_of("docs/adding_an_op.md", tmp_path)
    options = ["-std=gnu++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-DSPROMPT_ISA=portable"]
    folders, kernel = (tmp_path / "csrc", ROOT / "csrc"), tmp_path / "csrc/padded_mean/padded_mean_cpu.cpp"
    command = [compiler, *options, *(f"-I{folder}" for folder in folders), str(kernel)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
