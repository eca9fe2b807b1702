#!/bin/sh
# Run every linter over every tracked file.
# Usage: scripts/lint.sh [LINTER...]; all of them without names. tidy needs the flags in build/.
set -eu
cd "$(dirname "$0")/.."
export VENV=.venv-lint
scripts/venv.sh scripts/lint.txt
PATH=$PWD/$VENV/bin:$PATH
files() { git -c safe.directory='*' ls-files -z -- "$@"; }
files >/dev/null # else an error of git would pass as an empty list

layers() { scripts/layers.sh; }
records() { scripts/records.sh; }
paths() { scripts/paths.sh; }
format() { files '*.[ch]' | xargs -0 clang-format --dry-run -Werror; }
shell() { files '*.sh' .ci/run | xargs -0 shellcheck; }
python() { files '*.py' | xargs -0 ruff check --quiet --no-cache; }
spelling() {
    files ':!tests/fuzz/corpus' ':!*.json' ':!*.svg' | xargs -0 codespell
}
# tests/host_openmp.c: clang's omp.h is not in the wheel.
tidy() {
    files '*.c' ':!tests/host_openmp.c' |
        xargs -0 -n 4 -P "$(nproc)" clang-tidy --quiet -p build 2>build/clang-tidy.log ||
        { grep -i '^error' build/clang-tidy.log; return 1; }
}

[ $# -gt 0 ] || set -- layers records paths format shell python spelling tidy
failed=
for linter; do
    "$linter" || { echo "lint: $linter"; failed=1; }
done
[ -z "$failed" ]
