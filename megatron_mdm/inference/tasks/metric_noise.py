"""The noise of a task's metric that comes from the noise of its log-likelihoods."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean
from lm_eval.api.task import Task

from megatron_mdm.diffusion.noise import seed_sequence
from megatron_mdm.inference.requests import Score

# By the type of a task. The harness takes almost a millisecond per document with several answers,
# and the sum over many documents makes up for few redraws.
NUM_REDRAWS = {"multiple_choice": 16, "loglikelihood": 200, "loglikelihood_rolling": 200}


def estimate_metric_noise(
    task: Task, scores: Mapping[int, Score], seed: int, num_redraws: int | None = None
) -> dict[str, float]:
    """Estimates the standard deviations of a task's metrics over seeds of the masks.

    Every log-likelihood is drawn again from a normal distribution with its own standard error, and
    the task computes its metrics from them. The estimates stand in for the true values, so
    decisions that are closer than their error look somewhat less certain than they are.

    Args:
        task: A task of the harness that was evaluated.
        scores: What each of its requests came to, by the id of the `Instance`.
        seed: Of what is drawn here.
        num_redraws: How often; None: as `NUM_REDRAWS` says. The figure's own relative error is
            1 / sqrt(2 num_redraws), and of a mean smaller, since noises of documents are
            independent and their variances add up.

    Returns:
        By the name of the metric, in its units; nothing for a task that generates.
    """
    documents: dict[int, list[Instance]] = defaultdict(list)
    for one in task.instances:
        if id(one) in scores:
            documents[one.doc_id].append(one)
    size = num_redraws or NUM_REDRAWS.get(task.get_config("output_type"))
    if size is None or not documents:
        return {}
    generator = np.random.default_rng(seed_sequence(seed))
    # For each metric its documents, and of each the values of all redraws.
    draws: dict[str, list[list[Any]]] = defaultdict(list)
    for requests in documents.values():
        requests.sort(key=lambda one: one.idx)
        found = [scores[id(one)] for one in requests]
        redrawn = _redraw(task, requests, found, generator, size)
        for metric in redrawn[0]:
            draws[metric].append([values[metric] for values in redrawn])
    aggregations = task.aggregation()
    return {
        metric: _deviation(values, aggregations[metric])
        for metric, values in draws.items()
        if metric in aggregations
    }


def _redraw(
    task: Task,
    requests: Sequence[Instance],
    scores: Sequence[Score],
    generator: np.random.Generator,
    num_redraws: int,
) -> list[dict[str, Any]]:
    """Redraws a document: its values, for each redraw."""
    means = np.array([one.log_likelihood for one in scores])
    errors = np.array([one.standard_error for one in scores])
    if not errors.any():
        return [_compute_values(task, requests, scores, means)] * num_redraws
    normal = generator.standard_normal((num_redraws, len(scores)))
    return [_compute_values(task, requests, scores, means + errors * row) for row in normal]


def _compute_values(
    task: Task, requests: Sequence[Instance], scores: Sequence[Score], means: np.ndarray
) -> dict[str, Any]:
    rolling = task.get_config("output_type") == "loglikelihood_rolling"
    results: list[Any] = [
        float(mean) if rolling else (float(mean), bool(score.is_greedy))
        for mean, score in zip(means, scores, strict=True)
    ]
    values: dict[str, Any] = task.process_results(requests[0].doc, results)
    return values


def _deviation(values: Sequence[Sequence[Any]], aggregate: Callable[[Any], float]) -> float:
    if aggregate is mean:
        return math.sqrt(sum(_variance(one) for one in values)) / len(values)
    return math.sqrt(_variance([aggregate(one) for one in zip(*values, strict=True)]))


def _variance(values: Sequence[float]) -> float:
    if not all(map(math.isfinite, values)):
        return math.nan
    # Equal values have no rounding of a mean between them.
    return float(np.var(np.array(values) - values[0], ddof=1))
