#!/bin/bash
#SBATCH --job-name=residscope
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#
# Harvest, train and analyze on all nodes of one job: sbatch docs/clusters/slurm.sh
# Without SLURM the same steps run on this machine: PER_NODE=2 FOLDER=/tmp/run MODEL=... bash docs/clusters/slurm.sh
# A job that ran out of time goes on when it is submitted again.

set -euo pipefail

export FOLDER=${FOLDER:-$PWD}        # seen by all nodes under this name
export PER_NODE=${PER_NODE:-8}       # workers and trainers of a node: one for each GPU
MODEL=${MODEL:-pythia-1b}
HARVEST_FLAGS=${HARVEST_FLAGS:---dataset monology/pile-uncopyrighted --max-tokens 10_000_000}
TRAIN_FLAGS=${TRAIN_FLAGS:---expansion-factor 16}
ANALYZE_FLAGS=${ANALYZE_FLAGS:-}

# Since SLURM 22.05 srun does not take it over from the job.
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi

mkdir -p "$FOLDER"

everywhere() { # a command, once on each node
    if [ -n "${SLURM_JOB_ID:-}" ]; then srun "$@"; else "$@"; fi
}

cluster() { # a Dask scheduler here and PER_NODE workers on each node, as long as a command runs
    SCHEDULER_FILE=$(mktemp "$FOLDER/scheduler.XXXXXX")
    rm "$SCHEDULER_FILE"
    export SCHEDULER_FILE
    dask scheduler --port 0 --no-dashboard --scheduler-file "$SCHEDULER_FILE" &
    local scheduler=$!
    # A worker that loses its scheduler ends after a minute.
    everywhere bash -c '
        for gpu in $(seq 0 $((PER_NODE - 1))); do
            CUDA_VISIBLE_DEVICES=$gpu dask worker --scheduler-file "$SCHEDULER_FILE" --nthreads 1 \
                --no-dashboard --death-timeout 60 --local-directory "${TMPDIR:-/tmp}" &
        done
        wait' &
    local workers=$! address code=0
    until [ -s "$SCHEDULER_FILE" ]; do
        kill -0 "$scheduler" 2>/dev/null || { kill "$workers" 2>/dev/null; return 1; } # it did not start
        sleep 1
    done
    address=$(python -c 'import json, sys; print(json.load(open(sys.argv[1]))["address"])' "$SCHEDULER_FILE")
    "$@" --scheduler "$address" || code=$?
    kill "$scheduler"
    wait "$scheduler" "$workers" || true
    rm -f "$SCHEDULER_FILE"
    return "$code"
}

# shellcheck disable=SC2086  # flags are several words
cluster harvest --model "$MODEL" --out "$FOLDER/acts.zarr" $HARVEST_FLAGS

# shellcheck disable=SC2086
everywhere torchrun --nnodes "${SLURM_JOB_NUM_NODES:-1}" --nproc-per-node "$PER_NODE" --rdzv-backend c10d \
    --rdzv-id "${SLURM_JOB_ID:-1}" --rdzv-endpoint "${SLURMD_NODENAME:-localhost}:29400" \
    -m residscope train --store "$FOLDER/acts.zarr" --out "$FOLDER/ckpt.pt" --resume $TRAIN_FLAGS

# shellcheck disable=SC2086
cluster analyze --store "$FOLDER/acts.zarr" --sae "$FOLDER/ckpt.pt" $ANALYZE_FLAGS
