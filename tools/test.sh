#!/usr/bin/env bash
# test.sh BIN [pytest arguments]: runs the whole suite at the best instruction set of this CPU, with the programs in the folder
# BIN. Then it runs the slow levels for the ops that tools/changed.py names: the tests that depend on the instruction set at
# each lower instruction set, and the ops' own tests on the reference. On a CPU with AVX2 but no AVX-512 it also runs the avx512
# level, on a build that emulates these instructions (tests/emulation). The same build runs the GPU kernels on this CPU: it
# emulates CUDA C++ with two orders of the threads, and Triton's interpreter runs the Triton kernels.
#   SPROMPT_TEST_OPS  other ops for the slow levels: "mask_nms masks", "all", or "none"
#   SPROMPT_BASE      commit to compare with (default: the commit in .ci/base)
set -euo pipefail
cd "$(dirname "$0")/.."
bin=$1
shift

cores=$(nproc 2>/dev/null || sysctl -n hw.ncpu)
workers=${SPROMPT_TEST_WORKERS:-2}
threads=$((cores / workers))
export OMP_NUM_THREADS=$((threads > 0 ? threads : 1))
export MKL_NUM_THREADS=$OMP_NUM_THREADS
# Compilation, export and opcheck test the registration, which does not depend on the instruction set. Only the first run has
# them.
kernels=(tests/ops tests/test_contract.py -k "not compiled and not export and not opcheck and not cpu-cuda")

suite() { # suite TITLE pytest-arguments...
    echo
    echo "== $1 ($((SECONDS / 60)) min $((SECONDS % 60)) s)"
    shift
    "$bin/pytest" -n "$workers" --dist worksteal --durations=10 --durations-min=1 "$@"
}

runs() { # runs LEVEL: succeeds if this CPU has that instruction set
    SPROMPT_CPU=$1 "$bin/python" -c 'import sprompt' 2>/dev/null
}

ops=$("$bin/python" tools/changed.py)
unset SPROMPT_TEST_OPS # the first run tests every op
best=$("$bin/python" -c 'from sprompt import native; print(native._C.best_level() if native._C else "none")')
if [ "$best" = none ]; then
    suite "no compiled kernels: the whole suite on the reference" "$@"
    exit
fi
built=
emulated() { # emulated COMMAND...: runs it on a build that emulates CUDA, and AVX-512 if this CPU has only AVX2
    if [ -z "$built" ]; then
        echo
        echo "building the emulation in build/emulated"
        runs avx512 || ! runs avx2 || export SPROMPT_EMULATE_AVX512=1
        SPROMPT_CUDA=off SPROMPT_EMULATE_CUDA=1 "$bin/python" setup.py --quiet build --build-base build/emulated --build-lib build/emulated/lib
        unset SPROMPT_EMULATE_AVX512
        built=yes
    fi
    PYTHONPATH=build/emulated/lib "$@"
}

SPROMPT_CPU=$best suite "SPROMPT_CPU=$best, the best of this CPU: the whole suite" "$@"
if [ -z "$ops" ]; then
    echo
    echo "== the slow levels (lower instruction sets, reference, emulation, interpreter): skipped, because no op changed; \`make test-all\` runs them"
    exit
fi
export SPROMPT_TEST_OPS=$ops # read by tests/conftest.py
for level in avx512 avx2 portable; do
    [ "$level" = "$best" ] && continue
    if runs "$level"; then
        SPROMPT_CPU=$level suite "SPROMPT_CPU=$level: what depends on the instruction set" "${kernels[@]}" "$@"
    elif [ "$level" = avx512 ] && runs avx2; then
        SPROMPT_CPU=avx512 emulated \
            suite "SPROMPT_CPU=avx512, emulated: what depends on the instruction set" "${kernels[@]}" "$@"
    else
        echo
        echo "== SPROMPT_CPU=$level: skipped, this CPU has at most $best"
    fi
done
SPROMPT_BACKEND=reference suite "SPROMPT_BACKEND=reference: the ops' own tests" tests/ops "$@"

# At run time, SPROMPT_EMULATE_CUDA makes CPU tensors use the backends that GPU tensors would.
rest="cpu-native or cpu-reference or opcheck or compiled or export or gradcheck or bad_input or autocast or pickle"
rest+=" or number_of_threads or both_ways or profiler_sees" # the same for all backends
gpu=(tests/ops tests/test_contract.py -k "not ($rest)")
if "$bin/python" -c 'import triton' 2>/dev/null; then
    export TRITON_INTERPRET=1
else
    echo
    echo "== triton is not installed: its kernels are not interpreted"
fi
SPROMPT_EMULATE_CUDA=1 emulated \
    suite "the GPU's kernels on this CPU: CUDA emulated, Triton interpreted" "${gpu[@]}" tests/test_gpu_bytes.py "$@"
unset TRITON_INTERPRET
SPROMPT_EMULATE_CUDA=1 SPROMPT_EMULATION_SEED=1 emulated \
    suite "the CUDA kernels emulated, threads in another order" "${gpu[@]}" "$@"
