from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_mdm.studies.costs.command import EstimateSettings
from megatron_mdm.studies.simulation import command
from megatron_mdm.studies.simulation.calls import Call
from megatron_mdm.studies.simulation.replay import Stuck
from megatron_mdm.studies.simulation.simulate import Simulation

RECIPE = Path(__file__).resolve().parents[3] / "configs/smdm/smdm-1028M-3.3e21.yaml"


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("waits", [False, True])
def test_a_layout_that_does_not_end_is_said_and_reported(monkeypatch, waits, as_json):
    call = Call("all_reduce", (0, 1), 0, None, 8, "float32", "step 0")
    faults = [Stuck(0, 3, call)] if waits else []

    def found(config, world_size, dtype, *, ranks):
        return Simulation(config, world_size, [0, 1], 8, faults, [])

    monkeypatch.setattr(command, "simulate", found)
    settings = EstimateSettings(config=RECIPE, gpus="2", simulate=True, json=as_json)
    text, ends = command.describe_simulations(settings)
    assert ends is not waits
    assert ("rank 0 waits in call 3" in text) is waits
    if as_json:
        assert len(json.loads(text)[0]["faults"]) == len(faults)
