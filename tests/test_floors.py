"""A floor uses only the floors below it, and the kernel library needs nothing but torch and numpy."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "sprompt"
#: what each floor may import of sprompt's other floors; files beside the floors (masks, settings, …) belong to all
FLOORS = {
    "ops": set(),
    "nn": {"ops"},
    "models": {"ops", "nn"},
    "data": {"ops"},
    "methods": {"ops", "nn", "models", "data"},
    "engine": {"ops", "nn", "models", "data"},
    "report": {"ops", "nn", "models", "data", "methods", "engine"},
    "study": {"ops", "nn", "models", "data", "methods", "engine", "report"},
    "commands": {"ops", "nn", "models", "data", "methods", "engine", "report", "study"},
}
FILES = [(floor, path) for floor in FLOORS for path in sorted((ROOT / floor).rglob("*.py"))]


def imported(path: Path) -> set[str]:
    """Floors that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{a.name}" for a in node.names}
        elif isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
    return {
        parts[1] for n in names if (parts := n.split("."))[0] == "sprompt" and len(parts) > 1 and parts[1] in FLOORS
    }


@pytest.mark.parametrize(("floor", "path"), FILES, ids=lambda v: v if isinstance(v, str) else str(v.relative_to(ROOT)))
def test_a_floor_uses_only_the_floors_below_it(floor: str, path: Path) -> None:
    assert imported(path) <= FLOORS[floor] | {floor}


def test_the_kernel_library_needs_torch_and_numpy_only() -> None:
    code = (
        "import sys, sprompt.ops; banned = {'accelerate', 'tyro', 'yaml', 'PIL', 'matplotlib', 'rich', 'safetensors', "
        "'tensorboard', 'pycocotools'}; sys.exit(' '.join(banned & set(sys.modules)) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
