"""The choice of the ops whose slow tests run again after a change (tools/changed.py)."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOOL = ROOT / "tools/changed.py"
_spec = importlib.util.spec_from_file_location("changed", TOOL)
assert _spec is not None and _spec.loader is not None
changed = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(changed)

TREE = {
    "sprompt/ops/__init__.py": "from sprompt.ops.a import fa\nfrom sprompt.ops.b import fb\n",
    "sprompt/ops/shared.py": "from sprompt.ops.c.reference import unpack\n",
    "sprompt/ops/a/__init__.py": "",
    "sprompt/ops/b/__init__.py": "def fb():\n    from sprompt.ops import fa\n",  # imports inside of functions count
    "sprompt/ops/c/__init__.py": "",
    "sprompt/ops/d/__init__.py": "from sprompt.ops import shared\n",
    "sprompt/testing/specs/a.py": "from sprompt.ops import fb\n",  # only makes its inputs
    "sprompt/testing/specs/c.py": "from sprompt.testing.specs.a import made\n",
    "csrc/common/low.h": "",
    "csrc/common/high.h": '#include "common/low.h"\n',
    "csrc/a/a_cpu.cpp": '#include "common/high.h"\n',
    "csrc/c/c_cpu.cpp": '#include "c/own.h"\n',
    "csrc/c/own.h": '  #  include "common/low.h"\n',
    "tests/ops/test_a.py": "",
    "README.md": "",
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name, text in TREE.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ("files", "ops"),
    [
        ([], ""),
        (
            ["README.md", "docs/a.md", "sprompt/models/knet/x.py", "tests/engine/test_train.py", "tests/test_docs.py"],
            "",
        ),
        (["tests/ops/test_b.py"], "b"),
        (["csrc/a/a_cuda.cu"], "a b c d"),  # b calls fa, c's spec takes from a's, d imports what imports c
        (["sprompt/ops/d/triton.py"], "d"),
        (["sprompt/testing/specs/c.py"], "c d"),
        (["csrc/common/high.h"], "a b c d"),
        (["csrc/b/b.h", "README.md"], "b"),
    ],
)
def test_ops_of_changed_files(tree: Path, files: list[str], ops: str) -> None:
    assert " ".join(changed.affected(files, tree)[0]) == ops


@pytest.mark.parametrize(
    "file",
    [
        "CMakeLists.txt", "setup.py", "constraints.txt", "pyproject.toml", "tools/test.sh", "tests/conftest.py",
        "tests/test_contract.py", "tests/test_gpu_bytes.py", "tests/emulation/cuda.h", "csrc/bindings.cpp",
        "csrc/common/threads.cpp", "csrc/common/gone.h", "csrc/gone/gone_cpu.cpp", "sprompt/native.py", "sprompt/backends.py",
        "sprompt/masks.py", "sprompt/ops/shared.py", "sprompt/testing/calls.py", "sprompt/testing/specs/__init__.py", "unheard/of",
    ],
)  # fmt: skip
def test_what_is_shared_or_unknown_concerns_every_op(tree: Path, file: str) -> None:
    assert changed.affected([file, "csrc/b/b.h"], tree)[0] == ["a", "b", "c", "d"]


def test_a_header_concerns_what_includes_it(tree: Path) -> None:
    assert changed.needs(tree, "a") == {"csrc/common/high.h", "csrc/common/low.h"}
    assert changed.needs(tree, "c") == {"csrc/common/low.h", "a"}
    (tree / "csrc/common/alone.h").touch()
    assert changed.affected(["csrc/common/alone.h"], tree)[0] == []


@pytest.fixture
def git(tree: Path) -> Callable[..., str]:
    """A git repository in the tree; its first commit holds the tree."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")

    def run(*arguments: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
        done = subprocess.run(("git", *identity, *arguments), cwd=tree, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    run("init", "-q")
    run("add", "-A")
    run("commit", "-q", "-m", "first")
    return run


def test_the_working_tree_is_compared_with_a_commit(tree: Path, git: Callable[..., str]) -> None:
    base = git("rev-parse", "HEAD")
    assert changed.since(base, tree)[0] == []
    (tree / "csrc/b").mkdir()
    (tree / "csrc/b/new.h").touch()  # not tracked
    assert changed.since(base, tree)[0] == ["b"]
    git("mv", "sprompt/ops/d/__init__.py", "sprompt/ops/d/moved.py")
    git("commit", "-q", "-am", "second")
    (tree / "sprompt/ops/d/__init__.py").touch()
    assert changed.since(base, tree)[0] == ["b", "d"]
    (tree / "sprompt/masks.py").touch()
    for commit in (base, "", "0" * 40):  # shared; none named; unknown, as in a shallow clone
        found, why = changed.since(commit, tree)
        assert found == ["a", "b", "c", "d"] and why


def test_a_commit_is_named_only_if_it_is_what_was_tested(tree: Path, git: Callable[..., str]) -> None:
    (tree / "README.md").write_text("changed")
    assert "not committed" in changed.passed(tree) and not (tree / ".ci").exists()
    git("commit", "-q", "-am", "second")
    assert "commit it" in changed.passed(tree)
    named = (tree / ".ci/base").read_text().strip()
    assert named == git("rev-parse", "HEAD")
    git("add", "-A")
    git("commit", "-q", "-m", "third")
    assert changed.since(named, tree)[0] == []


def test_ops_can_be_asked_for(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["changed.py"])
    for asked, printed in (("masks  rle", "masks rle"), ("all", "all"), ("none", "")):
        monkeypatch.setenv("SPROMPT_TEST_OPS", asked)
        changed.main()
        assert capsys.readouterr().out == printed + "\n"
    monkeypatch.setenv("SPROMPT_TEST_OPS", "masks nonsense")
    with pytest.raises(SystemExit, match="no op 'nonsense'"):
        changed.main()


def test_every_op_of_this_tree_has_its_files() -> None:
    """The rule that assigns a file to an op fits all file names, and every folder of kernels belongs to an op."""
    for op in changed.ops():
        for file in (f"sprompt/ops/{op}/op.py", f"sprompt/testing/specs/{op}.py", f"tests/ops/test_{op}.py"):
            assert (ROOT / file).is_file()
            assert op in changed.affected([file])[0]
    folders = {path.name for path in (ROOT / "csrc").iterdir() if path.is_dir()}
    assert folders - {"common"} <= set(changed.ops())
    assert {"mask_nms", "masks"} <= changed.needs(ROOT, "saliency_masks")
