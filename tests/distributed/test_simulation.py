"""A simulated rank calls what a real one calls: the same sequence, of the same sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import simulation_probe
from cases import config_of
from layouts import layout
from worlds import World

from megatron_mdm.model.memory import Dtype
from megatron_mdm.studies.simulation.calls import Call
from megatron_mdm.studies.simulation.replay import Stuck, replay
from megatron_mdm.studies.simulation.simulate import play_ranks, simulate

RANKS = range(4)
CASES: dict[str, tuple[dict[str, Any], Dtype]] = {
    "tp2-sp-pp2": (layout(tp=2, pp=2, sp=True, zero=0), "fp32"),
    "tp2-zero1-bf16-muon": (layout(tp=2, zero=1) | {"optimizer.kind": "muon"}, "bf16"),
    "pp2x2-zero2-tied": (layout(pp=2, zero=2, chunks=2) | {"model.tie_embeddings": True}, "fp32"),
    "dp4-zero3": (layout(zero=3), "fp32"),
}


@pytest.fixture(scope="module")
def played() -> Callable[[str], dict[int, list[Call]]]:
    known: dict[str, dict[int, list[Call]]] = {}

    def play(name: str) -> dict[int, list[Call]]:
        if name not in known:
            overrides, dtype = CASES[name]
            ranks = play_ranks(config_of(overrides), RANKS, len(RANKS), dtype)
            known[name] = {rank: one.calls for rank, one in ranks.items()}
        return known[name]

    return play


@pytest.mark.parametrize("name", CASES)
def test_a_simulated_rank_calls_what_a_real_one_calls(world_of, played, name):
    overrides, dtype = CASES[name]
    world: World = world_of(4)
    real = world.run(
        simulation_probe.record, overrides=overrides, world_size=len(RANKS), dtype=dtype
    )
    for rank in RANKS:
        assert played(name)[rank] == real[rank], f"rank {rank}"
    assert replay(played(name)) == []


def test_a_rank_that_leaves_out_one_call_is_found(played):
    calls = dict(played("tp2-sp-pp2"))
    middle = next(
        place for place, call in enumerate(calls[3]) if call.moment == "step 1" and not call.peer
    )
    calls[3] = calls[3][:middle] + calls[3][middle + 1 :]
    faults = replay(calls)
    assert faults
    assert all(isinstance(fault, Stuck) for fault in faults) or len(faults) == 1


def test_stages_that_exchange_in_another_order_are_found(played):
    calls = dict(played("tp2-sp-pp2"))
    first = list(calls[0])
    send = next(place for place, call in enumerate(first) if call.operation == "send")
    receive = next(place for place, call in enumerate(first) if call.operation == "receive")
    # The first stage waits for a gradient of what it has not sent.
    first.insert(send, first.pop(receive))
    calls[0] = first
    assert {fault.rank for fault in replay(calls)} == set(RANKS)


def test_the_ranks_of_one_kind_stand_for_all(played):
    overrides, dtype = CASES["tp2-sp-pp2"]
    found = simulate(config_of(overrides), len(RANKS), dtype, ranks=[0, 2])
    assert found.faults == []
    assert found.num_calls == sum(map(len, played("tp2-sp-pp2").values()))
    for stage in found.stages:
        assert stage.sent_bytes == pytest.approx(stage.predicted_bytes, rel=1e-12)
