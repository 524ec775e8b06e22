#!/usr/bin/env bash
# The rows of "From storage to storage" in README.md, measured on two H200s in about ten minutes.
#
#     infra/benchmarks/stored.sh infra/benchmarks/stored.jsonl && infra/benchmarks/render.py
#
# Needs the extras dask and test, for workers and for an S3 server of this machine's own.
set -u
file=$1
failed=0
port=${PORT:-5999}
endpoint=http://127.0.0.1:$port
export AWS_ACCESS_KEY_ID=bench AWS_SECRET_ACCESS_KEY=bench AWS_DEFAULT_REGION=us-east-1

bench() {
    echo "== bench $*"
    ${LOGITMILL:-logitmill} bench "$@" --json "$file" || failed=1
}

python3 -m moto.server -p "$port" 2>/dev/null &
trap 'kill $!' EXIT
until curl -s -X PUT -o /dev/null "$endpoint/bench"; do sleep 0.5; done

bench llama8b-mixed --quantization fp8 --shards 8 --repeat 1 --store /tmp/runs \
    --workers 1 --workers 2
bench llama8b-mixed --quantization fp8 --shards 4 --repeat 1 \
    --store s3://bench/runs --endpoint-url "$endpoint"
exit $failed
