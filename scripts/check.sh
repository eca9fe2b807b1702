#!/bin/sh
# Run every test: the unit tests, and the command as a user runs it; both in a release build and
# with address and undefined-behaviour sanitizers, and the loop also with the thread sanitizer.
# Arguments are passed to pytest.
set -eu
cd "$(dirname "$0")/.."

build() { # folder, options
    dir=$1 && shift
    [ -f "$dir/build.ninja" ] || meson setup "$dir" "$@" >"$dir.log" || { cat "$dir.log"; exit 1; }
    ninja -C "$dir" --quiet
}
build build-dev --native-file build-dev.ini
build build-tsan --native-file build-tsan.ini
scripts/venv.sh tests/python/requirements.txt examples/requirements.txt
pytest() { # build, tests
    PERTA=$1/perta && export PERTA && shift
    .venv/bin/python -m pytest -q --no-header -p no:cacheprovider "$@"
}
export TSAN_OPTIONS=halt_on_error=1

echo "== unit tests; with address and undefined-behaviour sanitizers; the loop with the thread one"
meson test -C build --print-errorlogs --quiet
meson test -C build-dev --print-errorlogs --quiet
meson test -C build-tsan --print-errorlogs --quiet stream engine window ring writer hasher workers gemm backend_memory backend_block backprop family
echo "== installed: command, library, headers, pkg-config, man page"
tests/install.sh build
echo "== which oneDNN is refused"
tests/onednn.sh
echo "== the command, against NumPy, PyTorch and independent readers; at the same time"
echo "   the same with address and undefined-behaviour sanitizers"
pytest build tests/python "$@" >build/pytest.log 2>&1 &
plain=$!
failed=
pytest build-dev tests/python "$@" || failed=1
wait "$plain" || failed=1
cat build/pytest.log
[ -z "$failed" ]
echo "== the loop, with the thread sanitizer"
pytest build-tsan tests/python/test_outputs.py tests/python/test_interop.py "$@"
