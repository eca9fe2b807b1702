#!/bin/sh
# Make the Python environment of the tests (or of what a requirements file names) in .venv.
# Usage: scripts/venv.sh REQUIREMENTS...
set -eu
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] || python3 -m venv .venv
for file in "$@"; do
    stamp=.venv/$(echo "$file" | tr / _).done
    if ! cmp -s "$file" "$stamp"; then
        echo "setup: installing Python packages of $file"
        .venv/bin/python -m pip install -q --disable-pip-version-check -r "$file"
        cp "$file" "$stamp"
    fi
done
