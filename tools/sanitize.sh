#!/usr/bin/env bash
# sanitize.sh [pytest arguments]: the ops' tests and the fuzz driver under AddressSanitizer and UndefinedBehaviorSanitizer.
#
# Everything happens in build/sanitize: the sanitized kernels lie beside a copy of the package, so the ordinary build is neither
# used nor overwritten. Tested are the ops that tools/changed.py names; where it names none, nothing is built. On a CPU without
# AVX-512 that level is compiled with its instructions emulated (tests/emulation).
#   PYTHON                   the interpreter (default: python3)
#   SPROMPT_TEST_OPS         ops to test instead: "mask_nms masks", "all", or "none"
#   SPROMPT_BASE             commit to compare with instead of the one in .ci/base
#   SPROMPT_SANITIZE_LEVELS  instruction sets to test (default: "avx512 avx2 portable")
#   SPROMPT_FUZZ_INPUTS      inputs of the fuzz driver of rle, half of them on each of two seeds (default: 300000)
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
python=${PYTHON:-python3}
[[ $python != */* ]] || python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python")
export CXX=${CXX:-g++}
room=$root/build/sanitize

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
    echo "== sanitizers: left out, no op changed; \`SPROMPT_TEST_OPS=all make sanitize\` tests every op"
    exit
fi
export SPROMPT_TEST_OPS=$ops # read by tests/conftest.py

echo "== building in build/sanitize"
mkdir -p "$room/package" "$room/build"
for part in sprompt tests benchmarks; do
    rm -rf "$room/package/$part"
    cp -R "$part" "$room/package/$part"
done
cp pyproject.toml "$room/package/"
rm -f "$room"/package/sprompt/_C*
emulate=OFF
grep -q avx512vpopcntdq /proc/cpuinfo 2>/dev/null || emulate=ON
"$python" - <<'PYTHON' >/dev/null || { echo "sanitize.sh: $python lacks cmake or ninja; type \`make sanitize\`, or pip install them" >&2; exit 1; }
import shutil
assert shutil.which("cmake") and shutil.which("ninja")
PYTHON
cmake -S "$root" -B "$room/build" -G Ninja -DPython_EXECUTABLE="$(command -v "$python")" -DSPROMPT_SANITIZE=ON -DSPROMPT_CUDA=off \
    -DSPROMPT_EMULATE_AVX512=$emulate -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$room/package/sprompt" >"$room/configure.log" || {
    cat "$room/configure.log"
    exit 1
}
cmake --build "$room/build" --target _C fuzz_rle -- -j "${SPROMPT_BUILD_JOBS:-$(nproc)}" --quiet

export ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:detect_stack_use_after_return=0
export UBSAN_OPTIONS=print_stacktrace=1
export OMP_NUM_THREADS=2 PYTHONDONTWRITEBYTECODE=1
cd "$room/package"
# libstdc++ is loaded with libasan, which looks for its functions when the interpreter starts.
sanitized() { LD_PRELOAD="$asan:$("$CXX" -print-file-name=libstdc++.so.6)" PYTHONPATH=$room/package "$@"; }

echo "== the sanitized module is loaded, and sees a write outside"
sanitized "$python" - "$room" <<'PYTHON'
import sys
from pathlib import Path

from sprompt import native

file = Path(native._C.__file__)
assert file.is_relative_to(sys.argv[1]), f"another module was loaded: {file}"
assert b"__asan_report" in file.read_bytes(), f"{file} is not sanitized"
PYTHON
if sanitized "$python" - >"$room/seeded.log" 2>&1 <<'PYTHON'
import torch

from sprompt import native

masks, areas = torch.ones(1000, 4, dtype=torch.int32), torch.empty(999, dtype=torch.int64)
native._C.mask_area(masks, areas, 1)
PYTHON
then
    echo "sanitize.sh: a write behind the end of a tensor was not seen" >&2
    exit 1
fi
if ! grep -q heap-buffer-overflow "$room/seeded.log" || ! grep -q "WRITE of size 8" "$room/seeded.log"; then
    cat "$room/seeded.log"
    exit 1
fi

case " $ops " in
*" rle "* | " all ")
    echo "== fuzzing"
    inputs=$((${SPROMPT_FUZZ_INPUTS:-300000} / 2))
    "$room/build/fuzz_rle" "$inputs" 1 &
    first=$!
    "$room/build/fuzz_rle" "$inputs" 2
    wait $first
    ;;
*) echo "== fuzzing: left out, rle has not changed" ;;
esac

for level in ${SPROMPT_SANITIZE_LEVELS:-avx512 avx2 portable}; do
    if ! SPROMPT_CPU=$level sanitized "$python" -c 'import sprompt' 2>/dev/null; then
        echo "== SPROMPT_CPU=$level: skipped, this CPU cannot"
        continue
    fi
    echo "== SPROMPT_CPU=$level"
    SPROMPT_CPU=$level sanitized "$python" -m pytest -p no:cacheprovider -n 2 --dist worksteal --durations=10 --durations-min=1 tests/ops "$@"
done
