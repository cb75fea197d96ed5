#!/usr/bin/env bash
# test_oldest.sh BIN [pytest arguments]: runs tests/patch on the oldest transformers that sprompt.patch serves, and on a package
# kernels that it takes. Both go into a folder of build/, without what they depend on: the environment has it. The suite itself has
# the newest transformers (constraints.txt).
set -euo pipefail
cd "$(dirname "$0")/.."
bin=$1
shift

oldest=$("$bin/python" -c 'from sprompt.patch.replaced import OLDEST; print(*OLDEST, sep=".")')
folder=build/transformers-$oldest
if [ ! -e "$folder/.ready" ]; then
    "$bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target "$folder" "transformers==$oldest.*" kernels==0.17.2
    touch "$folder/.ready"
fi
export PYTHONPATH=$folder${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=1
"$bin/python" -c 'import transformers; print("transformers", transformers.__version__)'
"$bin/pytest" -n "${SPROMPT_TEST_WORKERS:-2}" tests/patch "$@"
