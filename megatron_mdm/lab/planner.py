"""From unique tokens and a budget to a decision: AR or MDM, how large, how many epochs.

Compute is C = 6 N D FLOPs, N without embeddings; U and D are tokens, losses nats per token.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from megatron_mdm.config import preset_fields, preset_names
from megatron_mdm.config.model import ModelConfig
from megatron_mdm.errors import ConfigError
from megatron_mdm.laws.allocation import best_allocation
from megatron_mdm.laws.critical import (
    CriticalCompute,
    critical_flops_of_laws,
    published_critical_flops,
)
from megatron_mdm.laws.published import AR_LAW, CRITICAL_UNIQUE_TOKENS, mdm_optimal_size
from megatron_mdm.laws.storage import LawFile
from megatron_mdm.laws.uncertainty import (
    CONFIDENCE,
    Interval,
    percentile_interval,
    predicted_losses,
)
from megatron_mdm.scaling.accounting import count_parameters

ObjectiveKind = Literal["ar", "mdm"]
FAMILIES = ("dc", "smdm")
# Below this share of resamples on one side a comparison is called open.
_CLEAR = (1 + CONFIDENCE) / 2


class Option(NamedTuple):
    """The best run of one objective.

    Attributes:
        objective: AR or MDM.
        preset: Name of the model's sizes.
        num_parameters: N of the preset.
        num_tokens: D = C / (6 N).
        epochs: D / U.
        loss: What the law expects; None without one.
        interval: Of the loss, over the law's resamples; None without them.
        warnings: Where the law, or the preset, is stretched.
    """

    objective: ObjectiveKind
    preset: str
    num_parameters: int
    num_tokens: float
    epochs: float
    loss: float | None
    interval: Interval | None
    warnings: tuple[str, ...]


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
        unique_tokens: U.
        training_flops: C.
        options: The best run of each objective.
        choice: The better one.
        reason: Why, in one sentence.
        published_critical_flops: Where MDM overtakes AR on U tokens, by the published power law.
        critical: The same by the given laws; None unless both are given.
        gains: What more data or compute would buy the choice; empty without its law.
        warnings: What limits the decision.
    """

    unique_tokens: float
    training_flops: float
    options: Mapping[ObjectiveKind, Option]
    choice: ObjectiveKind
    reason: str
    published_critical_flops: float
    critical: CriticalCompute | None
    gains: tuple[Gain, ...]
    warnings: tuple[str, ...]


def make_plan(
    *,
    unique_tokens: float,
    training_flops: float,
    laws: Mapping[ObjectiveKind, LawFile],
    family: str = "dc",
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

    Returns:
        The plan.

    Raises:
        ConfigError: A number is not positive and finite, or the family is unknown.
    """
    for name, value in (("--unique-tokens", unique_tokens), ("--flops", training_flops)):
        if not 0 < value < math.inf:
            raise ConfigError(f"{name}={value:g} is not valid: give a positive number.")
    if training_flops < 6 * unique_tokens:
        raise ConfigError(
            f"--flops={training_flops:g} does not pay for one parameter on "
            f"--unique-tokens={unique_tokens:g}: give the budget in FLOPs and the corpus in tokens."
        )
    if family not in FAMILIES:
        raise ConfigError(f"--family={family} is not known: use one of {', '.join(FAMILIES)}.")
    known: dict[ObjectiveKind, LawFile] = {"ar": AR_LAW, **laws}
    options: dict[ObjectiveKind, Option] = {
        kind: _option(kind, known.get(kind), unique_tokens, training_flops, family)
        for kind in ("ar", "mdm")
    }
    published = published_critical_flops(unique_tokens=unique_tokens)
    critical = None
    warnings: list[str] = []
    if "ar" in laws and "mdm" in laws:
        choice, reason = _by_loss(options, laws, unique_tokens)
        critical = _critical(laws, unique_tokens)
    else:
        choice = "mdm" if training_flops >= published else "ar"
        side = "at or above" if choice == "mdm" else "below"
        reason = (
            f"the budget is {side} the published critical compute of {published:.3g} FLOPs for "
            f"{unique_tokens:.3g} unique tokens"
        )
        low, high = CRITICAL_UNIQUE_TOKENS
        if not low <= unique_tokens <= high:
            warnings.append(
                f"The critical compute was measured on {low:.3g} to {high:.3g} unique tokens; "
                f"{unique_tokens:.3g} extrapolates."
            )
        if "mdm" not in laws:
            warnings.append(
                "No complete law of MDMs under repetition has been published, so the MDM has no "
                "expected loss: fit one with tools/fit_scaling_law.py and give it with --law."
            )
    return Plan(
        unique_tokens=unique_tokens,
        training_flops=training_flops,
        options=options,
        choice=choice,
        reason=reason,
        published_critical_flops=published,
        critical=critical,
        gains=tuple(_gains(known.get(choice), unique_tokens, training_flops)),
        warnings=tuple(warnings),
    )


def preset_sizes(family: str) -> dict[str, int]:
    """N of the presets of a family.

    Args:
        family: `dc` or `smdm`.

    Returns:
        Parameters without embeddings, by name.
    """
    return {
        name: count_parameters(ModelConfig(**preset_fields(name))).non_embedding
        for name in preset_names()
        if name.startswith(family + "-")
    }


def expected_loss(
    law: LawFile, *, num_parameters: float, num_tokens: float, unique_tokens: float
) -> float:
    """What a law expects of one run.

    Args:
        law: The law.
        num_parameters: N.
        num_tokens: D.
        unique_tokens: U.

    Returns:
        Nats per token.
    """
    run = _run(num_parameters, num_tokens, unique_tokens)
    names = ("num_parameters", "num_tokens", "unique_tokens")
    return float(law.law.loss(**dict(zip(names, run, strict=True))))


def _run(num_parameters: float, num_tokens: float, unique: float) -> list[torch.Tensor]:
    values = (num_parameters, num_tokens, unique)
    return [torch.tensor([value], dtype=torch.float64) for value in values]


def _option(
    kind: ObjectiveKind, law: LawFile | None, unique: float, flops: float, family: str
) -> Option:
    sizes = preset_sizes(family)
    if law is None:
        wanted = mdm_optimal_size().at(flops)
        name = min(sizes, key=lambda one: abs(math.log(sizes[one] / wanted)))
    else:
        given = law
        wanted = best_allocation(law.law, training_flops=flops, unique_tokens=unique).num_parameters
        name = min(
            sizes,
            key=lambda one: expected_loss(
                given,
                num_parameters=sizes[one],
                num_tokens=flops / 6 / sizes[one],
                unique_tokens=unique,
            ),
        )
    size = sizes[name]
    tokens = flops / 6 / size
    loss, interval = _loss_of(law, size, tokens, unique)
    warnings = [
        *_preset_warnings(family, sizes, wanted),
        *_range_warnings(law, size, tokens, unique),
        *_reuse_warnings(law, tokens / unique),
    ]
    return Option(kind, name, size, tokens, tokens / unique, loss, interval, tuple(warnings))


def _loss_of(
    law: LawFile | None, size: float, tokens: float, unique: float
) -> tuple[float | None, Interval | None]:
    if law is None:
        return None, None
    loss = expected_loss(law, num_parameters=size, num_tokens=tokens, unique_tokens=unique)
    if not law.bootstrap:
        return loss, None
    found = predicted_losses(law.bootstrap, *_run(size, tokens, unique))[:, 0]
    return loss, percentile_interval(found.tolist())


def _preset_warnings(family: str, sizes: Mapping[str, int], wanted: float) -> Iterator[str]:
    least, most = min(sizes.values()), max(sizes.values())
    if wanted < least / 1.5 or wanted > most * 1.5:
        yield (
            f"The best size would be {wanted:.3g} parameters, outside the {family} presets "
            f"({least:.3g} to {most:.3g})."
        )


def _range_warnings(
    law: LawFile | None, size: float, tokens: float, unique: float
) -> Iterator[str]:
    if law is None:
        return
    found = {
        "num_parameters": size,
        "num_tokens": tokens,
        "unique_tokens": unique,
        "epochs": max(tokens / unique, 1.0),
    }
    for name, value in found.items():
        low, high = law.ranges.get(name, (0.0, math.inf))
        # To the printed digits; a law is no worse a hair beyond its runs.
        if not low * 0.99 <= value <= high * 1.01:
            yield (
                f"{name}={value:.3g} lies outside the {low:.3g} to {high:.3g} of the law's runs: "
                "its loss is an extrapolation."
            )


def _reuse_warnings(law: LawFile | None, epochs: float) -> Iterator[str]:
    reuse = getattr(law.law, "token_reuse", math.inf) if law is not None else math.inf
    if epochs > reuse:
        yield (
            f"{epochs:.3g} epochs are beyond R_D = {reuse:.3g}, and no form of the law knows "
            "overfitting: validate often and keep the best checkpoint."
        )


def _by_loss(
    options: Mapping[ObjectiveKind, Option],
    laws: Mapping[ObjectiveKind, LawFile],
    unique: float,
) -> tuple[ObjectiveKind, str]:
    ar, mdm = options["ar"], options["mdm"]
    if ar.loss is None or mdm.loss is None:
        raise ValueError("both options need an expected loss")
    choice: ObjectiveKind = "mdm" if mdm.loss <= ar.loss else "ar"
    reason = (
        f"{choice.upper()} is expected to reach {options[choice].loss:.4g} nats per token, "
        f"{abs(mdm.loss - ar.loss):.3g} below the other"
    )
    resamples = [
        predicted_losses(
            laws[one.objective].bootstrap, *_run(one.num_parameters, one.num_tokens, unique)
        )
        for one in (options[choice], options["ar" if choice == "mdm" else "mdm"])
        if laws[one.objective].bootstrap
    ]
    if len(resamples) < 2:
        return choice, reason + "; the laws hold no resamples, so how sure that is is not known"
    pairs = min(map(len, resamples))
    share = float((resamples[0][:pairs] <= resamples[1][:pairs]).double().mean())
    verdict = "" if share >= _CLEAR else ": too close to call"
    return choice, f"{reason}, in {share:.0%} of the resamples{verdict}"


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


def _gains(law: LawFile | None, unique: float, flops: float) -> Iterator[Gain]:
    if law is None:
        return
    now = best_allocation(law.law, training_flops=flops, unique_tokens=unique).loss
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
