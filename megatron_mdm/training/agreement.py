"""What each rank finds out for itself, compared before a run begins.

Nodes have disks and installations of their own. A rank that cannot start tells the others instead
of letting them wait, and ranks that would train on different things hear it from each other.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
from dataclasses import replace
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

import megatron_mdm
from megatron_mdm.checkpoint.discovery import choose_checkpoint
from megatron_mdm.config import Config
from megatron_mdm.core.errors import ConfigError, MdmError, tell
from megatron_mdm.data.opening import read_file_states
from megatron_mdm.distributed.gathering import gather
from megatron_mdm.distributed.mesh import Mesh
from megatron_mdm.distributed.processes import leads_machine, resolve_device, start_process_group
from megatron_mdm.training.data_plan import DataContent
from megatron_mdm.training.environment import gather_environment, list_versions
from megatron_mdm.training.initial_weights import verify_initial_weights
from megatron_mdm.training.plan import RunPlan, resume_plan

# A rank that fails alone waits so long for those that it tells.
_TELL_TIMEOUT = timedelta(seconds=60)
_STEPS = "the number of steps"


class _Finding(NamedTuple):
    """What a rank says of itself.

    Attributes:
        host: Its machine.
        failure: Why it cannot start, None if it can.
        digest: A hash of all that it found, but for the content of the data.
        files: A hash of which files hold the data.
        content: What they hold; None where it has not read them.
    """

    host: str
    failure: str | None
    digest: str = ""
    files: str = ""
    content: DataContent | None = None


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
        heard = gather(_Finding(socket.gethostname(), str(failure)))
    # Whatever keeps the ranks from meeting, this rank still tells its own failure.
    except Exception:
        return
    failure.is_told = failure.is_told or heard[0].failure in (None, str(failure))


def compare_findings(plan: RunPlan) -> RunPlan:
    """Compares what the ranks found out. Every rank that can start calls it, within the group.

    One rank of each machine has read the tokens that identify the data; the others take its word if
    they see the same files.

    Args:
        plan: What this rank would do.

    Returns:
        The plan, which knows what the data is.

    Raises:
        ConfigError: A rank cannot start, or would do something else; the same on every rank.
    """
    mine = _list_facts(plan)
    finding = _Finding(socket.gethostname(), None, _hash(mine), _hash(_list_files(plan)))
    heard = _hear(_add_content(plan, finding) if leads_machine() else finding)
    contents = _match_contents(heard)
    if None in contents:
        lacks_it = contents[dist.get_rank()] is None
        mine_heard = heard[dist.get_rank()]
        heard = _hear(_add_content(plan, finding) if lacks_it else mine_heard)
        contents = _match_contents(heard)
    told = [(each.digest, content) for each, content in zip(heard, contents, strict=True)]
    other = next((rank for rank, each in enumerate(told) if each != told[0]), None)
    content = contents[dist.get_rank()]
    plan = replace(plan, data=replace(plan.data, read_elsewhere=content))
    if other is None:
        return plan
    facts = gather(mine | _list_data_facts(plan))
    difference = _describe_difference(facts[0], facts[other])
    here, there = f"rank 0 on {heard[0].host}", f"rank {other} on {heard[other].host}"
    raise _make_error(f"{here} and {there} {difference}")


def settle_plan(plan: RunPlan, mesh: Mesh) -> RunPlan:
    """Completes a plan by what the ranks find out together. Every rank calls it.

    Args:
        plan: What each rank found alone.
        mesh: This rank's place.

    Returns:
        The plan, with the conditions of all ranks and with checkpoints whose every byte is checked.

    Raises:
        CheckpointError: There is no whole checkpoint where one is needed.
        ConfigError: The checkpoint to go on from belongs to another run.
        DataError: It was trained on other data.
    """
    plan = replace(plan, environment=gather_environment(mesh))
    # Only now: no other run writes there any more, and the ranks can share the reading.
    if plan.config.checkpoint.resume != "never":
        on_damage = plan.config.checkpoint.on_damage
        chosen = choose_checkpoint(plan.checkpoint_dir, on_damage, mesh)
        plan = resume_plan(plan, chosen)
    if plan.initial_weights is None:
        return plan
    return replace(plan, initial_weights=verify_initial_weights(plan.initial_weights, mesh))


def _hear(mine: _Finding) -> list[_Finding]:
    """Gathers what every rank says of itself; an error if one cannot start."""
    heard = gather(mine)
    failed = next((rank for rank, each in enumerate(heard) if each.failure is not None), None)
    if failed is not None:
        raise _make_error(
            f"rank {failed} on {heard[failed].host} cannot start: {heard[failed].failure}"
        )
    return heard


def _add_content(plan: RunPlan, finding: _Finding) -> _Finding:
    try:
        return finding._replace(content=plan.data.read_content())
    # The others wait to hear of it.
    except MdmError as failure:
        return finding._replace(failure=str(failure))


def _match_contents(heard: list[_Finding]) -> list[DataContent | None]:
    """The content of each rank's data: as it read it, or as one did with the same files."""
    known = {(each.host, each.files): each.content for each in heard if each.content is not None}
    return [each.content or known.get((each.host, each.files)) for each in heard]


def _list_facts(plan: RunPlan) -> dict[str, str]:
    """All that a rank derives alone, by names that a user knows."""
    facts = {"the code": _hash_code()}
    facts |= {f"the version of {name}": each for name, each in list_versions().items()}
    facts |= _flatten("", plan.config.model_dump(mode="json"))
    facts[_STEPS] = str(plan.num_steps)
    facts["the precision"] = str(plan.dtype)
    return facts


def _list_files(plan: RunPlan) -> list[list[list[int]]]:
    """Which files hold the data."""
    every = [plan.data.train, *([plan.data.valid] if plan.data.valid is not None else [])]
    return [read_file_states(source.source) for windows in every for source in windows.sources]


def _list_data_facts(plan: RunPlan) -> dict[str, str]:
    """What the data holds: in all, and by its place in the configuration and its path."""
    content = plan.data.read_content()
    found = {"the training data": content.train, "the held-out data": content.valid or "none"}
    for split, windows in (("train", plan.data.train), ("valid", plan.data.valid)):
        for number, source in enumerate(windows.sources if windows is not None else []):
            name = f"data.{split}.{number}.path={source.source.prefix}"
            found[name] = source.fingerprint()
    return found


def _describe_difference(first: dict[str, str], other: dict[str, str]) -> str:
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


def _flatten(prefix: str, tree: Any) -> dict[str, str]:
    if isinstance(tree, dict):
        found: dict[str, str] = {}
        for name, value in tree.items():
            found |= _flatten(f"{prefix}.{name}" if prefix else str(name), value)
        return found
    return {prefix: json.dumps(tree)}


@lru_cache(maxsize=1)
def _hash_code() -> str:
    """Identifies this package's code, whatever its version says."""
    root = Path(megatron_mdm.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()


def _hash(found: Any) -> str:
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def _make_error(message: str) -> ConfigError:
    """Makes an error that every rank raises and the first of each machine tells."""
    error = ConfigError(message)
    error.is_told = os.environ.get("LOCAL_RANK", "0") != "0"
    return error
