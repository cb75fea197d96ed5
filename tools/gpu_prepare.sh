#!/usr/bin/env bash
# gpu_prepare.sh: on a machine without a GPU, makes the folder build/gpu-kit, with which `make gpu` needs neither an index nor much
# compilation on the GPU machine: wheels that a bare machine lacks, sprompt._C, and Triton's cache of every kernel that tests and
# benchmark launch. It holds for one commit and for the GPU machine's versions of Python, torch and Triton.
#   PYTHON   an interpreter of that version, with pip (default: python3.12)
#   TORCH    that machine's torch, which brings its Triton (default: 2.11.0)
#   ENVIRONMENT  where they are installed (default: build/gpu-env-<Python>-<torch>)
#   ARCH     its GPU's architecture (default: 90)
#   TUNE     folders of ops that `make gpu` is to tune (see gpu.sh)
#   WHEELS   what it lacks (default: pycocotools expecttest tyro docstring_parser typeguard)
set -euo pipefail
cd "$(dirname "$0")/.."
begin=$SECONDS
given=
. tools/gpu_room.sh
python=$(command -v "${PYTHON:-python3.12}") || fail "no interpreter ${PYTHON:-python3.12}; name one of the GPU machine's version with PYTHON="
torch=${TORCH:-2.11.0} arch=${ARCH:-90}
read -ra wheels <<<"${WHEELS:-pycocotools expecttest tyro docstring_parser typeguard}"
tag=$("$python" -c 'import sys; print("%d%d" % sys.version_info[:2])')
environment=${ENVIRONMENT:-build/gpu-env-$tag-$torch}
mkdir -p "$kit/wheels" "$room"

if [ ! -e "$environment/.ready" ]; then
    say "the GPU machine's packages in $environment (torch alone is gigabytes)"
    "$python" -m venv --clear "$environment"
    "$environment/bin/python" -m pip install -q --disable-pip-version-check "torch==$torch" numpy scipy pytest pytest-xdist \
        pytest-timeout hypothesis cmake ninja accelerate safetensors pyyaml pillow matplotlib tensorboard rich
    touch "$environment/.ready"
fi
python=$(cd "$environment/bin" && pwd)/python
export PATH=$(dirname "$python"):$PATH

say "wheels"
rm -f "$kit"/wheels/*
platforms=()
for libc in manylinux_2_28 manylinux_2_17 manylinux2014 manylinux1; do platforms+=(--platform "${libc}_$(uname -m)"); done
"$python" -m pip download -q --disable-pip-version-check --no-deps --only-binary=:all: --python-version "$tag" --implementation cp \
    "${platforms[@]}" -d "$kit/wheels" "${wheels[@]}"
"$python" -m pip install -q --disable-pip-version-check --no-index --no-deps --upgrade --target "$room/site" "$kit"/wheels/*.whl

furnish
say "the compiled module for Python $tag and sm_$arch"
rm -f "$kit"/_C*
compile "$python" "$arch" "$PWD/$kit" "$kit/build.log" || { tail -30 "$kit/build.log"; fail "it could not be built"; }
cp "$kit"/_C*.so "$package/sprompt/"

say "Triton's cache"
rm -rf "$room/triton"
(cd "$package" && TRITON_CACHE_DIR=$room/triton "$python" -m sprompt.testing.replay --arch "$arch" &&
    TRITON_CACHE_DIR=$room/triton "$python" -m sprompt.testing.replay --arch "$arch" --check)
# A launch takes the machine code and what is known of it; the steps before it are ten times as large.
tar -czf "$kit/triton.tar.gz" -C "$room" --exclude='*.ttir' --exclude='*.ttgir' --exclude='*.llir' --exclude='*.ptx' --exclude='*.source' triton

say "what the GPU machine will do first: every import, every test collected"
(cd "$package" && "$python" -m sprompt.env >/dev/null && "$python" -c 'import benchmarks.run' &&
    "$python" -m pytest -q -p no:cacheprovider --collect-only tests/test_cuda.py tests/test_cuda_step.py tests/test_contract.py tests/ops | tail -1)
say "done: $kit, $(du -sh "$kit" | cut -f1)"
