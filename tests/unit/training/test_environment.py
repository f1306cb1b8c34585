"""What a resume finds changed: one line that names it, and nothing where nothing is."""

from __future__ import annotations

import os
import platform
from dataclasses import replace

import pytest
import torch
from plan_examples import plan_of, write_checkpoint

from megatron_mdm.checkpoint.manifest import SavedEnvironment, format_manifest, read_manifest
from megatron_mdm.training import environment
from megatron_mdm.training.environment import (
    count_threads,
    describe_processor,
    list_versions,
    tell_other_conditions,
)

CPU = torch.device("cpu")
ONE_THREAD = SavedEnvironment(threads=[1], processors=["A, AVX2"])
ROUNDING = "; the run goes on, equal to an uninterrupted one to rounding, but not bit for bit"


def told(tree, saved, now=ONE_THREAD, **sections) -> str:
    """What is told when a run with these sections goes on from a checkpoint with these fields."""
    path = write_checkpoint(tree)
    manifest = read_manifest(path).model_copy(update=saved)
    (path / "manifest.json").write_text(format_manifest(manifest))
    return tell_other_conditions(replace(plan_of(tree, **sections), environment=now))


def saved_by(**changes):
    return {"environment": ONE_THREAD, "versions": list_versions()} | changes


def test_under_the_same_conditions_nothing_is_told(tree):
    assert told(tree, saved_by()) == ""


@pytest.mark.parametrize(
    ("saved", "now", "change"),
    [
        ({}, {"threads": [2]}, "threads 1 -> 2"),
        ({"threads": [1, 2]}, {}, "threads 1 and 2 -> 1"),
        ({}, {"processors": ["A, AVX2", "B"]}, "processor A, AVX2 -> A, AVX2 and B"),
    ],
)
def test_other_threads_and_processors_are_told_in_one_line(tree, saved, now, change):
    before = saved_by(environment=ONE_THREAD.model_copy(update=saved))
    line = told(tree, before, ONE_THREAD.model_copy(update=now))
    assert line == f"other conditions than those of step_00000003: {change}{ROUNDING}"


def test_other_versions_are_told_with_all_else(tree):
    versions = list_versions()
    now = ONE_THREAD.model_copy(update={"threads": [4]})
    line = told(tree, saved_by(versions=versions | {"torch": "2.0", "python": "3.1"}), now)
    changes = f"python 3.1 -> {versions['python']}, torch 2.0 -> {versions['torch']}"
    assert (
        line == f"other conditions than those of step_00000003: threads 1 -> 4, {changes}{ROUNDING}"
    )


def test_a_checkpoint_from_before_the_record_says_what_it_can(tree):
    versions = list_versions()
    del versions["python"]
    other = SavedEnvironment(threads=[9], processors=["other"])
    assert told(tree, {"environment": None, "versions": versions}, other) == ""


@pytest.mark.parametrize(
    ("sections", "change"),
    [
        ({"batch": {"micro_batch_size": 1}}, "batch.micro_batch_size 2 -> 1"),
        ({"parallel": {"zero_stage": 2}}, "parallel.zero_stage 1 -> 2"),
        ({"parallel": {"recompute": "full"}}, "parallel.recompute none -> full"),
    ],
)
def test_another_layout_is_told(tree, sections, change):
    line = told(tree, saved_by(), **sections)
    assert line == f"other conditions than those of step_00000003: {change}{ROUNDING}"


@pytest.mark.parametrize("dropout", ["hidden_dropout", "attention_dropout"])
def test_with_dropout_another_layout_draws_other_masks_and_other_threads_do_not(tree, dropout):
    tree["model"][dropout] = 0.1
    other_masks = "dropout draws other masks under another layout"
    assert told(tree, saved_by(), batch={"micro_batch_size": 1}).endswith(other_masks)
    tree["run"]["dir"] += "-of-other-threads"
    now = ONE_THREAD.model_copy(update={"threads": [2]})
    assert told(tree, saved_by(), now).endswith(ROUNDING)
    tree["run"]["dir"] += "-and-zero-stage"
    assert told(tree, saved_by(), parallel={"zero_stage": 2}).endswith(ROUNDING)


def test_on_a_gpu_threads_do_not_count(tree):
    path = write_checkpoint(tree)
    manifest = read_manifest(path).model_copy(update=saved_by())
    (path / "manifest.json").write_text(format_manifest(manifest))
    now = ONE_THREAD.model_copy(update={"threads": [8]})
    plan = replace(plan_of(tree), device=torch.device("cuda", 0), environment=now)
    assert tell_other_conditions(plan) == ""


X86 = """\
processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 25
model\t\t: 1
model name\t: AMD EPYC

processor\t: 1
model name\t: another
"""
ARM = "processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: 0xd40\n"


@pytest.mark.parametrize(
    ("cpuinfo", "name"),
    [
        (X86, "AMD EPYC (AuthenticAMD, family 25, model 1)"),
        (ARM, "noname (implementer 0x41, part 0xd40)"),
        (None, "noname"),
    ],
)
def test_a_processor_is_named_by_its_kind(tmp_path, monkeypatch, cpuinfo, name):
    file = tmp_path / "cpuinfo"
    if cpuinfo is not None:
        file.write_text(cpuinfo)
    monkeypatch.setattr(environment, "_CPUINFO", file)
    monkeypatch.setattr(platform, "processor", lambda: "noname")
    assert describe_processor(CPU) == f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def test_a_gpu_is_named_by_its_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    assert describe_processor(torch.device("cuda", 1)) == "GPU 1"


@pytest.mark.parametrize(
    ("others", "threads"),
    [
        ([], 6),
        ([("here", range(6))], 3),
        ([("here", range(6))] * 7, 1),
        # Bound to cores of their own, or on other machines, they take nothing away.
        ([("here", range(6, 12)), ("there", range(6))], 6),
        ([("here", range(5, 12))], 3),
    ],
)
def test_ranks_of_a_machine_share_the_cores_that_they_may_use(monkeypatch, others, threads):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(6)), raising=False)
    monkeypatch.setattr("socket.gethostname", lambda: "here")

    def gather(mine):
        return [mine, *((host, set(cores)) for host, cores in others)]

    monkeypatch.setattr(environment, "gather", gather)
    assert count_threads() == threads


def test_versions_are_those_of_python_and_of_what_computes():
    assert list_versions().keys() == {
        *("python", "megatron_mdm", "torch", "deepspeed", "megatron-core", "numpy")
    }
    assert list_versions()["python"] == platform.python_version()
