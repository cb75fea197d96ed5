#!/usr/bin/env bash
# gpu.sh: on a machine with an NVIDIA GPU, builds, tests every promise on CUDA, checks the CUDA C++ kernels with
# compute-sanitizer and measures, within 9 minutes. Needs Python 3.10 to 3.13 with its own torch >= 2.8 and Triton >= 3.4; cmake,
# ninja, pybind11, pytest and what the tests compare with are installed into build/gpu/site only if they are missing.
#   PYTHON   the interpreter that has torch (default: python3)
#   OUT      where report.json, report.md and the logs go (default: benchmarks/results/<gpu name>)
#   SECONDS_TESTS, SECONDS_SANITIZER, SECONDS_BENCH   what each part may take (default: 240, 2 x 40, 140)
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
room=$root/build/gpu
package=$room/package
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

"$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || fail "$python is not Python 3.10 to 3.13; type \`make gpu PYTHON=...\`"
"$python" -c 'import torch; assert torch.cuda.is_available()' || fail "$python has no torch that sees a GPU; type \`make gpu PYTHON=...\`"
name=$("$python" -c 'import re, torch; print(re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-"))')
out=${OUT:-benchmarks/results/$name}
mkdir -p "$out" "$package"
out=$(cd "$out" && pwd)

missing=$("$python" - <<'PYTHON'
import importlib.util
needed = {"cmake": "cmake", "ninja": "ninja", "pybind11": "pybind11", "pytest": "pytest", "xdist": "pytest-xdist", "hypothesis": "hypothesis",
          "scipy": "scipy", "pycocotools": "pycocotools", "expecttest": "expecttest", "iniconfig": "iniconfig",
          "pluggy": "pluggy", "execnet": "execnet", "sortedcontainers": "sortedcontainers"}
print(*(package for module, package in needed.items() if importlib.util.find_spec(module) is None))
PYTHON
)
if [ -n "$missing" ]; then
    say "missing: $missing; trying to install"
    # shellcheck disable=SC2086
    timeout 60 "$python" -m pip install --quiet --disable-pip-version-check --retries 0 --timeout 10 --no-deps \
        --target "$room/site" $missing || echo "could not be installed: what needs them is skipped"
fi
export PATH=$room/site/bin:$(dirname "$python"):$PATH PYTHONPATH=$room/site

say "building in build/gpu"
for part in sprompt tests benchmarks; do
    rm -rf "${package:?}/$part"
    cp -R "$part" "$package/$part"
done
cp pyproject.toml "$package/"
rm -f "$package"/sprompt/_C*
arch=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
if "$python" -c 'import pybind11' 2>/dev/null && command -v cmake >/dev/null; then
    cmake -S "$root" -B "$room/build" $(command -v ninja >/dev/null && echo -G Ninja) -DPython_EXECUTABLE="$python" \
        -DSPROMPT_CUDA_ARCHS="$arch" -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$package/sprompt" >"$out/build.log" 2>&1 &&
        cmake --build "$room/build" --target _C -j "$(nproc)" >>"$out/build.log" 2>&1 ||
        { tail -30 "$out/build.log"; fail "the kernels could not be built; $out/build.log has it all"; }
else
    echo "cmake or pybind11 is missing: the CUDA C++ kernels are not built, their ops run on the reference"
fi
cd "$package" # no other sprompt is in reach
export PYTHONPATH=$package:$room/site
"$python" -m sprompt.env | tee "$out/environment.txt"

status=0
say "the promises on CUDA"
# Six processes: a test of far offsets takes up to 17 GB of the GPU's memory.
parallel=$("$python" -c 'import xdist' 2>/dev/null && echo "-n $(($(nproc) < 6 ? $(nproc) : 6)) --dist worksteal" || true)
# shellcheck disable=SC2086
timeout -s INT -k 15 "${SECONDS_TESTS:-240}" "$python" -m pytest -p no:cacheprovider -q -rfEs $parallel \
    tests/test_cuda.py tests/test_contract.py -k cuda --junitxml "$out/tests.xml" >"$out/tests.log" 2>&1 || status=$?
grep -vE '^\.|^$' "$out/tests.log" | tail -40 || true
[ $status = 0 ] || echo "tests ended with status $status (124: out of time)"

say "compute-sanitizer"
sanitizer=skipped
if command -v compute-sanitizer >/dev/null; then
    sanitizer=passed
    for tool in memcheck racecheck; do
        timeout "${SECONDS_SANITIZER:-40}" compute-sanitizer --tool $tool --error-exitcode 9 --kernel-name kernel_substring=sprompt \
            "$python" -m sprompt.testing.sanitized >"$out/$tool.log" 2>&1 || { sanitizer="$tool ended with status $?"; tail -15 "$out/$tool.log"; break; }
        tail -2 "$out/$tool.log"
    done
else
    echo "compute-sanitizer is not installed: skipped"
fi

say "benchmark at the paper's sizes"
timeout "${SECONDS_BENCH:-140}" "$python" -m benchmarks.run --device cuda --seconds 0.3 --budget "$((${SECONDS_BENCH:-140} - 25))" \
    --json "$out/report.json" --markdown "$out/report.md" >"$out/benchmark.log" 2>&1 || status=$((status ? status : $?))
tail -60 "$out/benchmark.log"

say "done: $out"
"$python" - "$out" "$status" "$sanitizer" <<'PYTHON'
import json, sys, xml.etree.ElementTree as tree
from pathlib import Path

out, status, sanitizer = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
file = out / "report.json"
report = json.loads(file.read_text()) if file.exists() else {"rows": []}
counts = {}
if (out / "tests.xml").exists():
    suite = tree.parse(out / "tests.xml").getroot()[0].attrib
    counts = {name: int(suite[name]) for name in ("tests", "failures", "errors", "skipped")}
report |= {"command": "make gpu", "tests": counts, "compute_sanitizer": sanitizer, "status": status}
file.write_text(json.dumps(report, indent=1) + "\n")
wrong = [row for row in report["rows"] if row.get("error") and not row["error"].endswith("is not installed")]
print(f"tests: {counts or 'none finished'}; compute-sanitizer: {sanitizer}; {len(report['rows'])} rows, {len(wrong)} of them wrong")
sys.exit(status or bool(wrong))
PYTHON
