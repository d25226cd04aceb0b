# The trials of a benchmark, one after the other; sourced by slurm.sh and docker.sh, which set and define:
#   vendor             the backend whose script was called
#   project            the project's folder, and `data`, `results`: DATADIR and LOGDIR, all as a training sees them
#   settings FLAGS     prints what `python -m base config --shell` does
#   training FLAGS     becomes (exec) run_training.sh with these flags, on every node
#   everywhere COMMAND runs a shell command on every node, outside any container
#   stop PID           asks a training to stop, where nobody else does
# Variables that people set: NAME, CONFIG or DGXSYSTEM, DATADIR, LOGDIR, NEXP, CLEAR_CACHES; docs/slurm-and-containers.md explains them.

fail() {
    echo "error: $*" >&2
    exit 2
}

# NAME and CONFIG, from what was set: the vendor's backend, unless only the reference has a configuration of that name.
choose() {
    CONFIG=${CONFIG:-${DGXSYSTEM:-}}
    [[ -n $CONFIG ]] || fail "CONFIG (or DGXSYSTEM) is not set: the name of a configuration; bash run_training.sh --list shows them"
    if [[ -z ${NAME:-} ]]; then
        NAME=$vendor
        if [[ ! -e $root/$NAME/config/$CONFIG.yaml && ! -e $root/base/recipes/$CONFIG.yaml && -e $root/reference/config/$CONFIG.yaml ]]; then
            NAME=reference
            echo "$CONFIG is a configuration of the reference, not of $vendor: NAME=reference"
        fi
    fi
}

# DATADIR and LOGDIR as absolute paths; both may be given relative to the current folder.
choose_folders() {
    LOGDIR=$(realpath -m "${LOGDIR:-results}")
    mkdir -p "$LOGDIR"
    if [[ -n ${DATADIR:-} ]]; then
        [[ -d $DATADIR ]] || fail "DATADIR=$DATADIR does not exist; prepare.py --data_dir $DATADIR --download fetches COCO 2017"
        DATADIR=$(realpath "$DATADIR")
    fi
}

# For a container: where it has the project, data and results.
choose_mounts() {
    [[ $LOGDIR${DATADIR:-} != *[:,]* ]] || fail "a container cannot be given folders with : or , in their names: DATADIR=${DATADIR:-}, LOGDIR=$LOGDIR"
    project=/workspace/ssd data=/data results=/results
    unset SSD_PYTHON VIRTUAL_ENV CONDA_PREFIX PYTHONPATH # those of this machine are not the container's
}

# The resolved configuration as variables, held to the number of nodes that there are ($1).
read_settings() {
    local nodes=$1 lines
    shift
    lines=$(settings --name "$NAME" --config "$CONFIG" "$@" --shell)
    eval "$lines"
    ((DGXNNODES == nodes)) || fail "$CONFIG wants $DGXNNODES node(s) and there are $nodes: sbatch -N $DGXNNODES -t $WALLTIME run.sub, or another CONFIG"
}

# Whether the page caches of all nodes are empty now: SSD_CACHES_CLEARED, which MLPerf's log states as cache_clear.
clear_caches() {
    export SSD_CACHES_CLEARED=0
    [[ ${CLEAR_CACHES:-1} == 1 ]] || return 0
    local drop='sync; if [[ -w /proc/sys/vm/drop_caches ]]; then echo 3 >/proc/sys/vm/drop_caches; else sudo -n sysctl -q vm.drop_caches=3; fi'
    if everywhere "$drop" 2>/dev/null; then
        SSD_CACHES_CLEARED=1
    else
        echo "warning: the caches are not cleared, as that takes root or sudo without a password on each node; MLPerf's rules ask for it" \
            "(cache_clear is false in mlperf.log); CLEAR_CACHES=0 does not try"
    fi
}

# Flags of run_training.sh that begin the trial $1 in its folder, or go on with it.
trial_flags() {
    local trial=$1 run=$2 weights=resnet34-333f7ec4.pth
    shift 2
    if [[ -e $LOGDIR/$run/environment.json ]]; then
        flags=(--resume "$results/$run")
        echo "trial $trial of $NEXP goes on, as it was begun, in $LOGDIR/$run"
    else
        [[ ! -e $LOGDIR/$run ]] || mv "$LOGDIR/$run" "$LOGDIR/$run.not-begun-$stamp" # it ended before there was anything to go on with
        flags=(--name "$NAME" --config "$CONFIG" "$@" --seed $((SSD_SEED + trial - 1)) --runs_dir "$results" --run_name "$run" --trials 1)
        echo "trial $trial of $NEXP begins in $LOGDIR/$run, seed $((SSD_SEED + trial - 1))"
        if [[ $SSD_BACKBONE == resnet34 && -z $SSD_BACKBONE_PATH$SSD_CHECKPOINT ]]; then
            if [[ -e ${DATADIR:-}/$weights ]]; then
                flags+=(--backbone_path "$data/$weights")
            else
                echo "warning: there is no $weights in DATADIR, so the backbone begins with random weights; prepare.py --download fetches it"
            fi
        fi
    fi
    [[ -z ${DATADIR:-} ]] || flags+=(--data_dir "$data")
}

# Runs a training with its output to the terminal and to the file $1; returns its exit code. A signal to this script reaches it too.
train_into() {
    local log=$1 tee code=0
    shift
    exec 3> >(
        trap '' TERM INT
        exec tee "$log"
    )
    tee=$!
    training "$@" >&3 2>&1 3>&- &
    local child=$!
    trap "stop $child || true" TERM INT
    wait "$child" || code=$?
    while kill -0 "$child" 2>/dev/null; do # it was a signal that ended `wait`, not the training
        code=0
        wait "$child" || code=$?
    done
    trap - TERM INT
    exec 3>&-
    wait "$tee"
    return "$code"
}

# time_ms of an event of an MLPerf log on standard input: the first.
time_of() { sed -n "s/^:::MLLOG .*\"time_ms\": \([0-9]*\),.*\"key\": \"$1\".*/\1/p" | sed -n 1p; }

# All trials that are not done yet. Each ends with its RESULT line, from MLPerf's run_start to its run_stop.
run_trials() {
    local stamp trial run log code flags events start stop
    stamp=$(date +%Y%m%d%H%M%S)
    for ((trial = 1; trial <= NEXP; trial++)); do
        run=$NAME-${CONFIG}_$trial log=$LOGDIR/${stamp}_$trial.log
        if [[ -e $LOGDIR/$run/result.txt ]]; then
            echo "trial $trial of $NEXP is done: $(<"$LOGDIR/$run/result.txt")"
            continue
        fi
        trial_flags "$trial" "$run" "$@"
        clear_caches
        code=0
        train_into "$log" "${flags[@]}" || code=$?
        if ((code == 143)); then
            echo "trial $trial of $NEXP was stopped; the same command, with the same LOGDIR, goes on with it"
            exit 143
        elif ((code)); then
            echo "error: trial $trial of $NEXP ended with exit code $code; see $log" >&2
            exit "$code"
        fi
        events=$(cat "$LOGDIR/$run"/{,stage-?/,stage-??/}mlperf.log 2>/dev/null || true) # stages have a log each
        start=$(time_of run_start <<<"$events") stop=$(tac <<<"$events" | time_of run_stop)
        [[ -n $start && -n $stop ]] || fail "no run_start and run_stop in the mlperf.log of $LOGDIR/$run"
        [[ $(grep '"key": "run_stop"' <<<"$events" | tail -n 1) != *aborted* ]] || echo "trial $trial of $NEXP did not reach its target" | tee -a "$log"
        echo "$events" >>"$log"
        echo "RESULT,SINGLE_STAGE_DETECTOR,,$(((stop - start + 500) / 1000)),$NAME,$(date -d "@$((start / 1000))" '+%Y-%m-%d %I:%M:%S %p')" |
            tee -a "$log" "$LOGDIR/$run/result.txt"
    done
}
