# What a site adds by variables: SETUP, PYTHON, SRUN_ARGS, CONTAINER, CONTAINER_MOUNTS and
# CONTAINER_RUNTIME of docs/slurm.md. Batch scripts and node.sh source it.
# shellcheck shell=bash
# shellcheck disable=SC2034 # read by who sources this

say() { echo "$(date '+%F %T') $*"; }
fail() {
  echo "error: $*" >&2
  exit 2
}

# A file or a line of shell, run in this shell: modules, conda, variables of NCCL.
set_up() {
  [[ -n ${SETUP:-} ]] || return 0
  local options=$- status=0
  set +eu # modules and conda are written for neither
  if [[ -f $SETUP ]]; then
    # shellcheck disable=SC1090
    source "$SETUP"
  else
    eval "$SETUP"
  fi || status=$?
  [[ $options != *e* ]] || set -e
  [[ $options != *u* ]] || set -u
  ((status == 0)) ||
    fail "SETUP=$SETUP ended with status $status: correct the line, or give a file of shell that exists."
}

# Sets container_options, which srun needs (pyxis), or container_command, which stands before a
# command (apptainer). Both see the folders that are given, and CONTAINER_MOUNTS.
choose_container() {
  container_options=()
  container_command=()
  local image=${CONTAINER:-} runtime=${CONTAINER_RUNTIME:-} mounts name
  if [[ -z $image ]]; then
    for name in CONTAINER_MOUNTS CONTAINER_RUNTIME; do
      [[ -z ${!name:-} ]] || fail "$name=${!name} needs an image: set CONTAINER, or leave it out."
    done
    return 0
  fi
  [[ -n $runtime ]] || { [[ $image == *.sif ]] && runtime=apptainer || runtime=pyxis; }
  mounts=$(for name in "$@"; do [[ -z $name ]] || echo "$name:$name"; done | sort -u | paste -sd,)
  mounts+=${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}
  case $runtime in
    pyxis)
      container_options=(--container-image="$image" --container-mounts="$mounts"
        --container-workdir="$PWD")
      ;;
    apptainer | singularity)
      [[ $image != *.sif || -f $image ]] ||
        fail "CONTAINER=$image does not exist: build it, see tools/containers, or correct the path."
      container_command=("$runtime" exec --nv --bind "$mounts" --pwd "$PWD" "$image")
      ;;
    *)
      fail "CONTAINER_RUNTIME=$runtime is none of pyxis, apptainer and singularity: choose one."
      ;;
  esac
}

# Before anything starts: is there what would start the container?
check_container() {
  if ((${#container_options[@]})); then
    grep -q -e --container-image <<<"$(srun --help 2>&1)" ||
      fail "CONTAINER=$CONTAINER needs pyxis, and srun has no option --container-image here: give a" \
        ".sif file or CONTAINER_RUNTIME=apptainer, or leave CONTAINER out."
  elif ((${#container_command[@]})); then
    command -v "${container_command[0]}" >/dev/null ||
      fail "CONTAINER=$CONTAINER needs ${container_command[0]}, which is not on PATH: load it by" \
        "SETUP, or choose CONTAINER_RUNTIME=pyxis."
  fi
}

# Sets python: PYTHON, or that of the image, or that of the folder which is given.
choose_python() {
  if [[ -n ${CONTAINER:-} ]]; then
    python=${PYTHON:-python3} # looked up in the image
    return 0
  fi
  python=${PYTHON:-$1/.venv/bin/python}
  command -v "$python" >/dev/null || if [[ -n ${PYTHON:-} ]]; then
    fail "PYTHON=$PYTHON is no program on this node: give a path that all nodes see, or a name that" \
      "SETUP brings onto PATH."
  else
    fail "$python is not there: run make setup in $1, which has to lie on a disk that all nodes" \
      "see, or name another interpreter by PYTHON."
  fi
}
