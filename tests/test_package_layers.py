"""A layer uses only the layers below it, file by file, and the kernel library needs nothing but torch and numpy."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "sprompt"
#: {module beside the layers: parts of the package that it may import}. A layer may import the modules that are listed for it.
BASE = {"native": set(), "backends": {"native"}, "atomic": set(), "registry": set(), "seeding": set(), "clock": set()}
BASE |= {"masks": {"ops", "backends"}, "cuda": {"native"}, "machine": {"native"}, "settings": {"registry"}}
BASE |= {"normalisation": set()}
SHARED = {"native", "backends", "masks", "cuda"}
#: {layer: parts of the package that it may import}. A layer may import all that the layers below it may import.
LAYERS: dict[str, set[str]] = {"ops": {*SHARED}}
LAYERS["nn"] = LAYERS["ops"] | {"ops", "atomic", "normalisation"}
LAYERS["patch"] = {*SHARED, "ops"}
LAYERS["models"] = LAYERS["nn"] | {"nn", "registry", "settings"}
LAYERS["data"] = LAYERS["ops"] | {"ops", "atomic", "seeding", "normalisation"}
LAYERS["methods"] = LAYERS["models"] | LAYERS["data"] | {"models", "data", "clock"}
LAYERS["engine"] = LAYERS["models"] | LAYERS["data"] | {"models", "data", "machine", "clock"}
LAYERS["report"] = LAYERS["engine"] | LAYERS["methods"] | {"engine", "methods"}
LAYERS["study"] = LAYERS["report"] | {"report"}
LAYERS["commands"] = LAYERS["study"] | {"study"}
TOP = {
    "cli": {"commands", "env"},
    "env": {*SHARED, "ops", "machine", "testing"},
    "__init__": {*SHARED, "engine", "patch"},
}
ALLOWED = BASE | LAYERS | TOP
FILES = [path for path in sorted(ROOT.rglob("*.py")) if path.relative_to(ROOT).parts[0] != "testing"]


def layer(path: Path) -> str:
    """The layer of a file, or the name of the module if it is beside the layers."""
    first = path.relative_to(ROOT).parts[0]
    return first.removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Parts of the package that a file imports, at any place in the file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{a.name}" for a in node.names}
        elif isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
    parts = [n.split(".") for n in names]
    return {
        p[1]
        for p in parts
        if p[0] == "sprompt" and len(p) > 1 and (ROOT / p[1]).exists() | (ROOT / f"{p[1]}.py").exists()
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_uses_only_the_layers_below_it(path: Path) -> None:
    assert imported(path) <= ALLOWED[layer(path)] | {layer(path)}


def test_no_layer_uses_itself_through_another() -> None:
    def below(name: str, seen: tuple[str, ...] = ()) -> None:
        assert name not in seen, f"{' -> '.join((*seen, name))}"
        for other in ALLOWED.get(name, ()):
            if other not in ("ops", "masks"):  # masks are part of the ops
                below(other, (*seen, name))

    for name in ALLOWED:
        below(name)


def test_the_kernel_library_needs_torch_and_numpy_only() -> None:
    code = (
        "import sys, sprompt.ops; banned = {'accelerate', 'tyro', 'yaml', 'PIL', 'matplotlib', 'rich', 'safetensors', "
        "'tensorboard', 'pycocotools'}; sys.exit(' '.join(banned & set(sys.modules)) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
