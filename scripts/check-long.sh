#!/bin/sh
# The long tier: what `make check` does a little of, by the hundred. Under an hour.
# Arguments go to pytest.
set -eu
cd "$(dirname "$0")/.."
scripts/venv.sh tests/python/requirements.txt examples/requirements.txt
export PERTA_LONG=1
pytest() { # build, tests
    PERTA=$1/perta && export PERTA && shift
    .venv/bin/python -m pytest -q --no-header -p no:cacheprovider "$@"
}

echo "== killed at random instants, every verb"
pytest build tests/python/test_crash.py tests/python/test_in_place.py "$@"

echo "== estimate: bfloat16 products for every architecture, many budgets and threads"
pytest build tests/python/test_estimate.py "$@"
