"""Checkpoints of weights alone, from any source of whole tensors; a run can begin with them."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import Tensor

from megatron_mdm.checkpoint.manifest import (
    FORMAT_VERSION,
    WEIGHT,
    CheckpointManifest,
    SavedLayout,
    SavedModel,
)
from megatron_mdm.checkpoint.publishing import publish_checkpoint, write_aside
from megatron_mdm.checkpoint.rank_files import MAX_FILE_BYTES
from megatron_mdm.checkpoint.resharding import write_divided
from megatron_mdm.checkpoint.retention import list_saved_steps
from megatron_mdm.checkpoint.storage import name_checkpoint
from megatron_mdm.config import ModelConfig, check_model_splits, divide_model
from megatron_mdm.config.objective import RunWays
from megatron_mdm.core.errors import CheckpointError
from megatron_mdm.diffusion.interpolation import Interpolation

_BYTES_PER_WEIGHT = 4


class WeightSource(Protocol):
    """A model as full, unsharded tensors in Megatron's layout."""

    def list_names(self) -> list[str]:
        """Lists the names of all parameters."""
        ...

    def load(self, name: str) -> Tensor:
        """Loads one parameter."""
        ...


def write_weights_checkpoint(
    source: WeightSource,
    shapes: Mapping[str, tuple[int, ...]],
    folder: Path,
    *,
    model: ModelConfig,
    kind: Literal["mdm", "ar"] | None,
    seq_length: int,
    noise: Interpolation | None = None,
    run_ways: RunWays | None = None,
    tensor_parallel_size: int = 1,
    pipeline_parallel_size: int = 1,
    versions: Mapping[str, str] | None = None,
    origin: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> Path:
    """Writes weights as a checkpoint, a tensor at a time, as float32.

    The checkpoint appears whole or not at all. Memory holds the largest tensor and a rank's part
    of it.

    Args:
        source: The weights.
        shapes: Global shape of each parameter of the model.
        folder: A `checkpoints` folder of its own.
        model: The model's sizes.
        kind: Masked diffusion, or autoregressive; None, with a `config` in `origin`: what that
            says.
        seq_length: Tokens per sequence that the model was trained on.
        noise: Of its training, where it is not masks alone.
        run_ways: What else it learned, and where it predicts.
        tensor_parallel_size: Ranks per layer.
        pipeline_parallel_size: Pipeline stages.
        versions: Versions of what wrote it.
        origin: Fields of the manifest that say more of where the weights come from.
        overwrite: Replace such a checkpoint that lies there already.
        max_file_bytes: A tensor file holds at most so many bytes, or one larger tensor.

    Raises:
        CheckpointError: The weights are not those of the model, the folder is taken, or it cannot
            be written.
        ConfigError: The model cannot be divided so.
    """
    saved = SavedModel(model, kind, seq_length, noise, run_ways)
    layout = plan_weights_layout(saved, tensor_parallel_size, pipeline_parallel_size)
    final = folder / name_checkpoint(0)
    _check_names(source, shapes)
    _check_free(final, overwrite)
    parameters = {name: list(shapes[name]) for name in sorted(shapes)}
    fields = {"data_fingerprint": "", **(origin or {})}
    if "config" not in fields:
        fields["config"] = saved.to_tree()
    manifest = CheckpointManifest(
        format_version=FORMAT_VERSION,
        kind="weights",
        step=0,
        consumed_samples=0,
        layout=layout,
        versions=dict(versions or {}),
        parameters=parameters,
        **fields,
    )

    def load(name: str, _: str) -> Tensor:
        tensor = source.load(name)
        if tuple(tensor.shape) != shapes[name]:
            raise CheckpointError(
                f"The weights hold {name} in the shape {list(tensor.shape)} where the model has "
                f"{list(shapes[name])}: give them with the sizes that they belong to."
            )
        return tensor

    with write_aside(final) as aside:
        _check_space(folder, shapes)
        files = write_divided(
            load,
            parameters,
            lambda name: (WEIGHT,),
            layout,
            aside,
            num_layers=model.num_layers,
            max_file_bytes=max_file_bytes,
        )
        publish_checkpoint(aside, final, manifest.model_copy(update={"files": files}))
    return final


def plan_weights_layout(
    saved: SavedModel, tensor_parallel_size: int, pipeline_parallel_size: int
) -> SavedLayout:
    """Plans how weights alone are divided over ranks.

    Returns:
        One replica of so many ranks.

    Raises:
        ConfigError: The model cannot be divided so.
    """
    parallel = divide_model(tensor_parallel_size, pipeline_parallel_size)
    check_model_splits(saved.model, parallel, saved.seq_length)
    return SavedLayout(
        world_size=tensor_parallel_size * pipeline_parallel_size,
        tensor_parallel_size=tensor_parallel_size,
        pipeline_parallel_size=pipeline_parallel_size,
    )


def _check_names(source: WeightSource, shapes: Mapping[str, tuple[int, ...]]) -> None:
    expected, found = set(shapes), set(source.list_names())
    for problem, names in (("lack", expected - found), ("have the extra", found - expected)):
        if names:
            raise CheckpointError(
                f"The weights {problem} parameter {min(names)} ({len(names)} such in all): give "
                "them with the sizes that they belong to."
            )


def _check_free(final: Path, overwrite: bool) -> None:
    others = [path for path in list_saved_steps(final.parent).values() if path != final]
    if others:
        raise CheckpointError(
            f"{final.parent} holds {others[0].name} of a run, which would no longer be its latest: "
            "choose another folder."
        )
    if final.exists() and not overwrite:
        raise CheckpointError(
            f"{final} exists: choose another output folder, or pass --overwrite to replace it."
        )


def _check_space(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    needed = sum(_BYTES_PER_WEIGHT * math.prod(shape) for shape in shapes.values())
    if (free := shutil.disk_usage(folder).free) < needed:
        raise CheckpointError(
            f"{folder} has {free:,} bytes free, less than the {needed:,} that the weights take: "
            "free some space or choose another disk."
        )
