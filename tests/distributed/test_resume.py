from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import resuming
import torch
from layouts import LAYOUTS, layout
from worlds import World

from megatron_mdm.checkpoint.discovery import verify_checkpoint
from megatron_mdm.checkpoint.reshape import reshard_checkpoint
from megatron_mdm.checkpoint.storage import CheckpointReader

TIED = {"model.tie_embeddings": True}
PASSED_BY = {"model.stochastic_depth": 0.4}
ANNEALED = {"objective.attention_annealing_steps": 4}
MIXTURE = {"objective": {"kind": "mixture", "ar_share": 0.3, "group_size": 2}}
DROPOUT = {"model.hidden_dropout": 0.1, "model.attention_dropout": 0.1}


@pytest.mark.parametrize(
    ("name", "settings", "dtype"),
    [
        ("dp2-zero1", DROPOUT, "fp32"),
        ("dp2-zero2", {}, "bf16"),
        ("dp2-zero3", DROPOUT, "fp32"),
        ("dp2-zero3", {}, "bf16"),
        ("dp2-zero1", DROPOUT, "bf16"),
        ("pp2-zero1", TIED, "bf16"),
        ("tp2-sp-pp2-zero2", TIED | DROPOUT | PASSED_BY, "fp32"),
        ("tp2-dp2-zero1", TIED | MIXTURE, "bf16"),
        # Saved while attention widens, and full in the last step.
        ("pp2-zero1", ANNEALED | {"model.qkv_bias": True, "model.qk_norm": True}, "fp32"),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    world_of: Callable[[int], World],
    tmp_path: Any,
    name: str,
    settings: dict[str, Any],
    dtype: str,
) -> None:
    size, parallel = LAYOUTS[name]
    common = {"overrides": parallel | settings, "folder": str(tmp_path), "dtype": dtype}
    uninterrupted = world_of(size).run(resuming.run, resume=False, **common)
    resumed = world_of(size).run(resuming.run, resume=True, **common)
    assert resumed == uninterrupted
    assert len(resumed[0]) == resuming.NUM_STEPS - resuming.SAVED_AFTER


ONE = (1, layout(zero=0))


@pytest.mark.parametrize(
    ("saved_by", "resumed_by"),
    [
        (ONE, LAYOUTS["tp2-sp-pp2-zero2"]),
        (ONE, LAYOUTS["dp2-zero3"]),
        (LAYOUTS["tp2-dp2-zero3"], ONE),
        (LAYOUTS["tp2-pp2-zero1"], LAYOUTS["dp4-zero1"]),
        (LAYOUTS["pp4-zero1"], LAYOUTS["tp2-dp2-zero2"]),
        (LAYOUTS["dp2-zero1"], LAYOUTS["pp2-dp2-zero0"]),
    ],
    ids=["one-to-tp-pp", "one-to-zero3", "zero3-to-one", "tp-pp-to-dp4", "pp4-to-tp", "dp-to-pp"],
)
@pytest.mark.parametrize("settings", [PASSED_BY, TIED], ids=["untied", "tied"])
def test_a_run_goes_on_under_another_layout(
    world_of: Callable[[int], World],
    tmp_path: Any,
    saved_by: tuple[int, dict[str, Any]],
    resumed_by: tuple[int, dict[str, Any]],
    settings: dict[str, Any],
) -> None:
    curves = []
    for resume, (size, parallel) in enumerate((saved_by, resumed_by)):
        overrides = parallel | settings
        curves.append(
            world_of(size).run(
                resuming.run, overrides=overrides, folder=str(tmp_path), resume=bool(resume)
            )[0]
        )
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-5)


MATRIX = {
    "one": ONE,
    **{
        name: LAYOUTS[name]
        for name in (
            "tp2-zero1",
            "pp2-zero1",
            "dp2-zero1",
            "dp2-zero2",
            "dp2-zero3",
            "tp2-pp2-zero1",
        )
    },
}


@pytest.fixture(scope="module")
def saved_by_each(
    world_of: Callable[[int], World], tmp_path_factory: pytest.TempPathFactory
) -> list[str]:
    """A checkpoint of a short run under each layout of the matrix."""
    root = tmp_path_factory.mktemp("matrix")
    for name, (size, parallel) in MATRIX.items():
        world_of(size).run(
            resuming.train_while_saving,
            overrides=parallel,
            folder=str(root / name),
            background=name != "one",
        )
    return [str(root / name / "step_00000003") for name in MATRIX]


@pytest.mark.parametrize("name", MATRIX)
def test_what_any_layout_saved_another_holds_bit_for_bit(
    world_of: Callable[[int], World], saved_by_each: list[str], tmp_path: Any, name: str
) -> None:
    size, parallel = MATRIX[name]
    world_of(size).run(
        resuming.save_again, overrides=parallel, sources=saved_by_each, folder=str(tmp_path)
    )
    for index, source in enumerate(saved_by_each):
        again = tmp_path / f"step_{index:08d}"
        assert len(list(again.glob("*.safetensors"))) > size
        verify_checkpoint(again)
        before = CheckpointReader(Path(source))
        after = CheckpointReader(again)
        assert after.list_names() == before.list_names()
        for parameter in before.list_names():
            for kind in before.manifest.stored_kinds:
                assert torch.equal(after.load(parameter, kind), before.load(parameter, kind))


@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 2)])
def test_a_reshaped_checkpoint_goes_on(
    world_of: Callable[[int], World], tmp_path: Any, tensor: int, pipeline: int
) -> None:
    size, parallel = LAYOUTS["tp2-zero1"]
    run = functools.partial(world_of(size).run, resuming.run, overrides=parallel)
    uninterrupted = run(folder=str(tmp_path / "whole"), resume=False)
    reshard_checkpoint(
        tmp_path / "whole" / f"step_{resuming.SAVED_AFTER:08d}",
        tmp_path / "reshaped",
        tensor_parallel_size=tensor,
        pipeline_parallel_size=pipeline,
    )
    assert run(folder=str(tmp_path / "reshaped"), resume=True) == uninterrupted
