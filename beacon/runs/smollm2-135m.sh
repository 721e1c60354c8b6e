#!/bin/sh
# The miniature: beacons for SmolLM2-135M-Instruct, trained on real text and on long questions, then asked beside the
# other methods at equal bytes. Hours on two cores; every step goes on where it was interrupted. Run it from the folder
# that holds this checkout's .venv:
#
#     sh beacon/runs/smollm2-135m.sh
set -eu
LONGSCOPE="${LONGSCOPE:-.venv/bin/longscope}"
OUT="${OUT:-out/beacon}"
BASE=smollm2-135m-instruct
WINDOW=512

# Nothing of what is asked below: the last 40 % of Moby-Dick and some addresses are in neither part.
if [ ! -f "$OUT/train.jsonl" ]; then
    "$LONGSCOPE" synth texts --out "$OUT/eval.jsonl" --cut.part validation --cut.rows 6 --cut.tokens 2048
    "$LONGSCOPE" synth offline --out "$OUT/talks.jsonl" --mixture.rows 600
    "$LONGSCOPE" synth texts --out "$OUT/train.jsonl" --cut.tokens 2048
fi
"$LONGSCOPE" train beacon --config beacon/recipes/smollm2-135m.yaml --out "$OUT/pretrained"
"$LONGSCOPE" train beacon --config beacon/recipes/smollm2-135m-finetune.yaml --out "$OUT/finetuned"

# Every method holds tokens / ratio + one window of slots, which is what beacons hold.
grid() { # label, length, options
    label=$1 length=$2
    shift 2
    "$LONGSCOPE" eval grid --model $BASE --label "$label" --start 0.6 --lengths "$length" --texts 3 --dtype fp32 \
        --out "$OUT/grid/$label-$length" "$@"
}
loss() { # label, length, options
    label=$1 length=$2
    shift 2
    "$LONGSCOPE" eval perplexity --model $BASE --begin 0.6 --window 0 --contexts "$length" --places 3 --dtype fp32 \
        --out "$OUT/perplexity/$label-$length" "$@"
}
for ratio in 8 4 2 16; do
    for length in 4096 8192; do
        slots=$((length / ratio + WINDOW))
        for measure in grid loss; do
            $measure "beacon-x$ratio" $length --method beacon --beacons "$OUT/finetuned/beacons" --ratio $ratio
            for method in streaming snapkv pyramidkv tova knorm keydiff spotlight; do
                $measure "$method-x$ratio" $length --method $method --slots $slots
            done
        done
    done
done
for measure in grid loss; do
    for length in 4096 8192; do
        $measure full $length
        $measure untrained-x8 $length --method beacon --ratio 8
    done
done
