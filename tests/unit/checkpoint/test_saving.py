from __future__ import annotations

import os
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_mdm.checkpoint import publishing, streaming
from megatron_mdm.checkpoint.discovery import find_checkpoint, verify_checkpoint
from megatron_mdm.checkpoint.manifest import FORMAT_VERSION, CheckpointManifest
from megatron_mdm.checkpoint.rank_files import PlannedTensor, RankFiles, SavedTensor
from megatron_mdm.checkpoint.restoring import load_optimizer, load_weights
from megatron_mdm.checkpoint.saving import CheckpointWriter
from megatron_mdm.checkpoint.storage import (
    CheckpointReader,
    find_latest_checkpoint,
    name_checkpoint,
)
from megatron_mdm.config import CheckpointConfig
from megatron_mdm.core.errors import CheckpointError
from megatron_mdm.distributed.mesh import Mesh
from megatron_mdm.model.shards import NamedShard

ALONE = Mesh(torch.device("cpu"))


class States:
    """Weights, and moments that are told apart from them."""

    zero_stage = 1
    names = ("exp_avg", "exp_avg_sq")

    def __init__(self, step=0.0):
        self.step = step
        self.by_role = {}

    def list_kinds(self, shard):
        return ("weight", *self.names)

    def get_numbers(self):
        return {"step": self.step}

    def get(self, parameter, kind):
        return parameter.detach() + {"weight": 0.0, "exp_avg": 1.0, "exp_avg_sq": 2.0}[kind]

    def set(self, parameter, kind, value):
        assert torch.equal(value, self.get(parameter, kind))

    def set_numbers(self, numbers):
        self.step = numbers["step"]


def shards(rows=12, width=64):
    generator = torch.Generator().manual_seed(1)
    name = "embedding.word_embeddings.weight"
    shape = (rows, width)
    weight = torch.nn.Parameter(torch.randn(shape, generator=generator))
    norm = torch.nn.Parameter(torch.ones(width))
    return [
        NamedShard(name, shape, weight, 0, 1, False),
        NamedShard("decoder.final_layernorm.weight", (width,), norm, 0, 1, False),
    ]


def writer(folder, max_file_bytes=2**30, **settings) -> CheckpointWriter:
    settings = CheckpointConfig(**settings)
    return CheckpointWriter(folder, settings, ALONE, max_file_bytes=max_file_bytes)


def manifest_of(step) -> CheckpointManifest:
    return CheckpointManifest(
        format_version=FORMAT_VERSION,
        step=step,
        consumed_samples=8 * step,
        config={},
        versions={},
        data_fingerprint="f",
    )


def save(folder, step, rows=12, **settings):
    with writer(folder, **settings) as saving_writer:
        saving_writer.save(manifest_of(step), shards=shards(rows), states=States())
    return folder / name_checkpoint(step)


def rank_files_for(folder, tensors) -> RankFiles:
    planned = [PlannedTensor(kind, name, tuple(value.shape)) for kind, name, value in tensors]
    return RankFiles(folder, planned, tensor_rank=0, pipeline_rank=0, data_rank=0)


@contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """A full disk, as far as this process can tell: writing beyond the limit fails."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_what_is_saved_is_read_back_and_becomes_the_latest(tmp_path):
    path = save(tmp_path, 3)
    assert find_latest_checkpoint(tmp_path) == path
    assert sorted(file.name for file in tmp_path.iterdir()) == ["latest", "step_00000003"]
    fresh = shards()
    for shard in fresh:
        torch.nn.init.zeros_(shard.parameter)
    reader = CheckpointReader(path)
    assert (reader.manifest.step, reader.manifest.consumed_samples) == (3, 24)
    load_weights(reader, fresh)
    for shard, expected in zip(fresh, shards(), strict=True):
        assert torch.equal(shard.parameter, expected.parameter)
        for kind, offset in (("exp_avg", 1.0), ("exp_avg_sq", 2.0)):
            assert torch.equal(reader.load(shard.name, kind), expected.parameter + offset)


@pytest.mark.parametrize("limit_bytes", [0, 200, 2000])
def test_a_full_disk_is_an_error_that_leaves_the_older_checkpoint_whole(tmp_path, limit_bytes):
    older = save(tmp_path, 3)
    # 0: nothing fits; 200: the manifest does not; 2000: the manifest fits, the tensors do not.
    with files_of_at_most(limit_bytes), pytest.raises(CheckpointError) as caught:
        save(tmp_path, 6, rows=64 if limit_bytes == 2000 else 12)
    message = str(caught.value)
    assert "\n" not in message
    assert f"{tmp_path / '.step_00000006.tmp'} cannot be written" in message
    assert message.endswith("free some space; older checkpoints are whole.")
    assert find_latest_checkpoint(tmp_path) == older
    assert sorted(file.name for file in tmp_path.iterdir()) == ["latest", "step_00000003"]
    reader = CheckpointReader(older)
    assert reader.manifest.step == 3


def test_a_disk_that_fills_with_the_manifest_is_an_error_too(tmp_path, monkeypatch):
    older = save(tmp_path, 3)

    def no_space(path, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(publishing, "write_text_whole", no_space)
    with pytest.raises(CheckpointError, match=r"cannot be written .*No space left on device"):
        save(tmp_path, 6)
    monkeypatch.undo()
    assert find_latest_checkpoint(tmp_path) == older
    reader = CheckpointReader(older)
    assert reader.manifest.step == 3


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written by rank 0"):
        save(tmp_path / "file" / "checkpoints", 3)


def test_what_a_killed_save_left_is_replaced(tmp_path):
    aside = tmp_path / ".step_00000003.tmp"
    aside.mkdir()
    (aside / "weights-tp7-pp0-dp0.safetensors").write_text("half")
    path = save(tmp_path, 3)
    reader = CheckpointReader(path)
    assert len(reader.manifest.files) == 2
    assert len(list(path.iterdir())) == 3


def test_a_step_saved_again_replaces_the_first_saving(tmp_path):
    save(tmp_path, 3)
    path = save(tmp_path, 3, rows=20)
    reader = CheckpointReader(path)
    assert reader.load("embedding.word_embeddings.weight").shape == (20, 64)


def test_what_the_optimizer_counts_goes_on(tmp_path):
    with writer(tmp_path) as saving_writer:
        saving_writer.save(manifest_of(9), shards=shards(), states=States(step=7.0))
    states = States()
    reader = CheckpointReader(tmp_path / name_checkpoint(9))
    load_optimizer(reader, shards(), states)
    assert states.step == 7.0


def test_the_states_of_another_optimizer_are_refused(tmp_path):
    path = save(tmp_path, 3)
    states = States()
    states.names = ("momentum_buffer",)
    reader = CheckpointReader(path)
    with pytest.raises(CheckpointError, match=r"exp_avg, exp_avg_sq.* keeps momentum_buffer: use"):
        load_optimizer(reader, shards(), states)


@pytest.mark.parametrize("rows", [8, 20])
def test_weights_of_a_larger_or_smaller_model_are_refused(tmp_path, rows):
    path = save(tmp_path, 3)
    expected = rf"another shape, \[12, 64\], than this model's \[{rows}, 64\]"
    reader = CheckpointReader(path)
    with pytest.raises(CheckpointError, match=expected):
        load_weights(reader, shards(rows=rows))


def all_bytes(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_the_background_writes_what_the_foreground_writes_bit_for_bit(tmp_path):
    plain = save(tmp_path / "plain", 3)
    background = save(tmp_path / "background", 3, background=True)
    assert all_bytes(background) == all_bytes(plain)


def test_training_may_change_the_weights_while_they_are_written(tmp_path, monkeypatch):
    may_write = threading.Event()
    write = RankFiles.write

    def late(self, tensors):
        may_write.wait(30)
        return write(self, tensors)

    monkeypatch.setattr(RankFiles, "write", late)
    theirs = shards()
    expected = [shard.parameter.detach().clone() for shard in theirs]
    published = []
    with writer(tmp_path, background=True) as background:
        background.save(
            manifest_of(3), shards=theirs, states=States(), on_published=published.append
        )
        for shard in theirs:
            torch.nn.init.zeros_(shard.parameter)
        assert not published
        assert background.take_reports() == []
        may_write.set()
        background.wait()
        (report,) = background.take_reports()
    assert published == [report.path] == [tmp_path / "step_00000003"]
    size = sum(len(data) for name, data in all_bytes(report.path).items() if name[0] != "m")
    assert report.num_bytes == size
    reader = CheckpointReader(report.path)
    for shard, value in zip(theirs, expected, strict=True):
        assert torch.equal(reader.load(shard.name), value)


def test_a_second_save_waits_for_the_first_and_uses_its_memory_again(tmp_path):
    theirs = shards()
    with writer(tmp_path, background=True) as background:
        for step in (1, 2):
            for shard in theirs:
                torch.nn.init.constant_(shard.parameter, float(step))
            background.save(manifest_of(step), shards=theirs, states=States())
        background.wait()
        assert [report.step for report in background.take_reports()] == [1, 2]
    for step in (1, 2):
        verify_checkpoint(tmp_path / name_checkpoint(step))
        reader = CheckpointReader(tmp_path / name_checkpoint(step))
        assert torch.all(reader.load("embedding.word_embeddings.weight") == step)


def test_an_error_in_the_background_is_raised_by_the_next_call(tmp_path):
    older = save(tmp_path, 3)
    with writer(tmp_path, background=True) as background:
        with files_of_at_most(200):
            background.save(manifest_of(6), shards=shards(), states=States())
            background._thread.join()
        with pytest.raises(CheckpointError, match="cannot be written by rank 0"):
            background.save(manifest_of(9), shards=shards(), states=States())
    assert find_latest_checkpoint(tmp_path) == older
    verify_checkpoint(older)


@pytest.mark.parametrize("background", [False, True])
def test_a_run_may_go_on_without_a_checkpoint(tmp_path, capsys, background):
    older = save(tmp_path, 3)
    settings = {"on_write_error": "continue", "background": background}
    with files_of_at_most(200):
        save(tmp_path, 6, **settings)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: a checkpoint was not saved, training goes on: ")
    assert find_latest_checkpoint(tmp_path) == older
    assert verify_checkpoint(save(tmp_path, 9, **settings)).step == 9


def test_files_are_split_at_the_limit_and_read_back_the_same(tmp_path):
    whole = save(tmp_path / "whole", 3)
    with writer(tmp_path / "split", max_file_bytes=300) as splitting:
        splitting.save(manifest_of(3), shards=shards(), states=States())
    split = tmp_path / "split" / whole.name
    # 3,072 bytes of embedding and 256 of norm; two moments of each: no two fit into one file.
    assert len(verify_checkpoint(whole).files) == 2
    assert len(verify_checkpoint(split).files) == 6
    left = CheckpointReader(whole)
    right = CheckpointReader(split)
    assert left.list_names() == right.list_names()
    for name in left.list_names():
        for kind in ("weight", "exp_avg", "exp_avg_sq"):
            assert torch.equal(left.load(name, kind), right.load(name, kind))


def test_views_of_one_memory_are_written_as_tensors_of_their_own(tmp_path):
    flat = torch.arange(6.0)
    tensors = [SavedTensor("weight", "a", flat[:4]), SavedTensor("weight", "b", flat[4:])]
    (name,) = rank_files_for(tmp_path, tensors).write(tensors)
    assert load_file(tmp_path / name)["weight/b"].tolist() == [4.0, 5.0]


def test_a_rank_that_leaves_out_a_tensor_or_changes_their_order_is_stopped(tmp_path):
    tensors = [SavedTensor("weight", name, torch.zeros(2)) for name in "abc"]
    for index, wrong in enumerate((tensors[:2], [tensors[1], tensors[0], tensors[2]])):
        folder = tmp_path / str(index)
        folder.mkdir()
        with pytest.raises(ValueError, match=r"lacks tensors|has to go on with"):
            rank_files_for(folder, tensors).write(wrong)


def test_numbers_that_are_none_are_kept_bit_for_bit(tmp_path):
    value = torch.tensor([float("nan"), float("inf"), -0.0])
    tensors = [SavedTensor("weight", "a", value)]
    (name,) = rank_files_for(tmp_path, tensors).write(tensors)
    found = load_file(tmp_path / name)["weight/a"]
    assert torch.equal(found.view(torch.int32), value.view(torch.int32))


def test_what_the_disk_gives_back_is_compared_with_what_was_written(tmp_path, monkeypatch):
    older = save(tmp_path, 3)
    real = streaming._read_back

    def flipping(path):
        content = bytearray(path.read_bytes())
        content[-7] ^= 1
        path.write_bytes(content)
        return real(path)

    monkeypatch.setattr(streaming, "_read_back", flipping)
    with pytest.raises(CheckpointError, match=r"0.safetensors reads back other bytes than were"):
        save(tmp_path, 6)
    assert find_latest_checkpoint(tmp_path) == older


def test_an_unwritable_folder_leaves_the_older_checkpoint_whole(tmp_path):
    older = save(tmp_path, 3)
    # The superuser writes everywhere, so a file stands in the way.
    (tmp_path / ".step_00000006.tmp").symlink_to("/proc/1")
    with pytest.raises(CheckpointError, match=r"step_00000006.tmp cannot be written"):
        save(tmp_path, 6)
    verify_checkpoint(older)


# Where the second save is killed, before or after the call, and the step that must be whole then.
KILLED_AT = [
    ("TensorFile", "write", "before", 3),
    ("TensorFile", "write", "after", 3),
    ("streaming", "_read_back", "before", 3),
    ("saving", "publish_checkpoint", "before", 3),
    ("os", "replace", "after", 3),
    ("saving", "publish_checkpoint", "after", 6),
]
# Imports cost seconds, so one process forks into those that are killed.
KILLING = """
import os, signal, sys, threading
sys.path.insert(0, sys.argv[1])
import test_saving
from megatron_mdm.checkpoint import saving, streaming

def save_and_die(folder, module, name, when):
    test_saving.save(folder, 3)
    modules = {"TensorFile": streaming.TensorFile, "streaming": streaming}
    module = (modules | {"saving": saving, "os": os})[module]
    real = getattr(module, name)

    def dying(*arguments, **options):
        assert threading.current_thread().name == "checkpoint-writer"
        if when == "after":
            real(*arguments, **options)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(module, name, dying)
    test_saving.save(folder, 6, background=True)

for index, (*place, _) in enumerate(test_saving.KILLED_AT):
    child = os.fork()
    if child == 0:
        save_and_die(test_saving.Path(sys.argv[2]) / str(index), *place)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, place
"""


def test_a_kill_while_the_thread_writes_leaves_a_whole_checkpoint(tmp_path):
    command = [sys.executable, "-c", KILLING, Path(__file__).parent, tmp_path]
    subprocess.run(command, check=True, timeout=120)
    for index, (*_, survives) in enumerate(KILLED_AT):
        folder = tmp_path / str(index)
        assert find_checkpoint(folder, "previous") == folder / name_checkpoint(survives)
        verify_checkpoint(folder / name_checkpoint(survives))
        save(folder, 9)
        assert not list(folder.glob(".*"))


@pytest.mark.skipif(os.geteuid() != 0, reason="only the superuser mounts a tmpfs")
@pytest.mark.parametrize("background", [False, True])
def test_a_disk_that_is_really_full_is_an_error(tmp_path, background):
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("this system allows no mount")
    try:
        older = save(tmp_path / "checkpoints", 3)
        with pytest.raises(CheckpointError, match=r"cannot be written by rank 0 .*[Nn]o space"):
            save(tmp_path / "checkpoints", 6, rows=200, background=background)
        verify_checkpoint(older)
        assert find_latest_checkpoint(tmp_path / "checkpoints") == older
        assert not list((tmp_path / "checkpoints").glob(".*"))
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)
