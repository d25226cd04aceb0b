#!/usr/bin/env bash
# CONT=IMAGE DATADIR=… LOGDIR=… CONFIG=DGXA100 ./run_with_docker.sh [FLAGS of run_training.sh]: docs/slurm-and-containers.md
exec bash "$(dirname "${BASH_SOURCE[0]}")/../../base/docker.sh" nvidia --gpus all -- "$@"
