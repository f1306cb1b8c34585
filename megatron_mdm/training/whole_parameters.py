"""Whole parameters for an optimizer, out of the pieces that the ranks of a stage hold of them.

The parameters are dealt to all ranks of the stage, replicas and tensor-parallel peers alike. Each
rank receives the pieces of those that are its own, does what the optimizer does with whole ones,
and sends the pieces back: every number goes each way once, and nothing is computed twice.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mdm.checkpoint.flat_tensors import FlatTensor
from megatron_mdm.config import ModelConfig
from megatron_mdm.config.parameter_groups import OptimizedParameter, Piece, WholeParameters
from megatron_mdm.distributed.mesh import Mesh
from megatron_mdm.model.memory import ROUND_ELEMENTS
from megatron_mdm.model.sharding import Slices, list_shard_slices
from megatron_mdm.model.shards import NamedShard, describe_parameters

_Function = Callable[[OptimizedParameter, Tensor], Tensor]


def deal(costs: Sequence[float], num_ranks: int) -> list[int]:
    """Deals work out: the most costly first, each to a rank that has least so far.

    Args:
        costs: Of each piece of work.
        num_ranks: Ranks to deal to.

    Returns:
        The rank of each piece, the same wherever it is computed.
    """
    loads = [(0.0, rank) for rank in range(num_ranks)]
    ranks = [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda one: -costs[one]):
        load, rank = heapq.heappop(loads)
        ranks[index] = rank
        heapq.heappush(loads, (load + costs[index], rank))
    return ranks


class _Member(NamedTuple):
    """A parameter that is made whole.

    Attributes:
        shard: What this rank holds of it.
        parameter: What the optimizer is told of it.
    """

    shard: NamedShard
    parameter: OptimizedParameter

    def list_slices(self, tensor_rank: int) -> list[Slices]:
        """Slices of the whole that a tensor-parallel rank holds, in its order."""
        shard = self.shard
        return list_shard_slices(shard.name, shard.shape, tensor_rank, shard.tensor_size)


class _Fragment(NamedTuple):
    """What a rank holds of a parameter.

    Attributes:
        member: Which parameter of a round.
        tensor_rank: Whose part of it; of one that is not divided the first's.
        start: The first element in that part, flattened.
        numel: How many.
        flat: Which of the tensors that the optimizer steps holds them.
        offset: Where they begin in it.
    """

    member: int
    tensor_rank: int
    start: int
    numel: int
    flat: int
    offset: int


# To or from each rank of the stage, in the order in which they are sent.
_Route = list[list[_Fragment]]


class DividedParameters(WholeParameters):
    """The parameters of a stage, whatever the layout divides.

    Args:
        shards: This rank's, not yet partitioned by ZeRO.
        model: Sizes.
        mesh: This rank's place.

    Attributes:
        parameters: What the optimizer is told of each shard.
    """

    def __init__(self, shards: Sequence[NamedShard], model: ModelConfig, mesh: Mesh) -> None:
        self.parameters = describe_parameters(shards, model)
        self._members = {
            id(shard.parameter): _Member(shard, parameter)
            for shard, parameter in zip(shards, self.parameters, strict=True)
        }
        self._mesh = mesh
        self._flats: dict[int, FlatTensor] = {}
        self._rounds: dict[tuple[int, ...], list[_Round]] = {}

    def place(self, flats: Sequence[FlatTensor]) -> None:
        """Takes what the optimizer steps, once ZeRO has made it."""
        self._flats = {id(flat.tensor): flat for flat in flats}

    def list_pieces(self, tensor: Tensor) -> list[Piece]:
        """Lists the pieces of parameters in a tensor that the optimizer steps, in order."""
        flat, dp = self._flats[id(tensor)], self._mesh.dp
        members = [self._members[id(one)] for one in flat.parameters]
        return [
            Piece(members[place].parameter, start, numel, offset)
            for place, start, numel, offset in flat.list_extents(dp.rank, dp.size)
        ]

    def replace(
        self, tensors: Sequence[Tensor], values: Sequence[Tensor], function: _Function
    ) -> None:
        """Replaces values by a function of those of whole parameters."""
        key = tuple(map(id, tensors))
        if key not in self._rounds:
            self._rounds[key] = list(self._plan([self._flats[one] for one in key]))
        for one in self._rounds[key]:
            one.replace([value.view(-1) for value in values], function)

    def _plan(self, flats: Sequence[FlatTensor]) -> Iterator[_Round]:
        members: dict[tuple[int, int], _Member] = {}
        limit, total = ROUND_ELEMENTS * self._mesh.dp.size * self._mesh.tp.size, 0
        for index, flat in enumerate(flats):
            for place, parameter in enumerate(flat.parameters):
                member = self._members[id(parameter)]
                size = math.prod(member.shard.shape)
                if members and total + size > limit:
                    yield _Round(members, flats, self._mesh)
                    members, total = {}, 0
                members[index, place] = member
                total += size
        yield _Round(members, flats, self._mesh)


class _Round:
    """Parameters that are made whole at the same time.

    Args:
        members: They, by tensor that the optimizer steps and place among its parameters.
        flats: All that the optimizer steps.
        mesh: This rank's place.
    """

    def __init__(
        self,
        members: Mapping[tuple[int, int], _Member],
        flats: Sequence[FlatTensor],
        mesh: Mesh,
    ) -> None:
        self._members, self._mesh = list(members.values()), mesh
        self._zero_stage = flats[0].zero_stage
        ranks = range(mesh.dp.size * mesh.tp.size)
        mine = mesh.dp.rank * mesh.tp.size + mesh.tp.rank
        # The short side squared times the long one: what products of matrices cost.
        shapes = [one.shard.shape for one in self._members]
        self._owners = deal([math.prod(shape) * min(shape) for shape in shapes], len(ranks))
        self._own = [number for number, owner in enumerate(self._owners) if owner == mine]
        numbers = {place: number for number, place in enumerate(members)}
        held = [list(self._list_held(rank, numbers, flats)) for rank in ranks]
        self._gathered = [self._select(held[mine], mine, rank, True) for rank in ranks]
        self._received = [self._select(held[rank], rank, mine, True) for rank in ranks]
        self._returned = [self._select(held[rank], rank, mine, False) for rank in ranks]
        self._replaced = [self._select(held[mine], mine, rank, False) for rank in ranks]

    def replace(self, values: Sequence[Tensor], function: _Function) -> None:
        """Replaces the members' values in flattened tensors."""

        def cut(one: _Fragment) -> Tensor:
            return values[one.flat].narrow(0, one.offset, one.numel)

        if len(self._gathered) == 1:
            for one in self._gathered[0]:
                member = self._members[one.member]
                _transform(member, [cut(one).view(member.shard.local_shape)], function)
            return
        outgoing = _pack(cut, self._gathered, values)
        incoming = self._exchange(outgoing, self._gathered, self._received)
        del outgoing
        parts = self._make_parts(incoming)

        def cut_part(one: _Fragment) -> Tensor:
            return parts[one.member, one.tensor_rank].view(-1).narrow(0, one.start, one.numel)

        _unpack(incoming, cut_part, self._received)
        del incoming
        for number in self._own:
            _transform(
                self._members[number],
                [part for (owner, _), part in parts.items() if owner == number],
                function,
            )
        outgoing = _pack(cut_part, self._returned, values)
        parts.clear()
        _unpack(self._exchange(outgoing, self._returned, self._replaced), cut, self._replaced)

    def _list_held(
        self, rank: int, numbers: Mapping[tuple[int, int], int], flats: Sequence[FlatTensor]
    ) -> Iterator[_Fragment]:
        replica, tensor_rank = divmod(rank, self._mesh.tp.size)
        for index, flat in enumerate(flats):
            for place, start, numel, offset in flat.list_extents(replica, self._mesh.dp.size):
                number = numbers.get((index, place))
                if number is not None:
                    is_split = self._members[number].shard.is_split
                    whose = tensor_rank if is_split else 0
                    yield _Fragment(number, whose, start, numel, index, offset)

    def _select(
        self, held: Sequence[_Fragment], holder: int, owner: int, gathers: bool
    ) -> list[_Fragment]:
        """What a rank holds of those of an owner; to gather, without what the owner has alike."""
        (replica, tensor_rank), (owner_replica, owner_tensor_rank) = (
            divmod(rank, self._mesh.tp.size) for rank in (holder, owner)
        )

        def is_wanted(one: _Fragment) -> bool:
            if self._owners[one.member] != owner:
                return False
            if gathers and not self._zero_stage and replica != owner_replica:
                return False
            is_split = self._members[one.member].shard.is_split
            return is_split or not gathers or tensor_rank == owner_tensor_rank

        return list(filter(is_wanted, held))

    def _make_parts(self, like: Tensor) -> dict[tuple[int, int], Tensor]:
        """Room for what tensor-parallel ranks hold of this rank's own parameters."""
        parts = {}
        for number in self._own:
            shard = self._members[number].shard
            for tensor_rank in range(shard.tensor_size if shard.is_split else 1):
                parts[number, tensor_rank] = like.new_empty(shard.local_shape)
        return parts

    def _exchange(self, outgoing: Tensor, sent: _Route, received: _Route) -> Tensor:
        """Sends fragments to every rank of the stage; returns those that come from each."""
        input_sizes, output_sizes = (
            [sum(one.numel for one in each) for each in route] for route in (sent, received)
        )
        incoming = outgoing.new_empty(sum(output_sizes))
        dist.all_to_all_single(
            incoming,
            outgoing,
            output_split_sizes=output_sizes,
            input_split_sizes=input_sizes,
            group=self._mesh.get_group("tp+dp"),
        )
        return incoming


def _pack(read: Callable[[_Fragment], Tensor], route: _Route, values: Sequence[Tensor]) -> Tensor:
    pieces = [read(one) for one in itertools.chain(*route)]
    return torch.cat(pieces) if pieces else values[0].new_empty(0)


def _unpack(incoming: Tensor, find: Callable[[_Fragment], Tensor], route: _Route) -> None:
    position = 0
    for one in itertools.chain(*route):
        find(one).copy_(incoming.narrow(0, position, one.numel))
        position += one.numel


def _transform(member: _Member, parts: Sequence[Tensor], function: _Function) -> None:
    """Applies a function to a whole parameter, given the parts of its tensor-parallel ranks."""
    if len(parts) == 1:
        parts[0].copy_(function(member.parameter, parts[0]))
        return
    whole = parts[0].new_empty(member.shard.shape)
    for tensor_rank, part in enumerate(parts):
        slices = member.list_slices(tensor_rank)
        for target, piece in zip(slices, part.chunk(len(slices)), strict=True):
            whole[target] = piece
    result = function(member.parameter, whole)
    for tensor_rank, part in enumerate(parts):
        torch.cat([result[one] for one in member.list_slices(tensor_rank)], out=part)
