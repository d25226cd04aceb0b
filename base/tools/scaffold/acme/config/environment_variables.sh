# What acme devices are best run with: source acme/config/environment_variables.sh before prepare.py and run_training.sh.
# A value that is set already stays.

export PYTHONFAULTHANDLER=${PYTHONFAULTHANDLER:-1} # a crash in a driver or a kernel says in which line of Python it happened
