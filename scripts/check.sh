#!/bin/sh
# Every test: the unit tests as built for use and with sanitizers, then the command as a user
# runs it, against NumPy. Sums up on its last line.
set -eu
cd "$(dirname "$0")/.."

[ -f build-dev/build.ninja ] || meson setup build-dev --native-file build-dev.ini >build-dev.log
ninja -C build-dev --quiet
scripts/layers.sh
scripts/venv.sh tests/python/requirements.txt examples/requirements.txt
echo "== unit tests"
meson test -C build --print-errorlogs --quiet
echo "== unit tests, address and undefined-behaviour sanitizers"
meson test -C build-dev --print-errorlogs --quiet
echo "== installed: command, library, headers, pkg-config, man page"
tests/install.sh build
echo "== the command, against NumPy and independent readers"
PERTA=build/perta .venv/bin/python -m pytest -q tests/python "$@"
