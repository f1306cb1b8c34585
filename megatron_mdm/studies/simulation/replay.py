"""Plays the calls of all ranks against each other: does every one of them return?

A collective returns when all ranks of its group stand at it. A sender goes on, a receiver waits for
what it is sent, over one group in the order in which it was sent. So what is found to wait here
waits for ever on any machine; that messages sent at the same time may also wait for each other's
buffers is not looked at.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from megatron_mdm.studies.simulation.calls import Call


class Stuck(NamedTuple):
    """A rank that waits for ever.

    Attributes:
        rank: Its place in the world.
        position: Calls that returned before.
        call: That it waits in; None: it has ended, while another waits for it.
    """

    rank: int
    position: int
    call: Call | None

    def __str__(self) -> str:
        if self.call is None:
            return f"rank {self.rank} has ended after {self.position} calls"
        return f"rank {self.rank} waits in call {self.position}: {describe(self.call)}"


class Disagreement(NamedTuple):
    """Ranks of one group that do not mean the same call.

    Attributes:
        first: A rank and its call.
        second: Another one's, which should be the same.
    """

    first: tuple[int, Call]
    second: tuple[int, Call]

    def __str__(self) -> str:
        return " while ".join(
            f"rank {rank} calls {describe(call)}" for rank, call in (self.first, self.second)
        )


class Unread(NamedTuple):
    """A message that nobody receives.

    Attributes:
        rank: Its sender.
        call: The message.
    """

    rank: int
    call: Call

    def __str__(self) -> str:
        return f"rank {self.rank} calls {describe(self.call)}, and nobody receives it"


Fault = Stuck | Disagreement | Unread


def describe(call: Call) -> str:
    """Says a call in words.

    Args:
        call: The call.

    Returns:
        For example `all_reduce of 64 float32 over ranks 0, 1 (step 0)`.
    """
    size = f" of {call.elements:,} {call.dtype}" if call.dtype else ""
    ranks = ", ".join(map(str, call.ranks[:8])) + (", ..." if len(call.ranks) > 8 else "")
    whom = f"over ranks {ranks}"
    if call.peer is not None:
        whom = f"{'to' if call.operation == 'send' else 'from'} rank {call.peer}"
    return f"{call.operation}{size} {whom} ({call.moment})"


def replay(calls: Mapping[int, Sequence[Call]]) -> list[Fault]:
    """Plays all ranks.

    Args:
        calls: Of every rank, by its place in the world, in order.

    Returns:
        What is wrong: nothing if every call returns. After a disagreement nothing is played on.
    """
    position = dict.fromkeys(calls, 0)
    meetings: dict[object, list[int]] = {}
    messages: dict[object, deque[tuple[int, Call]]] = {}
    waiting: dict[object, int] = {}
    ready = deque(calls)
    while ready:
        rank = ready.popleft()
        while position[rank] < len(calls[rank]):
            call = calls[rank][position[rank]]
            key = _key(rank, call)
            if call.operation == "send":
                messages.setdefault(key, deque()).append((rank, call))
                if key in waiting:
                    ready.append(waiting.pop(key))
            elif call.operation == "receive":
                if not messages.get(key):
                    waiting[key] = rank
                    break
                sender, sent = messages[key].popleft()
                if _size(sent) != _size(call):
                    return [Disagreement((sender, sent), (rank, call))]
            else:
                here = meetings.setdefault(key, [])
                first = here[0] if here else rank
                other = calls[first][position[first]]
                if (other.operation, _size(other)) != (call.operation, _size(call)):
                    return [Disagreement((first, other), (rank, call))]
                here.append(rank)
                if len(here) < len(call.ranks):
                    break
                for one in meetings.pop(key):
                    if one != rank:
                        position[one] += 1
                        ready.append(one)
            position[rank] += 1
    unread = [message for queue in messages.values() for message in queue]
    return _list_stuck(calls, position) or [Unread(*message) for message in unread]


def _key(rank: int, call: Call) -> object:
    """What a call has in common with those that it meets."""
    if call.peer is None:
        return call.ranks, call.communicator
    ends = (rank, call.peer) if call.operation == "send" else (call.peer, rank)
    return call.ranks, call.communicator, ends


def _size(call: Call) -> tuple[int, str]:
    # To all others ranks send what each has for them.
    return 0 if call.operation == "all_to_all" else call.elements, call.dtype


def _list_stuck(calls: Mapping[int, Sequence[Call]], position: Mapping[int, int]) -> list[Fault]:
    return [
        Stuck(rank, place, calls[rank][place] if place < len(calls[rank]) else None)
        for rank, place in position.items()
        if place < len(calls[rank]) or _is_awaited(rank, calls, position)
    ]


def _is_awaited(
    rank: int, calls: Mapping[int, Sequence[Call]], position: Mapping[int, int]
) -> bool:
    return any(
        rank == call.peer or (call.peer is None and rank in call.ranks)
        for other, place in position.items()
        if place < len(calls[other])
        for call in [calls[other][place]]
    )
