"""Builds sprompt._C with CMake and ninja. Needs no torch: the kernels take pointers (see csrc/).

SPROMPT_NO_EXT=1    install without the extension; every op then runs its reference
SPROMPT_SANITIZE=1  build with AddressSanitizer and UndefinedBehaviorSanitizer
SPROMPT_WERROR=1    treat compiler warnings as errors
SPROMPT_CUDA=auto|on|off  the CUDA kernels: auto builds them if nvcc is found (default), on needs nvcc, off leaves them out
SPROMPT_CUDA_ARCHS="80;90"  GPU architectures (default 80;90;100)
SPROMPT_EMULATE_CUDA=1  tests only: compile the CUDA kernels for the host (tests/emulation)
SPROMPT_EMULATE_AVX512=1  tests only: compile the avx512 level for AVX2 with emulated instructions (tests/emulation)
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


def switch(name: str) -> bool:
    return os.environ.get(name, "0").lower() not in ("", "0", "off", "false")


def require(found: bool, complaint: str, advice: str) -> None:
    if not found:
        raise SystemExit(f"sprompt: {complaint}; {advice}, or type `SPROMPT_NO_EXT=1 pip install .` for pure Python")


def compiler_found() -> bool:
    asked = os.environ.get("CXX", "").split(" ")[0]
    return any(shutil.which(name) for name in ([asked] if asked else ["c++", "g++", "clang++"]))


def prepare(build: Path) -> None:
    """Resets CMake's folder if it was made for another setup. CMake stores the paths that it found at the first call,
    and does not search again. So a folder is valid for one path of the sources, one interpreter and one choice of
    compilers."""
    made_for = "\n".join(
        [
            *(str(ROOT), str(build), sys.executable, sys.base_prefix, sys.version),
            *(f"{name}={os.environ.get(name, '')}" for name in ("CXX", "CXXFLAGS", "CUDACXX")),
            f"nvcc={shutil.which('nvcc')}",
        ]
    )
    stamp = build / "made_for.txt"
    if not stamp.exists() or stamp.read_text() != made_for:
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        shutil.rmtree(build / "CMakeFiles", ignore_errors=True)
    build.mkdir(parents=True, exist_ok=True)
    stamp.write_text(made_for)


class FreshPython(build_py):
    """Empties build/lib first. setuptools never removes files there, so it would install modules that the sources no
    longer have."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib) / "sprompt", ignore_errors=True)
        super().run()


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve()
        require(shutil.which("cmake") is not None, "cmake not found", "type `pip install cmake`")
        require(shutil.which("ninja") is not None, "ninja not found", "type `pip install ninja`")
        require(compiler_found(), "no C++17 compiler found", "install one (Debian: apt-get install g++)")
        prepare(build)
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", "--log-level=NOTICE",
            f"-DPython_EXECUTABLE={sys.executable}",
            # Passed at every call: in pip's isolated builds, ninja's folder is deleted before the next build.
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
            f"-DSPROMPT_SANITIZE={'ON' if switch('SPROMPT_SANITIZE') else 'OFF'}",
            f"-DSPROMPT_WERROR={'ON' if switch('SPROMPT_WERROR') else 'OFF'}",
            f"-DSPROMPT_CUDA={os.environ.get('SPROMPT_CUDA', 'auto').lower()}",
            f"-DSPROMPT_CUDA_ARCHS={os.environ.get('SPROMPT_CUDA_ARCHS', '')}",
            f"-DSPROMPT_EMULATE_CUDA={'ON' if switch('SPROMPT_EMULATE_CUDA') else 'OFF'}",
            f"-DSPROMPT_EMULATE_AVX512={'ON' if switch('SPROMPT_EMULATE_AVX512') else 'OFF'}",
        ]  # fmt: skip
        for command in (configure, ["cmake", "--build", str(build), "--target", "_C"]):
            if subprocess.run(command).returncode != 0:
                raise SystemExit(
                    "sprompt: the kernels could not be built (see the compiler's messages above); "
                    "type `SPROMPT_NO_EXT=1 pip install .` for pure Python"
                )


setup(
    ext_modules=[] if switch("SPROMPT_NO_EXT") else [Extension("sprompt._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "build_py": FreshPython},
)
