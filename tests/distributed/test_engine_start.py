"""What an engine does not do when it starts."""

from __future__ import annotations

import deepspeed
from cases import engine_of, stage_of


def kernels_that_were_looked_into() -> dict[str, bool]:
    with stage_of({"parallel.zero_stage": 1}) as stage, engine_of(stage):
        return vars(deepspeed.ops)["__compatible_ops__"]


def test_no_compiler_is_asked_what_it_could_build(world_of):
    assert world_of(1).run(kernels_that_were_looked_into) == [{}]
