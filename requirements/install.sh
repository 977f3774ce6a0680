#!/bin/sh
# Make or reuse the virtual environment ($1) and install the locked packages; an unchanged lock installs nothing.
set -eu
venv=$1
here=$(cd "$(dirname "$0")" && pwd)
stamp="$venv/.installed"
wanted=$(cat "$here/cpu.lock" "$here/torch-cpu.lock" "$here/../pyproject.toml" | sha256sum)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then exit 0; fi

[ -x "$venv/bin/python" ] || "${PYTHON:-python3.11}" -m venv "$venv"
# Most modules are never imported: to compile all of them takes as long as to unpack them.
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@" --no-compile; }
# The CPU wheel that pip already finds, else the one of PyTorch's CPU index; never the multi-gigabyte CUDA build.
{
    pip install --no-deps --require-hashes -r "$here/torch-cpu.lock" ||
        pip install --no-deps --require-hashes --index-url https://download.pytorch.org/whl/cpu -r "$here/torch-cpu.lock"
} &
torch=$!  # a third of the unpacking, on a core of its own
pip install --no-deps --require-hashes -r "$here/cpu.lock"
wait $torch
pip install --no-deps --no-build-isolation --quiet --editable "$here/.."
printf '%s\n' "$wanted" > "$stamp"
