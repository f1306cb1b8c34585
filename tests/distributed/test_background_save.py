from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import resuming
from layouts import LAYOUTS
from worlds import RankFailure, World

from megatron_mdm.checkpoint.discovery import verify_checkpoint

SIZE, PARALLEL = LAYOUTS["dp2-zero2"]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


@pytest.mark.parametrize("name", ["dp2-zero3", "tp2-zero1", "pp2-zero2"])
def test_saving_in_the_background_changes_neither_training_nor_files(
    world_of: Callable[[int], World], tmp_path: Any, name: str
) -> None:
    size, parallel = LAYOUTS[name]
    norms = [
        world_of(size).run(
            resuming.train_while_saving,
            overrides=parallel,
            folder=str(tmp_path / str(background)),
            background=background,
        )
        for background in (False, True)
    ]
    assert norms[0] == norms[1]
    plain, background = contents(tmp_path / "False"), contents(tmp_path / "True")
    assert background == plain
    assert {Path(file).parts[0] for file in plain} == {"latest", "step_00000002", "step_00000003"}


@pytest.mark.parametrize("full_rank", [0, 1])
@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_of_one_rank_is_known_to_all(
    world_of: Callable[[int], World], tmp_path: Any, full_rank: int, background: bool
) -> None:
    common = {"overrides": PARALLEL, "full_rank": full_rank, "background": background}
    said = world_of(SIZE).run(
        resuming.save_without_space, folder=str(tmp_path / "a"), on_write_error="stop", **common
    )
    assert said[0] == said[1]
    first, second, third, last = said[0]
    # In the background the error waits for the next call, which then saves nothing.
    error = third if background else second
    assert f"step_00000002.tmp cannot be written by rank {full_rank} (" in error
    assert [first, second if background else third, last] == ["", "", ""]
    saved = {path.name for path in (tmp_path / "a").glob("step_*")}
    assert saved == {"step_00000001"} | (set() if background else {"step_00000003"})
    said = world_of(SIZE).run(
        resuming.save_without_space, folder=str(tmp_path / "b"), on_write_error="continue", **common
    )
    assert said == [[""] * 4] * SIZE
    assert {path.name for path in (tmp_path / "b").glob("step_*")} == {
        "step_00000001",
        "step_00000003",
    }


def test_a_rank_killed_while_it_writes_leaves_the_checkpoint_before(
    world_of: Callable[[int], World], tmp_path: Any
) -> None:
    with pytest.raises(RankFailure) as caught:
        world_of(SIZE).run(
            resuming.die_while_saving,
            overrides=PARALLEL,
            folder=str(tmp_path),
            dying_rank=1,
        )
    assert caught.value.rank == 1
    assert (tmp_path / "latest").read_text() == "step_00000001\n"
    verify_checkpoint(tmp_path / "step_00000001")
    assert not (tmp_path / "step_00000002").exists()


@pytest.mark.parametrize("damaged_file", [0, 1])
def test_all_ranks_pass_over_damage_that_one_of_them_finds(
    world_of: Callable[[int], World], tmp_path: Any, damaged_file: int
) -> None:
    world_of(SIZE).run(
        resuming.train_while_saving, overrides=PARALLEL, folder=str(tmp_path), background=False
    )
    choose = {"overrides": PARALLEL, "folder": str(tmp_path)}
    found = world_of(SIZE).run(resuming.choose, on_damage="refuse", **choose)
    assert found == ["step_00000003"] * SIZE
    file = sorted((tmp_path / "step_00000003").glob("*.safetensors"))[damaged_file]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    found = world_of(SIZE).run(resuming.choose, on_damage="previous", **choose)
    assert found == ["step_00000002"] * SIZE
    refused = world_of(SIZE).run(resuming.choose, on_damage="refuse", **choose)
    assert refused[0] == refused[1]
    assert str(file) in refused[0]
