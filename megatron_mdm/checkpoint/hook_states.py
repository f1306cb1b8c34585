"""Tensors in the shapes of the weights that hooks of the training loop keep, such as averages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from megatron_mdm.checkpoint.manifest import WEIGHT, SavedHookState, name_hook_kind
from megatron_mdm.checkpoint.rank_files import PlannedTensor, SavedTensor
from megatron_mdm.checkpoint.storage import CheckpointReader

if TYPE_CHECKING:
    # For types alone: offline tools start without Megatron-Core and DeepSpeed.
    from megatron_mdm.checkpoint.optimizer_state import OptimizerStates
    from megatron_mdm.model.shards import NamedShard


class WeightState(NamedTuple):
    """What a hook keeps in the shapes of the weights.

    Attributes:
        pieces: float32, one beside each of `OptimizerStates.list_pieces`, in its shape.
        about: What it is, in a few words.
        is_average: Is it an average of the weights? The model can then run with it.
        is_judged: Do validations judge it? Only averages.
    """

    pieces: Sequence[Tensor]
    about: str = ""
    is_average: bool = False
    is_judged: bool = True

    def to_saved(self) -> SavedHookState:
        """What a manifest says of it."""
        return SavedHookState(is_average=self.is_average, about=self.about)


def plan_hook_states(
    owned: Sequence[NamedShard], kept: Mapping[str, WeightState]
) -> list[PlannedTensor]:
    """Plans what `read_hook_states` will give, in order.

    Args:
        owned: The parameters that this rank writes.
        kept: States by name.
    """
    return [
        PlannedTensor(name_hook_kind(name), shard.name, shard.local_shape)
        for name in kept
        for shard in owned
    ]


def read_hook_states(
    shards: Sequence[NamedShard],
    owned: Sequence[NamedShard],
    states: OptimizerStates,
    kept: Mapping[str, WeightState],
) -> Iterator[SavedTensor]:
    """Reads the tensors that this rank writes. All ranks have to exhaust it: ZeRO gathers.

    Between two tensors the optimizer's weights are those of the state: no step may come between.

    Args:
        shards: This rank's parameters.
        owned: Those among them that it writes.
        states: Their optimizer state.
        kept: States by name, the same names on every rank.

    Yields:
        Its share, on its device; without ZeRO the state itself.
    """
    mine = {*map(id, owned)}
    for name, state in kept.items():
        with states.exchange(state.pieces):
            for shard in shards:
                value = states.get(shard.parameter, WEIGHT)
                if id(shard) in mine:
                    yield SavedTensor(name_hook_kind(name), shard.name, value)


def load_hook_state(
    reader: CheckpointReader,
    shards: Sequence[NamedShard],
    states: OptimizerStates,
    name: str,
    state: WeightState,
) -> None:
    """Fills a hook's tensors from a checkpoint of any layout. Every rank calls it.

    Raises:
        CheckpointError: The checkpoint does not hold them.
    """
    with states.exchange(state.pieces):
        for shard in shards:
            value = reader.load_shard(shard.name, shard.list_slices(), name_hook_kind(name))
            states.set(shard.parameter, WEIGHT, value)
