"""What a checkpoint is, in words."""

from __future__ import annotations

import math
from pathlib import Path

from megatron_mdm.checkpoint.manifest import RAW, CheckpointManifest, read_manifest

_KINDS = {
    "training": "weights and optimizer state of a run",
    "weights": "weights alone, for run.initial_weights",
}


def describe_checkpoint(path: Path) -> str:
    """What a checkpoint's manifest says; nothing else is read.

    Returns:
        Lines of text: progress, layout, threads, processors, versions, parameters and files with
        their sizes.

    Raises:
        CheckpointError: The manifest is missing or damaged.
    """
    manifest = read_manifest(path)
    layout = manifest.layout
    elements = sum(math.prod(shape) for shape in manifest.parameters.values())
    facts = {
        "path": str(path),
        "format_version": str(manifest.format_version),
        "holds": _KINDS[manifest.kind],
        **_describe_averages(manifest),
        **(_describe_progress(manifest) if manifest.kind == "training" else {}),
        "layout": (
            f"{layout.world_size} ranks: {layout.tensor_parallel_size} tensor-parallel x "
            f"{layout.pipeline_parallel_size} stages x {layout.data_parallel_size} replicas, "
            f"ZeRO-{layout.zero_stage}"
        ),
        **_describe_environment(manifest),
        "versions": ", ".join(f"{name} {number}" for name, number in manifest.versions.items()),
        "parameters": f"{len(manifest.parameters)} tensors, {elements:,} numbers",
        "size": f"{sum(record.num_bytes for record in manifest.files.values()):,} bytes",
    }
    lines = [f"{name:20}{value}" for name, value in facts.items()]
    lines += ["", "parameters, with global shapes:"]
    lines += [f"  {name}  {shape}" for name, shape in manifest.parameters.items()]
    lines += ["", "files, with sizes in bytes:"]
    lines += [f"  {name}  {record.num_bytes:,}" for name, record in manifest.files.items()]
    return "\n".join(lines)


def _describe_progress(manifest: CheckpointManifest) -> dict[str, str]:
    return {
        "step": f"{manifest.step:,}",
        "skipped steps": f"{manifest.skipped_steps:,}",
        "consumed samples": f"{manifest.consumed_samples:,}",
        "data fingerprint": manifest.data_fingerprint,
        **_describe_tokenizer(manifest),
    }


def _describe_averages(manifest: CheckpointManifest) -> dict[str, str]:
    """Which weights there are to choose from."""
    if manifest.average_of is not None:
        return {"average": manifest.average_of.describe()}
    averages = [f"{name} ({about})" for name, about in manifest.averages.items()]
    return {"weights": "; ".join((RAW, *averages))} if averages else {}


def _describe_tokenizer(manifest: CheckpointManifest) -> dict[str, str]:
    record = manifest.tokenizer
    if record is None:
        return {}
    return {"tokenizer": f"{record.place or record.name}, sha256 {record.sha256}"}


def _describe_environment(manifest: CheckpointManifest) -> dict[str, str]:
    environment = manifest.environment
    if environment is None:
        return {}
    return {
        "threads per process": " and ".join(map(str, environment.threads)),
        "processor": " and ".join(environment.processors),
    }
