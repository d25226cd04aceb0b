# What NVIDIA GPUs are best run with: source nvidia/config/environment_variables.sh before prepare.py and run_training.sh.
# A value that is set already stays.

export CUDA_DEVICE_ORDER=${CUDA_DEVICE_ORDER:-PCI_BUS_ID}      # ranks count GPUs as nvidia-smi does
export CUDA_MODULE_LOADING=${CUDA_MODULE_LOADING:-EAGER}       # no kernel is loaded for the first time while a graph is captured
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1} # a rank that waits in vain ends the run after `timeout`
