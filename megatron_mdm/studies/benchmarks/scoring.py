"""Likelihoods of many requests, beside one request at a time as the papers' public code does it.

The questions have the shape of the papers' tasks: several answers to one context, or a word. How
many tokens they have are round estimates, not counts of the data sets, which were not at hand. Each
length is drawn from half to one and a half times of it. RACE, of some 450 tokens, is left out: it
does not fit the demo's models.

The other way is in `public_code.py`. Under torchrun all processes share the requests, as those of
mdm evaluate do, and the other way is one process with the threads of all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from megatron_mdm.core.errors import ConfigError
from megatron_mdm.diffusion.probes import EstimatorKind
from megatron_mdm.distributed.host_memory import keep_freed_memory
from megatron_mdm.inference.models import ModelFacts
from megatron_mdm.inference.passes import Judgement, Passes, judge_with
from megatron_mdm.inference.rank_pool import RankPool, join_launched_ranks
from megatron_mdm.inference.requests import Request, ScoringSettings
from megatron_mdm.inference.scoring import Scorer, make_scoring_task, score_on_ranks
from megatron_mdm.studies.benchmarks.devices import choose_device, now
from megatron_mdm.studies.benchmarks.exported_models import load_export, make_random_model
from megatron_mdm.studies.benchmarks.harness import summarize, summarize_ratios
from megatron_mdm.studies.benchmarks.public_code import one_at_a_time
from megatron_mdm.studies.benchmarks.settings import ScoreSettings


class TaskShape(NamedTuple):
    """What the requests of a task look like.

    Attributes:
        choices: Answers to a question.
        context: Tokens of a context, on average.
        continuation: Tokens of an answer, on average.
    """

    choices: int
    context: int
    continuation: int


TASKS = {
    "arc_easy": TaskShape(4, 32, 5),
    "openbookqa": TaskShape(4, 16, 4),
    "social_iqa": TaskShape(3, 36, 5),
    "piqa": TaskShape(2, 14, 22),
    "hellaswag": TaskShape(4, 48, 26),
    "boolq": TaskShape(2, 160, 1),
    "lambada_openai": TaskShape(1, 84, 2),
}


class _Model:
    """The model of an export without a tokenizer."""

    def __init__(self, model: Any) -> None:
        self.model, self.tokenizer = model, None
        config = model.config
        self.facts = ModelFacts(
            name="the model",
            is_causal=config.is_causal,
            vocab_size=config.vocab_size,
            mask_token_id=config.mask_token_id,
            max_length=config.max_position_embeddings,
            end_token_id=None,
        )

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    def judge(self, passes: Passes) -> Judgement:
        return judge_with(self.model, passes)


class _Run(NamedTuple):
    seconds: float
    values: list[float]

    @classmethod
    def of_all(cls, runs: Sequence[_Run]) -> _Run:
        seconds = sum(one.seconds for one in runs)
        return cls(seconds, [value for one in runs for value in one.values])


_Score = Callable[[Sequence[Request]], list[float]]


class _Case(NamedTuple):
    """Two ways to the same numbers.

    Attributes:
        ours: On all ranks.
        alone: Ours on one rank, whose operations can be counted.
        public: One request at a time.
        device: Where all of them compute.
    """

    ours: _Score
    alone: _Score
    public: _Score
    device: torch.device


def measure_scoring(settings: ScoreSettings) -> dict[str, Any] | None:
    """Times scoring in turn on one model, task by task as the harness does.

    Args:
        settings: What is scored.

    Returns:
        Of each case, for all tasks together and for each: requests per second, how many times
        faster ours is than one request at a time, how many times fewer operations its matrix
        products have, and the most that the two differ, in nats. And how many times the draws of
        `fixed_count` other forms need for the same error, on continuations too long for all masks.
        None on a rank that does not lead.

    Raises:
        ConfigError: A setting is out of range, or the model or the device cannot be used.
    """
    keep_freed_memory()
    length = max(_longest(TASKS[name]) for name in settings.tasks)
    device = choose_device(settings.device)
    if settings.model is not None:
        models = [load_export(settings.model, device)]
    else:
        models = [
            make_random_model(settings.preset, length, device, is_causal=is_causal)
            for is_causal in (False, True)
        ]
    wrapped = {"ar" if model.config.is_causal else "mdm": _Model(model) for model in models}
    results: dict[str, Any] = {}
    with join_launched_ranks():
        pool = RankPool({name: make_scoring_task(model) for name, model in wrapped.items()})

        def work() -> None:
            for name, model in wrapped.items():
                results.update(_measure(model, partial(_ours, pool, name), settings, length))

        pool.run_on_driver(work)
    return results if pool.is_driver else None


def _longest(shape: TaskShape) -> int:
    return 3 * shape.context // 2 + 3 * shape.continuation // 2


def _measure(
    model: _Model, ours: Callable[..., list[float]], settings: ScoreSettings, length: int
) -> dict[str, Any]:
    if model.facts.max_length < length:
        raise ConfigError(
            f"--model takes {model.facts.max_length} tokens, and a task here has {length}: give a "
            "model of a longer sequence length, or leave tasks out with --tasks."
        )
    tasks: dict[str, list[Request]] = {
        name: _requests(TASKS[name], settings.num_questions, model.facts, number)
        for number, name in enumerate(settings.tasks)
    }
    kinds: tuple[EstimatorKind, ...] = ("fixed_count", "monte_carlo", "chain_rule")
    ways = {"autoregressive": ScoringSettings()}
    if not model.facts.is_causal:
        ways = {
            kind + ("_guided" if scale else ""): ScoringSettings(
                kind, draws=settings.draws, guidance_scale=scale
            )
            for kind in kinds
            for scale in (0.0, settings.guidance_scale)
        }
    found = {}
    for name, way in ways.items():
        public = partial(one_at_a_time, model.model, way)
        case = _Case(partial(ours, way), partial(_alone, model, way), public, model.device)
        found[name] = _compare(case, tasks, settings.repeats)
    if not model.facts.is_causal:
        requests = [one for group in tasks.values() for one in group]
        found["draws_for_the_same_error"] = _compare_errors(model, requests, settings)
    return found


def _compare(case: _Case, tasks: dict[str, list[Request]], repeats: int) -> dict[str, Any]:
    runs: dict[str, list[tuple[_Run, _Run]]] = {name: [] for name in tasks}
    # The first run of a case pays for memory and kernels.
    flops = {
        name: (_flops(case.alone, group), _flops(case.public, group))
        for name, group in tasks.items()
    }
    for _ in range(repeats):
        for name, requests in tasks.items():
            ours = _timed(case.ours, requests, case.device)
            with _threads_of_all_ranks():
                runs[name].append((ours, _timed(case.public, requests, case.device)))
    found = {name: _describe(runs[name], len(tasks[name]), flops[name]) for name in tasks}
    together = [
        tuple(_Run.of_all(side) for side in zip(*pairs, strict=True))
        for pairs in zip(*runs.values(), strict=True)
    ]
    totals = tuple(sum(part) for part in zip(*flops.values(), strict=True))
    return _describe(together, sum(map(len, tasks.values())), totals) | {"tasks": found}


def _timed(score: _Score, requests: Sequence[Request], device: torch.device) -> _Run:
    start = now(device)
    values = score(requests)
    return _Run(now(device) - start, values)


@contextmanager
def _threads_of_all_ranks() -> Iterator[None]:
    own = torch.get_num_threads()
    torch.set_num_threads(own * (dist.get_world_size() if dist.is_initialized() else 1))
    try:
        yield
    finally:
        torch.set_num_threads(own)


def _flops(score: _Score, requests: Sequence[Request]) -> int:
    with FlopCounterMode(display=False) as counter:
        score(requests)
    return int(counter.get_total_flops())


def _describe(
    pairs: Sequence[tuple[_Run, ...]], num_requests: int, flops: tuple[int, ...]
) -> dict[str, Any]:
    ours, public = ([run.seconds for run in side] for side in zip(*pairs, strict=True))
    return {
        "ours_requests_per_second": summarize([num_requests / one for one in ours]),
        "public_requests_per_second": summarize([num_requests / one for one in public]),
        "ours_over_public": summarize_ratios(public, ours),
        # Few draws may hide no token at all, and then there is nothing to run.
        "public_flops_over_ours": flops[1] / flops[0] if flops[0] else None,
        "most_different_nats": max(
            float(np.abs(np.subtract(a.values, b.values)).max()) for a, b in pairs
        ),
    }


def _compare_errors(
    model: _Model, requests: Sequence[Request], settings: ScoreSettings
) -> dict[str, Any]:
    """How many draws each form needs, as a multiple of `fixed_count` with stratified t."""
    drawn = [one for one in requests if 2 ** len(one.continuation) - 1 > settings.draws]
    if not drawn:
        return {"num_requests": 0}
    forms = {
        "fixed_count": ScoringSettings("fixed_count", settings.draws),
        "fixed_count_independent_t": ScoringSettings("fixed_count", settings.draws, False),
        "monte_carlo": ScoringSettings("monte_carlo", settings.draws),
        "monte_carlo_independent_t": ScoringSettings("monte_carlo", settings.draws, False),
    }
    # The error falls with the root of the draws.
    variances = {
        name: float(np.mean([one.standard_error**2 for one in Scorer(model, form).score(drawn)]))
        for name, form in forms.items()
    }
    base = variances["fixed_count"]
    return {"num_requests": len(drawn)} | {name: one / base for name, one in variances.items()}


def _requests(shape: TaskShape, num_questions: int, facts: ModelFacts, seed: int) -> list[Request]:
    """Random tokens of the shape of a task."""
    generator = np.random.default_rng(seed)

    def tokens(mean: int) -> tuple[int, ...]:
        size = generator.integers(max(1, mean // 2), 3 * mean // 2 + 1)
        return tuple(generator.integers(0, facts.vocab_size, size).tolist())

    contexts = [tokens(shape.context) for _ in range(num_questions)]
    return [
        Request(context, tokens(shape.continuation))
        for context in contexts
        for _ in range(shape.choices)
    ]


def _ours(
    pool: RankPool, task: str, settings: ScoringSettings, requests: Sequence[Request]
) -> list[float]:
    return [score.log_likelihood for score in score_on_ranks(pool, task, settings, requests)]


def _alone(model: _Model, settings: ScoringSettings, requests: Sequence[Request]) -> list[float]:
    return [score.log_likelihood for score in Scorer(model, settings).score(requests)]
