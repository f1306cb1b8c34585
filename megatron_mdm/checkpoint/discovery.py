"""Discovery: is a checkpoint whole, and from which one does a run resume? All ranks agree."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from megatron_mdm.checkpoint.manifest import MANIFEST, CheckpointManifest, read_manifest
from megatron_mdm.checkpoint.retention import list_saved_steps
from megatron_mdm.checkpoint.storage import LATEST, CheckpointReader, record_file
from megatron_mdm.core.errors import CheckpointError
from megatron_mdm.core.remarks import warn
from megatron_mdm.distributed.gathering import gather

if TYPE_CHECKING:
    # For types alone: offline tools start without Megatron-Core and DeepSpeed.
    from megatron_mdm.distributed.mesh import Mesh

OnDamage = Literal["previous", "refuse"]
# Hashing releases the interpreter lock, and one thread cannot keep a fast disk busy.
_HASH_THREADS = 4


class Candidates(NamedTuple):
    """Checkpoints that a run could resume from.

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
    """Checks a checkpoint by its manifest and headers: no tensor is read.

    Raises:
        CheckpointError: A file is missing, has another size, or a tensor is not all there.
    """
    reader = CheckpointReader(path)
    reader.check_complete()
    return reader.manifest


def find_checkpoint(folder: Path, on_damage: OnDamage) -> Path | None:
    """Finds the checkpoint to resume from, by sizes and headers: for before the ranks have met.

    Args:
        folder: The run's `checkpoints` folder.
        on_damage: `previous`: pass over damaged ones.

    Returns:
        Its path, or None when there is no checkpoint at all.

    Raises:
        CheckpointError: None is whole, the first to try is damaged and `on_damage` is `refuse`, or
            the one to take holds weights alone.
    """

    def find_problem(path: Path) -> str:
        try:
            check_headers(path)
        except CheckpointError as error:
            return str(error)
        return ""

    return _choose(folder, _list_candidates(folder), on_damage, find_problem, lambda _: None)


def choose_checkpoint(folder: Path, on_damage: OnDamage, mesh: Mesh) -> Path | None:
    """Chooses the checkpoint to resume from, every byte checked; all ranks call it and share it.

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
    candidates = gather(_list_candidates(folder))[0]

    def say(message: str) -> None:
        if message and mesh.rank == 0:
            warn(message)

    say(candidates.problem)
    say(candidates.note)
    return _choose(folder, candidates, on_damage, lambda path: find_damage(path, mesh), say)


def find_damage(path: Path, mesh: Mesh) -> str:
    """Checks every byte of a checkpoint. Every rank calls it; they share the work.

    Args:
        path: Its folder, the same on every rank.
        mesh: This rank's place.

    Returns:
        What is wrong with it, the same on every rank; empty: nothing.
    """
    problem = ""
    try:
        verify_checkpoint(path, part=mesh.rank, num_parts=mesh.world_size)
    except CheckpointError as error:
        problem = str(error)
    return next(filter(None, gather(problem)), "")


def _choose(
    folder: Path,
    candidates: Candidates,
    on_damage: OnDamage,
    find_problem: Callable[[Path], str],
    say: Callable[[str], None],
) -> Path | None:
    """The first candidate that has no problem."""
    if candidates.problem and (on_damage == "refuse" or not candidates.names):
        raise CheckpointError(candidates.problem)
    problems: list[str] = []
    for name in candidates.names:
        path = folder / name
        problem = find_problem(path)
        if not problem:
            _check_resumable(path, read_manifest(path))
            if problems:
                say(f"going on from {path}, the newest checkpoint before that is whole.")
            return path
        if on_damage == "refuse":
            raise CheckpointError(f"{name} is damaged and checkpoint.on_damage=refuse: {problem}")
        say(problem)
        problems.append(problem)
    if problems:
        raise CheckpointError(
            f"{folder} holds no whole checkpoint to go on from; the first: {problems[0]}"
        )
    return None


def _list_candidates(folder: Path) -> Candidates:
    steps = list_saved_steps(folder)
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
    # A user who writes an older name into `latest` goes back to it: newer ones are not tried.
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
