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
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from megatron_mdm.checkpoint.manifest import (
    FORMAT_VERSION,
    CheckpointManifest,
    SavedLayout,
    format_manifest,
    read_manifest,
    read_saved_model,
)
from megatron_mdm.checkpoint.storage import (
    CheckpointReader,
    find_latest_checkpoint,
    resolve_checkpoint,
)
from megatron_mdm.core.errors import CheckpointError
from megatron_mdm.core.files import write_text_whole
from megatron_mdm.model.sharding import list_shard_slices

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
    reader = CheckpointReader(write_checkpoint(tmp_path, tensor_size))
    assert reader.list_names() == sorted(SHAPES)
    assert (reader.manifest.step, reader.manifest.consumed_samples) == (20, 160)
    for key, tensor in whole_tensors().items():
        kind, _, name = key.partition("/")
        torch.testing.assert_close(reader.load(name, kind), tensor, rtol=0, atol=0)


@pytest.mark.parametrize("written", [1, 2])
@pytest.mark.parametrize("read", [1, 2, 4])
def test_shards_of_another_layout_are_cut_from_the_whole(tmp_path, written, read):
    reader = CheckpointReader(write_checkpoint(tmp_path, written))
    for key, tensor in whole_tensors().items():
        kind, _, name = key.partition("/")
        for rank in range(read):
            slices = list_shard_slices(name, SHAPES[name], rank, read)
            shard = reader.load_shard(name, slices, kind)
            expected = part_of(key, tensor, rank, read)
            torch.testing.assert_close(shard, expected, rtol=0, atol=0)
            assert shard.is_contiguous()


def test_a_parameter_that_is_not_there_is_named(tmp_path):
    reader = CheckpointReader(write_checkpoint(tmp_path, 1))
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
    manifest = read_manifest_of(state={"guard": {"loss_average": 0.1 + 0.2}}, step=3)
    assert manifest.state == {"guard": {"loss_average": 0.1 + 0.2}}
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
        }
        manifest = CheckpointManifest.model_validate(fields | changes)
        (Path(folder) / "manifest.json").write_text(format_manifest(manifest))
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
    reader = CheckpointReader(path)
    with pytest.raises(CheckpointError) as caught:
        reader.load(EMBEDDING)
    assert str(path) in str(caught.value)
    assert EMBEDDING in str(caught.value)


@pytest.mark.parametrize("version", [5, 7])
@pytest.mark.parametrize("extra", [{}, {"a_field_of_the_future": 1}])
def test_another_format_version_is_refused_by_number(tmp_path, version, extra):
    path = write_checkpoint(tmp_path, 1, format_version=version, **extra)
    message = refusal(path)
    assert f"has format_version={version}, but this version reads 6:" in message


@pytest.mark.parametrize("kind", ["training", "weights"])
def test_moments_are_missed_only_where_they_belong(tmp_path, kind):
    path = write_checkpoint(tmp_path, 2, kind=kind)

    def forget_moments(manifest):
        manifest["files"] = {n: r for n, r in manifest["files"].items() if "optimizer" not in n}

    change_manifest(path, forget_moments)
    reader = CheckpointReader(path)
    if kind == "weights":
        reader.check_complete()
    else:
        with pytest.raises(CheckpointError, match="holds 0 of 2 parts of the exp_avg of "):
            reader.check_complete()


def cuts(size):
    bounds = st.tuples(st.integers(0, size - 1), st.integers(1, size)).filter(lambda b: b[0] < b[1])
    return bounds.map(lambda b: slice(*b))


@settings(max_examples=60, deadline=None)
@given(data=st.data(), written=st.sampled_from([1, 2, 4]), name=st.sampled_from(sorted(SHAPES)))
def test_any_slices_are_those_of_the_whole_tensor(checkpoints, data, written, name):
    whole = whole_tensors()[f"weight/{name}"]
    # Along the first dimension anything goes; the other slices have to be alike to be joined.
    others = [data.draw(cuts(size)) for size in whole.shape[1:]]
    wanted = [(first, *others) for first in data.draw(st.lists(cuts(whole.shape[0]), min_size=1))]
    reader = CheckpointReader(checkpoints[written])
    found = reader.load_shard(name, wanted)
    assert reader.find_shape(name) == tuple(whole.shape)
    expected = torch.cat([whole[part] for part in wanted])
    assert found.is_contiguous()
    assert torch.equal(found.view(torch.int32), expected.contiguous().view(torch.int32))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """One for each number of tensor-parallel ranks that wrote it."""
    root = tmp_path_factory.mktemp("written")
    return {size: write_checkpoint(root / str(size), size) for size in (1, 2, 4)}


def test_slices_beyond_a_tensor_are_refused(tmp_path):
    reader = CheckpointReader(write_checkpoint(tmp_path, 2))
    for wanted in ((slice(0, 13), slice(0, 3)), (slice(0, 12),)):
        with pytest.raises(CheckpointError, match=r"in another shape, \[12, 3\], than"):
            reader.load_shard(EMBEDDING, [wanted])


def file_pages_bytes() -> int:
    """Pages of files that this process has in memory."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"RssFile:\s+(\d+) kB", status)[1])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux counts pages")
def test_what_was_read_does_not_stay_mapped_and_slices_read_no_more_than_themselves(tmp_path):
    path = write_checkpoint(tmp_path, 1)
    file = path / "weights-tp0-pp0-dp0-0.safetensors"
    rows = 2**15
    names = [f"decoder.layers.{i}.mlp.linear_fc1.weight" for i in range(4)]
    save_file({f"weight/{n}": torch.ones(rows, 256) for n in names}, file, {"tensor_rank": "0"})

    def describe(manifest):
        manifest["files"] = {file.name: record(file)}

    change_manifest(path, describe)
    tensor_bytes = rows * 256 * 4
    reader = CheckpointReader(path)
    before = file_pages_bytes()
    part = reader.load_shard(names[0], [(slice(0, rows // 32), slice(0, 256))])
    assert part.sum() == rows // 32 * 256
    assert file_pages_bytes() - before < tensor_bytes / 8
    del part
    for name in names:
        assert reader.load(name).sum() == rows * 256
    assert file_pages_bytes() - before < tensor_bytes / 8


def test_a_checkpoint_is_found_by_its_own_folder_and_by_those_above(tmp_path):
    path = write_checkpoint(tmp_path / "run" / "checkpoints", 1)
    for place in (path, path.parent, path.parent.parent):
        assert resolve_checkpoint(place) == path
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(CheckpointError, match=r"holds no checkpoint: give .*\.$"):
            resolve_checkpoint(place)


def test_the_model_of_a_checkpoint_is_read_from_either_kind(tmp_path):
    model = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 2}
    model |= {"ffn_hidden_size": 8, "vocab_size": 12}
    config = {"model": model, "objective": {"kind": "ar"}, "data": {"seq_length": 16}}
    for kind in ("weights", "training"):
        path = write_checkpoint(tmp_path / kind, 1, kind=kind, config=config)
        found = read_saved_model(read_manifest(path))
        assert (found.model.vocab_size, found.kind, found.seq_length) == (12, "ar", 16)
    for change in ({"model": model | {"num_layers": 0}}, {"data": {}}):
        path = write_checkpoint(tmp_path / str(change), 1, config=config | change)
        with pytest.raises(CheckpointError, match=r"describes no model \(.*\): use the version"):
            read_saved_model(read_manifest(path))


def test_a_run_without_checkpoints_has_no_latest(tmp_path):
    assert find_latest_checkpoint(tmp_path / "checkpoints") is None
    (tmp_path / "checkpoints").mkdir()
    assert find_latest_checkpoint(tmp_path / "checkpoints") is None


def test_latest_names_the_checkpoint(tmp_path):
    path = write_checkpoint(tmp_path, 1)
    write_text_whole(tmp_path / "latest", path.name + "\n")
    assert find_latest_checkpoint(tmp_path) == path


@pytest.mark.parametrize(
    "name", ["step_00000099", "", "../../etc", "step_00000020/..", "step_1\nstep_2"]
)
def test_latest_that_names_something_absent_offers_the_newest_whole_one(tmp_path, name):
    write_checkpoint(tmp_path, 1)
    (tmp_path / "step_00000030").mkdir()  # no manifest: not whole
    (tmp_path / "latest").write_text(name)
    with pytest.raises(CheckpointError, match=r"latest names .*write step_00000020 into it\.$"):
        find_latest_checkpoint(tmp_path)


def test_latest_with_no_checkpoint_at_all_says_how_to_start_anew(tmp_path):
    (tmp_path / "latest").write_text("step_00000099")
    with pytest.raises(CheckpointError, match=r"remove it to start anew\.$"):
        find_latest_checkpoint(tmp_path)


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
