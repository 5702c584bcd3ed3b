#!/bin/bash
# Several machines under Slurm, an accelerate launcher on each:
#     sbatch examples/accelerate/slurm.sh --init gradient        # what follows goes to accelerate_pde.py
# --output-dir should lie on a file system that all machines share: checkpoints are read by all of them. CONFIG,
# PER_NODE (processes on each machine) and PORT may be set in the environment.
#SBATCH --job-name=lotra
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=1
#SBATCH --time=01:00:00
set -euo pipefail

mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
launch=(
    accelerate launch
    --config_file "${CONFIG:-examples/accelerate/multi_gpu_ddp.yaml}"
    --num_machines "$SLURM_NNODES"
    --num_processes "$((SLURM_NNODES * ${PER_NODE:-1}))"
    --main_process_ip "${hosts[0]}"
    --main_process_port "${PORT:-29500}"
)
# srun starts one task on each machine. Only there is it known which one it is.
export COMMAND="${launch[*]} --machine_rank"
srun bash -c '$COMMAND "$SLURM_NODEID" examples/accelerate_pde.py "$@"' accelerate_pde "$@"
