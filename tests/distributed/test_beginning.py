"""Runs that begin with the weights of another run's checkpoint, under any layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import resuming
from layouts import LAYOUTS, layout
from weight_pieces import assemble
from worlds import World

from megatron_mdm.checkpoint.storage import CheckpointReader

GetWorld = Callable[[int], World]

IMPORTED = {"model.num_query_groups": 2, "model.qkv_bias": True, "model.qk_norm": True}


@pytest.fixture(scope="module")
def source(
    world_of: GetWorld, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, tuple[float, float]]:
    """A run of one process, and its losses at its end."""
    folder = tmp_path_factory.mktemp("source") / "checkpoints"
    (losses,) = world_of(1).run(
        resuming.train_and_save, overrides=IMPORTED | layout(zero=0), folder=str(folder)
    )
    return folder.parent, losses


def _beginning_with(folder: Path) -> dict[str, Any]:
    return IMPORTED | {"run.initial_weights": str(folder)}


@pytest.mark.parametrize(
    "name", ["tp2-zero1", "tp2-sp-zero0", "pp2-zero1", "dp2-zero3", "tp2-sp-pp2x2-zero2"]
)
def test_a_run_begins_where_one_process_ended(
    world_of: GetWorld, source: tuple[Path, tuple[float, float]], name: str
) -> None:
    folder, (held_out, loss) = source
    size, parallel = LAYOUTS[name]
    ranks = world_of(size).run(resuming.begin, overrides=_beginning_with(folder) | parallel)
    for found in ranks:
        assert found["held_out"] == pytest.approx(held_out, rel=1e-6)
        assert found["loss"] == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "dtype"), [("zero1", "bf16"), ("dp2-zero3", "bf16"), ("tp2-zero0", "fp32")]
)
def test_the_optimizer_holds_the_weights_to_the_bit(
    world_of: GetWorld, source: tuple[Path, tuple[float, float]], name: str, dtype: str
) -> None:
    folder, _ = source
    size, parallel = LAYOUTS[name]
    overrides = _beginning_with(folder) | parallel
    ranks = world_of(size).run(resuming.begin, overrides=overrides, dtype=dtype)
    weights = assemble([piece for found in ranks for piece in found["weights"]])
    reader = CheckpointReader(folder / "checkpoints" / "step_00000002")
    assert sorted(weights) == reader.list_names()
    for parameter, values in weights.items():
        np.testing.assert_array_equal(values, reader.load(parameter).numpy(), parameter)


def test_every_rank_tells_of_a_damaged_byte(
    world_of: GetWorld, source: tuple[Path, tuple[float, float]], tmp_path: Path
) -> None:
    path = tmp_path / "step_00000002"
    path.mkdir()
    for file in (source[0] / "checkpoints" / path.name).iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    overrides = _beginning_with(path) | LAYOUTS["tp2-zero1"][1]
    assert world_of(2).run(resuming.verify, overrides=overrides) == [str(path)] * 2
    damaged = sorted(path.glob("*.safetensors"))[0]
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    first, second = world_of(2).run(resuming.verify, overrides=overrides)
    assert first == second
    assert f"{damaged} has" in first
