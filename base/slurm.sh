#!/usr/bin/env bash
# bash base/slurm.sh BACKEND [FLAGS of run_training.sh]: what a vendor's slurm/run.sub calls. In a job of Slurm one task a node starts
# run_training.sh, in the container CONT (Pyxis) if that is set; outside Slurm it is started on this machine.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/base/trials.sh"
vendor=$1
shift
choose
choose_folders
project=$root data=${DATADIR:-} results=$LOGDIR once=()

settings() { "${once[@]}" bash "$project/run_training.sh" config "$@"; }

if [[ -z ${SLURM_JOB_ID:-} ]]; then
    [[ -z ${CONT:-} ]] || fail "CONT is for Slurm with Pyxis, and this is no job of Slurm; run_with_docker.sh takes it"
    nodes=1
    training() { exec setsid bash "$project/run_training.sh" "$@"; } # setsid: Ctrl-C comes through stop only
    everywhere() { bash -c "$1"; }
    stop() { kill "$1"; }
else
    nodes=$SLURM_JOB_NUM_NODES
    container=()
    if [[ -n ${CONT:-} ]]; then
        choose_mounts
        container=(--container-image="$CONT" --container-mounts="${DATADIR:+$DATADIR:$data,}$LOGDIR:$results")
        once=(srun --nodes=1 --ntasks=1 "${container[@]}")
    fi
    each=(srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --kill-on-bad-exit=1 --cpu-bind=none)
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p) # not head, which would end scontrol by SIGPIPE before it has printed all nodes
    address=${MASTER_ADDR:-$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')}
    meeting=(--rdzv-endpoint "$address:${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}" --rdzv-id "job-$SLURM_JOB_ID")
    training() {
        exec "${each[@]}" "${container[@]}" bash -c 'exec bash "$0" "$@" --node-rank "$SLURM_NODEID"' "$project/run_training.sh" "$@" "${meeting[@]}"
    }
    everywhere() { "${each[@]}" bash -c "$1"; }
    stop() { :; } # Slurm signals the tasks itself; srun would kill them
fi
[[ -n ${CONT:-} || ! -e $root/$NAME/config/environment_variables.sh ]] || source "$root/$NAME/config/environment_variables.sh"

read_settings "$nodes" "$@"
run_trials "$@"
