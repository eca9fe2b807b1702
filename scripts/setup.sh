#!/bin/sh
# Install the packages that building and testing need, if they are missing (Debian and derivatives).
# Usage: scripts/setup.sh [MORE PACKAGES...]
set -eu
packages="gcc pkg-config meson ninja-build liburing-dev libzstd-dev libxxhash-dev check
libjansson-dev libssl-dev libdnnl-dev zstd xxhash minisign python3-venv e2fsprogs xfsprogs fuse3
$*"
missing=
for package in $packages; do
    dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' ||
        missing="$missing $package"
done
[ -n "$missing" ] || exit 0

if ! command -v apt-get >/dev/null; then
    echo "setup: missing packages:$missing (install their like by hand)" >&2
    exit 1
fi
sudo=
if [ "$(id -u)" != 0 ]; then
    command -v sudo >/dev/null || {
        echo "setup: missing packages:$missing; run as root, or install sudo" >&2
        exit 1
    }
    sudo=sudo
fi
echo "setup: installing$missing"
export DEBIAN_FRONTEND=noninteractive
$sudo apt-get update -qq
# shellcheck disable=SC2086
$sudo apt-get install -y -qq --no-install-recommends $missing >/dev/null
