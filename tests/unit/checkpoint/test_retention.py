from __future__ import annotations

import shutil

import pytest
from checkpoint_examples import write_checkpoint
from hypothesis import given
from hypothesis import strategies as st

from megatron_mdm.checkpoint import retention
from megatron_mdm.checkpoint.retention import (
    choose_steps_to_delete,
    clean_leftovers,
    delete_checkpoint,
    delete_old,
    list_saved_steps,
)


@given(
    st.sets(st.integers(1, 60)),
    st.none() | st.integers(1, 8),
    st.none() | st.integers(1, 20),
    st.sets(st.integers(1, 60), max_size=3),
)
def test_a_checkpoint_goes_exactly_when_no_rule_keeps_it(steps, last, every, protected):
    gone = choose_steps_to_delete(
        steps, keep_last=last, keep_every_steps=every, protected=protected
    )
    for step in steps:
        num_newer = sum(other > step for other in steps)
        stays = (
            last is None
            or num_newer < last
            or (every is not None and step % every == 0)
            or step in protected
        )
        assert (step in gone) != stays
    assert gone == sorted(gone)


def kept(folder):
    return sorted(list_saved_steps(folder))


def test_what_is_kept_after_each_save(tmp_path):
    for step in range(10, 80, 10):
        write_checkpoint(tmp_path, step=step)
        delete_old(tmp_path, step, keep_last=2, keep_every_steps=30)
    assert kept(tmp_path) == [30, 60, 70]
    assert not list(tmp_path.glob(".*"))


def test_without_keep_last_nothing_goes(tmp_path):
    for step in (10, 20, 30):
        write_checkpoint(tmp_path, step=step)
        delete_old(tmp_path, step, keep_last=None, keep_every_steps=20)
    assert kept(tmp_path) == [10, 20, 30]


def test_a_damaged_checkpoint_does_not_push_out_a_whole_one(tmp_path):
    for step in (10, 20, 30):
        path = write_checkpoint(tmp_path, step=step)
        if step == 20:
            (path / "weights-tp0-pp0-dp0-0.safetensors").unlink()
    delete_old(tmp_path, 30, keep_last=2, keep_every_steps=None)
    assert kept(tmp_path) == [10, 20, 30]


def test_later_steps_of_a_run_that_was_set_back_are_left_alone(tmp_path):
    for step in (10, 50, 60, 20):
        write_checkpoint(tmp_path, step=step)
    delete_old(tmp_path, 20, keep_last=1, keep_every_steps=None)
    assert kept(tmp_path) == [20, 50, 60]


def test_a_killed_deletion_leaves_no_half_checkpoint(tmp_path, monkeypatch):
    path = write_checkpoint(tmp_path, step=10)
    write_checkpoint(tmp_path, step=20)

    def killed(folder, **_):
        next(folder.iterdir()).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(retention.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            delete_checkpoint(path)
    assert kept(tmp_path) == [20]
    assert len(list(tmp_path.glob(".*"))) == 1
    clean_leftovers(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["latest", "step_00000020"]


def test_leftovers_go_and_nothing_else(tmp_path):
    path = write_checkpoint(tmp_path, step=10)
    shutil.copytree(path, tmp_path / ".step_00000020.tmp")
    shutil.copytree(path, tmp_path / ".deleted-step_00000005")
    (tmp_path / ".latest.123.tmp").write_text("step_0")
    others = ["notes.txt", ".hidden", "step_best"]
    for name in others:
        (tmp_path / name).write_text("")
    clean_leftovers(tmp_path)
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == sorted([*others, "latest", path.name])
    assert kept(tmp_path) == [10]
