"""Is a checkpoint whole, and which one does a run go on from? All ranks find the same answer."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch.distributed as dist

from megatron_mdm.checkpoint.keeping import saved_steps
from megatron_mdm.checkpoint.storage import (
    LATEST,
    MANIFEST,
    CheckpointManifest,
    CheckpointReader,
    read_manifest,
    record_file,
)
from megatron_mdm.core.errors import CheckpointError

if TYPE_CHECKING:
    # For types alone: offline tools start without Megatron-Core and DeepSpeed.
    from megatron_mdm.distributed.mesh import Mesh

OnDamage = Literal["previous", "refuse"]
# Hashing lets other threads run, and one alone does not fill a fast disk.
_HASH_THREADS = 4


class Candidates(NamedTuple):
    """Checkpoints that a run could go on from.

    Attributes:
        names: Folder names, the one to try first at the front.
        problem: What is wrong with `latest`; empty: nothing.
        note: What a user should know of the choice; empty: nothing.
    """

    names: list[str]
    problem: str
    note: str


def verify_checkpoint(path: Path, *, part: int = 0, num_parts: int = 1) -> CheckpointManifest:
    """Checks that a checkpoint is what was written: its manifest, its tensors, and every byte.

    Args:
        path: Its folder.
        part: Which of the checksums to compute, 0 to num_parts - 1; all else is always checked.
        num_parts: Processes that share the checksums.

    Returns:
        The manifest.

    Raises:
        CheckpointError: It is not whole; the message names file, what was expected and found.
    """
    manifest = check_headers(path)
    names = sorted(manifest.files)[part::num_parts]
    try:
        with ThreadPoolExecutor(_HASH_THREADS) as executor:
            found = list(executor.map(record_file, [path / name for name in names]))
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror}, {error.filename}): use another checkpoint."
        ) from None
    for name, record in zip(names, found, strict=True):
        if record != (expected := manifest.files[name]):
            raise CheckpointError(
                f"{path / name} has {record.num_bytes} bytes with sha256 {record.sha256} where "
                f"{MANIFEST} says {expected.num_bytes} with {expected.sha256}: the checkpoint is "
                "damaged; use another."
            )
    return manifest


def check_headers(path: Path) -> CheckpointManifest:
    """Checks all of a checkpoint that is cheap to check: no tensor is read.

    Args:
        path: Its folder.

    Returns:
        The manifest.

    Raises:
        CheckpointError: A file is missing, has another size, or a tensor is not all there.
    """
    with CheckpointReader(path) as reader:
        reader.check_complete()
        return reader.manifest


def find_checkpoint(folder: Path, on_damage: OnDamage) -> Path | None:
    """The checkpoint to go on from, by sizes and headers alone: for before the ranks have met.

    Args:
        folder: The run's `checkpoints` folder.
        on_damage: `previous`: pass over damaged ones.

    Returns:
        Its path, or None when there is no checkpoint at all.

    Raises:
        CheckpointError: None is whole, the first to try is damaged and `on_damage` is `refuse`, or
            the one to take holds weights alone.
    """
    candidates = _candidates(folder)
    damage = _Damage(on_damage, candidates)
    for path in damage.each(folder):
        try:
            manifest = check_headers(path)
        except CheckpointError as error:
            damage.found(path, str(error))
        else:
            _check_resumable(path, manifest)
            return path
    return None


def choose_checkpoint(folder: Path, on_damage: OnDamage, mesh: Mesh) -> Path | None:
    """The checkpoint to go on from, every byte checked. Every rank calls it; they share the work.

    Damage and a stale `latest` are told on standard error.

    Args:
        folder: The run's `checkpoints` folder.
        on_damage: `previous`: pass over damaged ones.
        mesh: This rank's place.

    Returns:
        The same path on every rank, or None when there is no checkpoint at all.

    Raises:
        CheckpointError: On every rank alike: none is whole, the first to try is damaged and
            `on_damage` is `refuse`, or the one to take holds weights alone.
    """
    # Ranks that list a network folder for themselves may see different states of it.
    candidates = _gathered(_candidates(folder) if mesh.rank == 0 else None, mesh)[0]
    damage = _Damage(on_damage, candidates)
    if mesh.rank == 0:
        for line in filter(None, (candidates.problem, candidates.note)):
            _warn(line)
    for path in damage.each(folder):
        problem = ""
        try:
            verify_checkpoint(path, part=mesh.rank, num_parts=mesh.world_size)
        except CheckpointError as error:
            problem = str(error)
        problem = next(filter(None, _gathered(problem, mesh)), "")
        if not problem:
            _check_resumable(path, read_manifest(path))
            if mesh.rank == 0 and damage.messages:
                _warn(f"going on from {path}, the newest checkpoint before that is whole.")
            return path
        damage.found(path, problem)
        if mesh.rank == 0:
            _warn(problem)
    return None


class _Damage:
    """What to do about each damaged candidate."""

    def __init__(self, on_damage: OnDamage, candidates: Candidates) -> None:
        self._on_damage = on_damage
        self._candidates = candidates
        self.messages: list[str] = []

    def each(self, folder: Path) -> Iterator[Path]:
        """Yields the candidates.

        Raises:
            CheckpointError: `latest` is stale and that is refused, or no candidate was taken.
        """
        candidates = self._candidates
        if candidates.problem and (self._on_damage == "refuse" or not candidates.names):
            raise CheckpointError(candidates.problem)
        for name in candidates.names:
            yield folder / name
        if self.messages:
            raise CheckpointError(
                f"{folder} holds no whole checkpoint to go on from; the first: {self.messages[0]}"
            )

    def found(self, path: Path, problem: str) -> None:
        """Notes damage.

        Raises:
            CheckpointError: It is refused.
        """
        if self._on_damage == "refuse":
            raise CheckpointError(
                f"{path.name} is damaged and checkpoint.on_damage=refuse: {problem}"
            )
        self.messages.append(problem)


def _candidates(folder: Path) -> Candidates:
    steps = saved_steps(folder)
    names = [path.name for path in steps.values()]
    pointer = folder / LATEST
    if not pointer.exists():
        note = f"{pointer} is missing: going on from the newest checkpoint." if names else ""
        return Candidates(names, "", note)
    name = pointer.read_text(encoding="utf-8", errors="replace").strip()
    match = re.fullmatch(r"step_(\d+)", name)
    if match is None or name not in names:
        remedy = f"write {names[0]} into it" if names else "remove it to start anew"
        problem = f"{pointer} names {name!r}, which is not a checkpoint there: {remedy}."
        earlier = [path.name for step, path in steps.items() if match and step < int(match[1])]
        return Candidates(earlier or names, problem, "")
    # Who writes an older name into `latest` goes back to it, and not to newer ones.
    chosen = int(match[1])
    note = f"{pointer} names {name}, so newer checkpoints, {names[0]} among them, are left aside."
    tried = [path.name for step, path in steps.items() if step <= chosen]
    return Candidates(tried, "", note if names[0] != name else "")


def _check_resumable(path: Path, manifest: CheckpointManifest) -> None:
    if manifest.kind == "weights":
        raise CheckpointError(
            f"{path} holds weights without the optimizer's state, so that no run can go on from "
            f"it: choose another run.dir and start there with run.initial_weights={path}."
        )


def _gathered(mine: Any, mesh: Mesh) -> list[Any]:
    if mesh.world_size == 1:
        return [mine]
    everyone: list[Any] = [None] * mesh.world_size
    dist.all_gather_object(everyone, mine)
    return everyone


def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr, flush=True)  # noqa: T201 - for the user
