#!/bin/sh
# Records must be complete (io/text.h). Fails on calls of jansson whose result is ignored, and on
# calls that drop parts silently, because those can fail when out of memory.
set -eu
cd "$(dirname "$0")/.."
bad=$(
    grep -nE '^ +json_(object_(set|update)|array_(append|extend|insert|set))[a-z_]*\(' \
        io/*.c io/*/*.c stream/*.c stream/*/*.c estimators/*/*.c tools/*.c | grep -v 'takes no memory'
    grep -nE '\b(json_dumps|open_memstream)\(' \
        io/*.c io/*/*.c stream/*.c stream/*/*.c estimators/*/*.c tools/*.c
) || true
[ -z "$bad" ] || { echo "perta_json_set() and its like, perta_note(), perta_json_text(), perta_text_print() must be used instead of:"; echo "$bad"; exit 1; }
