#!/usr/bin/env bash
# gpu.sh: builds, tests every promise on CUDA, and measures, on a machine with an NVIDIA GPU. The most important parts come
# first, and each part has its share of the time. Needs Python 3.10 to 3.13 that has torch >= 2.8 and Triton >= 3.4 installed.
# Other missing packages come from build/gpu-kit (`make gpu-prepare`, on any machine), or from a package index if one can be
# reached.
#   PYTHON   the interpreter that has torch (default: python3)
#   OUT      folder for report.json, report.md and the logs (default: benchmarks/results/<gpu name>)
#   TOTAL    seconds for all parts together (default: 530)
#   PARTS    parts to run (default: "smoke values forward promises systems programs modes memcheck compile")
#   TUNE     folders of ops for which the part "tune" tries other tile sizes; OUT/<folder>.json is the new configs.json
#   SELECT   expression that selects tests (pytest -k); default: all tests
#   OPS      ops that the benchmark times ("mask_iou mask_nms"); default: all ops
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
begin=$SECONDS
given=${PYTHONPATH:-}
. tools/gpu_folder.sh
python=$(command -v "${PYTHON:-python3}") || fail "no interpreter ${PYTHON:-python3}"
total=${TOTAL:-530}
parts=" ${PARTS:-smoke values forward promises systems programs modes memcheck compile} "

"$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' ||
    fail "$python is not Python 3.10 to 3.13; type \`make gpu PYTHON=...\`"
name=$("$python" - <<'PYTHON'
import re, sys, torch
assert torch.cuda.is_available()
gpu = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
print(gpu, "%d%d" % torch.cuda.get_device_capability(), "%d%d" % sys.version_info[:2])
PYTHON
) || fail "$python has no torch that sees a GPU; type \`make gpu PYTHON=...\`"
read -r gpu arch tag <<<"$name"
out=${OUT:-benchmarks/results/$gpu}
mkdir -p "$out" "$work"
out=$(cd "$out" && pwd)
kit=$(cd "$kit" 2>/dev/null && pwd || echo none)

install() { timeout 40 "$python" -m pip install -q --disable-pip-version-check --no-deps --no-compile --upgrade --target "$work/site" "$@"; }
if compgen -G "$kit/wheels/*.whl" >/dev/null; then
    install --no-index --no-cache-dir "$kit"/wheels/*.whl
fi
export PYTHONPATH=$work/site${given:+:$given} PATH=$work/site/bin:$(dirname "$python"):$PATH
missing=$("$python" - <<'PYTHON'
import importlib.util
needed = {"cmake": "cmake", "ninja": "ninja", "pytest": "pytest", "xdist": "pytest-xdist", "execnet": "execnet",
          "pytest_timeout": "pytest-timeout", "iniconfig": "iniconfig", "pluggy": "pluggy", "hypothesis": "hypothesis",
          "sortedcontainers": "sortedcontainers", "scipy": "scipy", "pycocotools": "pycocotools", "expecttest": "expecttest"}
print(*(package for module, package in needed.items() if importlib.util.find_spec(module) is None))
PYTHON
)
if [ -n "$missing" ]; then
    say "missing: $missing; trying to install"
    # shellcheck disable=SC2086
    install --retries 0 --timeout 5 $missing 2>/dev/null || echo "they could not be installed; parts that need them are skipped"
fi
[ ! -d /usr/local/cuda/bin ] || export PATH=$PATH:/usr/local/cuda/bin

furnish
if compgen -G "$kit/_C.cpython-$tag-*.so" >/dev/null; then
    say "kernels from $kit"
    cp "$kit"/_C.cpython-"$tag"-*.so "$package/sprompt/"
elif command -v cmake >/dev/null; then
    say "building in $work"
    command -v nvcc >/dev/null || echo "nvcc is missing: the CUDA C++ kernels are not built, and their tests are skipped"
    compile "$python" "$arch" "$package/sprompt" "$out/build.log" || { tail -30 "$out/build.log"; fail "the kernels could not be built"; }
else
    echo "cmake is missing: the CUDA C++ kernels are not built, their ops run on the reference"
fi
export TRITON_CACHE_DIR=$work/triton # one cache for all processes; Inductor would give each process its own
[ ! -e "$kit/triton.tar.xz" ] || "$python" -m tarfile -e "$kit/triton.tar.xz" "$work"
export TORCHINDUCTOR_COMPILE_THREADS=1
export CUBLAS_WORKSPACE_CONFIG=:4096:8 # torch refuses deterministic products without it
cd "$package"
"$python" -m sprompt.env | tee "$out/environment.txt"
ended= # NAME:STATUS of every part

# part NAME SHARE: succeeds if PARTS has the part. Prints the name and sets `limit` to the seconds until SHARE percent of TOTAL.
part() {
    limit=$((total * $2 / 100 - (SECONDS - begin)))
    limit=$((limit > 15 ? limit : 15))
    case $parts in *" $1 "*) say "$1, within $limit s" ;; *) return 1 ;; esac
}
test_cuda() { # test_cuda NAME pytest-arguments...; ten processes, because each takes up to a tenth of the GPU's memory
    local name=$1 status=0 workers
    shift
    workers=$(($(nproc) < 10 ? $(nproc) : 10))
    local parallel timed
    parallel=$("$python" -c 'import xdist' 2>/dev/null && echo "-n $workers --dist worksteal" || true)
    timed=$("$python" -c 'import pytest_timeout' 2>/dev/null && echo "--timeout 90" || true)
    # shellcheck disable=SC2086
    timeout -s INT -k 10 "$limit" "$python" -m pytest -p no:cacheprovider -q -rfEs $parallel $timed --junitxml "$work/$name.xml" "$@" \
        >"$out/$name.log" 2>&1 || status=$?
    grep -vE '^[.sFEx]+ *(\[|$)|^$|^SKIPPED' "$out/$name.log" | grep -E '^(FAILED|ERROR|[0-9]+ |=|.*CUDA error)' | cut -c1-400 | tail -40 || true
    ended="$ended $name:$status"
}
measure() { # measure NAME benchmark-arguments...
    local name=$1 status=0
    shift
    # shellcheck disable=SC2046
    timeout -k 5 "$limit" "$python" -m benchmarks.run --device cuda --no-compile --seconds 0.2 --budget $((limit - limit / 8)) \
        ${OPS:+$(printf -- '--op %s ' $OPS)} --json "$out/$name.json" "$@" >"$out/$name.log" 2>&1 || status=$?
    tail -60 "$out/$name.log"
    ended="$ended $name:$status"
}
rm -f "$work"/*.xml
chosen=${SELECT:+ and ($SELECT)}

if part smoke 7; then
    status=0
    timeout "$limit" "$python" -m sprompt.testing.sanitized >"$out/smoke.log" 2>&1 || status=$?
    tail -3 "$out/smoke.log"
    ended="$ended smoke:$status"
fi
if part values 25; then
    test_cuda values tests/test_contract.py -k "cuda and not cuda-reference and (right_on or gradients_equal)$chosen"
fi
if part forward 48; then
    measure forward --mode forward
fi
if part promises 65; then
    test_cuda promises tests/test_cuda.py tests/test_cuda_step.py tests/test_contract.py tests/ops/test_linear_assignment.py \
        tests/ops/test_resize_masks.py tests/ops/test_rle.py \
        -k "cuda and not cuda-reference and not (right_on or gradients_equal or opcheck or compiled or export)$chosen"
fi
if part systems 72; then
    test_cuda systems tests/test_systems.py
fi
if part programs 84; then
    status=0
    timeout -k 5 "$limit" "$python" -m benchmarks.programs --device cuda --seconds 1 --json "$out/programs.json" \
        >"$out/programs.log" 2>&1 || status=$?
    tail -60 "$out/programs.log"
    ended="$ended programs:$status"
fi
if part modes 92; then
    measure modes --mode full --mode memory --mode backward
fi
if part memcheck 96; then # without the caching allocator, a write behind a tensor is a write behind its allocation
    told="not installed"
    if command -v compute-sanitizer >/dev/null; then
        status=0
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout "$limit" compute-sanitizer --tool memcheck --report-api-errors no --error-exitcode 9 \
            --kernel-name kernel_substring=sprompt "$python" -m sprompt.testing.sanitized >"$out/sanitizer.log" 2>&1 || status=$?
        told="memcheck ended with status $status (0: nothing found, 124: out of time)"
    fi
    echo "$told" | tee "$work/sanitizer.txt"
fi
if part tune 98; then
    status=0
    # shellcheck disable=SC2046
    timeout "$limit" "$python" -m benchmarks.tune --seconds 0.05 $(printf -- '--op %s ' ${TUNE:?}) >"$out/tune.log" 2>&1 || status=$?
    tail -20 "$out/tune.log"
    for folder in $TUNE; do cp "sprompt/ops/$folder/configs.json" "$out/$folder.json"; done
    ended="$ended tune:$status"
fi
if part compile 99; then
    test_cuda compile tests/test_contract.py -k "cuda and (opcheck or compiled or export)$chosen"
fi

say "done: $out"
"$python" - "$out" "$work" "$ended" <<'PYTHON'
import json, sys, xml.etree.ElementTree as tree
from pathlib import Path

from benchmarks import table

out, work, ended = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3].split()
report = {"rows": [], "empty_calls": [], "left_out": []}
for file in ("forward.json", "modes.json"):
    if (out / file).exists():
        part = json.loads((out / file).read_text())
        for name in ("rows", "empty_calls", "left_out"):
            part[name] = report[name] + part[name]
        report |= part
counts = {}
for file in sorted(work.glob("*.xml")):
    suite = tree.parse(file).getroot()[0].attrib
    counts[file.stem] = {name: int(suite[name]) for name in ("tests", "failures", "errors", "skipped")}
sanitizer = (work / "sanitizer.txt").read_text().strip() if (work / "sanitizer.txt").exists() else "not run"
report |= {"command": "make gpu", "tests": counts, "compute_sanitizer": sanitizer, "parts": ended}
(out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
if report["rows"]:
    (out / "report.md").write_text(table.markdown(report) + "\n")
wrong = [row for row in report["rows"] if row.get("error") and not row["error"].endswith("is not installed")]
for row in wrong:
    print("wrong:", row["op"], row["shape"], row["dtype"], row["mode"], row["error"])
print(f"tests: {counts or 'none finished'}; {sanitizer}; {len(report['rows'])} rows, {len(wrong)} of them wrong; {' '.join(ended)}")
sys.exit(1 if wrong or any(not part.endswith(":0") for part in ended) else 0)
PYTHON
