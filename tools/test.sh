#!/usr/bin/env bash
# test.sh PYTHON [pytest arguments]: the whole suite at the best instruction set of this CPU; what depends on the
# instruction set again at each lower one; the ops' own tests once more on the reference.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1
shift

cores=$(nproc 2>/dev/null || sysctl -n hw.ncpu)
workers=${SPROMPT_TEST_WORKERS:-2}
threads=$((cores / workers))
export OMP_NUM_THREADS=$((threads > 0 ? threads : 1))
export MKL_NUM_THREADS=$OMP_NUM_THREADS

suite() { # suite TITLE pytest-arguments...
    local title=$1
    shift
    echo
    echo "== $title"
    "$python" -m pytest -n "$workers" --dist worksteal "$@"
}

best=$("$python" -c 'from sprompt import native; print(native._C.best_level() if native._C else "none")')
if [ "$best" = none ]; then
    suite "no compiled kernels (SPROMPT_NO_EXT=1): the whole suite on the reference" "$@"
    exit
fi
full=yes
for level in avx512 avx2 portable; do
    if ! SPROMPT_CPU=$level "$python" -c 'import sprompt' 2>/dev/null; then
        echo
        echo "== SPROMPT_CPU=$level: skipped, this CPU has at most $best"
    elif [ $full = yes ]; then
        SPROMPT_CPU=$level suite "SPROMPT_CPU=$level: the whole suite" "$@"
        full=no
    else
        SPROMPT_CPU=$level suite "SPROMPT_CPU=$level: what depends on the instruction set" tests/ops tests/test_contract.py "$@"
    fi
done
SPROMPT_BACKEND=reference suite "SPROMPT_BACKEND=reference: the ops on their definition" tests/ops "$@"
