#!/usr/bin/env bash
# venv.sh VENV [PYTHON]: makes the virtual environment VENV and installs everything that the build, the tests and the demo need,
# at the versions of constraints.txt, and the working tree in editable mode. A second run updates the environment.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1
asked=${2:-}

fail() {
    echo "sprompt: $*" >&2
    exit 1
}

suits='import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))'
version='import sys; print("%d.%d" % sys.version_info[:2])'

if [ -n "$asked" ]; then
    command -v "$asked" >/dev/null || fail "no interpreter $asked; type \`make PYTHON=/path/to/python3.12 ...\`"
    "$asked" -c "$suits" ||
        fail "$asked is Python $("$asked" -c "$version"), sprompt needs 3.10 to 3.13; type \`make PYTHON=/path/to/python3.12 ...\`"
    python=$asked
    if [ -x "$venv/bin/python" ] && [ "$("$venv/bin/python" -c "$version")" != "$("$python" -c "$version")" ]; then
        fail "$venv holds Python $("$venv/bin/python" -c "$version"), not $("$python" -c "$version");" \
            "type \`rm -r $venv\`, or keep both with \`make VENV=.venv-other PYTHON=$asked ...\`"
    fi
else
    for candidate in "$venv/bin/python" python3 python3.13 python3.12 python3.11 python3.10; do
        if command -v "$candidate" >/dev/null && "$candidate" -c "$suits" 2>/dev/null; then
            python=$candidate
            break
        fi
    done
    [ -n "${python:-}" ] || fail "no Python 3.10 to 3.13 found; install one, or type \`make PYTHON=/path/to/python3.12 ...\`"
fi

if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    "$python" -c 'import venv, ensurepip' 2>/dev/null ||
        fail "$python has no venv module; install it (Debian: apt-get install python3-venv), or choose another with PYTHON="
    echo "making $venv with $("$python" --version)"
    "$python" -m venv --clear "$venv"
fi

# Environments of Python 3.12 and later have no setuptools. sprompt is installed without its kernels; `make build` builds them.
install() { "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt "$@"; }
echo "installing into $venv (the first time this downloads torch; PIP_INDEX_URL and pip's other settings apply)"
install setuptools packaging cmake ninja
# editable_mode=compat adds a path. An import hook would give this tree's kernels to any other copy of sprompt.
SPROMPT_NO_EXT=1 install --no-build-isolation --config-settings editable_mode=compat -e ".[dev]"
touch "$venv/.ready"
