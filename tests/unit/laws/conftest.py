"""Runs to fit: the public ones, and synthetic ones of a known law."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_mdm.studies.laws.forms import DataConstrainedLaw, Law
from megatron_mdm.studies.laws.runs import Runs, read_runs

# 182 runs of arXiv 2305.16264, from its public repository (huggingface/datablations).
PUBLIC = Path(__file__).parents[2] / "golden" / "datablations_182.csv"
COLUMNS = {
    "num_parameters": "N_params",
    "num_tokens": "D_tokens",
    "unique_tokens": "U_unique",
    "loss": "val_loss",
}


@pytest.fixture(scope="session")
def public_table() -> tuple[Path, dict[str, str]]:
    """The table of the public runs and the names of its columns."""
    return PUBLIC, COLUMNS


@pytest.fixture(scope="session")
def public_runs() -> Runs:
    return read_runs(PUBLIC, columns=COLUMNS).runs


@pytest.fixture(scope="session")
def published() -> DataConstrainedLaw:
    """The constants of arXiv 2305.16264, appendix A, with the digits of its public code.

    Printed, the first three are A = 520.82, B = 1487.72 and E = 1.86914.
    """
    return DataConstrainedLaw(
        parameter_scale=math.exp(6.255414),
        token_scale=math.exp(7.3049974),
        irreducible_loss=math.exp(0.6254804),
        parameter_exponent=0.3526596,
        token_exponent=0.3526596,
        token_reuse=15.387756,
        parameter_reuse=5.309743,
    )


@pytest.fixture(scope="session")
def grid_of() -> Callable[..., Runs]:
    """Makes runs on a grid of sizes, unique tokens and epochs, with the losses of a law."""

    def make(law: Law, shape: tuple[int, int, int] = (7, 4, 6), noise: float = 0.0, seed: int = 0):
        sizes = np.logspace(7, 9.5, shape[0])
        unique = np.logspace(8, 10, shape[1])
        epochs = np.logspace(0, 2, shape[2])
        n, u, e = (axis.flatten() for axis in np.meshgrid(sizes, unique, epochs, indexing="ij"))
        losses = law.loss(num_parameters=n, num_tokens=u * e, unique_tokens=u)
        errors = np.random.default_rng(seed).standard_normal(len(n))
        return Runs(n, u * e, u, losses * np.exp(noise * errors))

    return make
