#!/bin/sh
# The miniature: data, training, and the evaluation beside the same model without training. Hours on two cores; every
# step goes on where it was interrupted. Run it from the folder that holds this checkout's .venv:
#
#     sh longllm/runs/smollm2-135m-32k.sh
set -eu
LONGSCOPE="${LONGSCOPE:-.venv/bin/longscope}"
OUT="${OUT:-out/smollm2-32k}"
BASE=smollm2-135m-instruct

if [ ! -f "$OUT/data/train.jsonl" ]; then
    "$LONGSCOPE" synth offline --out "$OUT/data/eval.jsonl" --mixture.rows 12 --mixture.part validation \
        --mixture.low 700 --mixture.high 1100
    "$LONGSCOPE" synth offline --out "$OUT/data/train.jsonl" --mixture.rows 1600 \
        --mixture.low 700 --mixture.high 1100
fi
"$LONGSCOPE" train longllm --config longllm/recipes/smollm2-135m-32k.yaml --out "$OUT/run"

# Needles and pass key at ten depths, in the last 40 % of Moby-Dick, which the training data takes nothing from.
grid() { # label, model, further options
    label=$1 model=$2
    shift 2
    "$LONGSCOPE" eval grid --model "$model" --label "$label" --start 0.6 --lengths 4K,8K,16K,32K --texts 1 \
        --dtype fp32 --out "$OUT/grid/$label" "$@"
}
grid extended "$OUT/run/adapter"
grid base $BASE
grid yarn $BASE --rope yarn:4
grid dynamic $BASE --rope dynamic:4
"$LONGSCOPE" eval compare "$OUT/grid/base" "$OUT/grid/dynamic" "$OUT/grid/yarn" "$OUT/grid/extended" --out "$OUT/grids"

# Loss on the held-out part of the novel; the base alone has no positions beyond 8K.
for label in extended base yarn dynamic; do
    case $label in
    extended) set -- --model "$OUT/run/adapter" ;;
    base) set -- --model $BASE ;;
    *) set -- --model $BASE --rope $label:4 ;;
    esac
    "$LONGSCOPE" eval perplexity "$@" --begin 0.6 --window 0 --contexts 2K,8K --places 2 --dtype fp32 \
        --out "$OUT/perplexity/$label-2K,8K"
    [ $label = base ] || "$LONGSCOPE" eval perplexity "$@" --begin 0.6 --window 0 --contexts 16K --places 1 --dtype fp32 \
        --out "$OUT/perplexity/$label-16K"
done

# What short questions cost.
for model in "$OUT/run/adapter" $BASE; do
    "$LONGSCOPE" eval mmlu --model "$model" --sample 200 --dtype fp32 --out "$OUT/mmlu/$(basename "$model")"
done
