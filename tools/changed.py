"""Finds the ops whose slow tests must run again. `python tools/changed.py` prints their names in one line, or "all", and prints
the reason on stderr. It compares the working tree, uncommitted files included, with the commit SPROMPT_BASE (default: the
commit named in .ci/base). If SPROMPT_TEST_OPS is set ("mask_nms masks", "all", "none"), it prints these ops instead. `--passed`
writes .ci/base.

A file belongs to an op if it lies in one of the op's folders. An op is affected by its own files, by the headers that its
kernels include, and by the ops that it imports. Any other file counts as shared and affects every op, unless FAR lists it.
"""

from __future__ import annotations

import ast
import functools
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: Files that belong to an op. A group names the op.
OWN = re.compile(r"(?:csrc|sprompt/ops)/(\w+)/.*|(?:sprompt/testing/specs/|tests/ops/test_)(\w+)\.py")
#: Files on which no kernel and no test of the slow levels depends. A file that is not listed counts as shared.
FAR = re.compile(
    r"docs/.*|examples/.*|benchmarks/.*|[^/]*\.md|.*/README\.md|LICENSE|\.gitignore|\.pre-commit-config\.yaml|\.ci/base"
    r"|sprompt/(?:commands|data|engine|methods|models|nn|patch|presets|report|study|weights)/.*|sprompt/(?:__init__|atomic|cli|env|machine|registry|seeding|settings)\.py"
    r"|sprompt/testing/(?:compiled|replay|sanitized)\.py"
    r"|tests/(?:commands|data|engine|methods|models|nn|patch|report|study)/.*"
    r"|tests/test_(?!contract\.py|gpu_bytes\.py)\w+\.py|tools/gpu\w*\.\w+"
)
HEADER = re.compile(r"csrc/common/\w+\.(?:h|cuh)")
INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)


def ops(root: Path = ROOT) -> list[str]:
    """All ops. Each op is a folder of sprompt/ops."""
    return sorted(path.parent.name for path in (root / "sprompt/ops").glob("*/__init__.py"))


@functools.cache
def imported(source: str) -> set[str]:
    """The modules that Python source imports at any place, each with the imported name, for example
    sprompt.ops.masks.op.rows."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def exports(root: Path) -> dict[str, str]:
    """{a name that sprompt.ops exports: the folder that defines it}."""
    parts = (name.split(".") for name in imported((root / "sprompt/ops/__init__.py").read_text()))
    return {name[-1]: name[2] for name in parts if name[:2] == ["sprompt", "ops"] and len(name) > 3}


def python_needs(root: Path, op: str) -> set[str]:
    """The other ops that the op's modules import, also through the shared modules sprompt/ops/*.py, and the ops whose specs its
    own spec imports. Other imports of the spec do not count, because a function that only makes inputs is no part of the op."""
    public, found, seen = exports(root), set(), set()
    todo = sorted((root / "sprompt/ops" / op).glob("*.py"))
    while todo:
        path = todo.pop()
        if path in seen:
            continue
        seen.add(path)
        for name in imported(path.read_text()):
            parts = name.split(".")
            if parts[:2] == ["sprompt", "ops"] and len(parts) > 2:
                found.add(parts[2] if len(parts) > 3 else public.get(parts[2], parts[2]))
                if (shared := root / "sprompt/ops" / f"{parts[2]}.py").is_file():
                    todo.append(shared)
    spec = root / "sprompt/testing/specs" / f"{op}.py"
    for name in imported(spec.read_text()) if spec.is_file() else ():
        if name.startswith("sprompt.testing.specs."):
            found.add(name.split(".")[3])
    return found


def included(root: Path, op: str) -> set[str]:
    """Every file of csrc that belongs to the op's kernels or is included by them."""
    found: set[str] = set()
    todo = [path.relative_to(root).as_posix() for path in (root / "csrc" / op).glob("*")]
    while todo:
        path = todo.pop()
        if path not in found and (root / path).is_file():
            found.add(path)
            todo += [f"csrc/{name}" for name in INCLUDE.findall((root / path).read_text())]
    return found


def needs(root: Path, op: str) -> set[str]:
    """The dependencies of an op besides its own files: names of other ops, paths of headers of csrc/common."""
    files = included(root, op)
    headers = {path for path in files if HEADER.fullmatch(path)}
    return headers | (python_needs(root, op) | {path.split("/")[1] for path in files}) & set(ops(root)) - {op}


def affected(files: Iterable[str], root: Path = ROOT) -> tuple[list[str], str]:
    """(the ops that the changed files affect, the reason)."""
    known = ops(root)
    changed = set()
    for file in sorted(files):
        own = OWN.fullmatch(file)
        if own and (own[1] or own[2]) in known:
            changed.add(own[1] or own[2])
        elif HEADER.fullmatch(file) and (root / file).exists():
            changed.add(file)
        elif not FAR.fullmatch(file):
            return known, f"{file} is shared by all ops"
    uses = {op: needs(root, op) for op in known}
    reached = changed & set(known)
    reasons = {op: "its own files changed" for op in reached}
    while True:
        more = {op: hit for op in known if op not in reached and (hit := uses[op] & (changed | reached))}
        if not more:
            break
        reached |= set(more)
        reasons |= {op: f"it uses {', '.join(sorted(hit))}" for op, hit in more.items()}
    return sorted(reached), "; ".join(f"{op}: {reasons[op]}" for op in sorted(reached)) or "no file of an op changed"


def git(root: Path, *arguments: str) -> str | None:
    """The output of git; None if the command fails."""
    try:
        done = subprocess.run(("git", *arguments), cwd=root, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None


def since(base: str, root: Path = ROOT) -> tuple[list[str], str]:
    """(the ops that changed since the commit, the reason). All ops if git cannot tell."""
    if not base:
        return ops(root), "no commit to compare with (.ci/base or SPROMPT_BASE)"
    if git(root, "cat-file", "-e", f"{base}^{{commit}}") is None:
        return ops(root), f"git does not know the commit {base}"
    tracked = git(root, "diff", "--name-only", "--no-renames", "-z", base)
    untracked = git(root, "ls-files", "--others", "--exclude-standard", "-z")
    if tracked is None or untracked is None:
        return ops(root), f"git cannot compare with {base}"
    return affected(filter(None, (tracked + untracked).split("\0")), root)


def passed(root: Path = ROOT) -> str:
    """To call after every level passed for every op. Writes HEAD to .ci/base if HEAD is the tested state. Returns a message
    that says what it did."""
    head, changes = git(root, "rev-parse", "HEAD"), git(root, "status", "--porcelain")
    if head is None or changes is None:
        return "all levels passed; .ci/base is left as it is: this is no git repository"
    if changes.strip():
        return "all levels passed; .ci/base is left as it is: the working tree has changes that are not committed"
    (root / ".ci").mkdir(exist_ok=True)
    (root / ".ci/base").write_text(head)
    return f"all levels passed: .ci/base now names {head[:12]}; commit it, and later runs compare with it"


def main() -> None:
    if sys.argv[1:] == ["--passed"]:
        print(passed())
        return
    asked = os.environ.get("SPROMPT_TEST_OPS", "").split()
    if asked:
        unknown = [] if asked in (["all"], ["none"]) else sorted(set(asked) - set(ops()))
        if unknown:
            raise SystemExit(f"SPROMPT_TEST_OPS: no op {unknown[0]!r}; there are {', '.join(ops())}; or all, or none")
        print("" if asked == ["none"] else " ".join(asked))
        return
    named = ROOT / ".ci/base"
    base = os.environ.get("SPROMPT_BASE") or (named.read_text().strip() if named.exists() else "")
    found, why = since(base)
    left = [op for op in ops() if op not in found]
    print(f"since {base[:12] or 'ever'}: {why}", file=sys.stderr)
    print(f"slow tests of {', '.join(found) or 'no op'}; without {', '.join(left) or 'exception'}", file=sys.stderr)
    print(" ".join(found) if left else "all")


if __name__ == "__main__":
    main()
