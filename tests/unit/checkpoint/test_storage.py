from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_mdm.checkpoint.storage import (
    CheckpointReader,
    checkpoint_name,
    latest_checkpoint,
)
from megatron_mdm.errors import CheckpointError
from megatron_mdm.files import write_text_whole
from megatron_mdm.model.sharding import shard_slices

PACKAGE = Path(__file__).resolve().parents[3] / "megatron_mdm"

FC1 = "decoder.layers.0.mlp.linear_fc1.weight"
FC2 = "decoder.layers.0.mlp.linear_fc2.weight"
NORM = "decoder.final_layernorm.weight"
EMBEDDING = "embedding.word_embeddings.weight"
SHAPES = {FC1: (16, 3), FC2: (3, 8), NORM: (3,), EMBEDDING: (12, 3)}


def whole_tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        f"{kind}/{name}": torch.randn(shape, generator=generator)
        for kind in ("weight", "exp_avg", "exp_avg_sq")
        for name, shape in SHAPES.items()
    }


def part_of(key, tensor, rank, size):
    """By hand, not by the package's rules: gate and up are halves, each cut by rows."""
    name = key.partition("/")[2]
    if name == FC1:
        return torch.cat([half.chunk(size)[rank] for half in tensor.chunk(2)]).clone()
    if name == NORM:
        return tensor.clone()
    return tensor.chunk(size, dim=1 if name == FC2 else 0)[rank].contiguous().clone()


def write_checkpoint(folder: Path, tensor_size: int, **changes) -> Path:
    """Norms, which every rank holds, are written by rank 0 alone."""
    path = folder / checkpoint_name(20)
    path.mkdir(parents=True)
    files = {}
    for rank in range(tensor_size):
        for file, kinds in (("weights", ("weight",)), ("optimizer", ("exp_avg", "exp_avg_sq"))):
            tensors = {
                key: part_of(key, tensor, rank, tensor_size)
                for key, tensor in whole_tensors().items()
                if key.partition("/")[0] in kinds and (rank == 0 or not key.endswith(NORM))
            }
            target = path / f"{file}-tp{rank}-pp0-dp0.safetensors"
            save_file(tensors, target, {"format": "pt", "tensor_rank": str(rank)})
            files[target.name] = target.stat().st_size
    manifest = {
        "format_version": 1,
        "step": 20,
        "consumed_samples": 160,
        "world_size": tensor_size,
        "config": {"parallel": {"tensor_model_parallel_size": tensor_size}},
        "versions": {"torch": "2"},
        "data_fingerprint": "f",
        "predictions": [0],
        "files": files,
    }
    (path / "manifest.json").write_text(json.dumps(manifest | changes), encoding="utf-8")
    return path


def change_manifest(path: Path, change) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


def refusal(path: Path) -> str:
    """The error of opening a checkpoint, after checking that it is one sentence."""
    with pytest.raises(CheckpointError) as caught:
        CheckpointReader(path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    assert not re.search(r"\. [A-Z]|https?:", message)
    return message


@pytest.mark.parametrize("tensor_size", [1, 2, 4])
def test_every_layout_gives_back_the_whole_tensors(tmp_path, tensor_size):
    with CheckpointReader(write_checkpoint(tmp_path, tensor_size)) as reader:
        assert reader.names() == sorted(SHAPES)
        assert (reader.manifest.step, reader.manifest.consumed_samples) == (20, 160)
        for key, tensor in whole_tensors().items():
            kind, _, name = key.partition("/")
            torch.testing.assert_close(reader.load(name, kind), tensor, rtol=0, atol=0)


@pytest.mark.parametrize("written", [1, 2])
@pytest.mark.parametrize("read", [1, 2, 4])
def test_shards_of_another_layout_are_cut_from_the_whole(tmp_path, written, read):
    with CheckpointReader(write_checkpoint(tmp_path, written)) as reader:
        for key, tensor in whole_tensors().items():
            kind, _, name = key.partition("/")
            for rank in range(read):
                slices = shard_slices(name, SHAPES[name], rank, read)
                shard = reader.load_shard(name, slices, kind)
                expected = part_of(key, tensor, rank, read)
                torch.testing.assert_close(shard, expected, rtol=0, atol=0)
                assert shard.is_contiguous()


def test_a_parameter_that_is_not_there_is_named(tmp_path):
    with CheckpointReader(write_checkpoint(tmp_path, 1)) as reader:
        with pytest.raises(CheckpointError, match=r"step_00000020 holds no weight of output_layer"):
            reader.load("output_layer.weight")
        with pytest.raises(CheckpointError, match=r"holds no exp_avg_cubed of "):
            reader.load(NORM, "exp_avg_cubed")


def test_a_missing_file_is_named(tmp_path):
    path = write_checkpoint(tmp_path, 2)
    (path / "optimizer-tp1-pp0-dp0.safetensors").unlink()
    assert "optimizer-tp1-pp0-dp0.safetensors is missing" in refusal(path)


@pytest.mark.parametrize("keep", [0, 7, -1])
def test_a_truncated_file_is_named_with_both_sizes(tmp_path, keep):
    path = write_checkpoint(tmp_path, 2)
    file = path / "weights-tp1-pp0-dp0.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:keep])
    message = refusal(path)
    assert f"{file} has {len(content[:keep])} bytes where manifest.json says {len(content)}" in (
        message
    )


def test_a_file_that_grew_is_refused(tmp_path):
    path = write_checkpoint(tmp_path, 1)
    with (path / "weights-tp0-pp0-dp0.safetensors").open("ab") as file:
        file.write(b"\0")
    assert "weights-tp0-pp0-dp0.safetensors has " in refusal(path)


@pytest.mark.parametrize("damage", [b"\xff" * 8, b"\x08" + b"\0" * 7 + b"no JSON!", b"\0" * 40])
def test_a_damaged_header_of_the_right_size_is_refused(tmp_path, damage):
    path = write_checkpoint(tmp_path, 1)
    file = path / "weights-tp0-pp0-dp0.safetensors"
    file.write_bytes(damage + file.read_bytes()[len(damage) :])
    assert f"{file} is damaged" in refusal(path)


def test_a_safetensors_file_of_somebody_else_is_refused(tmp_path):
    path = write_checkpoint(tmp_path, 1)
    file = path / "weights-tp0-pp0-dp0.safetensors"
    save_file({"a": torch.zeros(2)}, file)
    size = file.stat().st_size
    change_manifest(path, lambda manifest: manifest["files"].update({file.name: size}))
    assert f"{file} is damaged" in refusal(path)


def test_a_folder_without_a_manifest_is_no_checkpoint(tmp_path):
    path = write_checkpoint(tmp_path, 1)
    (path / "manifest.json").unlink()
    assert f"{path / 'manifest.json'} is missing" in refusal(path)
    assert "manifest.json is missing" in refusal(tmp_path / "nowhere")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"step": 1}', "\x00\x01"])
def test_a_manifest_that_is_no_manifest_is_damaged(tmp_path, text):
    path = write_checkpoint(tmp_path, 1)
    (path / "manifest.json").write_text(text)
    assert f"{path / 'manifest.json'} is damaged" in refusal(path)


def test_a_manifest_that_is_not_text_is_damaged(tmp_path):
    path = write_checkpoint(tmp_path, 1)
    (path / "manifest.json").write_bytes(b"\xff\xfe\x00")
    assert "manifest.json is damaged" in refusal(path)


@pytest.mark.parametrize(
    ("field", "value"),
    [("step", "many"), ("step", None), ("files", {"a": "b"}), ("files", []), ("surprise", 1)],
)
def test_a_manifest_with_an_altered_field_names_it(tmp_path, field, value):
    path = write_checkpoint(tmp_path, 1, **{field: value})
    message = refusal(path)
    assert "manifest.json is damaged" in message
    assert field in message


def test_a_manifest_that_says_another_size_is_refused(tmp_path):
    path = write_checkpoint(tmp_path, 1)
    name = "weights-tp0-pp0-dp0.safetensors"
    change_manifest(path, lambda manifest: manifest["files"].update({name: 12}))
    assert f"{name} has " in refusal(path)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_manifest_that_leaves_out_a_rank_is_no_smaller_model(tmp_path, rank):
    path = write_checkpoint(tmp_path, 2)
    name = f"weights-tp{rank}-pp0-dp0.safetensors"
    change_manifest(path, lambda manifest: manifest["files"].pop(name))
    with CheckpointReader(path) as reader, pytest.raises(CheckpointError) as caught:
        reader.load(EMBEDDING)
    assert str(path) in str(caught.value)
    assert EMBEDDING in str(caught.value)


@pytest.mark.parametrize("extra", [{}, {"a_field_of_the_future": 1}])
def test_another_format_version_is_refused_by_number(tmp_path, extra):
    path = write_checkpoint(tmp_path, 1, format_version=2, **extra)
    message = refusal(path)
    assert "manifest.json has format_version=2, but this version reads 1" in message


def test_a_run_without_checkpoints_has_no_latest(tmp_path):
    assert latest_checkpoint(tmp_path / "checkpoints") is None
    (tmp_path / "checkpoints").mkdir()
    assert latest_checkpoint(tmp_path / "checkpoints") is None


def test_latest_names_the_checkpoint(tmp_path):
    path = write_checkpoint(tmp_path, 1)
    write_text_whole(tmp_path / "latest", path.name + "\n")
    assert latest_checkpoint(tmp_path) == path


@pytest.mark.parametrize(
    "name", ["step_00000099", "", "../../etc", "step_00000020/..", "step_1\nstep_2"]
)
def test_latest_that_names_something_absent_offers_the_newest_whole_one(tmp_path, name):
    write_checkpoint(tmp_path, 1)
    (tmp_path / "step_00000030").mkdir()  # no manifest: not whole
    (tmp_path / "latest").write_text(name)
    with pytest.raises(CheckpointError, match=r"latest names .*write step_00000020 into it\.$"):
        latest_checkpoint(tmp_path)


def test_latest_with_no_checkpoint_at_all_says_how_to_start_anew(tmp_path):
    (tmp_path / "latest").write_text("step_00000099")
    with pytest.raises(CheckpointError, match=r"remove it to start anew\.$"):
        latest_checkpoint(tmp_path)


def test_a_file_written_whole_replaces_the_old_one_and_leaves_nothing_else(tmp_path):
    write_text_whole(tmp_path / "latest", "one")
    write_text_whole(tmp_path / "latest", "two")
    assert (tmp_path / "latest").read_text() == "two"
    assert [file.name for file in tmp_path.iterdir()] == ["latest"]


def test_nothing_in_the_package_unpickles():
    unsafe = re.compile(
        r"torch\.load\(|import pickle|pickle\.loads?\(|allow_pickle=True|\beval\(\""
    )
    found = [str(file) for file in PACKAGE.rglob("*.py") if unsafe.search(file.read_text("utf-8"))]
    assert found == []
