"""Checkpoints on disk: safetensors shards under global names, and a manifest in JSON.

A checkpoint folder appears whole, by one rename, or not at all. Nothing in it can run code. Tensors
carry global parameter names, so any layout reads what any other wrote. The manifest holds a sha256
of each file and of itself.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_mdm.errors import CheckpointError
from megatron_mdm.model.sharding import Slices, shard_rule

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
LATEST = "latest"
# What is stored of every parameter: the float32 weight and AdamW's two moments.
WEIGHT, MOMENTS = "weight", ("exp_avg", "exp_avg_sq")
# Of the manifest's own content, beside it in the same JSON object.
_OWN_DIGEST = "manifest_sha256"


class FileRecord(BaseModel):
    """What a tensor file has to be.

    Attributes:
        num_bytes: Size.
        sha256: Digest of the content, in hexadecimal.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_bytes: int
    sha256: str


class SavedLayout(BaseModel):
    """The division of ranks that wrote a checkpoint.

    Attributes:
        world_size: Ranks in all.
        tensor_parallel_size: Ranks a layer: how many parts a split tensor has.
        pipeline_parallel_size: Pipeline stages.
        data_parallel_size: Replicas.
        zero_stage: ZeRO stage, 0 to 3.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    world_size: int = 1
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    data_parallel_size: int = 1
    zero_stage: int = 0


class CheckpointManifest(BaseModel):
    """What a checkpoint holds.

    Attributes:
        format_version: Version of this layout of files.
        step: Optimizer steps taken.
        consumed_samples: Samples trained on.
        layout: Division of ranks that wrote it.
        config: The run's resolved configuration.
        versions: Versions of the libraries that wrote it.
        data_fingerprint: Content of the training data; the sample order refers to it.
        predictions: Tokens predicted in training so far, for each source of the data.
        skipped_steps: Steps among them whose update was left out.
        loss_average: Moving average of the loss, for the guard against spikes; None without it.
        parameters: Global shape of every parameter.
        files: Size and digest of every tensor file.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int
    step: int
    consumed_samples: int
    layout: SavedLayout = SavedLayout()
    config: dict[str, Any]
    versions: dict[str, str]
    data_fingerprint: str
    predictions: list[int]
    skipped_steps: int = 0
    loss_average: float | None = None
    parameters: dict[str, list[int]] = {}
    files: dict[str, FileRecord] = {}


def manifest_text(manifest: CheckpointManifest) -> str:
    """A manifest as it is written: JSON with a digest of itself.

    Args:
        manifest: What the checkpoint holds.

    Returns:
        The content of `manifest.json`.
    """
    tree = manifest.model_dump(mode="json")
    return json.dumps(tree | {_OWN_DIGEST: _digest(tree)}, indent=2) + "\n"


def record_file(path: Path) -> FileRecord:
    """Reads a file back and describes what is there.

    Args:
        path: A file.

    Returns:
        Its size and digest.
    """
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return FileRecord(num_bytes=stream.tell(), sha256=digest)


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after a number of steps."""
    return f"step_{step:08d}"


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of a run.

    Args:
        folder: The run's `checkpoints` folder.

    Returns:
        Its path, or None when the run has none.

    Raises:
        CheckpointError: `latest` names a checkpoint that is not there.
    """
    pointer = folder / LATEST
    if not pointer.exists():
        return None
    name = pointer.read_text(encoding="utf-8").strip()
    if not re.fullmatch(r"step_\d+", name) or not (folder / name / MANIFEST).exists():
        whole = sorted(path.parent.name for path in folder.glob(f"step_*/{MANIFEST}"))
        remedy = f"write {whole[-1]} into it" if whole else "remove it to start anew"
        raise CheckpointError(
            f"{pointer} names {name!r}, which is not a whole checkpoint: {remedy}."
        )
    return folder / name


class CheckpointReader:
    """Reads tensors of a checkpoint, whole or in part, whatever layout wrote them.

    Args:
        path: A checkpoint's folder.

    Raises:
        CheckpointError: A file is missing, has another size than the manifest says, or is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = read_manifest(path)
        self._handles: dict[str, Any] = {}
        # (kind, name) -> files, by tensor-parallel rank
        self._places: dict[tuple[str, str], dict[int, str]] = {}
        self._stack = ExitStack()
        for name, record in self.manifest.files.items():
            self._open(name, record.num_bytes)

    def __enter__(self) -> CheckpointReader:
        """Keeps the files open for the length of the context."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the files."""
        self._stack.close()

    def names(self) -> list[str]:
        """Global names of all parameters, sorted."""
        return sorted({name for kind, name in self._places if kind == WEIGHT})

    def load(self, name: str, kind: str = WEIGHT) -> Tensor:
        """A whole tensor.

        Args:
            name: Global parameter name.
            kind: `weight`, `exp_avg` or `exp_avg_sq`.

        Returns:
            float32, of the parameter's global shape.

        Raises:
            CheckpointError: The checkpoint does not hold it.
        """
        places = self._places.get((kind, name))
        if not places:
            raise CheckpointError(
                f"{self.path} holds no {kind} of {name}: it belongs to another model."
            )
        key = f"{kind}/{name}"
        parts = [self._handles[places[rank]].get_tensor(key) for rank in sorted(places)]
        rule = shard_rule(name)
        tensor_size = self.manifest.layout.tensor_parallel_size
        if rule.dim is not None and len(parts) != tensor_size:
            raise CheckpointError(
                f"{self.path} holds {kind} of {name} from {len(parts)} of {tensor_size} "
                f"tensor-parallel ranks, so {MANIFEST} leaves out files: use another checkpoint."
            )
        if len(parts) == 1 or rule.dim is None:
            return parts[0]
        # Every rank holds a part of each block: bring the blocks together again.
        blocks = [part.chunk(rule.blocks, dim=rule.dim) for part in parts]
        ordered = [block[index] for index in range(rule.blocks) for block in blocks]
        return torch.cat(ordered, dim=rule.dim)

    def load_shard(self, name: str, slices: Sequence[Slices], kind: str = WEIGHT) -> Tensor:
        """Slices of a tensor, concatenated along the first dimension.

        Args:
            name: Global parameter name.
            slices: Parts of the whole tensor, in order.
            kind: `weight`, `exp_avg` or `exp_avg_sq`.

        Returns:
            float32.
        """
        whole = self.load(name, kind)
        return torch.cat([whole[part] for part in slices]).contiguous()

    def check_complete(self) -> None:
        """Checks that every part of each parameter's weight and moments is there, by the headers.

        Raises:
            CheckpointError: Something is missing, or has another shape or dtype.
        """
        for name, shape in self.manifest.parameters.items():
            for kind in (WEIGHT, *MOMENTS):
                self._check_parts(name, shape, kind)

    def _check_parts(self, name: str, shape: Sequence[int], kind: str) -> None:
        try:
            rule = shard_rule(name)
        except KeyError:
            raise CheckpointError(
                f"{self.path / MANIFEST} names the parameter {name!r}, which no model here has: "
                "use the version that wrote it."
            ) from None
        num_parts = self.manifest.layout.tensor_parallel_size if rule.dim is not None else 1
        places = self._places.get((kind, name), {})
        expected = list(shape)
        if rule.dim is not None:
            expected[rule.dim] //= num_parts
        if len(places) != num_parts:
            raise CheckpointError(
                f"{self.path} holds {len(places)} of {num_parts} parts of the {kind} of {name}: "
                "the checkpoint is not whole; use another."
            )
        for file in places.values():
            part = self._handles[file].get_slice(f"{kind}/{name}")
            if (found := part.get_shape()) != expected or part.get_dtype() != "F32":
                raise CheckpointError(
                    f"{self.path / file} holds {kind} of {name} as {part.get_dtype()} {found} "
                    f"where {MANIFEST} says F32 {expected}: use another checkpoint."
                )

    def _open(self, name: str, size: int) -> None:
        path = self.path / name
        if not path.exists():
            raise CheckpointError(f"{path} is missing: the checkpoint is not whole; use another.")
        if path.stat().st_size != size:
            raise CheckpointError(
                f"{path} has {path.stat().st_size} bytes where {MANIFEST} says {size}: the "
                "checkpoint is damaged; use another."
            )
        try:
            handle = self._stack.enter_context(safe_open(path, framework="pt"))
        except SafetensorError as error:
            raise CheckpointError(f"{path} is damaged ({error}): use another checkpoint.") from None
        self._handles[name] = handle
        metadata = handle.metadata() or {}
        if "tensor_rank" not in metadata:
            raise CheckpointError(
                f"{path} is damaged (it does not name its tensor-parallel rank): use another "
                "checkpoint."
            )
        rank = int(metadata["tensor_rank"])
        for key in handle.keys():  # noqa: SIM118 - the handle is no mapping
            kind, _, parameter = key.partition("/")
            self._places.setdefault((kind, parameter), {})[rank] = name


def read_manifest(path: Path) -> CheckpointManifest:
    """Reads and checks a manifest.

    Args:
        path: A checkpoint's folder.

    Returns:
        What the checkpoint should hold; its files are not looked at.

    Raises:
        CheckpointError: It is missing, damaged, altered or of another version.
    """
    file = path / MANIFEST
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{file} is missing, so {path.name} is not a whole checkpoint: use another."
        ) from None
    except ValueError as error:
        raise CheckpointError(f"{file} is damaged ({error}): use another checkpoint.") from None
    # First, since another version may have other fields.
    version = tree.get("format_version") if isinstance(tree, dict) else None
    if isinstance(version, int) and version != FORMAT_VERSION:
        raise CheckpointError(
            f"{file} has format_version={version}, but this version reads {FORMAT_VERSION}: use "
            "the version that wrote it."
        )
    digest = tree.pop(_OWN_DIGEST, None) if isinstance(tree, dict) else None
    try:
        manifest = CheckpointManifest.model_validate(tree)
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(str(part) for part in problem["loc"]) or "all of it"
        raise CheckpointError(
            f"{file} is damaged ({field}: {problem['msg']}): use another checkpoint."
        ) from None
    if digest != _digest(tree):
        raise CheckpointError(
            f"{file} is damaged or was altered (its content has sha256 {_digest(tree)} where it "
            f"says {digest}): use another checkpoint."
        )
    return manifest


def _digest(tree: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
