# shellcheck shell=bash
# All that differs between clusters, in one place. Edit what stands after `=`, or set the variable in your shell for one
# submission. submit.sh and pipeline.sh read this file where you submit, train.sbatch at the start of each job.

# What a job asks for; empty takes the cluster's default. An option given to submit.sh wins over these.
: "${KD_PARTITION:=}"
: "${KD_ACCOUNT:=}"
: "${KD_QOS:=}"
: "${KD_TIME:=04:00:00}"  # a run that needs longer resumes in the job's next start
: "${KD_NODES:=1}"
: "${KD_GPUS_PER_NODE:=}" # 4, or a100:4; empty for CPUs
: "${KD_CPUS_PER_NODE:=}"
: "${KD_MEMORY_PER_NODE:=}" # 64G

# What a job finds. The project's folder must be on a disk that all nodes share, and so should the scratch folder.
: "${KD_MODULES:=}"                   # cuda/12.8 python/3.12
: "${KD_ACTIVATE=.venv/bin/activate}" # sourced if it is there
: "${KD_CONTAINER:=}"                 # words before the command: apptainer exec --nv --bind /scratch kd.sif
: "${KD_PYTHON:=python}"
: "${KD_SCRATCH:=}" # decoded images and tables go to $KD_SCRATCH/cache; empty: ~/.cache/kd

# How a job runs.
: "${KD_ACCELERATE_CONFIG:=accelerate_configs/multi_node.yaml}"
: "${KD_PROCESSES_PER_NODE:=}" # empty: one for each GPU, one on a node without
: "${KD_MAX_RESTARTS:=100}"    # a job that was started more often is left to you

# Modules, network settings of NCCL and the like, on the first node of a job; the other nodes inherit the environment.
kd_environment() {
  local module
  for module in $KD_MODULES; do module load "$module" || return; done
  # shellcheck disable=SC1090  # the user's own
  if [[ -f $KD_ACTIVATE ]]; then source "$KD_ACTIVATE" || return; fi
  if [[ -n $KD_SCRATCH ]]; then export KD_CACHE=${KD_CACHE:-$KD_SCRATCH/cache}; fi
  # export NCCL_SOCKET_IFNAME=ib0
}

# The options of sbatch that follow from the above.
kd_options=(--nodes="$KD_NODES" --time="$KD_TIME")
[[ -z $KD_PARTITION ]] || kd_options+=(--partition="$KD_PARTITION")
[[ -z $KD_ACCOUNT ]] || kd_options+=(--account="$KD_ACCOUNT")
[[ -z $KD_QOS ]] || kd_options+=(--qos="$KD_QOS")
[[ -z $KD_GPUS_PER_NODE ]] || kd_options+=(--gpus-per-node="$KD_GPUS_PER_NODE")
[[ -z $KD_CPUS_PER_NODE ]] || kd_options+=(--cpus-per-task="$KD_CPUS_PER_NODE") # a job has one task a node
[[ -z $KD_MEMORY_PER_NODE ]] || kd_options+=(--mem="$KD_MEMORY_PER_NODE")
