#!/bin/sh
# Install the packages of requirements files into the Python environment .venv, or VENV.
# Usage: [VENV=DIR] scripts/venv.sh REQUIREMENTS...
set -eu
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
install() { "$venv/bin/python" -m pip install -q --disable-pip-version-check "$@"; }
for file in "$@"; do
    stamp=$venv/$(echo "$file" | tr / _).done
    cmp -s "$file" "$stamp" && continue
    echo "setup: installing Python packages of $file"
    # PyTorch for CPUs alone is a tenth of the size of PyPI's; if its index cannot be reached,
    # install PyPI's.
    torch=$(grep '^torch==' "$file") && install --retries 0 --timeout 20 --no-deps \
        --index-url https://download.pytorch.org/whl/cpu "$torch" 2>/dev/null || true
    install -r "$file"
    cp "$file" "$stamp"
done
