"""Adapters that several ranks learn are those that one learns."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from adapting import learn
from pair_shards import write_pairs

from megatron_mdm.checkpoint.manifest import SavedModel
from megatron_mdm.config import ModelConfig
from megatron_mdm.hf.export import export_to_hf
from megatron_mdm.model.parameters import find_parameter_shape, list_parameter_names

VOCAB = 29
MODEL = {
    "num_layers": 2,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "ffn_hidden_size": 24,
    "vocab_size": VOCAB,
}


class RandomWeights:
    def __init__(self, saved):
        generator = torch.Generator().manual_seed(0)
        self._tensors = {
            name: 0.3 * torch.randn(find_parameter_shape(name, saved.model), generator=generator)
            for name in list_parameter_names(saved.model)
        }

    def list_names(self):
        return list(self._tensors)

    def load(self, name):
        return self._tensors[name]


def random_pairs():
    generator = np.random.default_rng(0)
    for _ in range(20):
        tokens = generator.integers(1, VOCAB, generator.integers(2, 9))
        yield np.split(tokens, [int(generator.integers(1, len(tokens)))])


@pytest.mark.parametrize("kind", ["mdm", "ar"])
def test_two_ranks_learn_what_one_learns(world_of, tmp_path, kind):
    saved = SavedModel(ModelConfig(**MODEL), kind, 24)
    folder = tmp_path / "export"
    export_to_hf(
        RandomWeights(saved), saved, folder, tokenizer_dir=None, eos_token_id=0, metadata={}
    )
    write_pairs(tmp_path / "shards", list(random_pairs()), VOCAB)
    tree = {
        "run": {"dir": "unused", "seed": 1, "device": "cpu"},
        "model": MODEL,
        # Some steps mask nothing on one of the ranks: both have to go on together.
        "objective": {"kind": kind},
        "finetuning": {"enabled": True, "fill_to": 0, "packing": False},
        "data": {
            "train": [{"path": str(tmp_path / "shards")}],
            "valid": [{"path": str(tmp_path / "shards")}],
            "seq_length": 24,
        },
        "batch": {"micro_batch_size": 1, "global_batch_size": 2},
        "optimizer": {"lr": 1e-2, "min_lr": 1e-3},
        "schedule": {"steps": 6},
    }
    ((alone, expected),) = world_of(1).run(
        learn, timeout_seconds=180, folder=str(folder), tree=tree
    )
    found = world_of(2).run(learn, timeout_seconds=180, folder=str(folder), tree=tree)
    for records, adapters in found:
        for record, other in zip(records, alone, strict=True):
            assert record == pytest.approx(other, rel=1e-5)
        for mine, theirs in zip(adapters, expected, strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5)
