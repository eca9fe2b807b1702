#!/bin/sh
# The whole demo with PyTorch: train a model, make it forget with two files of facts alone, and ask;
# then train a tuned model, dump gradients, accumulate, unlearn, verify, apply, revert, and ask.
# Usage: examples/demo.sh PERTA WORKDIR
set -eu
perta=$(realpath "$1")
work=$2
here=$(dirname "$(realpath "$0")")
cd "$here/.."
mkdir -p "$work"
work=$(realpath "$work")

scripts/venv.sh examples/requirements.txt
python=$here/../.venv/bin/python

say() { printf '\n== %s\n' "$*"; }
# Patterns are passed quoted, so that they are printed as written.
run() {
    printf '$ perta %s\n' "$*"
    # shellcheck disable=SC2068
    "$perta" $@
}

cd "$work"
rm -rf base full tuned data grads importance patches models applied reverted
say "A model that knows made-up people, and facts to forget and to retain (PyTorch)"
"$python" "$here/made_up_people.py" make .

say "unlearn with the model and two files alone: in steps, from its own gradients (own-gradient)"
for left in 0.5 0.1; do
    run unlearn --model full --method signed-hold --steps 16 --data-forget data/forget.jsonl \
        --data-retain data/retain.jsonl --stop-probability $left \
        --patch patches/own-gradient/left-$left --out models/own-gradient/left-$left
done
"$python" "$here/made_up_people.py" evaluate full models/own-gradient/*

say "Beside it, what a task vector needs: a model tuned on what to forget, and gradients (PyTorch)"
"$python" "$here/made_up_people.py" tune .

say "accumulate: gradients of many batches to importances"
for set in forget retain; do
    run accumulate --stat mean,meansq --out "importance/$set" "grads/$set/*.safetensors"
done

say "unlearn: plain task arithmetic (tv), and weighted by gradients (grad) and Fisher (fisher)"
inputs="--model full --tuned tuned --base base"
alphas=0.25,0.5,0.75,1,1.25,1.5
mean="--forget importance/forget/mean --retain importance/retain/mean"
meansq="--forget importance/forget/meansq --retain importance/retain/meansq"
# shellcheck disable=SC2086
{
    run unlearn $inputs --method tv --alpha $alphas --patch patches/tv --out models/tv
    run unlearn $inputs $mean --method grad --alpha $alphas --patch patches/grad --out models/grad
    run unlearn $inputs $meansq --method fisher --alpha $alphas --patch patches/fisher \
        --out models/fisher
}

say "verify, apply, revert: the patch alone gives the same model, and takes it back"
run verify patches/fisher/alpha-1
run apply full patches/fisher/alpha-1 --out applied
run revert applied patches/fisher/alpha-1 --out reverted
for shard in full/*.safetensors; do
    name=$(basename "$shard")
    cmp "models/fisher/alpha-1/$name" "applied/$name"
    cmp "$shard" "reverted/$name"
done
echo "byte for byte: applied = unlearned, reverted = full"

say "ask: loaded with transformers' from_pretrained"
"$python" "$here/made_up_people.py" evaluate full models/*/*
