"""Where a rank stands in a layout, and what it would call if it stood elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from megatron_mdm.config import Layout, ParallelConfig
from megatron_mdm.studies.simulation.calls import Call


class Place(NamedTuple):
    """A rank's coordinates.

    Attributes:
        tp: Among the ranks that share a layer.
        dp: Replica.
        pp: Pipeline stage.
    """

    tp: int
    dp: int
    pp: int


class Grid(NamedTuple):
    """All ranks of a layout, numbered as Megatron does: TP fastest, then DP, then PP.

    Attributes:
        tp: Ranks that share a layer.
        dp: Replicas.
        pp: Pipeline stages.
    """

    tp: int
    dp: int
    pp: int

    @classmethod
    def of(cls, parallel: ParallelConfig, layout: Layout) -> Grid:
        """The grid of a run."""
        return cls(
            parallel.tensor_model_parallel_size,
            layout.data_parallel_size,
            parallel.pipeline_model_parallel_size,
        )

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.tp * self.dp * self.pp

    def place_of(self, rank: int) -> Place:
        """The coordinates of a rank."""
        return Place(rank % self.tp, rank // self.tp % self.dp, rank // (self.tp * self.dp))

    def rank_of(self, place: Place) -> int:
        """The rank at coordinates."""
        return place.tp + self.tp * (place.dp + self.dp * place.pp)

    def list_kinds(self) -> list[int]:
        """One rank of each kind.

        Returns:
            Of every stage the first rank, the last of its tensor-parallel peers and the last
            replica: what a rank calls may depend on its stage, and on being first.
        """
        places = [
            place
            for stage in range(self.pp)
            for place in (
                Place(0, 0, stage),
                Place(self.tp - 1, 0, stage),
                Place(0, self.dp - 1, stage),
            )
        ]
        return list(dict.fromkeys(map(self.rank_of, places)))

    def find_alike(self, rank: int, played: Iterable[int]) -> int:
        """Finds the rank whose calls stand for another's.

        Args:
            rank: Any rank.
            played: Ranks whose calls are known; of every stage at least one.

        Returns:
            Itself if it was played; otherwise of its stage the one that agrees with it best in
            being first or not.
        """
        place = self.place_of(rank)

        def likeness(other: int) -> tuple[bool, int]:
            known = self.place_of(other)
            pairs = zip(place, known, strict=True)
            return other == rank, sum((one == 0) == (two == 0) for one, two in pairs)

        return max((other for other in played if self.place_of(other).pp == place.pp), key=likeness)

    def spread(self, played: Mapping[int, Sequence[Call]]) -> dict[int, list[Call]]:
        """Gives every rank the calls of the one that stands for it.

        Args:
            played: Calls of some ranks; of every stage at least one.

        Returns:
            Calls of all ranks, over the groups and with the peers that each has.
        """
        spread = {}
        for rank in range(self.size):
            alike = self.find_alike(rank, played)
            ranks: dict[tuple[int, ...], tuple[int, ...]] = {}
            moved = []
            for call in played[alike]:
                if call.ranks not in ranks:
                    ranks[call.ranks] = self._move(call.ranks, alike, rank)
                peer = None if call.peer is None else self._move_peer(call.peer, alike, rank)
                moved.append(call._replace(ranks=ranks[call.ranks], peer=peer))
            spread[rank] = moved
        return spread

    def _move_peer(self, peer: int, origin: int, target: int) -> int:
        """The peer of another rank, in as many other coordinates as the known one's.

        Its group does not tell: between two stages, messages go over the group of all ranks.
        """
        places = zip(self.place_of(peer), self.place_of(origin), self.place_of(target), strict=True)
        return self.rank_of(Place(*(goal if own == known else own for own, known, goal in places)))

    def _move(self, ranks: tuple[int, ...], origin: int, target: int) -> tuple[int, ...]:
        """The group of another rank: where the group does not reach, its own coordinate."""
        places = [self.place_of(rank) for rank in ranks]
        goal = self.place_of(target)
        fixed = [len(set(along)) == 1 for along in zip(*places, strict=True)]
        return tuple(
            sorted(
                self.rank_of(
                    Place(
                        *(
                            wanted if is_fixed else own
                            for own, wanted, is_fixed in zip(place, goal, fixed, strict=True)
                        )
                    )
                )
                for place in places
            )
        )
