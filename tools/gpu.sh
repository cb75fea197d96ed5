#!/usr/bin/env bash
# gpu.sh: on a machine with an NVIDIA GPU, builds, measures, and tests every promise on CUDA, within 9 minutes. Needs Python 3.10
# to 3.13 with its own torch >= 2.8 and Triton >= 3.4; cmake, ninja, pytest and what the tests compare with are
# installed into build/gpu/site only if they are missing and an index can be reached.
#   PYTHON   the interpreter that has torch (default: python3)
#   OUT      where report.json, report.md and the logs go (default: benchmarks/results/<gpu name>)
#   TOTAL    seconds in all (default: 530)
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
room=$root/build/gpu
package=$room/package
given=${PYTHONPATH:-}
python=$(command -v "${PYTHON:-python3}") || { echo "gpu.sh: no interpreter ${PYTHON:-python3}" >&2; exit 1; }
begin=$SECONDS

fail() {
    echo "gpu.sh: $*" >&2
    exit 1
}
say() {
    echo
    echo "== $* ($((SECONDS - begin)) s)"
}
left() { # left RESERVE: seconds until RESERVE before the end, at least 10
    local seconds=$((${TOTAL:-530} - (SECONDS - begin) - $1))
    echo $((seconds > 10 ? seconds : 10))
}

"$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' ||
    fail "$python is not Python 3.10 to 3.13; type \`make gpu PYTHON=...\`"
name=$("$python" - <<'PYTHON'
import re, torch
assert torch.cuda.is_available()
print(re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-"), "%d%d" % torch.cuda.get_device_capability())
PYTHON
) || fail "$python has no torch that sees a GPU; type \`make gpu PYTHON=...\`"
arch=${name##* }
out=${OUT:-benchmarks/results/${name%% *}}
mkdir -p "$out" "$package"
out=$(cd "$out" && pwd)

missing=$("$python" - <<'PYTHON'
import importlib.util
needed = {"cmake": "cmake", "ninja": "ninja", "pytest": "pytest", "xdist": "pytest-xdist", "execnet": "execnet",
          "iniconfig": "iniconfig", "pluggy": "pluggy", "hypothesis": "hypothesis", "sortedcontainers": "sortedcontainers",
          "scipy": "scipy", "pycocotools": "pycocotools", "expecttest": "expecttest"}
print(*(package for module, package in needed.items() if importlib.util.find_spec(module) is None))
PYTHON
)
if [ -n "$missing" ]; then
    say "missing: $missing; trying to install"
    # shellcheck disable=SC2086
    timeout 30 "$python" -m pip install --quiet --disable-pip-version-check --retries 0 --timeout 5 --no-deps \
        --target "$room/site" $missing 2>/dev/null || echo "could not be installed: what needs them is skipped"
fi
export PATH=$room/site/bin:$(dirname "$python"):$PATH PYTHONPATH=$room/site${given:+:$given}
[ ! -d /usr/local/cuda/bin ] || export PATH=$PATH:/usr/local/cuda/bin

say "building in build/gpu"
for part in sprompt tests benchmarks; do
    rm -rf "${package:?}/$part"
    cp -R "$part" "$package/$part"
done
cp pyproject.toml "$package/"
rm -f "$package"/sprompt/_C*
if ! command -v nvcc >/dev/null; then
    echo "nvcc is missing: the CUDA C++ kernels are not built, their ops run on the reference, and the tests will say so"
fi
if command -v cmake >/dev/null; then
    generator=$(command -v ninja >/dev/null && echo "-G Ninja" || true)
    # shellcheck disable=SC2086
    cmake -S "$root" -B "$room/build" $generator -DPython_EXECUTABLE="$python" -DSPROMPT_CUDA_ARCHS="$arch" \
        -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$package/sprompt" >"$out/build.log" 2>&1 &&
        cmake --build "$room/build" --target _C -j "$(nproc)" >>"$out/build.log" 2>&1 ||
        { tail -30 "$out/build.log"; fail "the kernels could not be built; $out/build.log has it all"; }
else
    echo "cmake is missing: the CUDA C++ kernels are not built, their ops run on the reference"
fi
cd "$package" # no other sprompt is in reach
export PYTHONPATH=$package:$PYTHONPATH
export CUBLAS_WORKSPACE_CONFIG=:4096:8 # without it torch refuses products where deterministic ones are asked for
"$python" -m sprompt.env | tee "$out/environment.txt"

status=0
say "benchmark at the paper's sizes"
limit=$(left 290)
timeout "$limit" "$python" -m benchmarks.run --device cuda --no-compile --seconds 0.2 --budget $((limit > 60 ? limit - 40 : limit / 2)) \
    --json "$out/report.json" --markdown "$out/report.md" >"$out/benchmark.log" 2>&1 || status=$?
tail -70 "$out/benchmark.log"
[ $status = 0 ] || echo "benchmark ended with status $status (1: a wrong answer, 124: out of time)"

say "the promises on CUDA, and compute-sanitizer beside them"
sanitized() { # memory is not cached, so that a write behind a tensor is one behind its allocation
    local told=
    for tool in memcheck racecheck; do
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 100 compute-sanitizer --tool $tool --report-api-errors no --error-exitcode 9 \
            --kernel-name kernel_substring=sprompt "$python" -m sprompt.testing.sanitized >"$room/$tool.log" 2>&1 &&
            told="$told $tool passed" || told="$told $tool ended with status $?"
    done
    echo "$told" >"$room/sanitizer.txt"
}
echo "compute-sanitizer is not installed: skipped" >"$room/sanitizer.txt"
checking=
if command -v compute-sanitizer >/dev/null; then
    echo "did not end" >"$room/sanitizer.txt"
    sanitized &
    checking=$!
fi
# Six processes: a test of far offsets takes up to 17 GB of the GPU's memory.
parallel=$("$python" -c 'import xdist' 2>/dev/null && echo "-n $(($(nproc) < 6 ? $(nproc) : 6)) --dist worksteal" || true)
tested=0
# shellcheck disable=SC2086
timeout -s INT -k 15 "$(left 30)" "$python" -m pytest -p no:cacheprovider -q -rfEs $parallel tests/test_cuda.py tests/test_cuda_step.py \
    tests/test_contract.py \
    -k "cuda and not cuda-reference" --junitxml "$room/tests.xml" >"$out/tests.log" 2>&1 || tested=$?
grep -vE '^[.sFE]+ *(\[|$)|^$' "$out/tests.log" | tail -40 || true
[ $tested = 0 ] || echo "tests ended with status $tested (2: out of time)"
if [ -n "$checking" ]; then
    for _ in $(seq "$(left 8)"); do
        kill -0 $checking 2>/dev/null || break
        sleep 1
    done
    kill $checking 2>/dev/null || true
    cat "$room"/*check.log >"$out/sanitizer.log" 2>/dev/null || true
fi
cat "$room/sanitizer.txt"

say "done: $out"
"$python" - "$out" "$room" "$status" "$tested" <<'PYTHON'
import json, sys, xml.etree.ElementTree as tree
from pathlib import Path

out, room, status, tested = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
file = out / "report.json"
report = json.loads(file.read_text()) if file.exists() else {"rows": []}
counts = {}
if (room / "tests.xml").exists():
    suite = tree.parse(room / "tests.xml").getroot()[0].attrib
    counts = {name: int(suite[name]) for name in ("tests", "failures", "errors", "skipped")}
sanitizer = (room / "sanitizer.txt").read_text().strip()
report |= {"command": "make gpu", "tests": counts, "compute_sanitizer": sanitizer, "benchmark_status": status, "test_status": tested}
file.write_text(json.dumps(report, indent=1) + "\n")
wrong = [row for row in report["rows"] if row.get("error") and not row["error"].endswith("is not installed")]
print(f"tests: {counts or 'none finished'}; compute-sanitizer: {sanitizer}; {len(report['rows'])} rows, {len(wrong)} of them wrong")
sys.exit(1 if status or tested or wrong else 0)
PYTHON
