# What CoreX needs: source iluvatar/config/environment_variables.sh, from any folder, before prepare.py and run_training.sh.
# COREX_HOME names the SDK's folder. What is set already stays, and nothing is added twice.

export COREX_HOME=${COREX_HOME:-/usr/local/corex}
if [ -d "$COREX_HOME" ]; then
    case ":${PATH:-}:" in *":$COREX_HOME/bin:"*) ;; *) export PATH=$COREX_HOME/bin${PATH:+:$PATH} ;; esac # ixsmi
    case ":${LD_LIBRARY_PATH:-}:" in *":$COREX_HOME/lib64:"*) ;; *) export LD_LIBRARY_PATH=$COREX_HOME/lib64${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH} ;; esac
    ssd_packages=$COREX_HOME/lib64/python3/dist-packages # where the SDK's installer puts torch
    if [ -d "$ssd_packages" ]; then
        case ":${PYTHONPATH:-}:" in *":$ssd_packages:"*) ;; *) export PYTHONPATH=$ssd_packages${PYTHONPATH:+:$PYTHONPATH} ;; esac
    fi
    unset ssd_packages
else
    echo "no CoreX SDK in $COREX_HOME: set COREX_HOME to its folder" >&2
fi
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1} # a rank that waits in vain ends the run after `timeout`
