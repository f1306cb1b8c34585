from __future__ import annotations

import re
import tempfile
from pathlib import Path

import pytest
import torch
from checkpoint_examples import (
    EMBEDDING,
    NORM,
    SHAPES,
    change_manifest,
    part_of,
    record,
    whole_tensors,
    write_checkpoint,
)
from safetensors.torch import save_file

from megatron_mdm.checkpoint.storage import (
    FORMAT_VERSION,
    CheckpointManifest,
    CheckpointReader,
    SavedLayout,
    latest_checkpoint,
    manifest_text,
    read_manifest,
)
from megatron_mdm.errors import CheckpointError
from megatron_mdm.files import write_text_whole
from megatron_mdm.model.sharding import shard_slices

PACKAGE = Path(__file__).resolve().parents[3] / "megatron_mdm"


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
    (path / "optimizer-tp1-pp0-dp0-0.safetensors").unlink()
    assert "optimizer-tp1-pp0-dp0-0.safetensors is missing" in refusal(path)


@pytest.mark.parametrize("keep", [0, 7, -1])
def test_a_truncated_file_is_named_with_both_sizes(tmp_path, keep):
    path = write_checkpoint(tmp_path, 2)
    file = path / "weights-tp1-pp0-dp0-0.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:keep])
    message = refusal(path)
    assert f"{file} has {len(content[:keep])} bytes where manifest.json says {len(content)}" in (
        message
    )


def test_a_file_that_grew_is_refused(tmp_path):
    path = write_checkpoint(tmp_path, 1)
    with (path / "weights-tp0-pp0-dp0-0.safetensors").open("ab") as file:
        file.write(b"\0")
    assert "weights-tp0-pp0-dp0-0.safetensors has " in refusal(path)


@pytest.mark.parametrize("damage", [b"\xff" * 8, b"\x08" + b"\0" * 7 + b"no JSON!", b"\0" * 40])
def test_a_damaged_header_of_the_right_size_is_refused(tmp_path, damage):
    path = write_checkpoint(tmp_path, 1)
    file = path / "weights-tp0-pp0-dp0-0.safetensors"
    file.write_bytes(damage + file.read_bytes()[len(damage) :])
    assert f"{file} is damaged" in refusal(path)


def test_a_safetensors_file_of_somebody_else_is_refused(tmp_path):
    path = write_checkpoint(tmp_path, 1)
    file = path / "weights-tp0-pp0-dp0-0.safetensors"
    save_file({"a": torch.zeros(2)}, file)
    change_manifest(path, lambda manifest: manifest["files"].update({file.name: record(file)}))
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
    [
        ("step", "many"),
        ("step", None),
        ("files", {"a": "b"}),
        ("files", []),
        ("layout", {"ranks": 2}),
        ("surprise", 1),
    ],
)
def test_a_manifest_with_an_altered_field_names_it(tmp_path, field, value):
    path = write_checkpoint(tmp_path, 1)
    change_manifest(path, lambda manifest: manifest.update({field: value}))
    message = refusal(path)
    assert "manifest.json is damaged" in message
    assert field in message


@pytest.mark.parametrize("change", [('"step": 20', '"step": 21'), ('"torch": "2"', '"torch": "3"')])
def test_a_manifest_that_was_altered_by_hand_is_refused(tmp_path, change):
    path = write_checkpoint(tmp_path, 1)
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text.replace(*change))
    assert "manifest.json is damaged or was altered" in refusal(path)


def test_a_manifest_reads_back_as_what_was_written():
    manifest = read_manifest_of(loss_average=0.1 + 0.2, step=3)
    assert manifest.loss_average == 0.1 + 0.2
    assert manifest.layout == SavedLayout()


def read_manifest_of(**changes):
    with tempfile.TemporaryDirectory() as folder:
        fields = {
            "format_version": FORMAT_VERSION,
            "step": 1,
            "consumed_samples": 8,
            "config": {"run": {"seed": 1}},
            "versions": {"torch": "2"},
            "data_fingerprint": "f",
            "predictions": [1],
        }
        manifest = CheckpointManifest.model_validate(fields | changes)
        (Path(folder) / "manifest.json").write_text(manifest_text(manifest))
        assert read_manifest(Path(folder)) == manifest
        return manifest


def test_a_manifest_that_says_another_size_is_refused(tmp_path):
    path = write_checkpoint(tmp_path, 1)
    name = "weights-tp0-pp0-dp0-0.safetensors"
    change_manifest(path, lambda manifest: manifest["files"][name].update(num_bytes=12))
    assert f"{name} has " in refusal(path)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_manifest_that_leaves_out_a_rank_is_no_smaller_model(tmp_path, rank):
    path = write_checkpoint(tmp_path, 2)
    name = f"weights-tp{rank}-pp0-dp0-0.safetensors"
    change_manifest(path, lambda manifest: manifest["files"].pop(name))
    with CheckpointReader(path) as reader, pytest.raises(CheckpointError) as caught:
        reader.load(EMBEDDING)
    assert str(path) in str(caught.value)
    assert EMBEDDING in str(caught.value)


@pytest.mark.parametrize("version", [1, 3])
@pytest.mark.parametrize("extra", [{}, {"a_field_of_the_future": 1}])
def test_another_format_version_is_refused_by_number(tmp_path, version, extra):
    path = write_checkpoint(tmp_path, 1, format_version=version, **extra)
    message = refusal(path)
    assert f"manifest.json has format_version={version}, but this version reads 2" in message


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
