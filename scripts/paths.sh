#!/bin/sh
# The paths in docs/architecture.md are true as far as a script can tell: each names at most eight
# files, every file is there, and defines the function that is named beside it.
set -eu
cd "$(dirname "$0")/.."
failed=
path='' n=0
while read -r line; do
    case $line in
    '### '*) path=${line#'### '} n=0 ;;
    '| `'*)
        file=$(echo "$line" | cut -d'`' -f2)
        function=$(echo "$line" | cut -d'`' -f4)
        n=$((n + 1))
        [ "$n" -le 8 ] || { echo "$path: more than eight files"; failed=1; }
        # a line that begins with a type, and names the function or a macro that makes it
        grep -qE "^[a-z].*[ *]($function\\(|REAL\\($function\\)\\()" "$file" ||
            { echo "$path: $file does not define $function"; failed=1; }
        ;;
    esac
done <docs/architecture.md
[ -n "$path" ] || { echo "docs/architecture.md has no paths"; failed=1; }
[ -z "$failed" ]
