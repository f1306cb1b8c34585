"""The mean of several models' probabilities: against sums by hand, and against its members."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from dataclasses import replace

import lm_eval
import numpy as np
import pytest
import torch
from lm_eval.tasks import TaskManager
from local_tasks import write_tasks

from megatron_mdm.core.errors import ConfigError
from megatron_mdm.core.options import run_command
from megatron_mdm.data.writer import ShardWriter
from megatron_mdm.inference import perplexity_command
from megatron_mdm.inference.ensemble import Ensemble
from megatron_mdm.inference.exported import ExportedModel
from megatron_mdm.inference.requests import Request, ScoringSettings
from megatron_mdm.inference.scoring import Scorer
from megatron_mdm.inference.tasks import command as tasks_command
from megatron_mdm.inference.tasks.harness import HarnessModel, HarnessWorker
from megatron_mdm.inference.tasks.recipe import TaskSettings

REQUESTS = [
    Request((3, 4, 5), (6, 7, 8)),
    Request((3, 4, 5), (9,)),
    Request((11,), (2, 17)),
    Request((2, 9, 9, 2), (14, 3)),
]
# More draws than there are masks of three tokens.
EXACT = ScoringSettings(draws=16)


@pytest.fixture
def open_members(export, tiny):
    """Models of the same kind with other weights."""

    def run(number: int = 3, **options) -> list[ExportedModel]:
        folders = (export(tiny(**options), f"member{one}", seed=one)[0] for one in range(number))
        return [ExportedModel(folder) for folder in folders]

    return run


def score(model, settings=EXACT) -> list[float]:
    return [one.log_likelihood for one in Scorer(model, settings).score(REQUESTS)]


@torch.no_grad()
def mean_probabilities(members, tokens) -> torch.Tensor:
    """Of every token at every place, float64 [S, V]."""
    tokens_1S = torch.tensor([tokens])
    each = [member._model.double()(tokens_1S).logits[0].softmax(-1) for member in members]
    return torch.stack(each).mean(dim=0)


def test_next_tokens_have_the_mean_of_the_members_probabilities(open_members):
    members = open_members(is_causal=True)
    found = score(Ensemble(members))
    for request, value in zip(REQUESTS, found, strict=True):
        tokens = [*request.context, *request.continuation]
        mean_SV = mean_probabilities(members, tokens)
        places = range(len(request.context), len(tokens))
        expected = sum(math.log(mean_SV[place - 1, tokens[place]]) for place in places)
        assert value == pytest.approx(expected, abs=1e-5)


def test_hidden_tokens_have_the_mean_at_the_same_masks(open_members):
    """All masks of up to three tokens: l uniform, L / l times the cross-entropies of l tokens."""
    members = open_members()
    mask = members[0].facts.mask_token_id
    found = score(Ensemble(members))
    for request, value in zip(REQUESTS, found, strict=True):
        size, start = len(request.continuation), len(request.context)
        expected = 0.0
        for hidden in itertools.product((False, True), repeat=size):
            places = [place for place in range(size) if hidden[place]]
            if not places:
                continue
            seen = [
                mask if hide else token
                for hide, token in zip(hidden, request.continuation, strict=True)
            ]
            mean_SV = mean_probabilities(members, [*request.context, *seen])
            weight = 1.0 / (len(places) * math.comb(size, len(places)))
            for place in places:
                token = request.continuation[place]
                expected += weight * math.log(mean_SV[start + place, token])
        assert value == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("estimator", ["fixed_count", "chain_rule"])
def test_its_loss_is_at_most_the_mean_of_the_members(open_members, is_causal, estimator):
    members = open_members(is_causal=is_causal)
    settings = ScoringSettings(estimator, draws=4)
    alone = np.array([score(member, settings) for member in members])
    together = np.array(score(Ensemble(members), settings))
    assert (together > alone.mean(axis=0) + 1e-3).all()
    assert (alone.std(axis=0) > 0.01).all()


@pytest.mark.parametrize("is_causal", [False, True])
def test_a_model_and_itself_are_the_model(open_members, is_causal):
    (model,) = open_members(1, is_causal=is_causal)
    settings = ScoringSettings(draws=8, greedy_match="left_to_right")
    if not is_causal:
        settings = replace(settings, guidance_scale=0.7)
    alone = Scorer(model, settings).score(REQUESTS)
    twice = Scorer(Ensemble([model, model]), settings).score(REQUESTS)
    for one, other in zip(alone, twice, strict=True):
        assert other.log_likelihood == pytest.approx(one.log_likelihood, rel=1e-6)
        assert other.standard_error == pytest.approx(one.standard_error, rel=1e-4)
        assert (other.is_greedy, other.num_passes) == (one.is_greedy, one.num_passes)


def test_members_have_to_agree(export, tiny, tokenizer_dir, tmp_path):
    first = ExportedModel(export(tiny(), "first")[0])
    reworded = shutil.copytree(tokenizer_dir, tmp_path / "reworded")
    text = (reworded / "tokenizer.json").read_text()
    (reworded / "tokenizer.json").write_text(text.replace('"w5"', '"v5"'))
    cases = {
        "objectives differ .masked diffusion and autoregressive.": (tiny(is_causal=True), {}),
        "numbers of tokens differ .19 and 21.": (tiny(vocab_size=21, mask_token_id=21), {}),
        "mask tokens differ .19 and 18.": (tiny(mask_token_id=18), {}),
        "ends of text differ .0 and 3.": (tiny(), {"eos_token_id": 3}),
        "tokenizers differ": (tiny(), {"tokenizer_dir": reworded}),
    }
    for place, (said, (saved, options)) in enumerate(cases.items()):
        other = ExportedModel(export(saved, f"other{place}", **options)[0])
        with pytest.raises(ConfigError, match=f"first and .* since their {said}"):
            Ensemble([first, other])
    with pytest.raises(ConfigError, match="two or more members"):
        Ensemble([first])


@pytest.fixture
def folders(export, tiny):
    return [export(tiny(), name, seed=place)[0] for place, name in enumerate("ab")]


def test_perplexity_has_the_members_beside_the_mean_and_their_differences(
    folders, tmp_path, capsys
):
    with ShardWriter(tmp_path / "tokens", np.uint16) as writer:
        writer.add_document(np.random.default_rng(0).integers(2, 19, 200))
        writer.finish()
    options = ["--data", f"noise={tmp_path / 'tokens'}", "--seq-length", "10", "--draws", "4"]
    models = [option for folder in folders for option in ("--model", str(folder))]
    for name, more in {"apart": [], "together": ["--ensemble"]}.items():
        given = [*models, *options, *more, "--out", str(tmp_path / f"{name}.json")]
        run_command(perplexity_command.run, None, given)
    table = capsys.readouterr().out
    assert f"{folders[0]} less the mean of 2 models" in table
    apart, together = (
        json.loads((tmp_path / f"{name}.json").read_text()) for name in ("apart", "together")
    )
    mean, *members = together["models"]
    assert mean == "the mean of 2 models"
    assert together["settings"]["ensemble"] == members == [str(folder) for folder in folders]
    # Judged together or one after the other, a member has its loss.
    assert {one: together["models"][one] for one in members} == apart["models"]
    losses = [
        together["models"][one]["noise"]["nats_per_token_of_windows"] for one in (mean, *members)
    ]
    assert (np.array(losses[0]) < np.mean(losses[1:], axis=0)).all()
    with pytest.raises(ConfigError, match="two or more members"):
        run_command(perplexity_command.run, None, [*models[:2], *options, "--ensemble"])


def test_tasks_are_judged_by_the_mean_and_none_asks_it_for_texts(folders, tmp_path, capsys):
    tasks = write_tasks(tmp_path)
    models = [option for folder in folders for option in ("--model", str(folder))]
    options = [
        *models,
        "--include-path",
        str(tasks),
        "--draws",
        "8",
        "--out",
        str(tmp_path / "out"),
    ]
    run_command(tasks_command.run, None, [*options, "--tasks", "local_choice"])
    assert "fixed count, 8 draws, mean of 2 models" in capsys.readouterr().out
    tree = json.loads((tmp_path / "out/results.json").read_text())
    assert tree["model"] == f"{folders[0]} + {folders[1]}"
    worker = HarnessWorker(Ensemble(map(ExportedModel, folders)))
    model = HarnessModel.from_worker(worker, worker.make_pool())
    model.settings = TaskSettings(ScoringSettings(draws=8))
    found = lm_eval.simple_evaluate(
        model=model,
        tasks=["local_choice"],
        task_manager=TaskManager(include_path=tasks, include_defaults=False),
        bootstrap_iters=10,
    )
    expected = found["results"]["local_choice"]["acc,none"]
    assert tree["tasks"]["local_choice"]["results"]["local_choice"]["acc,none"] == expected
    with pytest.raises(ConfigError, match="local_story asks for texts"):
        run_command(tasks_command.run, None, [*options, "--tasks", "local_word,local_story"])
