"""What fits came to: as trees for programs, in the units of the lines that people read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from megatron_mdm.core.statistics import Interval
from megatron_mdm.studies.laws.best_epochs import EpochsAnalysis
from megatron_mdm.studies.laws.comparison import FormComparison, FormErrors
from megatron_mdm.studies.laws.epoch_curves import CurveMinimum
from megatron_mdm.studies.laws.epochs_law import EpochsLaw, Exponent
from megatron_mdm.studies.laws.fitting import Fit, r_squared
from megatron_mdm.studies.laws.forms import Law
from megatron_mdm.studies.laws.isoflop import IsoFlopAnalysis
from megatron_mdm.studies.laws.power_law import PowerLaw
from megatron_mdm.studies.laws.runs import Runs, RunsTable
from megatron_mdm.studies.laws.storage import find_ranges
from megatron_mdm.studies.laws.uncertainty import Profile, constant_interval

Tree = dict[str, Any]


def tree_of_table(table: RunsTable) -> Tree:
    """The runs that were read."""
    return {
        "num_runs": len(table.runs),
        "ranges": find_ranges(table.runs),
        "left_out": dict(table.left_out),
        "parameters": table.parameters,
        "objective": table.objective,
    }


def tree_of_fit(fit: Fit, runs: Runs, laws: Sequence[Law]) -> Tree:
    """A fit, with the intervals of its constants where there are resamples."""
    constants = {}
    for name in fit.law.names():
        ends = constant_interval(fit, laws, name) if laws and name in fit.fitted else None
        value = float(getattr(fit.law, name))
        constants[name] = {"value": _finite(value), "interval": _ends(ends)}
    return {
        "form": fit.law.form,
        "constants": constants,
        "fitted": list(fit.fitted),
        "at_limits": list(fit.at_limits),
        "huber_objective": fit.objective,
        "r_squared": r_squared(fit.law, runs),
        "num_resamples": len(laws),
    }


def tree_of_profile(found: Profile) -> Tree:
    """A profile with all its points."""
    return {
        "name": found.name,
        "estimate": _finite(found.estimate),
        "interval": _ends(found.interval),
        "is_weakly_identified": found.is_weakly_identified,
        "values": list(found.values),
        "objectives": list(found.objectives),
        "threshold": found.threshold,
    }


def tree_of_epochs(found: EpochsAnalysis) -> Tree:
    """Best numbers of epochs by a fit."""
    points = [
        {
            "num_parameters": one.num_parameters,
            "unique_tokens": one.unique_tokens,
            "epochs": _finite(one.epochs) if found.num_beyond else None,
            "interval": _ends(one.interval),
            "loss": one.loss,
            "trained_epochs": one.most_epochs,
            "profile": None if one.profile is None else tree_of_profile(one.profile),
        }
        for one in found.points
    ]
    law = found.exponents
    exponents = law and {
        "num_parameters": law.num_parameters,
        "unique_tokens": law.unique_tokens,
        "unique_exponent": law.unique_exponent,
        "unique_interval": _ends(law.unique_interval),
        "parameter_exponent": law.parameter_exponent,
        "parameter_interval": _ends(law.parameter_interval),
    }
    return {
        "points": points,
        "exponents": exponents,
        "num_beyond": found.num_beyond,
        "share_reached": found.share_reached,
        "warnings": found.warnings,
    }


def tree_of_comparison(found: FormComparison, names: Sequence[str]) -> Tree:
    """Forms by their errors on held-out runs, with the errors of each run."""
    return {
        "held_out": found.held_out,
        "runs": [names[row] for row in found.rows],
        "num_places": found.num_places,
        "forms": [_tree_of_errors(one) for one in found.forms],
        "verdict": found.verdict,
    }


def _tree_of_errors(one: FormErrors) -> Tree:
    difference = one.difference
    return {
        "form": one.form,
        "num_constants": one.num_constants,
        "mean_error": one.mean_error,
        "root_mean_square": one.root_mean_square,
        "bias": one.bias,
        "fitted_error": one.fitted_error,
        "difference": None if difference is None else difference.mean,
        "difference_clustered_error": None if difference is None else difference.clustered_error,
        "interval": _ends(one.interval),
        "ratio": one.ratio,
        "ratio_interval": _ends(one.ratio_interval),
        "is_worse": one.is_worse,
        "errors": one.errors.tolist(),
    }


def tree_of_curves(minima: Sequence[CurveMinimum], law: EpochsLaw | None, reason: str) -> Tree:
    """Minima of curves, and the power law through them or why there is none."""
    curves = [
        {
            "name": one.curve.name,
            "num_parameters": one.curve.num_parameters,
            "unique_tokens": one.curve.unique_tokens,
            "epochs": one.epochs,
            "interval": _ends(one.interval),
            "log_error": _finite(one.log_error),
            "loss": one.loss,
            "is_found": one.is_found,
        }
        for one in minima
    ]
    fitted = law and {
        "log_scale": law.log_scale,
        "unique_exponent": _tree_of_exponent(law.unique_exponent),
        "parameter_exponent": _tree_of_exponent(law.parameter_exponent),
        "scatter": law.scatter,
        "num_points": law.num_points,
    }
    return {"curves": curves, "law": fitted, "reason": reason or None}


def tree_of_isoflops(analysis: IsoFlopAnalysis) -> Tree:
    """Best sizes at each budget, and how they grow."""
    budgets = [
        {
            "flops": one.flops,
            "num_runs": len(one.losses),
            "best_parameters": one.best_parameters,
            "interval": _ends(one.parameters_interval),
            "best_tokens": one.best_tokens,
            "best_loss": one.best_loss,
        }
        for one in analysis.groups
    ]
    laws = {"size": analysis.size_law, "tokens": analysis.token_law, "loss": analysis.loss_law}
    named = {name: _tree_of_power_law(law) for name, law in laws.items()}
    return {"budgets": budgets, "laws": named, "warnings": analysis.warnings()}


def _tree_of_power_law(law: PowerLaw | None) -> Tree | None:
    if law is None:
        return None
    ends = _ends(law.exponent_interval)
    return {"scale": law.scale, "exponent": law.exponent, "interval": ends}


def _tree_of_exponent(exponent: Exponent | None) -> Tree | None:
    return exponent and {"value": exponent.value, "interval": _ends(exponent.interval)}


def _ends(interval: Interval | None) -> list[float | None] | None:
    """Both ends; one that is not known is null."""
    return None if interval is None else [_finite(interval.low), _finite(interval.high)]


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
