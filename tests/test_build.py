"""The build and the package: instruction sets never mix, the package works without kernels, and every error is one sentence."""

import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from sprompt import native

ROOT = Path(__file__).resolve().parents[1]
LEVELS = ("portable", "avx2", "avx512") if platform.machine() in ("x86_64", "AMD64") else ("portable",)
needs_build = pytest.mark.skipif(native._C is None, reason="the kernels are not built")


def run(*command: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a process that sees only the given switches (SPROMPT_...), not those of the environment."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SPROMPT_")}
    return subprocess.run(
        command, cwd=cwd, env={**clean, "PYTHONPATH": str(cwd), **environment}, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """{level: kernel objects}. They come from the build in place if they are as new as the sources. Otherwise they are
    compiled here."""
    sources = [ROOT / "CMakeLists.txt", *ROOT.glob("csrc/**/*.cpp"), *ROOT.glob("csrc/**/*.h")]
    newest = max(path.stat().st_mtime for path in sources)
    for build in ROOT.glob("build/temp*"):
        log = build / ".ninja_log"
        if log.exists() and log.stat().st_mtime >= newest and (found := kernel_objects(build)):
            return found
    build = tmp_path_factory.mktemp("build")
    configure = ("cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}")
    for command in (configure, ("cmake", "--build", str(build))):
        done = run(*command)
        assert done.returncode == 0, done.stdout + done.stderr
    found = kernel_objects(build)
    assert found, "a fresh build lacks kernel objects"
    return found


def kernel_objects(build: Path) -> dict[str, list[Path]]:
    """{level: kernel objects}; empty unless every level has an object of every kernel file."""
    kernels = [path.relative_to(ROOT) for path in sorted(ROOT.glob("csrc/*/*_cpu.cpp"))]
    found = {level: [build / f"CMakeFiles/kernels_{level}.dir/{kernel}.o" for kernel in kernels] for level in LEVELS}
    return found if all(path.exists() for paths in found.values() for path in paths) else {}


@needs_build
@pytest.mark.skipif(shutil.which("nm") is None, reason="nm (binutils) is not installed")
@pytest.mark.parametrize("level", LEVELS)
def test_kernel_objects_share_no_code(objects: dict[str, list[Path]], level: str) -> None:
    """The rule of csrc/common/isa.h. A linker merges weak (W, V) and unique (u) symbols of different levels, so there must
    be none. Any other global symbol must lie in the namespace of the level."""
    for path in objects[level]:
        symbols = subprocess.run(("nm", "-C", "--defined-only", str(path)), capture_output=True, text=True, check=True)
        for line in symbols.stdout.splitlines():
            kind, name = re.fullmatch(r"[0-9a-f]* ?(\S) (.*)", line.strip()).groups()  # type: ignore[union-attr]  # always matches
            assert kind not in "WVuvw", f"{path.name} ({level}) emits shared code: {name}; include nothing that does"
            if kind.isupper():
                assert name.startswith(f"sprompt::{level}::"), f"{path.name} ({level}) defines {name} outside its level"


@needs_build
def test_the_rule_is_seen_to_be_broken(tmp_path: Path) -> None:
    """The check above finds shared code."""
    if shutil.which("c++") is None or shutil.which("nm") is None:
        pytest.skip("no c++ or no nm")
    source = tmp_path / "broken.cpp"
    source.write_text(
        "#include <vector>\nint broken(int n) { std::vector<int> v(n); v.push_back(n); return v[n / 2]; }\n"
    )
    subprocess.run(("c++", "-O1", "-c", str(source), "-o", str(tmp_path / "broken.o")), check=True)
    symbols = subprocess.run(("nm", str(tmp_path / "broken.o")), capture_output=True, text=True, check=True).stdout
    assert " W " in symbols


def test_pure_python_install_works(tmp_path: Path) -> None:
    """Without the compiled module every op runs its reference and says so once, or never with SPROMPT_NO_EXT=1."""
    ignore = shutil.ignore_patterns("_C*", "__pycache__")
    shutil.copytree(ROOT / "sprompt", tmp_path / "sprompt", ignore=ignore)
    # An editable install would find the working tree's sprompt._C for the copy as well.
    alone = "import sys; sys.meta_path = [f for f in sys.meta_path if 'Editable' not in getattr(f, '__name__', '')]\n"
    code = alone + (
        "import torch, sprompt; from sprompt.ops import mask_area\n"
        "with sprompt.trace_backends() as ran:\n"
        "    for _ in range(3): area = mask_area(torch.ones(2, 3, 4))\n"
        "print(sprompt.__file__, area.tolist(), sorted({backend for _, backend in ran}))\n"
    )
    loud = run(sys.executable, "-W", "always", "-c", code, cwd=tmp_path)
    quiet = run(sys.executable, "-W", "always", "-c", code, cwd=tmp_path, SPROMPT_NO_EXT="1")
    for done in (loud, quiet):
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(str(tmp_path)) and done.stdout.endswith("[12, 12] ['reference']\n"), done.stdout
    assert loud.stderr.count("UserWarning: sprompt runs its slow reference on the CPU: sprompt._C is not built") == 1
    assert "sprompt" not in quiet.stderr
    forced = run(sys.executable, "-c", code, cwd=tmp_path, SPROMPT_BACKEND="native")
    assert "backend native was asked for, but sprompt._C is not built" in forced.stderr
    report = run(sys.executable, "-c", alone + "from sprompt import env; print(env.report())", cwd=tmp_path)
    assert report.returncode == 0 and "none: sprompt._C is not built" in report.stdout, report.stderr


@needs_build
def test_unknown_level_is_one_sentence() -> None:
    done = run(sys.executable, "-c", "import sprompt", SPROMPT_CPU="nonsense")
    assert done.returncode == 1
    assert done.stderr.endswith("ImportError: SPROMPT_CPU must be avx512, avx2 or portable, got nonsense\n")


@needs_build
def test_level_that_this_cpu_lacks_is_one_sentence() -> None:
    best = native._C.best_level()
    above = [
        level
        for level in ("avx2", "avx512")
        if ("portable", "avx2", "avx512").index(best) < ("portable", "avx2", "avx512").index(level)
    ]
    if not above:
        pytest.skip(f"this CPU has every level, up to {best}")
    done = run(sys.executable, "-c", "import sprompt", SPROMPT_CPU=above[0])
    assert done.returncode == 1
    sentence = f"ImportError: SPROMPT_CPU={above[0]}: this CPU has at most {best}; unset it or ask for that\n"
    assert done.stderr.endswith(sentence)


@needs_build
@pytest.mark.parametrize("level", LEVELS)
def test_level_asked_for_is_the_level_in_force(level: str) -> None:
    done = run(sys.executable, "-c", "from sprompt import native; print(native._C.level())", SPROMPT_CPU=level)
    assert done.stdout == f"{level}\n" or "this CPU has at most" in done.stderr


@pytest.mark.parametrize(
    ("present", "sentence"),
    [
        ((), "sprompt: cmake not found; type `pip install cmake`"),
        (("cmake",), "sprompt: ninja not found; type `pip install ninja`"),
        (("cmake", "ninja"), "sprompt: no C++17 compiler found; install one (Debian: apt-get install g++)"),
    ],
    ids=["no cmake", "no ninja", "no compiler"],
)
def test_missing_tool_is_one_sentence(tmp_path: Path, present: tuple[str, ...], sentence: str) -> None:
    pytest.importorskip("setuptools")
    for tool in present:
        (tmp_path / tool).write_text("#!/bin/sh\nexit 0\n")
        (tmp_path / tool).chmod(0o755)
    build = ("build_ext", "--build-temp", str(tmp_path / "temp"), "--build-lib", str(tmp_path / "lib"))
    done = run(sys.executable, "setup.py", "-q", *build, PATH=str(tmp_path), CXX="")
    assert done.returncode == 1
    said = done.stderr.strip().splitlines()[-1]
    assert said == f"{sentence}, or type `SPROMPT_NO_EXT=1 pip install .` for pure Python"
    assert "Traceback" not in done.stderr


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A copy of what a build needs, unbuilt."""
    pytest.importorskip("setuptools")
    tree = tmp_path / "clone"
    ignore = shutil.ignore_patterns("_C*", "__pycache__")
    for folder in ("csrc", "sprompt"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=ignore)
    for file in ("CMakeLists.txt", "setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md"):
        shutil.copy(ROOT / file, tree / file)
    return tree


def isolated_build(tree: Path, tools: Path, python: str = sys.executable, **environment: str) -> str:
    """Runs setup.py with cmake and ninja in a folder that is removed afterwards, as in pip's isolated builds. CMake
    configures. Ninja does not build; it only reads its file and prints the targets. Returns the content of CMake's cache."""
    pytest.importorskip("setuptools")
    cmake, ninja = shutil.which("cmake"), shutil.which("ninja")
    if cmake is None or ninja is None or not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("cmake, ninja or a C++ compiler is missing")
    tools.mkdir()
    (tools / "ninja").write_text(f'#!/bin/sh\nexec "{ninja}" "$@"\n')
    (tools / "cmake").write_text(
        f'#!/bin/sh\nif [ "$1" = --build ]; then set -- --build "$2" --target help; fi\nexec "{cmake}" "$@"\n'
    )
    for tool in tools.iterdir():
        tool.chmod(0o755)
    site = str(Path(pytest.importorskip("setuptools").__file__).parents[1])
    found = run(
        *(python, "setup.py", "-q", "build_ext"),
        cwd=tree,
        PATH=f"{tools}{os.pathsep}{os.environ['PATH']}",
        PYTHONPATH=site,
        SPROMPT_CUDA="off",
        **environment,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert "_C: phony" in found.stdout, found.stdout
    shutil.rmtree(tools)
    (cache,) = tree.glob("build/temp*/CMakeCache.txt")
    return cache.read_text()


def test_the_same_clone_is_built_again(clone: Path, tmp_path: Path) -> None:
    """The second build has other tools, another place, another interpreter or another compiler. Objects that are still right
    are kept."""
    isolated_build(clone, tmp_path / "first")
    (folder,) = clone.glob("build/temp*/CMakeFiles")
    (folder / "object.o").touch()
    cache = isolated_build(clone, tmp_path / "second")
    assert str(tmp_path / "second/ninja") in cache and (folder / "object.o").exists()

    moved = clone.rename(tmp_path / "moved")
    cache = isolated_build(moved, tmp_path / "third")
    assert f"CMAKE_HOME_DIRECTORY:INTERNAL={moved}\n" in cache and str(clone) not in cache
    assert not (moved / folder.relative_to(clone) / "object.o").exists()

    other = tmp_path / "venv/bin/python"
    subprocess.run((sys.executable, "-m", "venv", "--without-pip", str(other.parents[1])), check=True)
    cache = isolated_build(moved, tmp_path / "fourth", python=str(other))
    assert f"={other}\n" in cache and f"={sys.executable}\n" not in cache

    if (compiler := shutil.which("g++") or shutil.which("clang++")) is not None:
        cache = isolated_build(moved, tmp_path / "fifth", python=str(other), CXX=compiler)
        assert (
            f"CMAKE_CXX_COMPILER:STRING={compiler}\n" in cache or f"CMAKE_CXX_COMPILER:FILEPATH={compiler}\n" in cache
        )


def test_modules_that_are_gone_are_not_installed(clone: Path) -> None:
    for stale in (True, False):
        if stale:
            (clone / "sprompt/gone.py").touch()
        done = run(sys.executable, "setup.py", "-q", "build", "--build-lib", "build/lib", cwd=clone, SPROMPT_NO_EXT="1")
        assert done.returncode == 0, done.stderr
        assert (clone / "build/lib/sprompt/gone.py").exists() == stale
        (clone / "sprompt/gone.py").unlink(missing_ok=True)
    assert (clone / "build/lib/sprompt/__init__.py").exists()


def test_sdist_holds_the_sources(clone: Path, tmp_path: Path) -> None:
    """The sdist holds all sources, without git too, and CMake can configure it."""
    done = run(sys.executable, "setup.py", "-q", "sdist", "--dist-dir", str(tmp_path), cwd=clone)
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        held = {name.partition("/")[2] for name in tar.getnames()}
    sources = {str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.*") if path.is_file()}
    package = {
        str(path.relative_to(ROOT))
        for pattern in ("*.py", "*.json", "*.yaml", "*.safetensors")
        for path in ROOT.glob(f"sprompt/**/{pattern}")
    }
    missing = (sources | package | {"CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE", "README.md"}) - held
    assert not missing, f"the sdist lacks {sorted(missing)}"
    shutil.unpack_archive(archive, tmp_path / "unpacked")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    isolated_build(unpacked, tmp_path / "tools")
