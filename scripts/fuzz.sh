#!/bin/sh
# Run fuzz targets for SECONDS each, under memory limits. Needs clang with libFuzzer (Debian: clang
# libclang-rt-dev). Inputs that fail are left in build-fuzz/found.
#   scripts/fuzz.sh SECONDS [TARGET...]        without names, all targets
set -eu
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || { sed -n '2,4s/^# //p' "$0" >&2; exit 2; }
seconds=$1 && shift
dir=build-fuzz
cc=$(command -v clang || command -v clang-14) || { echo "fuzz: clang is missing" >&2; exit 1; }
[ -f $dir/build.ninja ] || CC=$cc meson setup $dir -Dfuzz=true -Db_lundef=false >$dir.log ||
    { cat $dir.log; exit 1; }
ninja -C $dir --quiet
[ $# -gt 0 ] || for corpus in tests/fuzz/corpus/*; do set -- "$@" "${corpus##*/}"; done
export ASAN_OPTIONS=quarantine_size_mb=16
for target; do
    mkdir -p $dir/found/"$target" $dir/corpus/"$target"
    echo "== $target"
    # 128 MiB at once: that is what the codec and the slots of the smallest budget take; inputs are
    # kilobytes.
    nice -n 19 $dir/tests/fuzz/fuzz_"$target" -max_total_time="$seconds" -timeout=20 \
        -malloc_limit_mb=128 -rss_limit_mb=700 -print_final_stats=1 -verbosity=0 \
        -artifact_prefix="$PWD/$dir/found/$target/" \
        "$PWD/$dir/corpus/$target" "$PWD/tests/fuzz/corpus/$target"
done
