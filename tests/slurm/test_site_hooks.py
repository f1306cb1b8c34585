"""What a site adds by variables, and scripts that do not train, on a real SLURM of two nodes.

Neither apptainer nor pyxis is here: programs stand in for them that note how they were called and
run what they were given, without a container.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from jobs import LAYOUT, QUIET, curve, log_of, submit, wait_for, wait_for_steps
from random_checkpoints import RandomSource, save_word_tokenizer, tiny_model
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_mdm.checkpoint.weights import write_weights_checkpoint
from megatron_mdm.hf.export import export_to_hf

REPO = Path(__file__).resolve().parents[2]
# As apptainer does without a terminal, it hands signals on to what it runs.
APPTAINER = """\
echo "$*" >> {folder}/calls
until [[ $1 == *.sif ]]; do shift; done
"${{@:2}}" &
trap 'kill -USR1 $!; again=yes' USR1
trap 'kill -TERM $!; again=yes' TERM
again=yes
while [[ -n $again ]]; do again=; wait $! && status=0 || status=$?; done
exit $status
"""
PYXIS = """\
[[ $1 != --help ]] || {{ echo "  --container-image=IMAGE [pyxis]"; exit 0; }}
words=()
for word; do
  if [[ $word == --container-* ]]; then echo "$word" >> {folder}/calls; else words+=("$word"); fi
done
exec {srun} "${{words[@]}}"
"""


def write_program(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/bash\n{text}")
    path.chmod(0o755)


def finish(cluster, job: str, folder: Path) -> str:
    """The first node's log of a job that completes."""
    state = wait_for(cluster, job, "COMPLETED", "FAILED")
    assert state == "COMPLETED", log_of(folder, job) + log_of(folder, job, "-node0")
    return log_of(folder, job, "-node0")


@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
def test_setup_interpreter_and_options_of_srun(launcher, cluster, recipe, tmp_path):
    program = (
        f'echo "$FROM_SETUP $SLURM_NODEID $*" >> {tmp_path}/calls; exec {sys.executable} "$@"\n'
    )
    write_program(tmp_path / "bin/site-python", program)
    # It fails in a shell that does not allow unset variables, as some sites' files do.
    setup = f"echo $UNSET; export FROM_SETUP=yes PATH={tmp_path}/bin:$PATH\n"
    (tmp_path / "setup.sh").write_text(setup)
    job = submit(
        *(cluster, recipe, tmp_path / "run", *LAYOUT, "schedule.steps=2"),
        LAUNCHER=launcher,
        SETUP=str(tmp_path / "setup.sh"),
        PYTHON="site-python",
        SRUN_ARGS="--label --immediate=60",
    )
    log = finish(cluster, job, tmp_path / "run")
    assert all(line.startswith("0: ") for line in log.splitlines() if "step" in line)
    assert len(curve(tmp_path / "run")) == 2
    calls = (tmp_path / "calls").read_text().splitlines()
    assert {call.split()[0] for call in calls} == {"yes"}
    assert calls[0].endswith("--dry-run")
    assert {call.split()[1] for call in calls[1:]} == {"0", "1"}


def test_apptainer_wraps_each_node_and_its_ranks_save(whole, cluster, recipe, tmp_path):
    write_program(tmp_path / "bin/apptainer", APPTAINER.format(folder=tmp_path))
    (tmp_path / "image.sif").touch()
    folder = tmp_path / "run"
    job = submit(
        *(cluster, recipe, folder, *LAYOUT),
        SETUP=f"PATH={tmp_path}/bin:$PATH",
        PYTHON=sys.executable,
        CONTAINER=str(tmp_path / "image.sif"),
        CONTAINER_MOUNTS="/data:/data:ro",
    )
    wait_for_steps(folder, 2)
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    wait_for(cluster, job, "PENDING")
    assert "resuming from " in finish(cluster, job, folder)
    assert curve(folder) == curve(whole[0])
    calls = (tmp_path / "calls").read_text().splitlines()
    start = f"exec --nv --bind {REPO}:{REPO},/data:/data:ro --pwd {REPO} {tmp_path}/image.sif "
    # Of each start: the check, and a torchrun on each node.
    assert [call.startswith(start) for call in calls] == [True] * 6
    ends = [call.removeprefix(start).split()[0] for call in calls]
    assert ends == [sys.executable, *[f"{REPO}/pretrain/slurm/ranks.sh"] * 2] * 2


def test_pyxis_gets_its_options_for_the_check_and_the_ranks(cluster, recipe, tmp_path):
    text = PYXIS.format(folder=tmp_path, srun=shutil.which("srun"))
    write_program(tmp_path / "bin/srun", text)
    job = submit(
        *(cluster, recipe, tmp_path / "run", *LAYOUT, "schedule.steps=2"),
        LAUNCHER="srun",
        SETUP=f"PATH={tmp_path}/bin:$PATH",
        PYTHON=sys.executable,
        CONTAINER="registry#image:1",
    )
    finish(cluster, job, tmp_path / "run")
    assert len(curve(tmp_path / "run")) == 2
    options = [
        "--container-image=registry#image:1",
        f"--container-mounts={REPO}:{REPO}",
        f"--container-workdir={REPO}",
    ]
    assert (tmp_path / "calls").read_text().splitlines() == options * 2


def submit_script(cluster, folder: Path, script: str, *words: object) -> str:
    return cluster.run(
        *("sbatch", "--parsable", "--nodes=2", f"--output={folder}/job-%j.log"),
        *("pretrain/slurm/pretrain.sbatch", *words),
        SCRIPT=script,
        PROCESSES_PER_NODE="2",
        NODE_LOG=f"{folder}/job-%j-node%n.log",
        **QUIET,
    )


def run_alone(script: str, *words: object) -> str:
    command = [sys.executable, script, *map(str, words)]
    done = subprocess.run(command, cwd=REPO, env=os.environ | QUIET, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_evaluation_on_two_nodes(cluster, tmp_path):
    save_word_tokenizer(tmp_path / "tokenizer")
    saved = tiny_model()
    options = {"tokenizer_dir": tmp_path / "tokenizer", "eos_token_id": 0, "metadata": {}}
    export_to_hf(RandomSource(saved), saved, tmp_path / "model", **options)
    documents = [
        {"question": f"w{n} w5", "choices": ["w3", "w4 w6"], "answer": 0} for n in range(9)
    ]
    (tmp_path / "documents.json").write_text(json.dumps(documents))
    task = {
        "task": "local",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "documents.json")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/local.yaml").write_text(yaml.safe_dump(task))
    words = ("--model", tmp_path / "model", "--include-path", tmp_path / "tasks", "--tasks")
    words = (*words, "local", "--draws", 4, "--out")
    job = submit_script(cluster, tmp_path, "tools/evaluate.py", *words, tmp_path / "two")
    run_alone("tools/evaluate.py", *words, tmp_path / "one")
    finish(cluster, job, tmp_path / "run")
    found, expected = (
        json.loads((tmp_path / name / "results.json").read_text())["tasks"]["local"]
        for name in ("two", "one")
    )
    assert found["num_documents"] == {"local": {"original": 9, "effective": 9}}
    assert found["results"]["local"]["acc,none"] == expected["results"]["local"]["acc,none"]


def test_a_generation_on_two_nodes_and_its_error(cluster, tmp_path):
    saved = tiny_model()
    source = RandomSource(saved)
    shapes = {name: tensor.shape for name, tensor in source.tensors.items()}
    write_weights_checkpoint(source, shapes, tmp_path / "weights", **saved._asdict())
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(18)}, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([end := AddedToken("<end>", special=True)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end)
    fast.save_pretrained(tmp_path / "tokenizer")
    words = ["--checkpoint", tmp_path / "weights", "--tokenizer", tmp_path / "tokenizer"]
    words += ["--prompt", "w3 w4", "--length", 5, "--steps", 2, "--jsonl"]
    layout = ["--tensor-parallel", 2, "--pipeline-parallel", 2]
    # Without a value: the tool's own sentence.
    wrong = submit_script(cluster, tmp_path, "tools/generate.py", *words, "--length")
    job = submit_script(cluster, tmp_path, "tools/generate.py", *words, *layout)
    (expected,) = run_alone("tools/generate.py", *words).splitlines()
    # The last stage has the text, and prints it.
    log = finish(cluster, job, tmp_path / "run") + log_of(tmp_path / "run", job, "-node1")
    (line,) = [line for line in log.splitlines() if line.startswith("{")]
    assert json.loads(line)["ids"] == json.loads(expected)["ids"]
    assert wait_for(cluster, wrong, "COMPLETED", "FAILED") == "FAILED"
    assert "the logs of the nodes say why" in log_of(tmp_path / "run", wrong)
    assert "error: --length " in log_of(tmp_path / "run", wrong, "-node0")


def test_what_does_not_fit_is_one_sentence_before_the_start(cluster, recipe, tmp_path):
    image = tmp_path / "image.sif"
    image.touch()
    cases = [
        ({"SETUP": "false"}, "SETUP=false ended with status 1: "),
        ({"SETUP": "/nowhere.sh"}, "SETUP=/nowhere.sh ended with status 127: "),
        ({"PYTHON": "/nowhere/python"}, "PYTHON=/nowhere/python is no program on this node: "),
        ({"CONTAINER_MOUNTS": "/data"}, "CONTAINER_MOUNTS=/data needs an image: set CONTAINER"),
        ({"CONTAINER": "none.sif"}, "CONTAINER=none.sif does not exist: "),
        ({"CONTAINER": str(image)}, f"CONTAINER={image} needs apptainer, which is not on PATH: "),
        ({"CONTAINER": "ubuntu"}, "CONTAINER=ubuntu needs pyxis, and srun has no option "),
        (
            {"CONTAINER": "ubuntu", "CONTAINER_RUNTIME": "podman"},
            "CONTAINER_RUNTIME=podman is none of pyxis, apptainer and singularity: choose one.",
        ),
        ({"SCRIPT": "tools/none.py"}, "SCRIPT=tools/none.py is neither a file of "),
    ]
    jobs = [submit(cluster, recipe, tmp_path / "run", **variables) for variables, _ in cases]
    for job, (_, sentence) in zip(jobs, cases, strict=True):
        assert wait_for(cluster, job, "COMPLETED", "FAILED") == "FAILED"
        assert cluster.field(job, "ExitCode") == "2:0"
        lines = log_of(tmp_path / "run", job).splitlines()
        assert lines[-1].startswith(f"error: {sentence}")
        # Bash's own word about a file that is not there.
        assert len(lines) == (2 if "/nowhere.sh" in sentence else 1)
