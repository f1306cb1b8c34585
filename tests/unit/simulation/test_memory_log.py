from __future__ import annotations

import torch

from megatron_mdm.studies.simulation.memory_log import MemoryLog


def test_what_is_made_before_the_first_step_is_no_part_of_one():
    log = MemoryLog()
    with log:
        weight = torch.ones(10, requires_grad=True)
        with log.making("optimizer"):
            copies = [torch.zeros(100), torch.zeros(50)]
            del copies[0]
        optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
        log.follow_optimizer(optimizer)
        with log.making("activations"):
            loss = (2 * weight).sum()
            torch.autograd.backward(loss)
            optimizer.step()
    # Weights, and both copies at once.
    assert log.fullest["start"] == {"weights": 40, "optimizer": 600}
    assert log.fullest["forward"]["optimizer"] == 200
    assert log.fullest["backward"]["weights"] == 40
    # The momentum is the optimizer's.
    assert log.fullest["update"]["optimizer"] == 240
