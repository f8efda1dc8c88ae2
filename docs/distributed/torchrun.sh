#!/bin/bash
# Several machines with torchrun. Run it on each of them; only NODE_RANK differs:
#   FIRST=10.0.0.1 NODES=2 NODE_RANK=0 ./torchrun.sh
# RUNS is a folder that all machines see.
set -euo pipefail

exec torchrun \
    --nnodes "${NODES:-1}" \
    --node-rank "${NODE_RANK:-0}" \
    --nproc-per-node "${GPUS:-8}" \
    --master-addr "${FIRST:-127.0.0.1}" \
    --master-port "${PORT:-29500}" \
    -m hymba_tune.cli sft \
    --model "${MODEL:-nvidia/Hymba-1.5B-Base}" \
    --data "${DATA:-my.jsonl}" \
    --strategy "${STRATEGY:-ddp}" \
    --out "${RUNS:-runs}/my-run"
