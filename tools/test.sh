#!/usr/bin/env bash
# test.sh BIN [pytest arguments]: with the environment whose programs lie in BIN, the whole suite at the best instruction set
# of this CPU, what depends on the instruction set again at each lower one, and the ops' own tests on the reference. On a CPU
# with AVX2 but no AVX-512 the avx512 level runs as well, on a build that emulates its instructions (tests/emulation).
set -euo pipefail
cd "$(dirname "$0")/.."
bin=$1
shift

cores=$(nproc 2>/dev/null || sysctl -n hw.ncpu)
workers=${SPROMPT_TEST_WORKERS:-2}
threads=$((cores / workers))
export OMP_NUM_THREADS=$((threads > 0 ? threads : 1))
export MKL_NUM_THREADS=$OMP_NUM_THREADS
# Compilation, export and opcheck concern the registration, which no instruction set changes: the first run has them.
kernels=(tests/ops tests/test_contract.py -k "not compiled and not export and not opcheck")

suite() { # suite TITLE pytest-arguments...
    echo
    echo "== $1 ($((SECONDS / 60)) min $((SECONDS % 60)) s)"
    shift
    "$bin/pytest" -n "$workers" --dist worksteal "$@"
}

runs() { # runs LEVEL: whether this CPU has it
    SPROMPT_CPU=$1 "$bin/python" -c 'import sprompt' 2>/dev/null
}

best=$("$bin/python" -c 'from sprompt import native; print(native._C.best_level() if native._C else "none")')
if [ "$best" = none ]; then
    suite "no compiled kernels: the whole suite on the reference" "$@"
    exit
fi
SPROMPT_CPU=$best suite "SPROMPT_CPU=$best, the best of this CPU: the whole suite" "$@"
for level in avx512 avx2 portable; do
    [ "$level" = "$best" ] && continue
    if runs "$level"; then
        SPROMPT_CPU=$level suite "SPROMPT_CPU=$level: what depends on the instruction set" "${kernels[@]}" "$@"
    elif [ "$level" = avx512 ] && runs avx2; then
        echo
        echo "building for SPROMPT_CPU=avx512, which this CPU lacks: its instructions are emulated"
        SPROMPT_EMULATE_AVX512=1 "$bin/python" setup.py --quiet build --build-base build/emulated --build-lib build/emulated/lib
        PYTHONPATH=build/emulated/lib SPROMPT_CPU=avx512 \
            suite "SPROMPT_CPU=avx512, emulated: what depends on the instruction set" "${kernels[@]}" "$@"
    else
        echo
        echo "== SPROMPT_CPU=$level: skipped, this CPU has at most $best"
    fi
done
SPROMPT_BACKEND=reference suite "SPROMPT_BACKEND=reference: the ops on their definition" tests/ops "$@"
