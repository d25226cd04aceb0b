#!/usr/bin/env bash
# On a GPU, without any network, in some minutes: the tests of the kernels, then the bench; results go to nvidia/results/<gpu>.md.
# $SSD_PYTHON names the Python; otherwise the active environment's or the project's own.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
active=${VIRTUAL_ENV:-${CONDA_PREFIX:-}}
python=${SSD_PYTHON:-${active:-$root/.venv}/bin/python}
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}

"$python" cpu/build.py || echo "the native loader cannot be built here: training with it will not be measured" >&2
card=$("$python" -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "_") if torch.cuda.is_available() else "")')
if [[ -z $card ]]; then
    echo "error: this torch finds no CUDA device" >&2
    exit 2
fi
mkdir -p nvidia/results
{
    SSD_TEST_DEVICE=cuda timeout 240 "$python" -m pytest -q nvidia/tests/interpreted -p no:cacheprovider
} 2>&1 | tail -n 60 | tee "nvidia/results/$card-tests.txt"
exec "$python" -m base.backends.nvidia.bench --out "nvidia/results/$card.md" "$@"
