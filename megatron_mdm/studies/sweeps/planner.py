"""From unique tokens and a budget to a decision: AR, MDM or either, how large, how many epochs.

Compute is C = 6 N D FLOPs, and a plan says which N; U and D are tokens, losses nats per token.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from megatron_mdm.config import (
    ModelSize,
    ParameterConvention,
    expand_preset,
    find_convention,
    list_presets,
)
from megatron_mdm.config.objective import ObjectiveKind
from megatron_mdm.core.errors import ConfigError
from megatron_mdm.core.statistics import HIGH_QUANTILE, Interval
from megatron_mdm.studies.laws import published
from megatron_mdm.studies.laws.allocation import best_allocation
from megatron_mdm.studies.laws.critical import CriticalCompute, critical_flops_of_laws
from megatron_mdm.studies.laws.forms import predicted_losses
from megatron_mdm.studies.laws.storage import LawFile
from megatron_mdm.studies.sweeps.plan_options import (
    Budget,
    Family,
    Option,
    choose_option,
    count_preset_sizes,
    speaks_of_vocabulary,
    uniform_guess_loss,
)

Choice = Literal["ar", "mdm", "either"]
# Below this share of resamples on one side a comparison is called open.
_CLEAR = HIGH_QUANTILE
# Two losses nearer than this are one, in nats per token.
_NOTHING = 1e-9


class Gain(NamedTuple):
    """What more of something would change.

    Attributes:
        change: Such as `twice the compute`.
        loss: Expected at the best size then, nats per token.
        difference: To the best size now; negative is better.
    """

    change: str
    loss: float
    difference: float


@dataclass(frozen=True)
class Plan:
    """A decision and its grounds.

    Attributes:
        budget: What there is to spend, and which N its FLOPs count.
        options: The best run of each objective.
        choice: The better one, or `either` where what is known does not tell.
        leaning: The better one as far as anything says; what `--out` writes.
        reason: Why, in one sentence.
        published_critical_flops: Where MDM overtakes AR on U tokens by the published power law,
            counted as the budget is.
        published_band: How well that is known.
        critical: The same by the given laws, counted as they count; None unless both are given
            and count alike.
        critical_parameters: Which N `critical` counts.
        gains: What more data or compute would buy the choice; empty without its law.
        warnings: What limits the decision.
    """

    budget: Budget
    options: Mapping[ObjectiveKind, Option]
    choice: Choice
    leaning: ObjectiveKind
    reason: str
    published_critical_flops: float
    published_band: Interval
    critical: CriticalCompute | None
    critical_parameters: ParameterConvention | None
    gains: tuple[Gain, ...]
    warnings: tuple[str, ...]

    @property
    def unique_tokens(self) -> float:
        """U."""
        return self.budget.unique_tokens

    @property
    def training_flops(self) -> float:
        """C."""
        return self.budget.training_flops


class _Decision(NamedTuple):
    choice: Choice
    leaning: ObjectiveKind
    reason: str


def make_plan(
    *,
    unique_tokens: float,
    training_flops: float,
    laws: Mapping[ObjectiveKind, LawFile],
    family: Family = "dc",
    parameters: ParameterConvention | None = None,
    vocab_size: int | None = None,
) -> Plan:
    """Decides how to spend a budget on a corpus.

    With laws of both objectives the lower expected loss decides. Otherwise the published critical
    compute does, and what is known of each objective fills in the sizes: the given or the published
    law of AR, the given law or the published compute-optimal sizes of MDM.

    Args:
        unique_tokens: U, distinct tokens of the corpus.
        training_flops: C, the budget.
        laws: Laws of one's own, by objective.
        family: Which presets to choose from, `dc` or `smdm`.
        parameters: Which N the budget counts; None: as the family does.
        vocab_size: V of the corpus; None: that of the presets.

    Returns:
        The plan.

    Raises:
        ConfigError: A number is not positive and finite, or a law that has to decide expects more
            than a guess would cost.
        DataError: A law does not say which N it takes.
    """
    _check_numbers(unique_tokens, training_flops)
    sizes = count_preset_sizes(family, vocab_size)
    budget = Budget(
        unique_tokens,
        training_flops,
        parameters or find_convention(family),
        sizes,
        vocab_size or _vocab_size(family),
    )
    known: dict[ObjectiveKind, LawFile] = {"ar": published.AR_LAW, **laws}
    options: dict[ObjectiveKind, Option] = {
        kind: choose_option(kind, known.get(kind), budget) for kind in ("ar", "mdm")
    }
    threshold = convert_published_threshold(unique_tokens, budget.parameters)
    has_both = "ar" in laws and "mdm" in laws
    decision = _by_loss(options, laws, budget) if has_both else _by_budget(budget, threshold)
    counts = {law.convention for law in laws.values()}
    comparable = has_both and len(counts) == 1
    return Plan(
        budget=budget,
        options=options,
        **decision._asdict(),
        published_critical_flops=threshold,
        published_band=published.critical_band(threshold),
        critical=_critical(laws, unique_tokens) if comparable else None,
        critical_parameters=counts.pop() if comparable else None,
        gains=tuple(_gains(known.get(decision.leaning), options[decision.leaning], budget)),
        warnings=tuple(_warnings(laws, budget)),
    )


def convert_published_threshold(unique_tokens: float, parameters: ParameterConvention) -> float:
    """The published critical compute in either count of FLOPs.

    Args:
        unique_tokens: U in tokens.
        parameters: Which N the FLOPs shall count.

    Returns:
        C_crit. It is known with embeddings; without, it is as many tokens of the shape that the
        published sizes of MDMs come nearest to at that budget.
    """
    critical = published.critical_flops(unique_tokens=unique_tokens)
    if parameters == published.PARAMETERS:
        return critical
    line = published.mdm_optimal_size(parameters)

    def converted(size: ModelSize) -> float:
        return size.convert_flops(critical, published.PARAMETERS, parameters)

    # The paper's shapes, whatever family the plan chooses from.
    nearest = min(
        count_preset_sizes("dc").values(),
        key=lambda size: abs(math.log(size.count_in(parameters) / line.at(converted(size)))),
    )
    return converted(nearest)


def _check_numbers(unique_tokens: float, training_flops: float) -> None:
    for name, value in (("--unique-tokens", unique_tokens), ("--flops", training_flops)):
        if not 0 < value < math.inf:
            raise ConfigError(f"{name}={value:g} is not valid: give a positive number.")
    if training_flops < 6 * unique_tokens:
        raise ConfigError(
            f"--flops={training_flops:g} does not pay for one parameter on "
            f"--unique-tokens={unique_tokens:g}: give the budget in FLOPs and the corpus in tokens."
        )


def _vocab_size(family: str) -> int:
    first = next(name for name in list_presets() if name.startswith(family + "-"))
    return int(expand_preset(first)["vocab_size"])


def _by_budget(budget: Budget, threshold: float) -> _Decision:
    flops, unique = budget.training_flops, budget.unique_tokens
    critical = (
        f"the published critical compute of {threshold:.3g} FLOPs for {unique:.3g} unique tokens"
    )
    leaning: ObjectiveKind = "mdm" if flops >= threshold else "ar"
    low, high = published.critical_band(threshold)
    if flops > high:
        return _Decision("mdm", "mdm", f"the budget is {flops / threshold:.3g} times {critical}")
    if flops < low:
        return _Decision("ar", "ar", f"the budget is {flops / threshold:.3g} of {critical}")
    reason = (
        f"the budget is {flops / threshold:.3g} times {critical}, which is known to a factor of "
        f"{published.CRITICAL_FACTOR:g} only"
    )
    return _Decision("either", leaning, reason)


def _by_loss(
    options: Mapping[ObjectiveKind, Option],
    laws: Mapping[ObjectiveKind, LawFile],
    budget: Budget,
) -> _Decision:
    losses = {kind: _decisive_loss(option, laws[kind], budget) for kind, option in options.items()}
    leaning: ObjectiveKind = "mdm" if losses["mdm"] <= losses["ar"] else "ar"
    other: ObjectiveKind = "ar" if leaning == "mdm" else "mdm"
    gap = losses[other] - losses[leaning]
    if gap < _NOTHING:
        reason = f"both laws expect {losses[leaning]:.4g} nats per token, a tie"
        return _Decision("either", leaning, reason)
    reason = (
        f"{leaning.upper()} is expected to reach {losses[leaning]:.4g} nats per token, "
        f"{gap:.3g} below the other"
    )
    if not all(laws[kind].bootstrap for kind in (leaning, other)):
        unknown = "; the laws hold no resamples, so how sure that is is not known"
        return _Decision(leaning, leaning, reason + unknown)
    better, worse = (
        predicted_losses(
            laws[kind].bootstrap,
            **laws[kind].arguments(
                options[kind].size, options[kind].num_tokens, budget.unique_tokens
            ),
        )
        for kind in (leaning, other)
    )
    pairs = min(len(better), len(worse))
    better, worse = better[:pairs], worse[:pairs]
    # A tie speaks for neither.
    share = float((better < worse).mean() + (better == worse).mean() / 2)
    reason = f"{reason}, in {share:.0%} of the resamples"
    if share >= _CLEAR:
        return _Decision(leaning, leaning, reason)
    return _Decision("either", leaning, f"{reason}: too close to call")


def _decisive_loss(option: Option, law: LawFile, budget: Budget) -> float:
    if option.loss is not None:
        return option.loss
    found = law.expected_loss(
        size=option.size, num_tokens=option.num_tokens, unique_tokens=budget.unique_tokens
    )
    raise ConfigError(
        f"The law of {option.objective} expects {found:.4g} nats per token of {option.preset} on "
        f"--unique-tokens={budget.unique_tokens:g}, more than the ln V = "
        f"{uniform_guess_loss(law, budget):.4g} of a guess among {budget.vocab_size:,} tokens: it "
        "does not reach this far, so plan with more tokens, or fit it to runs of this size."
    )


def _critical(laws: Mapping[ObjectiveKind, LawFile], unique: float) -> CriticalCompute:
    ar, mdm = laws["ar"], laws["mdm"]
    both = bool(ar.bootstrap) and bool(mdm.bootstrap)
    return critical_flops_of_laws(
        ar.law,
        mdm.law,
        unique_tokens=unique,
        ar_bootstrap=ar.bootstrap if both else (),
        mdm_bootstrap=mdm.bootstrap if both else (),
    )


def _gains(law: LawFile | None, option: Option, budget: Budget) -> Iterator[Gain]:
    """With all sizes free, in the law's own count of FLOPs, starting at the option's shape."""
    if law is None or not speaks_of_vocabulary(law, budget):
        return
    unique = budget.unique_tokens
    flops = 6 * option.size.count_in(law.convention) * budget.tokens_of(option.preset)
    now = best_allocation(law.law, training_flops=flops, unique_tokens=unique).loss
    if max(now, option.loss or math.inf) > uniform_guess_loss(law, budget):
        return
    for change, data, compute in (
        ("twice the unique tokens", 2, 1),
        ("ten times the unique tokens", 10, 1),
        ("twice the compute", 1, 2),
        ("ten times the compute", 1, 10),
    ):
        then = best_allocation(
            law.law, training_flops=flops * compute, unique_tokens=unique * data
        ).loss
        yield Gain(change, then, then - now)


def _warnings(laws: Mapping[ObjectiveKind, LawFile], budget: Budget) -> Iterator[str]:
    if "ar" in laws and "mdm" in laws:
        if laws["ar"].convention != laws["mdm"].convention:
            yield (
                "The two laws count parameters differently, so they have no critical compute in "
                "common; their losses at the presets, whose N is known both ways, are compared."
            )
        return
    low, high = published.CRITICAL_UNIQUE_TOKENS
    if not low <= budget.unique_tokens <= high:
        yield (
            f"The critical compute was measured on {low:.3g} to {high:.3g} unique tokens; "
            f"{budget.unique_tokens:.3g} extrapolates."
        )
    if budget.vocab_size != published.VOCAB_SIZE:
        yield (
            f"The published figures are of {published.VOCAB_SIZE:,} tokens of vocabulary, the "
            f"model has {budget.vocab_size:,}: what a token holds differs, so the critical compute "
            "is a guess."
        )
    if "mdm" not in laws:
        yield (
            "No complete law of MDMs under repetition has been published, so the MDM has no "
            "expected loss: fit one with mdm fit and give it with --law."
        )
