from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from megatron_mdm.checkpoint.manifest import (
    FORMAT_VERSION,
    CheckpointManifest,
    SavedLayout,
    format_manifest,
)
from megatron_mdm.checkpoint.storage import CheckpointReader, record_file
from megatron_mdm.model.parameters import find_parameter
from megatron_mdm.model.sharding import list_shard_slices

# Name and which dimension Megatron divides: rows of column-parallel weights and of vocabularies,
# columns of row-parallel weights, nothing of norms.
LAYER = "decoder.layers.11."
DIVIDED = {
    "embedding.word_embeddings.weight": 0,
    "output_layer.weight": 0,
    LAYER + "self_attention.linear_qkv.weight": 0,
    LAYER + "self_attention.linear_qkv.bias": 0,
    LAYER + "self_attention.linear_proj.weight": 1,
    LAYER + "mlp.linear_fc1.weight": 0,
    LAYER + "mlp.linear_fc2.weight": 1,
}
WHOLE = [
    LAYER + "input_layernorm.weight",
    LAYER + "pre_mlp_layernorm.weight",
    LAYER + "self_attention.q_layernorm.weight",
    LAYER + "self_attention.k_layernorm.weight",
    "decoder.final_layernorm.weight",
]

tensor_sizes = st.sampled_from([1, 2, 3, 4, 5, 8])


def numbered(shape):
    """A tensor whose elements are all different."""
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def shape_of(name, divided, other):
    """A shape with so many entries along the divided dimension; a bias has no other."""
    if name.endswith(".bias"):
        return (divided,)
    return (divided, other) if DIVIDED[name] == 0 else (other, divided)


def cut(whole, name, rank, size):
    return np.concatenate(
        [whole[part] for part in list_shard_slices(name, whole.shape, rank, size)]
    )


@given(st.sampled_from(sorted(DIVIDED)), tensor_sizes, st.integers(1, 3), st.integers(1, 4))
def test_the_shards_of_all_ranks_hold_every_element_exactly_once(name, size, units, other):
    whole = numbered(shape_of(name, 2 * size * units, other))
    shards = [cut(whole, name, rank, size) for rank in range(size)]
    assert len({shard.shape for shard in shards}) == 1
    held = np.concatenate([shard.ravel() for shard in shards])
    np.testing.assert_array_equal(np.sort(held), whole.ravel())


@given(st.sampled_from(WHOLE), tensor_sizes)
def test_every_rank_holds_all_of_a_norm(name, size):
    whole = numbered((6,))
    for rank in range(size):
        np.testing.assert_array_equal(cut(whole, name, rank, size), whole)


@given(tensor_sizes, st.integers(1, 4))
def test_every_rank_holds_the_same_rows_of_gate_and_up(size, rows):
    ffn = size * rows
    # Rows of the gate projection are 0..ffn-1; the up projection of row i is 1000 + i.
    whole = np.concatenate([np.arange(ffn), 1000 + np.arange(ffn)])[:, None]
    for rank in range(size):
        gate, up = np.split(cut(whole, LAYER + "mlp.linear_fc1.weight", rank, size), 2)
        np.testing.assert_array_equal(gate[:, 0], np.arange(rank * rows, (rank + 1) * rows))
        np.testing.assert_array_equal(up, gate + 1000)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(sorted(DIVIDED)), tensor_sizes, st.integers(1, 3))
def test_a_reader_puts_the_shards_of_any_size_together_again(tmp_path_factory, name, size, units):
    whole = numbered(shape_of(name, 2 * size * units, 3))
    folder = tmp_path_factory.mktemp("checkpoint")
    files = {}
    for rank in range(size):
        path = folder / f"weights-tp{rank}-pp0-dp0.safetensors"
        tensor = torch.from_numpy(cut(whole, name, rank, size))
        save_file({f"weight/{name}": tensor}, path, {"format": "pt", "tensor_rank": str(rank)})
        files[path.name] = record_file(path)
    manifest = CheckpointManifest(
        format_version=FORMAT_VERSION,
        step=1,
        consumed_samples=1,
        layout=SavedLayout(world_size=size, tensor_parallel_size=size),
        config={},
        versions={},
        data_fingerprint="f",
        files=files,
    )
    (folder / "manifest.json").write_text(format_manifest(manifest), encoding="utf-8")
    reader = CheckpointReader(folder)
    np.testing.assert_array_equal(reader.load(name).numpy(), whole)


def test_a_name_that_no_rule_covers_is_refused():
    with pytest.raises(KeyError):
        find_parameter("decoder.layers.0.mlp.router.weight")
    with pytest.raises(KeyError):
        find_parameter("decoder.layers.x.mlp.linear_fc1.weight")
