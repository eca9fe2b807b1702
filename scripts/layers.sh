#!/bin/sh
# Includes go one way: tools, bench -> estimators -> stream -> io. Fails on an upward one.
set -eu
cd "$(dirname "$0")/.."
bad=$(
    grep -nE '#include "(stream|estimators|tools|bench)/' io/*.[ch]
    grep -nE '#include "(estimators|tools|bench)/' stream/*.[ch]
    grep -nE '#include "(tools|bench)/' estimators/*.[ch] estimators/backprop/*.[ch]
) || true
[ -z "$bad" ] || { echo "upward includes:"; echo "$bad"; exit 1; }
