"""The best run of one objective for a budget: its size, its epochs, and what is expected of it.

Compute is C = 6 N D FLOPs; U and D are tokens, losses nats per token. A budget says which N it
counts, a law which N it takes, and every preset's N is known both ways. P presets.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_mdm.config import ModelSize, ParameterConvention, expand_preset, list_presets
from megatron_mdm.config.model import ModelConfig
from megatron_mdm.config.objective import ObjectiveKind
from megatron_mdm.core.statistics import Interval, percentile_interval
from megatron_mdm.model.accounting import model_size
from megatron_mdm.studies.laws.allocation import best_allocation
from megatron_mdm.studies.laws.forms import predicted_losses
from megatron_mdm.studies.laws.published import mdm_optimal_size
from megatron_mdm.studies.laws.storage import LawFile

Family = Literal["dc", "smdm"]
# A plan stops below its budget where the rest would gain less than what it prints, in nats per
# token, and is worth keeping: a tenth of the budget.
NO_GAIN = 0.001
_WORTH_KEEPING = 0.1
# Halvings of the range of tokens: 1e-12 of its width.
_HALVINGS = 40


@dataclass(frozen=True)
class Budget:
    """What there is to spend.

    Attributes:
        unique_tokens: U, distinct tokens of the corpus.
        training_flops: C.
        parameters: Which N the FLOPs count.
        sizes: N of the presets to choose from, by name.
        vocab_size: V of these presets; a uniform guess costs ln V nats.
    """

    unique_tokens: float
    training_flops: float
    parameters: ParameterConvention
    sizes: Mapping[str, ModelSize]
    vocab_size: int

    def tokens_of(self, name: str) -> float:
        """D that the whole budget buys a preset."""
        return self.training_flops / 6 / self.sizes[name].count_in(self.parameters)


class Option(NamedTuple):
    """The best run of one objective.

    Attributes:
        objective: AR or MDM.
        preset: Name of the model's sizes.
        size: N of the preset, both ways.
        num_tokens: D.
        epochs: D / U.
        training_flops: What it spends, counted as the budget is: all of it, or less where a law
            expects nothing of the rest.
        stops_early: Whether it is less.
        loss: What the law expects; None without one, or where it does not reach.
        interval: Of the loss, over the law's resamples; None without them.
        warnings: Where the law, or the preset, is stretched.
    """

    objective: ObjectiveKind
    preset: str
    size: ModelSize
    num_tokens: float
    epochs: float
    training_flops: float
    stops_early: bool
    loss: float | None
    interval: Interval | None
    warnings: tuple[str, ...]


def count_preset_sizes(family: str, vocab_size: int | None = None) -> dict[str, ModelSize]:
    """N of the presets of a family.

    Args:
        family: `dc` or `smdm`.
        vocab_size: Of the corpus; None: of the presets.

    Returns:
        N both ways, by name.
    """
    changes = {} if vocab_size is None else {"vocab_size": vocab_size}
    return {
        name: model_size(ModelConfig(**(expand_preset(name) | changes)))
        for name in list_presets()
        if name.startswith(family + "-")
    }


def choose_option(kind: ObjectiveKind, law: LawFile | None, budget: Budget) -> Option:
    """Chooses the preset of the least expected loss; without a law the published size.

    Args:
        kind: The objective.
        law: Its law.
        budget: What there is to spend.

    Returns:
        The option.

    Raises:
        DataError: The law does not say which N it takes.
    """
    if law is None:
        wanted = mdm_optimal_size(budget.parameters).at(budget.training_flops)
        counted = {name: size.count_in(budget.parameters) for name, size in budget.sizes.items()}
        name = min(counted, key=lambda one: abs(math.log(counted[one] / wanted)))
        tokens = budget.tokens_of(name)
        outside = _outside(counted, wanted)
    else:
        name, tokens = _best_run(law, budget)
        counted = {one: size.count_in(law.convention) for one, size in budget.sizes.items()}
        # The law's own budget of the run: as many tokens, its own N.
        flops = 6 * counted[name] * budget.tokens_of(name)
        outside = _outside(counted, best_size(law, flops, budget.unique_tokens))
    size, flops = budget.sizes[name], budget.training_flops
    stops_early = tokens < budget.tokens_of(name)
    if stops_early:
        flops = _rounded_up(6 * size.count_in(budget.parameters) * tokens)
        tokens = flops / 6 / size.count_in(budget.parameters)
    loss, interval = _loss_of(law, size, tokens, budget)
    return Option(
        objective=kind,
        preset=name,
        size=size,
        num_tokens=tokens,
        epochs=tokens / budget.unique_tokens,
        training_flops=flops,
        stops_early=stops_early,
        loss=loss,
        interval=interval,
        warnings=(
            *outside,
            *(() if law is None else _law_warnings(law, size, tokens, loss, budget)),
        ),
    )


def uniform_guess_loss(law: LawFile, budget: Budget) -> float:
    """The loss above which a law says nothing: that of guessing among the tokens that it counts.

    Args:
        law: The law.
        budget: Gives the vocabulary where the law does not.

    Returns:
        ln V, nats per token.
    """
    return math.log(law.vocab_size or budget.vocab_size)


def speaks_of_vocabulary(law: LawFile, budget: Budget) -> bool:
    """Are the law's losses those of the budget's vocabulary? Nats per token depend on it."""
    return law.vocab_size in (None, budget.vocab_size)


def best_size(law: LawFile, flops: float, unique_tokens: float) -> float:
    """The best of all N, not only of presets, in the law's own count."""
    return best_allocation(
        law.law, training_flops=flops, unique_tokens=unique_tokens
    ).num_parameters


def _best_run(law: LawFile, budget: Budget) -> tuple[str, float]:
    """The preset of the least expected loss, and the tokens that are worth training it on."""
    names = list(budget.sizes)
    sizes_P = np.array([budget.sizes[name].count_in(law.convention) for name in names])
    unique = budget.unique_tokens
    most_P = np.array([budget.tokens_of(name) for name in names])
    # Beyond its best number of epochs a run would only overfit.
    most_P = np.minimum(
        most_P, unique * law.law.best_epochs(num_parameters=sizes_P, unique_tokens=unique)
    )

    def losses(tokens_P: NDArray[np.float64]) -> NDArray[np.float64]:
        return law.law.loss(num_parameters=sizes_P, num_tokens=tokens_P, unique_tokens=unique)

    at_most_P = losses(most_P)
    best = int(at_most_P.argmin())
    if not law.law.minds_repetition() or float(most_P[best]) <= budget.unique_tokens:
        return names[best], float(most_P[best])
    enough = float(at_most_P[best]) + NO_GAIN
    low_P, high_P = np.minimum(unique, most_P), most_P
    for _ in range(_HALVINGS):
        middle_P = np.sqrt(low_P * high_P)
        suffices_P = losses(middle_P) <= enough
        high_P = np.where(suffices_P, middle_P, high_P)
        low_P = np.where(suffices_P, low_P, middle_P)
    share_P = np.where(at_most_P <= enough, high_P / most_P, math.inf)
    cheapest = int(share_P.argmin())
    if float(share_P[cheapest]) > 1 - _WORTH_KEEPING:
        return names[best], float(most_P[best])
    return names[cheapest], float(high_P[cheapest])


def _rounded_up(flops: float) -> float:
    """To three digits, which is what people write into a configuration."""
    unit = 10.0 ** (math.floor(math.log10(flops)) - 2)
    return float(f"{math.ceil(flops / unit) * unit:.3g}")


def _loss_of(
    law: LawFile | None, size: ModelSize, tokens: float, budget: Budget
) -> tuple[float | None, Interval | None]:
    if law is None or not speaks_of_vocabulary(law, budget):
        return None, None
    unique = budget.unique_tokens
    loss = law.expected_loss(size=size, num_tokens=tokens, unique_tokens=unique)
    if loss > uniform_guess_loss(law, budget):
        return None, None
    if not law.bootstrap:
        return loss, None
    found = predicted_losses(law.bootstrap, **law.arguments(size, tokens, unique))[:, 0]
    return loss, percentile_interval(found)


def _outside(counted: Mapping[str, float], wanted: float) -> Iterator[str]:
    least, most = min(counted.values()), max(counted.values())
    if wanted < least / 1.5 or wanted > most * 1.5:
        yield (
            f"The best size would be {wanted:.3g} parameters, outside the presets "
            f"({least:.3g} to {most:.3g})."
        )


def _law_warnings(
    law: LawFile, size: ModelSize, tokens: float, loss: float | None, budget: Budget
) -> Iterator[str]:
    """Where the law is stretched: beyond its runs, beyond its reuse, beyond what a guess costs."""
    epochs = tokens / budget.unique_tokens
    found = {
        "num_parameters": size.count_in(law.convention),
        "num_tokens": tokens,
        "unique_tokens": budget.unique_tokens,
        "epochs": max(epochs, 1.0),
    }
    for name, value in found.items():
        low, high = law.ranges.get(name, (0.0, math.inf))
        # To the printed digits; a law is no worse a hair beyond its runs.
        if not low * 0.99 <= value <= high * 1.01:
            yield (
                f"{name}={value:.3g} lies outside the {low:.3g} to {high:.3g} of the law's runs: "
                "its loss is an extrapolation."
            )
    reuse = getattr(law.law, "token_reuse", math.inf)
    decay = getattr(law.law, "token_decay", 0.0)
    if decay > 0:
        # What the geometric form's delta is in the other's terms.
        reuse = (1 - decay) / decay
    if epochs > reuse and not law.law.penalty_names:
        yield (
            f"{epochs:.3g} epochs are beyond the law's own reach, R_D = {reuse:.3g}, and its form "
            "does not know overfitting: validate often and keep the best checkpoint."
        )
    if not speaks_of_vocabulary(law, budget):
        yield (
            f"The law's losses are per token of a vocabulary of {law.vocab_size:,}, and the model "
            f"has one of {budget.vocab_size:,}: no expected loss is given."
        )
    elif loss is None:
        yield (
            f"The law does not reach this far: what it expects is above ln V = "
            f"{uniform_guess_loss(law, budget):.4g} nats per token, the loss of a guess, and so no "
            "expected loss is given; the size is an extrapolation too."
        )
