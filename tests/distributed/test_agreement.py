"""One rank of each machine reads what tells the data from other data; the others take its word."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from worlds import World

from megatron_mdm.config import parse_config
from megatron_mdm.core.errors import ConfigError
from megatron_mdm.data.positional_file import PositionalFile
from megatron_mdm.data.writer import ShardWriter
from megatron_mdm.distributed.processes import start_process_group
from megatron_mdm.training.agreement import compare_findings
from megatron_mdm.training.plan import make_plan

NUM_SOURCES = 5
TREE = {
    "run": {"dir": "run", "device": "cpu"},
    "model": {
        "num_layers": 2,
        "hidden_size": 16,
        "num_attention_heads": 4,
        "ffn_hidden_size": 24,
        "vocab_size": 300,
    },
    "data": {
        "train": [{"path": f"s{number}"} for number in range(NUM_SOURCES)],
        "seq_length": 8,
    },
    "batch": {"micro_batch_size": 1, "global_batch_size": 4},
    "schedule": {"steps": 5},
}


def agreed(folders: list[str], local_ranks: list[str]) -> tuple[str, int, str]:
    """What this rank learns of the data, how often it read tokens, and why it cannot start.

    One relative path leads each rank to the files in its folder, as on machines with own disks.
    """
    rank = int(os.environ["RANK"])
    before, folder = os.environ["LOCAL_RANK"], Path.cwd()
    os.chdir(folders[rank])
    os.environ["LOCAL_RANK"] = local_ranks[rank]
    reads = 0
    real = PositionalFile.fill

    def count(self: PositionalFile, out: Any, offset_bytes: int) -> None:
        nonlocal reads
        reads += self.path.suffix == ".bin"
        real(self, out, offset_bytes)

    PositionalFile.fill = count  # type: ignore[method-assign]
    try:
        start_process_group(torch.device("cpu"))
        plan = compare_findings(make_plan(parse_config(TREE)))
        return plan.data.fingerprint, reads, ""
    except ConfigError as error:
        return "", reads, str(error)
    finally:
        PositionalFile.fill = real  # type: ignore[method-assign]
        os.environ["LOCAL_RANK"] = before
        os.chdir(folder)


def write_sources(folder: Path, seed: int) -> str:
    """Small sources, each of another size."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    for number in range(NUM_SOURCES):
        with ShardWriter(folder / f"s{number}", np.uint16) as writer:
            writer.add_document(rng.integers(0, 299, 1000 + number))
            writer.finish()
    return str(folder)


@pytest.mark.parametrize(
    ("local_ranks", "read_for_fingerprint"),
    [
        (["0", "1"], [1, 0]),
        # Two ranks that each believe to be the first of their machine.
        (["0", "0"], [1, 1]),
        # A launcher within a launcher: nobody is the first, so each reads for itself.
        (["1", "1"], [1, 1]),
    ],
)
def test_ranks_of_one_machine_share_what_one_has_read(
    world_of: Callable[[int], World], tmp_path, local_ranks, read_for_fingerprint
):
    folder = write_sources(tmp_path / "a", seed=0)
    told = world_of(2).run(agreed, folders=[folder, folder], local_ranks=local_ranks)
    assert len(told[0][0]) == 64
    assert [(fingerprint, failure) for fingerprint, _, failure in told] == [(told[0][0], "")] * 2
    # The first process looks for ids beyond the vocabulary as well.
    assert [reads for _, reads, _ in told] == [
        NUM_SOURCES * (times + (rank == 0)) for rank, times in enumerate(read_for_fingerprint)
    ]


def test_rank_with_other_files_does_not_take_the_word_of_its_machines_first(
    world_of: Callable[[int], World], tmp_path
):
    folders = [write_sources(tmp_path / name, seed) for name, seed in (("a", 0), ("b", 1))]
    told = world_of(2).run(agreed, folders=folders, local_ranks=["0", "1"])
    assert told[0][2] == told[1][2]
    assert "read different data at data.train.0.path=s0 (fingerprints " in told[0][2]


def test_copies_with_the_same_content_are_the_same_data(world_of: Callable[[int], World], tmp_path):
    folders = [write_sources(tmp_path / name, seed=0) for name in ("a", "b")]
    told = world_of(2).run(agreed, folders=folders, local_ranks=["0", "1"])
    assert told[0][0] == told[1][0]
    # Other files, so that the second rank reads its own.
    assert [reads for _, reads, _ in told] == [2 * NUM_SOURCES, NUM_SOURCES]
