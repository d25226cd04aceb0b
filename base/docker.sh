#!/usr/bin/env bash
# bash base/docker.sh BACKEND [DOCKER'S FLAGS FOR THE DEVICES] -- [FLAGS of run_training.sh]: what a vendor's run_with_docker.sh calls.
# Runs the trials on this machine, each in a container of the image CONT, whose entry point is run_training.sh.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/base/trials.sh"
vendor=$1
shift
devices=()
while [[ $1 != -- ]]; do
    devices+=("$1")
    shift
done
shift
choose
choose_folders
choose_mounts
[[ -n ${CONT:-} ]] || fail "CONT is not set: the image that docker build -f $vendor/docker/Dockerfile made"

# --ipc=host: loaders and the devices' collective library share memory, and a container's own /dev/shm has 64 MB
container=(docker run --rm --init --ipc=host --network=host --ulimit memlock=-1 --ulimit stack=67108864 --env SSD_CACHES_CLEARED --env NEXP "${devices[@]}")
container+=(--mount "type=bind,source=$LOGDIR,target=$results")
[[ -z ${DATADIR:-} ]] || container+=(--mount "type=bind,source=$DATADIR,target=$data")

settings() { "${container[@]}" "$CONT" config "$@"; }
training() { exec setsid "${container[@]}" "$CONT" "$@"; } # setsid: Ctrl-C comes through stop only
everywhere() { bash -c "$1"; }
stop() { kill "$1"; }

read_settings 1 "$@"
run_trials "$@"
