#!/usr/bin/env bash
# Trains: bash run_training.sh [--name BACKEND] [--config CONFIG] [--data_dir DIR] [--backbone_path FILE] [--list] [--dry-run] …
# Without anything: sets up if needed, draws the demo data, trains the demo. A tool of python -m base may come first: run_training.sh config …
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

tool=train
if [[ ${1:-} == [a-z]* ]]; then
    tool=$1
    shift
fi
name=
arguments=("$@")
for ((i = 0; i < $#; i++)); do
    case ${arguments[i]} in
        --name) name=${arguments[i + 1]:-} ;;
        --name=*) name=${arguments[i]#--name=} ;;
    esac
done

python=${SSD_PYTHON:-}
if [[ -z $python ]]; then
    active=${VIRTUAL_ENV:-${CONDA_PREFIX:-}}
    python=${active:-$root/.venv}/bin/python
fi
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
if ! "$python" -c 'import importlib.util as u, sys; sys.exit(any(u.find_spec(m) is None for m in ("torch", "torchvision", "pydantic", "yaml", "rich", "pycocotools", "mlperf_logging")))' 2>/dev/null; then
    echo "setting up first: python3 prepare.py${name:+ --name $name}" >&2
    python3 "$root/prepare.py" ${name:+--name "$name"} ${SSD_PYTHON:+--python "$SSD_PYTHON"} >&2 # scripts read what config prints
fi
export PYTHONSAFEPATH=1 # a folder called base where this is called from is not the project
exec "$python" -m base "$tool" "$@"
