#!/bin/sh
# Compare families with transformers, and write their rows in docs/families.md and README.md.
# Usage: scripts/families.sh BUILD [FAMILY...]; all of them without names, which takes minutes.
set -eu
cd "$(dirname "$0")/.."
build=$1
shift
scripts/venv.sh tests/python/requirements.txt examples/requirements.txt
.venv/bin/python tests/python/families_page.py "$build/perta" "$@"
