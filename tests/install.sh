#!/bin/sh
# Install into a scratch folder, then build and run a program against what is there.
# Usage: tests/install.sh BUILD
set -eu
cd "$(dirname "$0")/.."
stage=$(mktemp -d)
trap 'rm -rf "$stage"' EXIT
DESTDIR=$stage meson install -C "$1" --no-rebuild --quiet
prefix=$stage/usr/local
pc=$(dirname "$(find "$stage" -name perta.pc)")
lib=$(dirname "$pc")
test -f "$prefix/share/man/man1/perta.1"
"$prefix/bin/perta" --version | grep -q '^perta [0-9]'
for verb in ask audit forget metrics tokenize; do # programs in libexec, with their own copy of the package
    (cd "$stage" && PYTHONDONTWRITEBYTECODE=1 "$prefix/bin/perta" $verb --help) |
        grep -q "^usage: perta $verb"
    "$prefix/bin/perta" help | grep -qE "^  ([a-z]+ )*$verb( |$)"
done

cat >"$stage/user.c" <<'C'
#include <perta.h>
#include <io/format/checkpoint.h>
#include <stream/patch/diff.h>
#include <estimators/edit/unlearn.h>
#include <stdio.h>
int main(void)
{
    struct perta_checkpoint *ck;
    struct perta_err err = {0};
    int rc = perta_checkpoint_open("/nonexistent", &ck, &err);
    puts(err.msg);
    return rc == PERTA_EINPUT || rc == PERTA_ESYS ? 0 : 1;
}
C
flags=$(PKG_CONFIG_PATH=$pc PKG_CONFIG_SYSROOT_DIR=$stage pkg-config --cflags --libs perta)
# shellcheck disable=SC2086
cc -std=gnu11 -Wall -Wextra -Werror -o "$stage/user" "$stage/user.c" $flags
LD_LIBRARY_PATH=$lib "$stage/user"
# shellcheck disable=SC2086
cc -D_GNU_SOURCE -std=gnu11 -Wall -Wextra -Werror -iquote . -o "$stage/host" tests/host.c $flags -lm
LD_LIBRARY_PATH=$lib "$stage/host"

others=$(nm -D --defined-only "$lib/libperta.so" | grep -v " perta_.*@@PERTA_\| PERTA_[0-9]" || true)
[ -z "$others" ] || { echo "symbols that are not perta's, or not versioned:"; echo "$others"; exit 1; }
