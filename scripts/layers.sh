#!/bin/sh
# Includes go one way: a room may include itself and the rooms listed after its name here. tools,
# bench and tests may include everything.
set -eu
cd "$(dirname "$0")/.."
below='
io
io/format: io
io/publish: io io/format
stream: io io/format io/publish
stream/patch: io io/format io/publish stream
estimators/edit: io io/format io/publish stream stream/patch
estimators/compute: io io/format stream
estimators/model: io io/format io/publish stream estimators/compute
estimators/passes: io io/format io/publish stream stream/patch estimators/edit estimators/compute estimators/model
estimators/steps: io io/format io/publish stream stream/patch estimators/edit estimators/compute estimators/model estimators/passes
'
bad=$(echo "$below" | grep . | while read -r room may; do
    room=${room%:}
    allowed=$(echo "$room $may" | tr ' ' '|')
    grep -nE '#include "(io|stream|estimators|tools|bench|tests)/' "$room"/*.[ch] |
        grep -vE "#include \"($allowed)/[a-z0-9_]+\.h\"" || true
done)
strays=$(find io stream estimators -name '*.[ch]' | sed 's|/[^/]*$||' | sort -u | while read -r room; do
    echo "$below" | grep -qE "^$room(:|$)" || echo "$room"
done)
[ -z "$strays" ] || { echo "rooms that are not listed here: $strays"; exit 1; }
[ -z "$bad" ] || { echo "includes against the order:"; echo "$bad"; exit 1; }
