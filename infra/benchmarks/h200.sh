#!/usr/bin/env bash
# Every row of the tables in README.md, measured on one H200 in less than five minutes.
#
#     infra/benchmarks/h200.sh infra/benchmarks/h200.jsonl && infra/benchmarks/render.py
#
# Records are added to the file. LOGITMILL is the command where it has another name; a checkpoint of
# 16 GB is left in the temporary folder.
set -u
file=$1
failed=0

bench() {
    echo "== bench $*"
    ${LOGITMILL:-logitmill} bench "$@" --json "$file" || failed=1
}

bench llama8b-mixed --quantization fp8 --top-k 20 --top-k 128 --repeat 2
bench llama8b-mixed --quantization fp8 --fp8-head --repeat 2
bench llama8b-mixed --repeat 2
bench llama8b-mixed --quantization int8 --repeat 2
bench llama8b-mixed --quantization int4_fp8 --repeat 2
bench llama8b-mixed --quantization int4 --repeat 1
bench llama8b-long --quantization fp8 --repeat 2
bench qwen0.5b-mixed --top-k 20 --top-k 128
# 28 GB of logits in host memory, some at a time.
bench llama8b-mixed --quantization fp8 --keep logits --limit 150 --repeat 2
# The loop takes a minute for all of the documents; this also writes the checkpoint for the next.
bench llama8b-mixed --peer transformers --limit 64 --repeat 1
bench llama8b-mixed --from-disk --limit 100 --repeat 1
exit $failed
