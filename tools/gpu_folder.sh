# gpu.sh and gpu_prepare.sh source this file. It names the folder in which a GPU machine builds and tests, and fills it.
# Triton's cache holds absolute paths, so this folder has the same path on both machines.
work=/tmp/sprompt-gpu
package=$work/package
kit=${KIT:-build/gpu-kit}

fail() {
    echo "$(basename "$0"): $*" >&2
    exit 1
}
say() {
    echo
    echo "== $* ($((SECONDS - ${begin:-0})) s)"
}
furnish() { # copies the package, its tests and benchmarks, without kernels; afterwards no other sprompt can be imported
    mkdir -p "$package"
    for part in sprompt tests benchmarks; do
        rm -rf "${package:?}/$part"
        cp -R "$part" "$package/$part"
    done
    cp pyproject.toml "$package/"
    rm -f "$package"/sprompt/_C*
    export PYTHONPATH=$package:$work/site${given:+:$given} PYTHONDONTWRITEBYTECODE=1
}
compile() { # compile PYTHON ARCHITECTURES FOLDER LOG: builds sprompt._C for that interpreter and these GPUs into FOLDER
    local generator
    rm -rf "$work/build" # its cache may belong to another source tree
    generator=$(command -v ninja >/dev/null && echo "-G Ninja" || true)
    # shellcheck disable=SC2086
    cmake -S "$PWD" -B "$work/build" $generator -DPython_EXECUTABLE="$1" -DSPROMPT_CUDA_ARCHS="$2" \
        -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$3" >"$4" 2>&1 &&
        cmake --build "$work/build" --target _C -j "$(nproc)" >>"$4" 2>&1
}
