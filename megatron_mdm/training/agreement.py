"""What each rank finds out for itself, compared before a run begins.

Nodes have disks and installations of their own. A rank that cannot start tells the others instead
of letting them wait, and ranks that would train on different things hear it from each other.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

import megatron_mdm
from megatron_mdm.config import Config
from megatron_mdm.errors import ConfigError, MdmError, tell
from megatron_mdm.parallel.topology import resolve_device, start_process_group
from megatron_mdm.training.environment import library_versions
from megatron_mdm.training.plan import RunPlan

# A rank that fails alone waits so long for those that it tells.
_TELL_TIMEOUT = timedelta(seconds=60)
_STEPS = "the number of steps"


class _Finding(NamedTuple):
    """What a rank says of itself.

    Attributes:
        host: Its machine.
        failure: Why it cannot start, None if it can.
        digest: A hash of all that it found.
    """

    host: str
    failure: str | None
    digest: str


def tell_failure(config: Config, failure: MdmError) -> None:
    """Tells all ranks that this one cannot start, so that they need not wait for it.

    Args:
        config: The run.
        failure: Why. The first rank says it at once; another's is marked as told if the first rank
            has heard it.
    """
    if os.environ.get("RANK", "0") == "0":
        tell(failure)
    try:
        device = resolve_device(config.run.device)
        start_process_group(device, timeout=_TELL_TIMEOUT, takes_device=False)
        heard = _gather(_Finding(socket.gethostname(), str(failure), ""))
    # Whatever keeps the ranks from meeting, this one has its own sentence to say.
    except Exception:
        return
    failure.is_told = failure.is_told or heard[0].failure in (None, str(failure))


def compare_findings(plan: RunPlan) -> None:
    """Compares what the ranks found out. Every rank that can start calls it, within the group.

    Args:
        plan: What this rank would do.

    Raises:
        ConfigError: A rank cannot start, or would do something else; the same on every rank.
    """
    mine = _facts(plan)
    digest = hashlib.sha256(json.dumps(mine).encode()).hexdigest()
    heard = _gather(_Finding(socket.gethostname(), None, digest))
    failed = next((rank for rank, each in enumerate(heard) if each.failure is not None), None)
    if failed is not None:
        raise _alike(f"rank {failed} on {heard[failed].host} cannot start: {heard[failed].failure}")
    other = next((rank for rank, each in enumerate(heard) if each.digest != heard[0].digest), None)
    if other is None:
        return
    facts = _gather(mine | _fingerprints(plan))
    difference = _first_difference(facts[0], facts[other])
    here, there = f"rank 0 on {heard[0].host}", f"rank {other} on {heard[other].host}"
    raise _alike(f"{here} and {there} {difference}")


def _facts(plan: RunPlan) -> dict[str, str]:
    """All that a rank derives alone, by names that a user knows."""
    facts = {"the code": _code_digest()}
    facts |= {f"the version of {name}": each for name, each in library_versions().items()}
    facts |= _flattened("", plan.config.model_dump(mode="json"))
    facts[_STEPS] = str(plan.num_steps)
    facts["the precision"] = str(plan.dtype)
    facts["the training data"] = plan.data.fingerprint
    facts["the held-out data"] = plan.data.valid.fingerprint() if plan.data.valid else "none"
    return facts


def _fingerprints(plan: RunPlan) -> dict[str, str]:
    """What each set of shards holds, by its place in the configuration and its path."""
    found = {}
    for split, windows in (("train", plan.data.train), ("valid", plan.data.valid)):
        for number, source in enumerate(windows.sources if windows is not None else []):
            name = f"data.{split}.{number}.path={source.source.prefix}"
            found[name] = source.fingerprint()
    return found


def _first_difference(first: dict[str, str], other: dict[str, str]) -> str:
    """Says in words what differs: the data by its files, if it is that."""
    names = [name for name in {**first, **other} if first.get(name) != other.get(name)]
    paths = [name for name in names if name.startswith("data.") and ".path=" in name]
    if paths and set(names) <= {*paths, "the training data", "the held-out data", _STEPS}:
        values = [facts.get(paths[0], "none")[:12] for facts in (first, other)]
        return (
            f"read different data at {paths[0]} (fingerprints {values[0]} and {values[1]}): copy "
            "the shards to every node again, or name a folder that all nodes see."
        )
    values = [facts.get(names[0], "nothing")[:60] for facts in (first, other)]
    return (
        f"differ in {names[0]} ({values[0]} and {values[1]}): give all ranks the same "
        "configuration and installation."
    )


def _flattened(prefix: str, tree: Any) -> dict[str, str]:
    if isinstance(tree, dict):
        found: dict[str, str] = {}
        for name, value in tree.items():
            found |= _flattened(f"{prefix}.{name}" if prefix else str(name), value)
        return found
    return {prefix: json.dumps(tree)}


@lru_cache(maxsize=1)
def _code_digest() -> str:
    """Identifies this package's code, whatever its version says."""
    root = Path(megatron_mdm.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()


def _gather(mine: Any) -> list[Any]:
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def _alike(message: str) -> ConfigError:
    """An error that every rank raises, and the first of each machine says."""
    error = ConfigError(message)
    error.is_told = os.environ.get("LOCAL_RANK", "0") != "0"
    return error
