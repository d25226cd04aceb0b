#!/usr/bin/env bash
# From within this folder, where earlier versions of the benchmark had it: the one in the project's root.
exec bash "$(dirname "${BASH_SOURCE[0]}")/../run_training.sh" "$@"
