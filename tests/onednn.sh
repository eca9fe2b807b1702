#!/bin/sh
# What setting up says of a oneDNN that is there: its version, or why it cannot be used. Headers
# stand in for those that no machine has. Usage: tests/onednn.sh
set -eu
cd "$(dirname "$0")/.."
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

setup() { # version, its kind of threads as a number, options: set up, with what is said in $said
    version=$1 && kind=$2 && shift 2
    rm -rf "$scratch/build"
    mkdir -p "$scratch/include"
    {
        echo "$version" | tr . ' ' | {
            read -r major minor patch
            printf '#define DNNL_VERSION_%s\n' "MAJOR $major" "MINOR $minor" "PATCH $patch"
        }
        printf '#define DNNL_RUNTIME_%s\n' 'SEQ 1u' 'OMP 2u' 'TBB 4u' 'THREADPOOL 8u'
        echo "#define DNNL_CPU_THREADING_RUNTIME $kind"
    } >"$scratch/include/dnnl.h"
    said=$(CFLAGS=-I$scratch/include meson setup "$scratch/build" "$@" 2>&1)
}
says() { # words
    echo "$said" | grep -qF "$*" || { echo "$said"; echo "onednn.sh: not said: $*"; exit 1; }
}
accepted() { # version, kind of threads, words
    setup "$1" "$2" || { echo "$said"; echo "onednn.sh: oneDNN $1 with threads $2 is refused"; exit 1; }
    says "oneDNN $1, with $3"
}
refused() { # version, kind of threads, words
    ! setup "$1" "$2" || { echo "onednn.sh: oneDNN $1 with threads $2 is not refused"; exit 1; }
    says "ERROR: Problem encountered: oneDNN $1 $3"
}

accepted 2.6.0 1u 'no threads'
accepted 3.10.1 2u OpenMP
refused 2.5.4 2u 'is too old: 2.6 or newer'
refused 1.8.0 2u 'is too old: 2.6 or newer'
refused 2.6.3 4u 'is built with oneTBB'
refused 3.7.2 8u 'is built with a thread pool'
refused 3.7.2 512u 'is built with threads of kind 512u'
setup 3.7.2 4u -Dmodel=disabled || { echo "$said"; exit 1; }
