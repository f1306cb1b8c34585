"""Checkpoints written by hand: with safetensors, json and hashlib, not by the package."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from megatron_mdm.checkpoint.manifest import FORMAT_VERSION

FC1 = "decoder.layers.0.mlp.linear_fc1.weight"
FC2 = "decoder.layers.0.mlp.linear_fc2.weight"
NORM = "decoder.final_layernorm.weight"
EMBEDDING = "embedding.word_embeddings.weight"
SHAPES = {FC1: (16, 3), FC2: (3, 8), NORM: (3,), EMBEDDING: (12, 3)}


KINDS = {"weights": ("weight",), "optimizer": ("exp_avg", "exp_avg_sq")}


def whole_tensors(seed: int = 0, kinds=("weight", "exp_avg", "exp_avg_sq")):
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{kind}/{name}": torch.randn(shape, generator=generator)
        for kind in kinds
        for name, shape in SHAPES.items()
    }


def part_of(key, tensor, rank, size):
    """By hand, not by the package's rules: gate and up are halves, each cut by rows."""
    name = key.partition("/")[2]
    if name == FC1:
        return torch.cat([half.chunk(size)[rank] for half in tensor.chunk(2)]).clone()
    if name == NORM:
        return tensor.clone()
    return tensor.chunk(size, dim=1 if "linear_fc2" in name else 0)[rank].contiguous().clone()


def record(file: Path) -> dict:
    content = file.read_bytes()
    return {"num_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def write_manifest(path: Path, tree: dict) -> None:
    digest = hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
    (path / "manifest.json").write_text(json.dumps(tree | {"manifest_sha256": digest}))


def change_manifest(path: Path, change) -> None:
    """Changes a manifest as its author would, its digest included."""
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["manifest_sha256"]
    change(manifest)
    write_manifest(path, manifest)


def write_checkpoint(
    folder: Path, tensor_size: int = 1, step: int = 20, seed: int = 0, **changes
) -> Path:
    """Norms, which every rank holds, are written by rank 0 alone."""
    path = folder / f"step_{step:08d}"
    path.mkdir(parents=True)
    files = {}
    for rank in range(tensor_size):
        hooks = {"hooks": ("hook.ema",)} if changes.get("hook_states") else {}
        everything = whole_tensors(seed, sum((KINDS | hooks).values(), ()))
        for file, kinds in (KINDS | hooks).items():
            tensors = {
                key: part_of(key, tensor, rank, tensor_size)
                for key, tensor in everything.items()
                if key.partition("/")[0] in kinds and (rank == 0 or not key.endswith(NORM))
            }
            target = path / f"{file}-tp{rank}-pp0-dp0-0.safetensors"
            save_file(tensors, target, {"format": "pt", "tensor_rank": str(rank)})
            files[target.name] = record(target)
    manifest = {
        "format_version": FORMAT_VERSION,
        "kind": "training",
        "step": step,
        "consumed_samples": 8 * step,
        "layout": {
            "world_size": tensor_size,
            "tensor_parallel_size": tensor_size,
            "pipeline_parallel_size": 1,
            "data_parallel_size": 1,
            "zero_stage": 0,
        },
        "config": {},
        "versions": {"torch": "2"},
        "environment": {"threads": [1, 2], "processors": ["a CPU, AVX2"]},
        "data_fingerprint": "f",
        "skipped_steps": 0,
        "optimizer": {"states": ["exp_avg", "exp_avg_sq"], "numbers": {"step": float(step)}},
        "state": {},
        "parameters": {name: list(shape) for name, shape in SHAPES.items()},
        "files": files,
    }
    if changes.get("kind") == "weights":
        manifest["optimizer"] = {}
    write_manifest(path, manifest | changes)
    (folder / "latest").write_text(path.name + "\n")
    return path
