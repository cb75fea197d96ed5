#!/usr/bin/env bash
# sanitize.sh [pytest arguments]: runs the tests of ops and the fuzz driver with AddressSanitizer and
# UndefinedBehaviorSanitizer.
#
# Everything happens in build/sanitize. The sanitized kernels lie beside a copy of the package, so this script neither uses nor
# overwrites the ordinary build. It tests the ops that tools/changed.py names; if there are none, it builds nothing. On a CPU
# without AVX-512, the avx512 level is compiled with emulated instructions (tests/emulation).
#   PYTHON                   the interpreter (default: python3)
#   SPROMPT_TEST_OPS         other ops to test: "mask_nms masks", "all", or "none"
#   SPROMPT_BASE             commit to compare with (default: the commit in .ci/base)
#   SPROMPT_SANITIZE_LEVELS  instruction sets to test (default: "avx512 avx2 portable")
#   SPROMPT_FUZZ_INPUTS      inputs of the fuzz driver of rle, half of them for each of two seeds (default: 300000)
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
python=${PYTHON:-python3}
[[ $python != */* ]] || python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python")
export CXX=${CXX:-g++}
work=$root/build/sanitize

if [ "$(uname)" != Linux ] || ! "$CXX" --version 2>/dev/null | grep -qiE "g\+\+|gcc|free software foundation"; then
    echo "sanitize.sh: needs Linux and g++ (Debian: apt-get install g++)" >&2
    exit 1
fi
asan=$("$CXX" -print-file-name=libasan.so)
if [ ! -e "$asan" ]; then
    echo "sanitize.sh: $CXX has no libasan (Fedora: dnf install libasan libubsan; Debian's g++ brings it)" >&2
    exit 1
fi

ops=$("$python" tools/changed.py)
if [ -z "$ops" ]; then
    echo "== sanitizers: skipped, because no op changed; \`SPROMPT_TEST_OPS=all make sanitize\` tests every op"
    exit
fi
export SPROMPT_TEST_OPS=$ops # read by tests/conftest.py

echo "== building in build/sanitize"
mkdir -p "$work/package" "$work/build"
for part in sprompt tests benchmarks; do
    rm -rf "$work/package/$part"
    cp -R "$part" "$work/package/$part"
done
cp pyproject.toml "$work/package/"
rm -f "$work"/package/sprompt/_C*
emulate=OFF
grep -q avx512_vpopcntdq /proc/cpuinfo 2>/dev/null || emulate=ON
"$python" - <<'PYTHON' >/dev/null || { echo "sanitize.sh: $python lacks cmake or ninja; type \`make sanitize\`, or pip install them" >&2; exit 1; }
import shutil
assert shutil.which("cmake") and shutil.which("ninja")
PYTHON
cmake -S "$root" -B "$work/build" -G Ninja -DPython_EXECUTABLE="$(command -v "$python")" -DSPROMPT_SANITIZE=ON -DSPROMPT_CUDA=off \
    -DSPROMPT_EMULATE_AVX512=$emulate -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$work/package/sprompt" >"$work/configure.log" || {
    cat "$work/configure.log"
    exit 1
}
cmake --build "$work/build" --target _C fuzz_rle -- -j "${SPROMPT_BUILD_JOBS:-$(nproc)}" --quiet

export ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:detect_stack_use_after_return=0
export UBSAN_OPTIONS=print_stacktrace=1
export OMP_NUM_THREADS=2 PYTHONDONTWRITEBYTECODE=1
cd "$work/package"
# libasan looks for functions of libstdc++ when the interpreter starts, so both are preloaded.
sanitized() { LD_PRELOAD="$asan:$("$CXX" -print-file-name=libstdc++.so.6)" PYTHONPATH=$work/package "$@"; }

echo "== checking that the sanitized module is loaded and reports a write outside of a tensor"
sanitized "$python" - "$work" <<'PYTHON'
import sys
from pathlib import Path

from sprompt import native

file = Path(native._C.__file__)
assert file.is_relative_to(sys.argv[1]), f"another module was loaded: {file}"
assert b"__asan_report" in file.read_bytes(), f"{file} is not sanitized"
PYTHON
if sanitized "$python" - >"$work/seeded.log" 2>&1 <<'PYTHON'
import torch

from sprompt import native

masks, areas = torch.ones(1000, 4, dtype=torch.int32), torch.empty(999, dtype=torch.int64)
native._C.mask_area(masks, areas, 1)
PYTHON
then
    echo "sanitize.sh: a write behind the end of a tensor was not reported" >&2
    exit 1
fi
if ! grep -q heap-buffer-overflow "$work/seeded.log" || ! grep -q "WRITE of size 8" "$work/seeded.log"; then
    cat "$work/seeded.log"
    exit 1
fi

case " $ops " in
*" rle "* | " all ")
    echo "== fuzzing"
    inputs=$((${SPROMPT_FUZZ_INPUTS:-300000} / 2))
    "$work/build/fuzz_rle" "$inputs" 1 &
    first=$!
    "$work/build/fuzz_rle" "$inputs" 2
    wait $first
    ;;
*) echo "== fuzzing: skipped, because rle has not changed" ;;
esac

for level in ${SPROMPT_SANITIZE_LEVELS:-avx512 avx2 portable}; do
    if ! SPROMPT_CPU=$level sanitized "$python" -c 'import sprompt' 2>/dev/null; then
        echo "== SPROMPT_CPU=$level: skipped, this CPU does not have it"
        continue
    fi
    echo "== SPROMPT_CPU=$level"
    SPROMPT_CPU=$level sanitized "$python" -m pytest -p no:cacheprovider -n 2 --dist worksteal --durations=10 --durations-min=1 tests/ops "$@"
done
