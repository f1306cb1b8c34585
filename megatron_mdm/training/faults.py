"""The last words of a run that meets a fault: one line, by one rank."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist

from megatron_mdm.checkpoint.storage import find_latest_checkpoint
from megatron_mdm.core.errors import CheckpointError, DataError, LostPeerError
from megatron_mdm.training.ranks import RankBoard
from megatron_mdm.training.signals import StopRequests
from megatron_mdm.training.watchdog import Watchdog

# A connection breaks a moment before the process at its other end counts as dead.
_SETTLING_SECONDS = 0.5
# gloo raises plain RuntimeErrors, with the place in its C++ code before the reason.
_LOST_CONNECTION = re.compile(
    r"Connection closed by peer|Connection reset by peer|Broken pipe|Connection refused|"
    r"Timed out waiting|Socket Timeout|Socket closed|remote process has terminated|"
    r"NCCL communicator was aborted|ncclRemoteError|ncclSystemError",
    re.IGNORECASE,
)


@contextlib.contextmanager
def tell_faults(
    board: RankBoard, checkpoint_dir: Path, watchdog: Watchdog, stops: StopRequests
) -> Iterator[None]:
    """Adds the rank to errors of one rank alone, and turns a lost peer into one sentence.

    Args:
        board: The ranks' files.
        checkpoint_dir: The run's checkpoints.
        watchdog: Knows the step.
        stops: Is told to ignore signals before the rank's last words.

    Raises:
        DataError: As raised in the block, with this rank's number.
        LostPeerError: A collective of the block failed, or a save for want of a rank.
    """
    try:
        yield
    except DataError as error:
        if board.world_size > 1:
            # Other ranks that read the damaged shard may meet it a moment later.
            stops.ignore_from_now_on()
            error.rank = board.rank
            error.is_told = not board.claim_last_word()
        raise
    except CheckpointError:
        time.sleep(_SETTLING_SECONDS)
        if not board.find_dead_ranks():
            raise
        stops.ignore_from_now_on()
        raise _explain_loss(board, checkpoint_dir, watchdog.step, "found while saving") from None
    except RuntimeError as error:
        reason = find_lost_connection(error)
        if board.world_size == 1 or reason is None:
            raise
        stops.ignore_from_now_on()
        time.sleep(_SETTLING_SECONDS)
        raise _explain_loss(board, checkpoint_dir, watchdog.step, reason) from None


def find_lost_connection(error: RuntimeError) -> str | None:
    """The reason of a collective's failure.

    Returns:
        A few words, or None if the error is another one.
    """
    found = _LOST_CONNECTION.search(str(error))
    if found is not None:
        return found.group()
    return type(error).__name__ if isinstance(error, dist.DistError) else None


def _explain_loss(board: RankBoard, checkpoint_dir: Path, step: int, reason: str) -> LostPeerError:
    dead = [str(rank) for rank in board.find_dead_ranks()]
    who = f"lost rank {', '.join(dead)}" if dead else "lost a rank"
    try:
        latest = find_latest_checkpoint(checkpoint_dir)
    except CheckpointError:
        latest = None
    remedy = f"go on from {latest}" if latest is not None else "begin anew, as nothing is saved yet"
    error = LostPeerError(
        f"{who} at step {step}: a peer died or the network failed ({reason}): see the first "
        f"failure in the log, and start the same command again to {remedy}."
    )
    error.rank = board.rank
    error.is_told = not board.claim_last_word()
    return error
