"""Mixtures of next-token prediction and masked diffusion: their ends are the pure runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cases
import pairs
import pytest
from layouts import LAYOUTS
from worlds import World

GetWorld = Callable[[int], World]

PURE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "mdm": ({"kind": "mdm"}, {"ar_share": 0.0, "shift": False}),
    "ar": ({"kind": "ar"}, {"ar_share": 1.0}),
}


@pytest.mark.parametrize("cut", [0.0, 0.5], ids=["whole", "cut"])
@pytest.mark.parametrize("kind", PURE)
def test_a_share_of_none_or_all_is_the_pure_run_bit_for_bit(
    world_of: GetWorld, kind: str, cut: float
) -> None:
    size, layout = LAYOUTS["dp2-zero1"]
    common = {"stochastic_length_ratio": cut}
    pure, mixture = (
        {"objective": fields | common}
        for fields in (PURE[kind][0], {"kind": "mixture"} | PURE[kind][1])
    )
    expected, found = (
        world_of(size).run(cases.train, overrides=layout | one) for one in (pure, mixture)
    )
    assert found == expected
    settings = {"num_samples": 6, "num_train_samples": 5, "draws_per_sample": 2}
    expected, found = (
        world_of(1).run(pairs.judge, overrides=one, validation=settings)[0]["metrics"]
        for one in (pure, mixture)
    )
    assert found == expected


@pytest.mark.parametrize("shift", [True, False], ids=["shifted", "in-place"])
def test_both_losses_are_those_that_the_pure_objectives_would_measure(
    world_of: GetWorld, shift: bool
) -> None:
    settings = {"num_samples": 6, "num_train_samples": 5, "draws_per_sample": 2}

    def judge(**fields: Any) -> dict[str, float]:
        (found,) = world_of(1).run(
            pairs.judge, overrides={"objective": fields}, validation=settings
        )
        return found["metrics"]

    ar, mdm = judge(kind="ar"), judge(kind="mdm")
    found = judge(kind="mixture", ar_share=0.25, shift=shift)
    for split in ("valid", "train"):
        for end in ("nats_per_token", "standard_error", "clustered_error"):
            assert found[f"{split}/as_ar_nll_{end}"] == ar[f"{split}/nll_{end}"]
            # What is mostly masked diffusion is judged as such.
            assert found[f"{split}/nll_{end}"] == found[f"{split}/as_mdm_nll_{end}"]
            if shift:
                assert found[f"{split}/as_mdm_nll_{end}"] != mdm[f"{split}/nll_given_first_{end}"]
            else:
                assert found[f"{split}/as_mdm_nll_{end}"] == mdm[f"{split}/nll_{end}"]
    turned = judge(kind="mixture", ar_share=0.25, shift=shift, own_loss="ar")
    assert turned["valid/nll_nats_per_token"] == ar["valid/nll_nats_per_token"]
    assert turned["valid/as_mdm_nll_nats_per_token"] == found["valid/as_mdm_nll_nats_per_token"]
