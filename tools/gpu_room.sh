# Sourced by gpu.sh and gpu_prepare.sh: where a GPU machine builds and tests, and what goes there. Triton's cache holds
# absolute paths, so the room has the same path on both machines.
room=/tmp/sprompt-gpu
package=$room/package
kit=${KIT:-build/gpu-kit}

fail() {
    echo "$(basename "$0"): $*" >&2
    exit 1
}
say() {
    echo
    echo "== $* ($((SECONDS - ${begin:-0})) s)"
}
furnish() { # the package, its tests and benchmarks, without kernels; no other sprompt is in reach from here
    mkdir -p "$package"
    for part in sprompt tests benchmarks; do
        rm -rf "${package:?}/$part"
        cp -R "$part" "$package/$part"
    done
    cp pyproject.toml "$package/"
    rm -f "$package"/sprompt/_C*
    export PYTHONPATH=$package:$room/site${given:+:$given} PYTHONDONTWRITEBYTECODE=1
}
compile() { # compile PYTHON ARCHITECTURES FOLDER LOG: sprompt._C for that interpreter and these GPUs into FOLDER
    local generator
    rm -rf "$room/build" # its cache may be another tree's
    generator=$(command -v ninja >/dev/null && echo "-G Ninja" || true)
    # shellcheck disable=SC2086
    cmake -S "$PWD" -B "$room/build" $generator -DPython_EXECUTABLE="$1" -DSPROMPT_CUDA_ARCHS="$2" \
        -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$3" >"$4" 2>&1 &&
        cmake --build "$room/build" --target _C -j "$(nproc)" >>"$4" 2>&1
}
