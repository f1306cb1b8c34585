#!/usr/bin/env bash
# A task of pretrain.sbatch on its node: SETUP, then the command, in the container if there is one.
#   node.sh COMMAND [ARGUMENT ...]
set -uo pipefail

repository=${BASH_SOURCE[0]%/pretrain/slurm/*}
source "$repository/pretrain/slurm/hooks.sh"
set_up
choose_container "$repository" "$PWD"
# Tasks of pyxis start in the container; they have no command before theirs.
exec "${container_command[@]}" "$@"
