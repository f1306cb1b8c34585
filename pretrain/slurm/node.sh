#!/usr/bin/env bash
# One node's part of pretrain.sbatch: torchrun, and whether its end was asked for.
# SLURM signals every process of a step, so ranks hear SIGUSR1 and SIGTERM without help. torchrun
# must not hear them: it would die of the one, and of the other kill the ranks while they save.
set -uo pipefail

asked=
trap 'asked=yes interrupted=yes' USR1 TERM
(
  trap '' USR1 TERM # ignored also after exec; a rank sets handlers of its own
  exec .venv/bin/torchrun --signals_to_handle=SIGINT \
    --nnodes="$SLURM_JOB_NUM_NODES" --node_rank="$SLURM_NODEID" \
    --nproc_per_node="$PROCESSES_PER_NODE" \
    --master_addr="$SLURM_LAUNCH_NODE_IPADDR" --master_port="$MASTER_PORT" "$@"
) &
launcher=$!
interrupted=yes
while [[ -n $interrupted ]]; do
  interrupted=
  wait "$launcher" && status=0 || status=$? # a signal ends wait, but not torchrun
done
# torchrun's own status is 1, whatever that of its ranks.
[[ $status == 0 || -z $asked ]] || status=75
exit "$status"
