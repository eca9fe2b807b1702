#!/bin/sh
# Install the programs that perta is compared with, measure, and write bench/results/.
# Usage: [BENCH_GB=4] [BENCH_ROUNDS=5] scripts/bench.sh BUILD
set -eu
cd "$(dirname "$0")/.."
scripts/setup.sh fio xdelta3
scripts/venv.sh bench/requirements.txt
VENV=bench/.venv scripts/venv.sh bench/peers.txt
work=${BENCH_DIR:-bench/work}
.venv/bin/python bench/run.py "$1" "$work" --gb "${BENCH_GB:-4}" --rounds "${BENCH_ROUNDS:-5}" \
    --peers bench/.venv
rm -rf "$work"
