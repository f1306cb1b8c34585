from __future__ import annotations

import json
import math
import platform
import socket

import pytest
import torch
from commands import NUM_STEPS, SEQ_LENGTH, VOCAB_SIZE, pretrain, run, run_all, torchrun
from threads import TEST_THREADS

from megatron_mdm.checkpoint.manifest import read_manifest
from megatron_mdm.checkpoint.storage import CheckpointReader, find_latest_checkpoint
from megatron_mdm.config import load_config, parse_config
from megatron_mdm.reporting.metrics import read_metrics

LOSS, GRAD_NORM, LR = "train/loss_nats_per_token", "train/grad_norm", "train/lr"
NLL, NLL_ERROR = "valid/nll_nats_per_token", "valid/nll_standard_error"
PROGRESS = {"step", "consumed_samples", "consumed_tokens", "epoch"}
HALF = NUM_STEPS // 2

# Kills the process while it saves for the second time: tensors are written, the manifest is not.
KILLED_WHILE_SAVING = f"""
import os, runpy, signal, sys
from megatron_mdm.checkpoint import publishing

write = publishing.write_text_whole

def killing(path, text):
    if path.name == publishing.MANIFEST and "{NUM_STEPS:08d}" in path.parent.name:
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, text)

publishing.write_text_whole = killing
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""

# One rank reaches the error seconds after the others, as when it alone scans the shards.
LATE_RANK = """
import os, runpy, sys, time
if os.environ["RANK"] == "{rank}":
    time.sleep(3)
sys.path.insert(0, os.getcwd())
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""

DRY_RUN = """
import runpy, sys, torch.distributed
del sys.argv[0]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("process group:", torch.distributed.is_initialized())
"""


def steps_of(run_dir):
    return {
        entry["step"]: entry for entry in read_metrics(run_dir / "metrics.jsonl") if LOSS in entry
    }


def validations_of(run_dir):
    return {
        entry["step"]: entry for entry in read_metrics(run_dir / "metrics.jsonl") if NLL in entry
    }


def curve(run_dir, *names):
    return {step: [entry[name] for name in names] for step, entry in steps_of(run_dir).items()}


def assert_same_run(run_dir, other):
    """Bit for bit: curves, validation, and all that the last checkpoint holds."""
    assert curve(run_dir, LOSS, GRAD_NORM, LR) == curve(other, LOSS, GRAD_NORM, LR)
    assert validations_of(run_dir) == validations_of(other)
    found, expected = (
        find_latest_checkpoint(folder / "checkpoints") for folder in (run_dir, other)
    )
    assert found.name == expected.name == f"step_{NUM_STEPS:08d}"
    left = CheckpointReader(found)
    right = CheckpointReader(expected)
    assert left.manifest.environment == right.manifest.environment
    assert left.list_names() == right.list_names()
    for name in right.list_names():
        for kind in right.manifest.stored_kinds:
            assert torch.equal(left.load(name, kind), right.load(name, kind)), (name, kind)


def assert_close_run(run_dir, other):
    """To float32 rounding, as the order of sums depends on the layout."""
    for step, expected in steps_of(other).items():
        found = steps_of(run_dir)[step]
        assert found[LOSS] == pytest.approx(expected[LOSS], abs=1e-5)
        assert found[GRAD_NORM] == pytest.approx(expected[GRAD_NORM], rel=1e-4)
        assert found[LR] == expected[LR]
    for step, expected in validations_of(other).items():
        assert validations_of(run_dir)[step][NLL] == pytest.approx(expected[NLL], abs=1e-5)
    found = CheckpointReader(find_latest_checkpoint(run_dir / "checkpoints"))
    expected = CheckpointReader(find_latest_checkpoint(other / "checkpoints"))
    assert found.list_names() == expected.list_names()
    for name in expected.list_names():
        difference = (found.load(name) - expected.load(name)).abs().max().item()
        assert difference < 1e-4, name


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("kind", ["mdm", "ar"])
def test_metrics_hold_every_step_once_with_all_that_a_report_needs(whole_runs, kind):
    records = read_metrics(whole_runs[kind].dir / "metrics.jsonl")
    training = [entry for entry in records if LOSS in entry]
    assert [entry["step"] for entry in training] == list(range(1, NUM_STEPS + 1))
    required = PROGRESS | {LOSS, GRAD_NORM, LR, "perf/tokens_per_second"}
    for entry in training:
        assert required <= entry.keys()
        assert entry["consumed_samples"] == 8 * entry["step"]
        assert entry["consumed_tokens"] == 8 * SEQ_LENGTH * entry["step"]
        assert all(math.isfinite(entry[name]) for name in required)
    validations = [entry for entry in records if NLL in entry]
    assert [entry["step"] for entry in validations] == [HALF, NUM_STEPS]
    for entry in validations:
        assert PROGRESS | {NLL, NLL_ERROR} <= entry.keys()
        assert 0 < entry[NLL_ERROR] < entry[NLL]
    assert len(records) == len(training) + len(validations)


@pytest.mark.parametrize("kind", ["mdm", "ar"])
def test_training_lowers_the_loss_from_that_of_a_uniform_guess(whole_runs, kind):
    values = [entry[NLL] for entry in validations_of(whole_runs[kind].dir).values()]
    assert values[1] < values[0]
    assert values[1] < math.log(VOCAB_SIZE)


def test_the_learning_rate_warms_up_and_ends_at_min_lr(whole_runs):
    rates = [value for (value,) in curve(whole_runs["mdm"].dir, LR).values()]
    assert rates[:2] == pytest.approx([1.5e-3, 3e-3])
    assert rates[-1] == pytest.approx(3e-4)
    # The third step of six on a cosine: halfway.
    assert rates[4] == pytest.approx((3e-3 + 3e-4) / 2)


def test_engines_say_nothing_of_each_layer(whole_runs):
    for whole in whole_runs.values():
        assert "Unknown MLP type" not in whole.result.output + whole.result.errors


def test_a_run_writes_its_resolved_config(whole_runs):
    run_dir = whole_runs["mdm"].dir
    expected = load_config(whole_runs["mdm"].recipe, [f"run.dir={run_dir}"])
    assert load_config(run_dir / "config.yaml") == expected
    reader = CheckpointReader(find_latest_checkpoint(run_dir / "checkpoints"))
    assert parse_config(reader.manifest.config) == expected


def test_wandb_and_tensorboard_get_files_of_their_own(whole_runs):
    run_dir = whole_runs["ar"].dir
    assert len(list(run_dir.glob("wandb/offline-run-*/*.wandb"))) == 1
    (events,) = run_dir.glob("tensorboard/events.out.tfevents.*")
    assert events.stat().st_size > 1000
    assert not (whole_runs["mdm"].dir / "wandb").exists()
    assert not (whole_runs["mdm"].dir / "tensorboard").exists()


@pytest.fixture(scope="module")
def stopped_runs(whole_runs, tmp_path_factory):
    """Folder and result of both runs, stopped on the way and started again."""
    root = tmp_path_factory.mktemp("stopped")
    mdm, ar = whole_runs["mdm"], whole_runs["ar"]
    ar.stopped_at_half(root / "ar")
    killed, ar_result = run_all(
        ["-c", KILLED_WHILE_SAVING, *mdm.command(root / "mdm")], ar.command(root / "ar")
    )
    assert killed.status == -9
    checkpoints = root / "mdm" / "checkpoints"
    assert find_latest_checkpoint(checkpoints).name == f"step_{HALF:08d}"
    assert not (checkpoints / f"step_{NUM_STEPS:08d}").exists()
    (mdm_result,) = run_all(mdm.command(root / "mdm"))
    return {"mdm": (root / "mdm", mdm_result), "ar": (root / "ar", ar_result)}


def test_a_run_killed_while_saving_goes_on_bit_for_bit(whole_runs, stopped_runs):
    run_dir, result = stopped_runs["mdm"]
    checkpoints = run_dir / "checkpoints"
    assert f"resuming from {checkpoints}/step_{HALF:08d}" in result.succeeded().output
    assert_same_run(run_dir, whole_runs["mdm"].dir)
    assert len(read_metrics(run_dir / "metrics.jsonl")) == NUM_STEPS + 2
    assert not list(checkpoints.glob(".*"))


def test_dropout_goes_on_bit_for_bit_in_the_same_layout(whole_runs, stopped_runs):
    run_dir, result = stopped_runs["ar"]
    result.succeeded()
    assert_same_run(run_dir, whole_runs["ar"].dir)


def test_a_run_that_goes_on_with_other_threads_says_so_in_one_line(whole_runs, tmp_path):
    whole = whole_runs["mdm"]
    run_dir = whole.stopped_at_half(tmp_path / "stopped")
    (result,) = run_all(whole.command(run_dir, f"run.num_threads={TEST_THREADS + 1}"))
    (line,) = [one for one in result.succeeded().output.splitlines() if "conditions" in one]
    assert line == (
        f"other conditions than those of step_{HALF:08d}: threads {TEST_THREADS} -> "
        f"{TEST_THREADS + 1}; the run goes on, equal to an uninterrupted one to rounding, but not "
        "bit for bit"
    )
    assert_close_run(run_dir, whole.dir)
    info = json.loads((run_dir / "run_info.json").read_text())
    environment = read_manifest(find_latest_checkpoint(run_dir / "checkpoints")).environment
    assert info["threads"] == environment.threads == [TEST_THREADS + 1]
    assert info["processors"] == environment.processors
    assert info["versions"]["python"] == platform.python_version()


def test_tensor_and_pipeline_ranks_go_on_from_a_checkpoint_of_one_process(whole_runs, tmp_path):
    whole = whole_runs["mdm"]
    run_dir = whole.stopped_at_half(tmp_path / "stopped")
    layout = ["tensor_model_parallel_size=2", "pipeline_model_parallel_size=2"]
    command = whole.command(run_dir, *(f"parallel.{size}" for size in layout))
    result = torchrun(4, *command).succeeded()
    assert result.output.count("resuming from") == 1
    assert_close_run(run_dir, whole.dir)
    assert len(read_metrics(run_dir / "metrics.jsonl")) == NUM_STEPS + 2


def test_zero_3_under_the_deepspeed_launcher_goes_on_from_a_checkpoint_of_one_process(
    whole_runs, tmp_path
):
    whole = whole_runs["mdm"]
    run_dir = whole.stopped_at_half(tmp_path / "stopped")
    # Without GPUs the launcher counts NUMA nodes, and lets --num_gpus overrule the count.
    launcher = ["-m", "deepspeed.launcher.runner", "--num_gpus", "2"]
    launcher += ["--master_addr", "127.0.0.1", "--master_port", free_port()]
    result = run(*launcher, *whole.command(run_dir, "parallel.zero_stage=3")).succeeded()
    assert result.output.count("resuming from") == 1
    assert "2 x cpu" in result.output
    assert_close_run(run_dir, whole.dir)


def test_a_finished_run_says_so_and_a_dry_run_starts_nothing(whole_runs, recipe, tmp_path):
    whole = whole_runs["mdm"]
    kept = {file: file.stat().st_mtime_ns for file in whole.dir.rglob("*")}
    dry = pretrain(recipe, tmp_path / "nowhere" / "run", "--dry-run", "--full")
    again, described = run_all(whole.command(whole.dir), ["-c", DRY_RUN, *dry])

    assert f"already finished at step {NUM_STEPS}: nothing to do" in again.succeeded().output
    assert {file: file.stat().st_mtime_ns for file in whole.dir.rglob("*")} == kept

    output = described.succeeded().output
    assert "process group: False" in output
    assert not (tmp_path / "nowhere").exists()
    facts = dict(line.rsplit(maxsplit=1) for line in output.splitlines() if line[40:44] == "    ")
    width, ffn = 32, 64
    weights = 2 * (4 * width**2 + 3 * width * ffn + 2 * width) + width
    assert facts["parameters_without_embeddings"] == f"{weights:,}"
    total = weights + (VOCAB_SIZE + 1 + VOCAB_SIZE) * width
    assert facts["parameters_with_embeddings"] == f"{total:,}"
    assert facts["tokens_per_step"] == f"{8 * SEQ_LENGTH:,}"
    assert facts["num_steps"] == str(NUM_STEPS)
    # A fifth of the samples is cut to a length of U{1..32}, 16.5 in the mean.
    mean_length = 0.8 * SEQ_LENGTH + 0.2 * 16.5
    assert float(facts["flops_6nd"]) == pytest.approx(
        6 * weights * NUM_STEPS * 8 * mean_length, rel=1e-4
    )
    assert "flops_exact" in facts
    assert "estimated total per rank" in output


def test_bad_input_is_one_line_and_status_2(recipe, tmp_path):
    commands = [
        pretrain(recipe, tmp_path / "run", "optimizer.learning_rate=1e-3"),
        pretrain(
            recipe,
            tmp_path / "run",
            "parallel.zero_stage=3",
            "parallel.pipeline_model_parallel_size=2",
        ),
        pretrain(recipe, tmp_path / "run", f"data.train=[{{path: {tmp_path}/absent}}]"),
    ]
    messages = [
        "optimizer.learning_rate is not a known key",
        "parallel.zero_stage=3 does not work with parallel.pipeline_model_parallel_size=2",
        f"{tmp_path}/absent.idx does not exist",
    ]
    for result, message in zip(run_all(*commands), messages, strict=True):
        assert result.status == 2
        # Two stages do not divide the one process either, which is a line of its own.
        line = result.error_lines[0]
        assert message in line
        assert line.endswith((".", "?"))
        assert "Traceback" not in result.errors + result.output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("late_rank", "override", "message"),
    [
        (1, "batch.global_batch_size=6", "batch.global_batch_size=6 is not a multiple of "),
        (0, "batch.globl_batch_size=6", "batch.globl_batch_size is not a known key"),
    ],
)
def test_under_torchrun_an_error_is_printed_once_whichever_rank_is_late(
    recipe, tmp_path, late_rank, override, message
):
    script = tmp_path / "late.py"
    script.write_text(LATE_RANK.format(rank=late_rank))
    result = torchrun(2, script, *pretrain(recipe, tmp_path / "run", override))
    assert result.status != 0
    (line,) = result.error_lines
    assert message in line
    assert not (tmp_path / "run").exists()
