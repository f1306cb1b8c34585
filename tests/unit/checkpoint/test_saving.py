from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from megatron_mdm.checkpoint import saving
from megatron_mdm.checkpoint.saving import load_weights, save_checkpoint
from megatron_mdm.checkpoint.storage import (
    FORMAT_VERSION,
    CheckpointManifest,
    CheckpointReader,
    latest_checkpoint,
)
from megatron_mdm.errors import CheckpointError
from megatron_mdm.model.parameters import NamedShard
from megatron_mdm.parallel.topology import Topology

ALONE = Topology(torch.device("cpu"), 0, 1, 0, 1, 0, 1, 0, 1)


class WorldOfOne:
    """Stands in for torch.distributed."""

    @staticmethod
    def barrier():
        pass

    @staticmethod
    def all_gather_object(everyone, mine):
        everyone[0] = mine


class States:
    """Weights, and moments that are told apart from them."""

    def get(self, parameter, kind):
        return parameter.detach() + {"weight": 0.0, "exp_avg": 1.0, "exp_avg_sq": 2.0}[kind]


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    monkeypatch.setattr(saving, "dist", WorldOfOne)


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


def save(folder, step, rows=12):
    return save_checkpoint(
        folder,
        CheckpointManifest(
            format_version=FORMAT_VERSION,
            step=step,
            consumed_samples=8 * step,
            world_size=1,
            config={},
            versions={},
            data_fingerprint="f",
            predictions=[0],
            files={},
        ),
        shards=shards(rows),
        states=States(),
        topology=ALONE,
    )


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
    assert latest_checkpoint(tmp_path) == path
    assert sorted(file.name for file in tmp_path.iterdir()) == ["latest", "step_00000003"]
    fresh = shards()
    for shard in fresh:
        torch.nn.init.zeros_(shard.parameter)
    with CheckpointReader(path) as reader:
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
    assert latest_checkpoint(tmp_path) == older
    assert sorted(file.name for file in tmp_path.iterdir()) == ["latest", "step_00000003"]
    with CheckpointReader(older) as reader:
        assert reader.manifest.step == 3


def test_a_disk_that_fills_with_the_manifest_is_an_error_too(tmp_path, monkeypatch):
    older = save(tmp_path, 3)

    def no_space(path, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving, "write_text_whole", no_space)
    with pytest.raises(CheckpointError, match=r"cannot be written .*No space left on device"):
        save(tmp_path, 6)
    monkeypatch.undo()
    assert latest_checkpoint(tmp_path) == older
    with CheckpointReader(older) as reader:
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
    with CheckpointReader(path) as reader:
        assert len(reader.manifest.files) == 2
    assert len(list(path.iterdir())) == 3


def test_a_step_saved_again_replaces_the_first_saving(tmp_path):
    save(tmp_path, 3)
    path = save(tmp_path, 3, rows=20)
    with CheckpointReader(path) as reader:
        assert reader.load("embedding.word_embeddings.weight").shape == (20, 64)


def test_weights_of_another_shape_are_refused(tmp_path):
    path = save(tmp_path, 3)
    with CheckpointReader(path) as reader, pytest.raises(CheckpointError, match="another shape"):
        load_weights(reader, shards(rows=20))
