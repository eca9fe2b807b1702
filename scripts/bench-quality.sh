#!/bin/sh
# Measure what is forgotten, what is kept and what lasts, and write bench/results/quality/ and
# bench/results/quality-lasting/.
# Usage: [TOFU=DIR] [QUALITY_SEEDS=1,2,3] [QUALITY_MODELS="small smollm2 verbatim tofu01"] scripts/bench-quality.sh BUILD
# QUALITY_MODELS=tiny takes a minute and checks that everything works.
set -eu
cd "$(dirname "$0")/.."
scripts/setup.sh
scripts/venv.sh tests/python/requirements.txt examples/requirements.txt bench/requirements.txt
work=${BENCH_DIR:-bench/work/quality}
run() {
    .venv/bin/python "bench/quality/$1.py" "$build" "$work" --model "$2" \
        --seeds "${QUALITY_SEEDS:-1,2,3}" ${TOFU:+--tofu "$TOFU"}
}
build=$1
# PyTorch allocates the same sizes again and again: keep the memory instead of returning it to the
# system in between.
export MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=4294967296
for model in ${QUALITY_MODELS:-small smollm2 verbatim tofu01}; do
    case $model in
    verbatim | tofu01) ;;
    *)
        run run "$model"
        run repair "$model"
        ;;
    esac
    run lasting "$model"
done
