from __future__ import annotations

import re

import pytest
import torch
from checkpoint_examples import (
    EMBEDDING,
    FC2,
    SHAPES,
    change_manifest,
    record,
    whole_tensors,
    write_checkpoint,
)
from safetensors.torch import load_file, save_file

from megatron_mdm.checkpoint.discovery import (
    choose_checkpoint,
    find_checkpoint,
    verify_checkpoint,
)
from megatron_mdm.core.errors import CheckpointError
from megatron_mdm.distributed.mesh import Mesh

ALONE = Mesh(torch.device("cpu"))
WEIGHTS = "weights-tp0-pp0-dp0-0.safetensors"


def remove_file(path):
    (path / WEIGHTS).unlink()


def truncate_file(path):
    (path / WEIGHTS).write_bytes((path / WEIGHTS).read_bytes()[:-9])


def flip_byte(path):
    """In the middle of the largest tensor, where no header and no size tells."""
    content = bytearray((path / WEIGHTS).read_bytes())
    values = whole_tensors()[f"weight/{EMBEDDING}"].numpy().tobytes()
    content[content.index(values) + len(values) // 2] ^= 0x10
    (path / WEIGHTS).write_bytes(content)


def alter_manifest(path):
    file = path / "manifest.json"
    file.write_text(file.read_text().replace('"torch": "2"', '"torch": "3"'))


def remove_manifest(path):
    (path / "manifest.json").unlink()


def forget_file(path):
    change_manifest(path, lambda manifest: manifest["files"].pop(WEIGHTS))


def forget_tensor(path):
    tensors = load_file(path / WEIGHTS)
    del tensors[f"weight/{FC2}"]
    save_file(tensors, path / WEIGHTS, {"format": "pt", "tensor_rank": "0"})
    change_manifest(path, lambda tree: tree["files"].update({WEIGHTS: record(path / WEIGHTS)}))


def change_shape(path):
    tensors = load_file(path / WEIGHTS)
    tensors[f"weight/{FC2}"] = tensors[f"weight/{FC2}"].T.contiguous()
    save_file(tensors, path / WEIGHTS, {"format": "pt", "tensor_rank": "0"})
    change_manifest(path, lambda tree: tree["files"].update({WEIGHTS: record(path / WEIGHTS)}))


def folder_for_manifest(path):
    remove_manifest(path)
    (path / "manifest.json").mkdir()


def folder_for_weights(path):
    """Of the size that the manifest names, so that it is opened."""
    remove_file(path)
    (path / WEIGHTS).mkdir()
    size = (path / WEIGHTS).stat().st_size
    change_manifest(path, lambda tree: tree["files"][WEIGHTS].update({"num_bytes": size}))


DAMAGE = {
    folder_for_manifest: r"manifest.json cannot be read \(Is a directory\)",
    folder_for_weights: f"{WEIGHTS} cannot be read ",
    remove_file: f"{WEIGHTS} is missing",
    truncate_file: f"{WEIGHTS} has \\d+ bytes where manifest.json says \\d+",
    flip_byte: f"{WEIGHTS} has \\d+ bytes with sha256 \\w{{64}} where manifest.json says",
    alter_manifest: r"manifest.json is damaged or was altered \(its content has sha256",
    remove_manifest: "manifest.json is missing",
    forget_file: "holds 0 of 1 parts of the weight of decoder",
    forget_tensor: f"holds 0 of 1 parts of the weight of {FC2}",
    change_shape: rf"{WEIGHTS} holds weight of {FC2} as F32 \[8, 3\] .* says F32 \[3, 8\]",
}
every_damage = pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)


def refusal(call, *arguments):
    with pytest.raises(CheckpointError) as caught:
        call(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    assert re.search(r"[:;] \w.*\.$", message), "no remedy"
    return message


@pytest.mark.parametrize("tensor_size", [1, 2])
def test_a_whole_checkpoint_is_whole(tmp_path, tensor_size):
    manifest = verify_checkpoint(write_checkpoint(tmp_path, tensor_size))
    assert set(manifest.parameters) == set(SHAPES)


@every_damage
def test_each_damage_is_found_and_named(tmp_path, damage):
    path = write_checkpoint(tmp_path)
    damage(path)
    message = refusal(verify_checkpoint, path)
    assert re.search(DAMAGE[damage], message), message
    assert str(path) in message


def test_processes_share_the_checksums(tmp_path):
    path = write_checkpoint(tmp_path, 2)
    flip_byte_of = path / "weights-tp1-pp0-dp0-0.safetensors"
    content = bytearray(flip_byte_of.read_bytes())
    content[-1] ^= 1
    flip_byte_of.write_bytes(content)
    found = []
    for part in range(3):
        try:
            verify_checkpoint(path, part=part, num_parts=3)
        except CheckpointError:
            found.append(part)
    assert len(found) == 1


@every_damage
def test_a_damaged_latest_gives_way_to_the_one_before(tmp_path, damage, capsys):
    write_checkpoint(tmp_path, step=10)
    older = write_checkpoint(tmp_path, step=15)
    damage(write_checkpoint(tmp_path, step=20))
    assert choose_checkpoint(tmp_path, "previous", ALONE) == older
    told, chosen = capsys.readouterr().err.splitlines()
    assert re.search(DAMAGE[damage], told)
    assert told.startswith("warning: ")
    assert f"going on from {older}" in chosen


@every_damage
def test_a_damaged_latest_is_refused_where_that_is_asked_for(tmp_path, damage):
    write_checkpoint(tmp_path, step=10)
    damage(write_checkpoint(tmp_path, step=20))
    message = refusal(choose_checkpoint, tmp_path, "refuse", ALONE)
    assert message.startswith("step_00000020 is damaged and checkpoint.on_damage=refuse: ")
    assert re.search(DAMAGE[damage], message)


@every_damage
def test_a_run_never_starts_anew_because_all_is_damaged(tmp_path, damage):
    for step in (10, 20):
        damage(write_checkpoint(tmp_path, step=step))
    message = refusal(choose_checkpoint, tmp_path, "previous", ALONE)
    assert "holds no whole checkpoint to go on from" in message
    assert "step_00000020" in message


def test_before_the_ranks_meet_only_what_is_cheap_is_checked(tmp_path):
    older = write_checkpoint(tmp_path, step=10)
    newest = write_checkpoint(tmp_path, step=20)
    flip_byte(newest)
    assert find_checkpoint(tmp_path, "refuse") == newest
    truncate_file(newest)
    assert find_checkpoint(tmp_path, "previous") == older
    assert "step_00000020" in refusal(find_checkpoint, tmp_path, "refuse")


@pytest.mark.parametrize("name", ["step_00000099", "", "../../etc", "step_1\nstep_2"])
def test_a_latest_that_names_nothing_does_not_block(tmp_path, name, capsys):
    write_checkpoint(tmp_path, step=10)
    newest = write_checkpoint(tmp_path, step=20)
    (tmp_path / "latest").write_text(name)
    assert find_checkpoint(tmp_path, "previous") == newest
    assert choose_checkpoint(tmp_path, "previous", ALONE) == newest
    assert f"names {name!r}, which is not a checkpoint there" in capsys.readouterr().err
    assert "write step_00000020 into it" in refusal(choose_checkpoint, tmp_path, "refuse", ALONE)


def test_a_missing_latest_does_not_block(tmp_path, capsys):
    path = write_checkpoint(tmp_path)
    (tmp_path / "latest").unlink()
    assert choose_checkpoint(tmp_path, "refuse", ALONE) == path
    assert "latest is missing" in capsys.readouterr().err


def test_who_names_an_older_checkpoint_goes_back_to_it(tmp_path, capsys):
    oldest = write_checkpoint(tmp_path, step=5)
    older = write_checkpoint(tmp_path, step=10)
    write_checkpoint(tmp_path, step=20)
    (tmp_path / "latest").write_text("step_00000010\n")
    assert choose_checkpoint(tmp_path, "refuse", ALONE) == older
    assert "newer checkpoints, step_00000020 among them, are left" in capsys.readouterr().err
    flip_byte(older)
    assert choose_checkpoint(tmp_path, "previous", ALONE) == oldest


def test_a_pointer_to_nothing_at_all_is_no_fresh_start(tmp_path):
    (tmp_path / "latest").write_text("step_00000010\n")
    assert "remove it to start anew" in refusal(find_checkpoint, tmp_path, "previous")


def test_a_run_without_checkpoints_starts_anew(tmp_path, capsys):
    for folder in (tmp_path, tmp_path / "none"):
        assert find_checkpoint(folder, "refuse") is None
        assert choose_checkpoint(folder, "refuse", ALONE) is None
    assert capsys.readouterr().err == ""


def test_a_run_does_not_go_on_from_weights_alone(tmp_path):
    older = write_checkpoint(tmp_path, step=3)
    path = write_checkpoint(tmp_path, step=5, kind="weights")
    expected = rf"^{path} holds weights without .*: .*run.initial_weights={path}\.$"
    for on_damage in ("previous", "refuse"):
        with pytest.raises(CheckpointError, match=expected):
            find_checkpoint(tmp_path, on_damage)
        with pytest.raises(CheckpointError, match=expected):
            choose_checkpoint(tmp_path, on_damage, ALONE)
    (tmp_path / "latest").write_text(older.name)
    assert find_checkpoint(tmp_path, "refuse") == older
