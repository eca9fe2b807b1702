#!/bin/sh
# Build and test on Debian 12 and 13, with gcc and with clang, each release in a chroot that
# debootstrap makes. Warnings are errors. Needs root and debootstrap; without them it exits with
# status 77.
# Arguments are passed to pytest, which runs in the gcc build (scripts/check.sh). Environment:
#   MATRIX_DIR     folder of the chroots, which are made if missing (build-matrix)
#   MATRIX_SUITES  Debian suites (bookworm trixie)
#   MATRIX_PART    unit: only build and run the unit tests
#   MATRIX_BIND    files and folders of this machine that are visible there too, read-only; for
#                  example those that pip's configuration (PIP_* in the environment) names
set -eu
cd "$(dirname "$0")/.."
skip() { echo "matrix: skipped, $1" >&2; exit 77; }
[ "$(id -u)" = 0 ] || skip "needs root"
command -v debootstrap >/dev/null || skip "debootstrap is missing (Debian: debootstrap)"
# The mounts belong to this process's own namespace and vanish with it.
[ -n "${MATRIX_PRIVATE:-}" ] || exec env MATRIX_PRIVATE=1 unshare -m "$0" "$@"
dir=${MATRIX_DIR:-build-matrix}
mkdir -p "$dir"

make_chroot() { # suite, folder; renamed to that once it is complete
    [ -d "$2" ] && return
    echo "== making $2"
    rm -rf "$2.partial"
    debootstrap --variant=minbase "$1" "$2.partial" >"$2.log" 2>&1 || { tail "$2.log"; return 1; }
    mv "$2.partial" "$2"
}

show() { # chroot: mount what it needs of this machine
    mount -t proc proc "$1/proc"
    mount --rbind /sys "$1/sys"
    mount --rbind /dev "$1/dev"
    cat /etc/resolv.conf >"$1/etc/resolv.conf"
    for path in ${MATRIX_BIND:-}; do
        if [ -d "$path" ]; then
            mkdir -p "$1$path"
        else
            mkdir -p "$1$(dirname "$path")" && touch "$1$path"
        fi
        mount -o bind,ro "$path" "$1$path"
    done
}

copy_tree() { # chroot: copy the working tree; builds in it are kept
    mkdir -p "$1/perta"
    find "$1/perta" -mindepth 1 -maxdepth 1 ! -name 'build*' ! -name .venv -exec rm -rf {} +
    git -c safe.directory='*' ls-files -z --cached --others --exclude-standard |
        tar -c --null -T - --ignore-failed-read | tar -x --no-same-owner -C "$1/perta"
}

# This script runs inside the chroot: it sets up, builds with each compiler and tests, and shows all
# output of the builds.
cat >"$dir/inside" <<'INSIDE'
set -eu
cd /perta
scripts/setup.sh clang libclang-rt-dev libomp-dev
build() { # folder, options
    to=$1 && shift
    [ -f "$to/build.ninja" ] || meson setup "$to" --werror "$@" >"$to.log" ||
        { cat "$to.log" && return 1; }
    ninja -C "$to" --quiet -k 0 && meson test -C "$to" --print-errorlogs --quiet
}
say() { echo "== $(. /etc/os-release && echo "$PRETTY_NAME"), $*"; }
failed=
say "without matrix products"
build build-no-model -Dmodel=disabled || failed=1
say "$(clang --version | head -n 1)"
CC=clang build build-clang || failed=1
say "$(gcc --version | head -n 1)"
build build || exit 1
if [ "${MATRIX_PART:-}" != unit ]; then
    scripts/check.sh "$@" || failed=1
    say "the command, without matrix products"
    PERTA=build-no-model/perta .venv/bin/python -m pytest -q --no-header -p no:cacheprovider \
        tests/python "$@" || failed=1
fi
[ -z "$failed" ]
INSIDE

failed=
for suite in ${MATRIX_SUITES:-bookworm trixie}; do
    root=$(realpath "$dir")/debian-$suite
    if make_chroot "$suite" "$root" && show "$root" && copy_tree "$root"; then
        env -u TMPDIR HOME=/root LC_ALL=C.UTF-8 chroot "$root" sh -s - "$@" <"$dir/inside" || failed=1
    else
        failed=1
    fi
done
[ -z "$failed" ]
