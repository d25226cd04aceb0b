#!/usr/bin/env bash
# Sets up and runs the tests: bash tests/run.sh [--all] [pytest arguments …]
# --all adds the long ones: kills with two ranks, the whole demo training, sizes of COCO.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"

select=" and not long"
if [[ ${1:-} == --all ]]; then
    select=
    shift
fi

for file in */backend.py; do
    [[ $file == base/* ]] || python3 prepare.py --name "${file%/*}" --with-tests
done
# Most of the time goes into processes that start and train on one thread: a file of tests on each core.
cores=$(env -u OMP_NUM_THREADS nproc)
files_at_once=$((cores < 4 ? cores : 4))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores / files_at_once))}
active=${VIRTUAL_ENV:-${CONDA_PREFIX:-}}
test=("${active:-$root/.venv}/bin/python" -m pytest --durations 40)
code=0 alone=0
"${test[@]}" -n "$files_at_once" --dist loadfile --no-loadscope-reorder -m "not alone$select" "$@" || code=$?
"${test[@]}" -m "alone$select" "$@" || alone=$?
none=5 # pytest's exit code if nothing is selected: it counts only if it does so twice
((code == none)) && exit "$alone"
((code)) && exit "$code"
((alone == none)) || exit "$alone"
