#!/bin/bash
# Several nodes under Slurm, with resume after the time limit and after preemption:
#
#     sbatch benchmarks/cluster/slurm.sh baseline_mtp.py --model Qwen/Qwen2.5-7B --data my.jsonl ...
#
# Submit from the project's folder, with the Python environment active. All nodes must see the
# project, RUN_DIR and the Hugging Face cache (HF_HOME). Set RUN_DIR and CHECKPOINT_DIR (a shared folder or s3://bucket/path) in the
# environment of sbatch, and the numbers of nodes, GPUs and CPUs below or as options of sbatch.
#
#SBATCH --job-name=wmtp
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@240
#SBATCH --requeue
#SBATCH --open-mode=append

if [ $# -eq 0 ]; then
    echo "usage: sbatch benchmarks/cluster/slurm.sh SCRIPT.py [flags of the script]" >&2
    exit 2
fi
run=${RUN_DIR:-$PWD/runs/slurm-$SLURM_JOB_ID}    # the job id stays when the job is queued again
checkpoints=${CHECKPOINT_DIR:+--checkpoint-dir $CHECKPOINT_DIR}
host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# Without this torch 2.13 may fail to restart workers (pytorch #135712)
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

# torchrun passes SIGTERM to the workers, which save and stop, and kills them after 200 s
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=0 \
    torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-1}" \
    --rdzv-backend c10d --rdzv-endpoint "$host:29500" --rdzv-id "$SLURM_JOB_ID" \
    --max-restarts 3 --shutdown-timeout 200 \
    "$@" --run-dir "$run" $checkpoints &
step=$!

# 240 s before the time limit Slurm sends USR1 to this shell. SIGTERM goes to the tasks, not to
# srun, which would kill them at once. Then wait until they have saved.
trap 'again=yes; scancel --signal=TERM "$SLURM_JOB_ID"' USR1
while kill -0 "$step" 2> /dev/null; do
    wait "$step"
    status=$?
done

[ -d "$run/model" ] && exit 0    # finished
# preempted with a grace period
scontrol show job "$SLURM_JOB_ID" | grep -q 'PreemptTime=[0-9]' && again=yes
[ -n "$again" ] && scontrol requeue "$SLURM_JOB_ID"    # not after a failure or a cancel
exit "$status"
