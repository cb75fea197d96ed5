#!/usr/bin/env bash
# gpu_prepare.sh: makes the folder build/gpu-kit on a machine without a GPU. With it `make gpu` needs no package index and
# little compilation on the GPU machine. The folder has the wheels that a bare machine lacks, sprompt._C, and a Triton cache of
# every kernel that tests and benchmarks launch. It is valid for one commit and for the GPU machine's versions of Python, torch
# and Triton.
#   PYTHON   an interpreter of the GPU machine's version, with pip (default: python3.12)
#   TORCH    the GPU machine's version of torch, which brings Triton (default: 2.11.0)
#   ENVIRONMENT  the virtual environment for these packages (default: build/gpu-env-<Python>-<torch>)
#   ARCH     the architecture of the GPU (default: 90)
#   TUNE     folders of ops that `make gpu` should tune (see gpu.sh)
#   WHEELS   packages that the GPU machine lacks (default: pycocotools expecttest tyro docstring_parser typeguard)
set -euo pipefail
cd "$(dirname "$0")/.."
begin=$SECONDS
given=
. tools/gpu_folder.sh
python=$(command -v "${PYTHON:-python3.12}") || fail "no interpreter ${PYTHON:-python3.12}; name one with PYTHON= that has the GPU machine's version"
torch=${TORCH:-2.11.0} arch=${ARCH:-90}
read -ra wheels <<<"${WHEELS:-pycocotools expecttest tyro docstring_parser typeguard}"
tag=$("$python" -c 'import sys; print("%d%d" % sys.version_info[:2])')
environment=${ENVIRONMENT:-build/gpu-env-$tag-$torch}
mkdir -p "$kit/wheels" "$work"

if [ ! -e "$environment/.ready" ]; then
    say "installing the GPU machine's packages in $environment (torch alone takes gigabytes)"
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
"$python" -m pip install -q --disable-pip-version-check --no-index --no-deps --upgrade --target "$work/site" "$kit"/wheels/*.whl

furnish
say "the compiled module for Python $tag and sm_$arch"
rm -f "$kit"/_C*
compile "$python" "$arch" "$PWD/$kit" "$kit/build.log" || { tail -30 "$kit/build.log"; fail "it could not be built"; }
cp "$kit"/_C*.so "$package/sprompt/"

say "Triton's cache"
rm -rf "$work/triton"
(cd "$package" && TRITON_CACHE_DIR=$work/triton "$python" -m sprompt.testing.replay --arch "$arch" &&
    TRITON_CACHE_DIR=$work/triton "$python" -m sprompt.testing.replay --arch "$arch" --check)
# A launch needs only the machine code and its metadata; the files of earlier compilation steps are four times as large. Kernels of
# one name differ little, so they lie side by side in the archive, and xz looks back further than by default: a fifth of the size.
rm -f "$kit"/triton.tar.*
(cd "$work" && find triton -type f ! -name '*.ttir' ! -name '*.ttgir' ! -name '*.llir' ! -name '*.ptx' ! -name '*.source' \
    -printf '%f %s %p\n' | sort | cut -d ' ' -f 3- | tar -cf - -T -) | xz -T 1 --lzma2=preset=3,dict=128MiB >"$kit/triton.tar.xz"

say "checking what the GPU machine does first: every import, the collection of every test"
(cd "$package" && "$python" -m sprompt.env >/dev/null && "$python" -c 'import benchmarks.run' &&
    "$python" -m pytest -q -p no:cacheprovider --collect-only tests/test_cuda.py tests/test_cuda_step.py tests/test_contract.py tests/ops | tail -1)
say "done: $kit, $(du -sh "$kit" | cut -f1)"
