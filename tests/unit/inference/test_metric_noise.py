"""What noise moves in a metric: by hand, and seen over many seeds."""

from __future__ import annotations

import math

import numpy as np
import pytest
from lm_eval.tasks import TaskManager
from local_tasks import write_tasks
from scipy.integrate import quad
from scipy.stats import norm

from megatron_mdm.inference.exported import ExportedModel
from megatron_mdm.inference.requests import Score, ScoringSettings
from megatron_mdm.inference.tasks.harness import HarnessModel, HarnessWorker
from megatron_mdm.inference.tasks.metric_noise import estimate_metric_noise
from megatron_mdm.inference.tasks.recipe import TaskSettings

NUM_DOCUMENTS = 10


@pytest.fixture(scope="module")
def manager(tmp_path_factory):
    folder = write_tasks(tmp_path_factory.mktemp("tasks"), NUM_DOCUMENTS)
    return TaskManager(include_path=folder, include_defaults=False)


def requests_of(manager, name):
    task = manager.load([name])["tasks"][name]
    task.build_all_requests()
    return task


def probability_of_right(means, errors, answer):
    """That a normal variable is the greatest of three."""

    def density(x):
        value = norm.pdf(x, means[answer], errors[answer])
        for place in {0, 1, 2} - {answer}:
            value *= norm.cdf(x, means[place], errors[place])
        return value

    reach = 8 * errors[answer]
    return quad(density, means[answer] - reach, means[answer] + reach)[0]


def test_accuracy_moves_as_its_documents_are_undecided(manager):
    task = requests_of(manager, "local_choice")
    generator = np.random.default_rng(3)
    means = generator.normal(-5, 0.4, (NUM_DOCUMENTS, 3))
    errors = generator.uniform(0.1, 0.5, (NUM_DOCUMENTS, 3))
    scores = {
        id(one): Score(means[one.doc_id, one.idx], errors[one.doc_id, one.idx], None, 8)
        for one in task.instances
    }
    found = estimate_metric_noise(task, scores, 1, num_redraws=400)
    right = [
        probability_of_right(means[place], errors[place], document["answer"])
        for place, document in enumerate(task.eval_docs)
    ]
    expected = math.sqrt(sum(p * (1 - p) for p in right)) / NUM_DOCUMENTS
    assert found["acc"] == pytest.approx(expected, rel=4 / math.sqrt(2 * 400))


def test_a_perplexity_moves_with_the_mean_of_its_errors(manager):
    task = requests_of(manager, "local_word")
    scores = {id(one): Score(-2.0, 0.01, False, 8) for one in task.instances}
    found = estimate_metric_noise(task, scores, 1, num_redraws=4000)
    expected = math.exp(2.0) * 0.01 / math.sqrt(NUM_DOCUMENTS)
    assert found["perplexity"] == pytest.approx(expected, rel=4 / math.sqrt(2 * 4000))
    assert found["acc"] == 0


def test_what_is_exact_does_not_move_and_texts_have_no_noise_of_scores(manager):
    task = requests_of(manager, "local_text")
    scores = {id(one): Score(-50.0, 0.0, None, 1) for one in task.instances}
    assert estimate_metric_noise(task, scores, 1) == {"word_perplexity": 0.0}
    story = requests_of(manager, "local_story")
    assert (
        estimate_metric_noise(story, {id(one): Score(0, 0, None, 1) for one in story.instances}, 1)
        == {}
    )
    assert estimate_metric_noise(task, {}, 1) == {}


def test_other_seeds_move_an_accuracy_as_one_seed_says(manager, export, tiny):
    worker = HarnessWorker(ExportedModel(export(tiny())[0]))
    model = HarnessModel.from_worker(worker, worker.make_pool())
    task = requests_of(manager, "local_choice")
    answers = [document["answer"] for document in task.eval_docs]
    accuracies, said = [], []
    for seed in range(30):
        model.settings, model.scores = (
            TaskSettings(ScoringSettings("monte_carlo", draws=8, seed=seed)),
            {},
        )
        found = model.loglikelihood(task.instances)
        table = np.zeros((NUM_DOCUMENTS, 3))
        for one, (value, _) in zip(task.instances, found, strict=True):
            table[one.doc_id, one.idx] = value
        accuracies.append(np.mean(np.argmax(table, 1) == answers))
        said.append(estimate_metric_noise(task, model.scores, seed)["acc"])
    seen = np.std(accuracies, ddof=1)
    assert seen > 0.01
    # The spread of 30 accuracies is itself known to an eighth; estimates stand for true values.
    assert 0.6 < np.mean(said) / seen < 1.6
