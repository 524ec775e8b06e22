#!/usr/bin/env bash
# The table of formats beside float32 in README.md: the bundled model on a package of Python's
# standard library, a few minutes on two cores.
#
#     infra/benchmarks/fidelity.sh infra/benchmarks/fidelity.jsonl && infra/benchmarks/render.py
#
# LOGITMILL is the command where it has another name; further arguments are options of it (--device cpu).
set -eu
here=$(cd "$(dirname "$0")" && pwd)
file=$(realpath -m "$1")
shift
work=$(mktemp -d)
trap 'rm -r "$work"' EXIT
# Under these names whatever the machine, since records hold their commands.
ln -s "$here/../demo/model" "$work/model"
ln -s "$(python3 -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')" "$work/stdlib"
cd "$work"
${LOGITMILL:-logitmill} bench model 'stdlib/json/*.py' --fidelity "$@" --json "$file"
