"""Shards that the tests start from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_mdm.data.shards import bin_path, idx_path
from megatron_mdm.data.writer import ShardWriter

DOCUMENTS = [[5, 6, 7], [8], [], [9, 10, 65_000], [1, 0]]


def write(prefix: Path, documents=DOCUMENTS, dtype=np.uint16) -> Path:
    with ShardWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(np.array(document, dtype=np.int64))
        writer.finish()
    return prefix


def build_with_megatron(prefix: Path, documents, dtype) -> Path:
    """Documents are lists of sequences."""
    builder = IndexedDatasetBuilder(str(bin_path(prefix)), dtype=dtype)
    for sequences in documents:
        for sequence in sequences:
            builder.add_item(torch.tensor(sequence, dtype=torch.int64))
        builder.end_document()
    builder.finalize(str(idx_path(prefix)))
    return prefix
