"""Builds sprompt._C with CMake and ninja. Needs no torch: the kernels take pointers (see csrc/).

SPROMPT_NO_EXT=1    install pure Python; every op then runs its reference
SPROMPT_SANITIZE=1  build with AddressSanitizer and UndefinedBehaviorSanitizer
SPROMPT_WERROR=1    treat compiler warnings as errors
SPROMPT_EMULATE_AVX512=1  tests only: compile the avx512 level for AVX2, its instructions emulated (tests/emulation)
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def switch(name: str) -> bool:
    return os.environ.get(name, "0").lower() not in ("", "0", "off", "false")


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        require("cmake", "pip install cmake")
        require("ninja", "pip install ninja")
        if not any(shutil.which(compiler) for compiler in (os.environ.get("CXX", "").split(" ")[0], "c++", "g++", "clang++") if compiler):
            raise SystemExit(
                "sprompt: no C++17 compiler found; install one (Debian: apt-get install g++), "
                "or type `SPROMPT_NO_EXT=1 pip install .` for pure Python"
            )
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
            f"-DSPROMPT_SANITIZE={'ON' if switch('SPROMPT_SANITIZE') else 'OFF'}",
            f"-DSPROMPT_WERROR={'ON' if switch('SPROMPT_WERROR') else 'OFF'}",
            f"-DSPROMPT_EMULATE_AVX512={'ON' if switch('SPROMPT_EMULATE_AVX512') else 'OFF'}",
        ]  # fmt: skip
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build), "--target", "_C"], check=True)


def require(tool: str, advice: str) -> None:
    if shutil.which(tool) is None:
        raise SystemExit(f"sprompt: {tool} not found; type `{advice}`, or `SPROMPT_NO_EXT=1 pip install .` for pure Python")


setup(
    ext_modules=[] if switch("SPROMPT_NO_EXT") else [Extension("sprompt._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
