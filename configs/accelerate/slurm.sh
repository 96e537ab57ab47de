#!/bin/bash
# A run on two nodes with eight GPUs each, by Slurm:
#
#     sbatch configs/accelerate/slurm.sh configs/gpt2_1558m_openwebtext.yaml --parallel.shard true
#
# All that follows the script's name goes to the trainer. 120 seconds before its time is over, and where it is preempted,
# the run is asked to save; `scontrol requeue`, or the same command again, goes on from there.
#SBATCH --job-name=nanogpt
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
set -euo pipefail

export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=100 # seconds in which torchrun lets the processes save, where it knows it
gpus=8
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
port=$((20000 + SLURM_JOB_ID % 20000))

# One launcher a node. --kill-on-bad-exit: when one node fails, the others end with it.
srun --kill-on-bad-exit=1 bash -c '
  exec torchrun --nnodes "$SLURM_JOB_NUM_NODES" --node_rank "$SLURM_NODEID" --nproc_per_node "$1" \
    --master_addr "$2" --master_port "$3" -m train.pretrain "${@:4}"
' launch "$gpus" "$first" "$port" "$@"
