#!/usr/bin/env bash
# Every row of the tables in README.md, measured on one H200 in about fifteen minutes.
#
#     infra/benchmarks/h200.sh infra/benchmarks/h200.jsonl && infra/benchmarks/render.py
#
# Records are added to the file, each as soon as it is there. What matters most comes first, so
# that a time limit costs little. LOGITMILL is the command where it has another name; a checkpoint
# of 16 GB is left in the temporary folder.
set -u
file=$1
failed=0

bench() {
    echo "== bench $*"
    ${LOGITMILL:-logitmill} bench "$@" --json "$file" || failed=1
}

# Runs of seconds, each after a warm-up: one is enough but where a pass takes a second.
bench llama8b-mixed --repeat 1 --top-k 20 --top-k 128 \
    --quantization fp8 --quantization fp8+head --quantization none --quantization int8 \
    --quantization int4_fp8 --quantization int4_fp8_exact --quantization int4 \
    --quantization fp8_block
bench llama8b-long --quantization fp8 --repeat 1
bench llama8b-choices --quantization fp8
bench qwen0.5b-mixed --top-k 20 --top-k 128 --repeat 2
# 114 GB of logits in host memory, some at a time; a virtual machine gives memory that it has never
# touched at half the speed.
bench llama8b-mixed --quantization fp8 --keep logits --repeat 2
bench llama8b-mixed --quantization fp8 --keep sampled --keep vocabulary --keep hidden --repeat 2
# Once to write the checkpoint, and again to see how soon the first batch is done.
${LOGITMILL:-logitmill} bench llama8b-mixed --from-disk --limit 1 --repeat 1 || failed=1
bench llama8b-mixed --from-disk --limit 80 --repeat 1
bench llama8b-mixed --peer transformers --limit 40 --repeat 1
# Sparse experts, and a model larger than what it may take of the device.
bench qwen3-30b-a3b-mixed --quantization fp8 --limit 300 --repeat 1
bench mixtral-mixed --quantization fp8 --limit 100 --repeat 1
bench qwen32b-mixed --limit 60 --repeat 1
bench qwen32b-mixed --device-memory 24 --limit 60 --repeat 1
bench qwen32b-mixed --device-memory 12 --limit 60 --repeat 1
bench qwen32b-mixed --quantization int4 --device-memory 8 --limit 60 --repeat 1
bench llama70b-mixed --quantization fp8 --limit 40 --repeat 1
bench llama70b-mixed --quantization fp8 --residency host --limit 40 --repeat 1
# Documents longer than a batch: minutes.
bench llama8b-256k --quantization fp8 --repeat 1
bench llama8b-1m-slice --quantization fp8 --repeat 1
exit $failed
