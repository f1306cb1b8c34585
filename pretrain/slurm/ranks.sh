#!/usr/bin/env bash
# The ranks of one node under torchrun, and whether their end was asked for.
#   ranks.sh PYTHON PROCESSES SCRIPT [ARGUMENT ...]
# SLURM signals every process of a step, so ranks hear SIGUSR1 and SIGTERM without help. torchrun
# must not hear them: it would die of the one, and of the other kill the ranks while they save.
set -uo pipefail

repository=${BASH_SOURCE[0]%/pretrain/slurm/*}
python=$1
processes=$2
shift 2

asked=
trap 'asked=yes interrupted=yes' USR1 TERM
# Of the step, so that steps and jobs which share a node do not meet each other.
meeting_point=$("$python" "$repository/megatron_mdm/core/launcher.py") || exit 2
read -r address port <<<"$meeting_point"
(
  trap '' USR1 TERM # ignored also after exec; a rank sets handlers of its own
  exec "$python" "$repository/pretrain/slurm/torchrun.py" --signals_to_handle=SIGINT \
    --nnodes="$SLURM_STEP_NUM_NODES" --node_rank="$SLURM_NODEID" --nproc_per_node="$processes" \
    --master_addr="$address" --master_port="$port" "$@"
) &
launcher=$!
interrupted=yes
while [[ -n $interrupted ]]; do
  interrupted=
  wait "$launcher" && status=0 || status=$? # a signal ends wait, but not torchrun
done
# Of ranks that end one after the other, the first may have been killed.
[[ $status == 0 || -z $asked ]] || status=75
exit "$status"
