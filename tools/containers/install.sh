#!/usr/bin/env bash
# What both recipes of containers install: PyTorch from an index, then the package with the versions
# that were tested together.
#   install.sh PYTHON [INDEX [OPTION OF PIP ...]]
# INDEX: such as https://download.pytorch.org/whl/cu126; without it PyTorch is the registry's.
set -euo pipefail

cd "${BASH_SOURCE[0]%/*}/../.."
python=$1
index=(${2:+--index-url "$2"})
options=(--no-cache-dir "${@:3}")
"$python" -m pip install "${options[@]}" "${index[@]}" "$(grep '^torch==' requirements.txt)"
"$python" -m pip install "${options[@]}" --constraint constraints.txt .
