#!/bin/sh
# The long tier: hundreds of the cases of which `make check` runs a few. Takes about an hour, and
# longer if the chroots of scripts/matrix.sh do not exist yet.
# Arguments are passed to pytest.
set -eu
cd "$(dirname "$0")/.."
scripts/venv.sh tests/python/requirements.txt examples/requirements.txt
export PERTA_LONG=1
pytest() { # build, tests
    PERTA=$1/perta && export PERTA && shift
    .venv/bin/python -m pytest -q --no-header -p no:cacheprovider "$@" || failed=1
}
failed= # a failure does not stop the rest

echo "== killed at random instants, every verb"
pytest build tests/python/test_crash.py tests/python/test_in_place.py "$@"
echo "== power cuts, unreliable disks by seed, and real disks"
pytest build tests/python/test_powercut.py tests/python/test_faults.py tests/python/test_disks.py "$@"
echo "== other seeds, with address and undefined-behaviour sanitizers"
[ -f build-dev/build.ninja ] || meson setup build-dev --native-file build-dev.ini >build-dev.log
ninja -C build-dev --quiet
PERTA_SEEDS=2001-2400 pytest build-dev tests/python/test_faults.py "$@"

echo "== all cases of the tests that make check runs in part, plain and with sanitizers"
pytest build tests/python/test_estimate.py tests/python/test_hostile.py tests/python/test_unlearn.py \
    tests/python/test_accumulate.py "$@"
pytest build-dev tests/python/test_resume.py tests/python/test_hostile.py tests/python/test_unlearn.py \
    tests/python/test_accumulate.py tests/python/test_diff.py tests/python/test_lora.py \
    tests/python/test_interop.py tests/python/test_steps.py tests/python/test_compose.py \
    tests/python/test_limits.py tests/python/test_estimate.py tests/python/test_eval.py \
    tests/python/test_torch.py tests/python/test_demo.py "$@"

if command -v clang >/dev/null || command -v clang-14 >/dev/null; then
    echo "== fuzz targets, a minute each"
    scripts/fuzz.sh 60 || failed=1
else
    echo "== fuzz targets: skipped, clang is missing"
fi
echo "== other systems: Debian 12 and 13, gcc and clang"
status=0
MATRIX_PART=${MATRIX_PART:-unit} scripts/matrix.sh || status=$?
[ $status = 0 ] || [ $status = 77 ] || failed=1
[ -z "$failed" ]
