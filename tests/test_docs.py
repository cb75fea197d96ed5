"""What the documentation says is so: doctests, the README's example, its generated tables, the list of switches."""

import contextlib
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

import pytest

import sprompt
from sprompt import env, masks, ops

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
DOCUMENTED = {
    **{name: getattr(ops, name) for name in ops.__all__},
    "BitMasks": masks.BitMasks,
    **{f"BitMasks.{name}": f for name, f in vars(masks.BitMasks).items() if isinstance(f, FunctionType)},
}


def _globals(thing: object) -> dict[str, object]:
    """Doctests see the names of their module, every op and torch."""
    import torch

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
    """The text of the README between <!-- mark --> and <!-- /mark -->."""
    found = re.search(rf"<!-- {mark} -->\n(.*?)\n<!-- /{mark} -->", README, re.DOTALL)
    assert found, f"README.md has no <!-- {mark} --> ... <!-- /{mark} -->"
    return found.group(1)


def test_example_of_the_readme_prints_what_it_says() -> None:
    code = re.search(r"```python\n(.*?)```\n+It prints:\n+```text\n(.*?)```", README, re.DOTALL)
    assert code, "README.md has no example followed by what it prints"
    assert len(code.group(1).strip().splitlines()) <= 14
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code.group(1), "README.md", "exec"), {})
    assert out.getvalue().strip() == code.group(2).strip()


def test_support_matrix_of_the_readme_is_current() -> None:
    assert between("support") == env.support_matrix(), "type `make readme`"


def test_switches_of_the_readme_are_current() -> None:
    assert between("switches") == env.switch_table(), "type `make readme`"


def test_no_switch_is_missing() -> None:
    """Every SPROMPT_ name that a source reads from the environment is in the table, and none that nothing reads."""
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


# -- docs/adding_an_op.md


def files_of(page: str) -> dict[str, str]:
    """What a page shows in full: the file's path in bold, and its text."""
    return dict(
        re.findall(r"^\*\*`(\S+)`\*\*\n\n```\w+\n(.*?)^```$", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
    )


def write_files_of(page: str, folder: Path) -> None:
    for name, text in files_of(page).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def test_op_of_the_page_works(tmp_path: Path) -> None:
    """In a copy of the package, without compiled kernels: its own tests, and what its spec promises of the reference."""
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
