#!/usr/bin/env bash
# On a GPU, without any network, in some minutes: the tests of the kernels, then the bench; results go to nvidia/results/<gpu>.md.
# Needed are torch, torchvision and Triton. What else is missing (pytest, a C++ compiler, pybind11, DALI) leaves out only what needs
# it, and is named. $SSD_PYTHON names the Python; otherwise it is the active environment's, the project's own, or python3.
# --device cpu shows without a GPU that all of it works, in Triton's interpreter. Other arguments are those of nvidia/bench.py.
# Exit code: the bench's, or 1 if tests failed.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
active=${VIRTUAL_ENV:-${CONDA_PREFIX:-}}
python=${SSD_PYTHON:-${active:-$root/.venv}/bin/python}
if [[ ! -x $(command -v "$python") ]]; then
    echo "there is no $python: using $(command -v python3)" >&2
    python=python3
fi
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}

device=cuda interpret=0 limit=240
card=$("$python" -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "_") if torch.cuda.is_available() else "")')
results=nvidia/results
if [[ " $* " =~ " --device"[\ =]"cpu " ]]; then
    device=cpu interpret=1 limit=900 card=cpu results=$(mktemp -d) # figures of a CPU say nothing here
elif [[ -z $card ]]; then
    echo "error: this torch finds no CUDA device; --device cpu shows only that the bench works" >&2
    exit 2
fi
mkdir -p "$results"
"$python" cpu/build.py || echo "the native loader cannot be built here: training with it will not be measured" >&2

failed=0
if "$python" -c 'import pytest' 2>/dev/null; then
    # Only the tests' own folder is looked into for what they share: the rest needs packages that may be missing here.
    test=("$python" -m pytest nvidia/tests/interpreted -p no:cacheprovider --confcutdir nvidia/tests/interpreted)
    TRITON_INTERPRET=$interpret SSD_TEST_DEVICE=$device timeout 300 "${test[@]}" 2>&1 | tail -n 60 | tee "$results/$card-tests.txt" || failed=1
else
    echo "the kernels were not tested: $python has no pytest" | tee "$results/$card-tests.txt"
fi
late=0 # with the tests' five minutes, nine in all; what has been measured by then is kept
timeout $limit "$python" -m base.backends.nvidia.bench --out "$results/$card.md" --profile "$results/$card-step.txt" "$@" || late=$?
((late == 0 || late == 124)) || exit $late
((late == 0)) || { echo "error: the bench was ended after $limit s; $results/$card.md has what was measured" >&2; exit 1; }
((failed == 0)) || echo "error: tests of the kernels failed, see $results/$card-tests.txt" >&2
exit $failed
