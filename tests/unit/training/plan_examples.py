"""Runs that can start, and what they would have left behind."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from megatron_mdm.checkpoint.manifest import (
    FORMAT_VERSION,
    CheckpointManifest,
    SavedOptimizer,
    format_manifest,
)
from megatron_mdm.checkpoint.storage import name_checkpoint, record_file
from megatron_mdm.config import parse_config
from megatron_mdm.data.manifest import Manifest, manifest_path
from megatron_mdm.data.writer import ShardWriter
from megatron_mdm.training.data_plan import plan_data
from megatron_mdm.training.plan import make_plan

VOCAB, SEQ = 300, 8


def write_shards(prefix: Path, tokens=None, **manifest) -> Path:
    tokens = np.arange(100) if tokens is None else np.asarray(tokens)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with ShardWriter(prefix, np.uint16) as writer:
        writer.add_document(tokens)
        writer.finish()
    if manifest:
        fields = {
            "tokenizer": "tok",
            "tokenizer_sha256": "ab" * 32,
            "vocab_size": VOCAB,
            "eod_token_id": 0,
            "special_tokens": {},
            "num_documents": 1,
            "num_tokens": len(tokens),
            "max_token_id": int(tokens.max()),
            "dtype": "uint16",
            "source_files": [],
        }
        Manifest(**(fields | manifest)).write(manifest_path(prefix))
    return prefix


def changed(tree, **sections):
    return tree | {name: {**tree.get(name, {}), **fields} for name, fields in sections.items()}


def plan_of(tree, **sections):
    return make_plan(parse_config(changed(tree, **sections)))


def refusal(kind, tree, **sections) -> str:
    """The message of a refused run, after checking that nothing was left behind."""
    before = sorted(Path(tree["run"]["dir"]).parent.rglob("*"))
    with pytest.raises(kind) as caught:
        plan_of(tree, **sections)
    assert type(caught.value) is kind
    assert sorted(Path(tree["run"]["dir"]).parent.rglob("*")) == before
    message = str(caught.value)
    assert "\n" not in message
    assert re.search(r": \w.*\.$", message), "no remedy"
    return message


def write_checkpoint(tree, step=3, kind="training", **sections) -> Path:
    """As a run of this configuration would have left it, or a conversion to weights alone."""
    config = parse_config(changed(tree, **sections))
    folder = Path(tree["run"]["dir"]) / "checkpoints"
    path = folder / name_checkpoint(step)
    path.mkdir(parents=True)
    file = path / "weights-tp0-pp0-dp0.safetensors"
    stored = ("weight", "exp_avg", "exp_avg_sq") if kind == "training" else ("weight",)
    norm = {f"{name}/decoder.final_layernorm.weight": torch.ones(16) for name in stored}
    save_file(norm, file, {"format": "pt", "tensor_rank": "0"})
    manifest = CheckpointManifest(
        format_version=FORMAT_VERSION,
        kind=kind,
        step=step,
        consumed_samples=4 * step,
        config=config.model_dump(mode="json"),
        optimizer=SavedOptimizer(states=stored[1:]),
        versions={},
        data_fingerprint=plan_data(config).fingerprint,
        parameters={"decoder.final_layernorm.weight": [16]},
        files={file.name: record_file(file)},
    )
    (path / "manifest.json").write_text(format_manifest(manifest))
    (folder / "latest").write_text(path.name + "\n")
    return path
