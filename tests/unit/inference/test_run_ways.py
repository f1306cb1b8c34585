"""Exports of mixtures of objectives, run as AR, as masked diffusion and as prefix LM."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from megatron_mdm.checkpoint.manifest import read_manifest, read_saved_model
from megatron_mdm.config.objective import RunWays
from megatron_mdm.core.errors import ConfigError, ConversionError, DataError
from megatron_mdm.core.options import run_command
from megatron_mdm.data.store import open_tokens
from megatron_mdm.data.windows import SourceWindows
from megatron_mdm.data.writer import ShardWriter
from megatron_mdm.diffusion.probes import LikelihoodEstimator, make_request_noise
from megatron_mdm.hf.adapters.model import read_export
from megatron_mdm.hf.adapters.running import plan_run
from megatron_mdm.hf.conversion.check import check_export
from megatron_mdm.hf.conversion.importing import import_to_checkpoint
from megatron_mdm.hf.formats.foreign import open_foreign
from megatron_mdm.inference import perplexity_command
from megatron_mdm.inference.ensemble import Ensemble
from megatron_mdm.inference.exported import ExportedModel
from megatron_mdm.inference.options import make_generation_options
from megatron_mdm.inference.perplexity import choose_requests
from megatron_mdm.inference.prompts import Prompt
from megatron_mdm.inference.requests import Request, ScoringSettings
from megatron_mdm.inference.sampling import generate, make_drafts
from megatron_mdm.inference.scoring import Scorer

MASK, V = 19, 19
SHIFTED = RunWays(("ar", "mdm", "prefix"), True)
FIXED = ScoringSettings(draws=16)


@pytest.fixture
def folder(export, tiny):
    return export(tiny(is_causal=True)._replace(run_ways=SHIFTED))[0]


@pytest.fixture
def in_place(export, tiny):
    return export(tiny()._replace(run_ways=RunWays(("mdm", "ar", "prefix"), False)), "in_place")[0]


def some_requests(number=10, seed=0):
    """Of many lengths, some with one context; contexts are not empty."""
    generator = np.random.default_rng(seed)
    found = []
    for index in range(number):
        sizes = (int(generator.integers(1, 12)), 1 + (index * 5) % 17)
        context, continuation = (tuple(generator.integers(2, V, n).tolist()) for n in sizes)
        found += [Request(context, continuation), Request(context, continuation[::-1])]
    return found


def hidden_logits(model, ids, seen_SS):
    """float64 [S, V] at each hidden state, where query i sees the keys of row i."""
    hf = model._model
    with torch.no_grad():
        hidden_BSH = hf.model(torch.tensor([ids]), torch.tensor(seen_SS)[None], None)
        return torch.log_softmax(hf.output_logits(hidden_BSH)[0].double(), -1)


def seen_by(way, context, size):
    """Bool [S, S] by definition."""
    places = range(size)
    if way == "mdm":
        return [[True] * size for _ in places]
    in_prompt = context if way == "prefix" else 0
    return [[key <= i or max(key, i) < in_prompt for key in places] for i in places]


@pytest.mark.parametrize("way", ["ar", "prefix"])
@pytest.mark.parametrize("max_tokens", [1, None])
def test_next_tokens_are_scored_with_the_attention_of_the_way(folder, way, max_tokens):
    model, requests = ExportedModel(folder, way=way), some_requests()
    settings = ScoringSettings(max_tokens=max_tokens)
    for request, score in zip(requests, Scorer(model, settings).score(requests), strict=True):
        ids, start = [*request.context, *request.continuation], len(request.context)
        log_probs = hidden_logits(model, ids, seen_by(way, start, len(ids)))
        chosen = [float(log_probs[i - 1, ids[i]]) for i in range(start, len(ids))]
        assert score.log_likelihood == pytest.approx(sum(chosen), abs=2e-4)
        best = [int(log_probs[i - 1].argmax()) == ids[i] for i in range(start, len(ids))]
        assert score[1:3] == (0.0, all(best))


def test_a_prefix_is_not_read_from_the_left_and_one_token_is_no_prefix(folder):
    requests = some_requests()
    one = [Request(each.context[:1], each.continuation) for each in requests]
    found = {
        way: [
            Scorer(ExportedModel(folder, way=way), FIXED).score(asked) for asked in (requests, one)
        ]
        for way in ("ar", "prefix")
    }
    for asked, ar, prefix in zip(requests, found["ar"][0], found["prefix"][0], strict=True):
        if len(asked.context) > 2:
            assert abs(ar.log_likelihood - prefix.log_likelihood) > 1e-3
    for ar, prefix in zip(found["ar"][1], found["prefix"][1], strict=True):
        assert prefix.log_likelihood == pytest.approx(ar.log_likelihood, abs=1e-4)


@pytest.mark.parametrize("shifted", [True, False], ids=["shifted", "in place"])
@pytest.mark.parametrize("estimator", ["fixed_count", "monte_carlo", "chain_rule"])
def test_hidden_tokens_are_scored_where_the_model_predicts_them(
    folder, in_place, shifted, estimator
):
    model = ExportedModel(folder if shifted else in_place, way="mdm")
    requests = some_requests(6)
    settings = ScoringSettings(estimator, draws=8)
    for request, score in zip(requests, Scorer(model, settings).score(requests), strict=True):
        context, continuation, _ = request
        probes = LikelihoodEstimator(estimator, 8, True)
        noise, values = make_request_noise(0, context, continuation), []
        for probe in probes.draw_probes(noise, continuation, 0):
            hidden = np.where(probe.hidden_L, MASK, continuation).tolist()
            ids, start = [*context, *hidden], len(context) - shifted
            log_probs = hidden_logits(model, ids, seen_by("mdm", 0, len(ids)))
            values.append(
                sum(
                    probe.weights_L[place] * float(log_probs[start + place, continuation[place]])
                    for place in np.flatnonzero(probe.weights_L)
                )
            )
        by_hand = probes.combine(len(continuation), [np.array(values)])
        assert score.log_likelihood == pytest.approx(by_hand.mean, abs=2e-4)
        assert score.standard_error == pytest.approx(by_hand.standard_error, abs=2e-4)


def load(folder, kind=AutoModelForMaskedLM, **way):
    return kind.from_pretrained(folder, trust_remote_code=True, **way).eval()


def test_the_logits_of_a_shifted_export_stand_at_the_tokens_that_they_predict(folder):
    model = load(folder, is_causal=False)
    ids = torch.randint(0, V, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = model(ids).logits
        model.config.is_shifted = False
        raw = model(ids).logits
    assert torch.equal(found[:, 1:], raw[:, :-1])
    assert not found[:, 0].any()
    assert model.config.run_ways == ["ar", "mdm", "prefix"]


def test_other_programs_find_the_next_token_under_the_name_that_they_know(folder, in_place):
    ids = torch.randint(0, V, (2, 9), generator=torch.Generator().manual_seed(0))
    for place in (folder, in_place):
        causal = load(place, AutoModelForCausalLM)
        with torch.no_grad():
            expected = load(place, is_causal=True)(ids).logits
            assert torch.allclose(causal(ids).logits, expected, atol=1e-5)
        with torch.no_grad():
            text = causal.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
        assert text.shape == (2, 12)


@pytest.mark.parametrize("cached", [False, True], ids=["whole", "cached"])
def test_generation_unmasks_with_logits_of_the_place_before(folder, cached):
    model = load(folder, is_causal=False)
    prompt = torch.tensor([[5, 7, 9, 3], [0, 0, 6, 4]])
    real = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    options = {"order": "confidence", "temperature": 0.0, "max_new_tokens": 6}
    if cached:
        # Every pass is a full one.
        options |= {"use_cache": True, "cache_refresh_steps": 1, "block_length": 3}
    found = model.generate(prompt, real, stop_at_end=False, **options)
    blocks = [range(0, 3), range(3, 6)] if cached else [range(6)]
    for row, start in enumerate((0, 2)):
        ids = [*prompt[row, start:].tolist(), *[MASK] * 6]
        first = len(ids) - 6
        for block in blocks:
            waiting = [first + place for place in block]
            while waiting:
                with torch.no_grad():
                    probs = model(torch.tensor([ids])).logits[0].softmax(-1)
                place = max(waiting, key=lambda one: float(probs[one].max()))
                ids[place] = int(probs[place].argmax())
                waiting.remove(place)
        assert found[row, start:].tolist() == ids


def test_the_cache_of_a_shifted_model_recomputes_what_predicts(folder):
    model = load(folder, is_causal=False)
    prompt = torch.tensor([[5, 7, 9]])
    options = {"max_new_tokens": 8, "block_length": 8, "temperature": 0.0, "stop_at_end": False}
    # One step of a block sees no column that is out of date.
    one = [
        model.generate(prompt, order="left_to_right", num_steps=1, use_cache=cache, **options)
        for cache in (False, True)
    ]
    assert torch.equal(*one)
    every = model.generate(prompt, order="left_to_right", use_cache=True, **options)
    assert int(every.max()) < V


def test_padding_is_passed_over_between_a_token_and_what_predicts_it(folder):
    model = load(folder, is_causal=False)
    text = [4, 8, MASK, 6, MASK, MASK, 7]
    alone = model.infill(torch.tensor([text]), temperature=0.0)[0].tolist()
    gaps = [2, 3, 5]
    padded, real = list(text), [1] * len(text)
    for gap in reversed(gaps):
        padded.insert(gap, 11)
        real.insert(gap, 0)
    found = model.infill(torch.tensor([padded]), torch.tensor([real]), temperature=0.0)[0]
    assert found[torch.tensor(real).bool()].tolist() == alone


def test_a_prompt_that_sees_itself_is_continued(folder):
    model = load(folder, is_causal=True, prefix_lm=True)
    prompts = [[5, 7, 9, 3, 8], [6, 4]]
    width = 5
    ids = torch.tensor([[0] * (width - len(one)) + one for one in prompts])
    real = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in prompts])
    found = model.generate(ids, real, max_new_tokens=7, temperature=0.0, stop_at_end=False)
    for row, prompt in enumerate(prompts):
        text = list(prompt)
        for _ in range(7):
            seen = torch.tensor([seen_by("prefix", len(prompt), len(text))])
            with torch.no_grad():
                logits = model.output_logits(model.model(torch.tensor([text]), seen, None))
            text.append(int(logits[0, -1].argmax()))
        assert found[row, width - len(prompt) :].tolist() == text
    plain = load(folder, is_causal=True).generate(
        ids, real, max_new_tokens=7, temperature=0.0, stop_at_end=False
    )
    assert not torch.equal(plain, found)


def test_the_tools_generate_in_every_way(folder):
    for way, order in (("ar", None), ("mdm", "confidence"), ("prefix", None)):
        model = ExportedModel(folder, way=way)
        decoding = {"temperature": 0.0, "max_new_tokens": 4} | ({"order": order} if order else {})
        options = make_generation_options(decoding, end_of_text="keep")
        prompts = [Prompt(prompt="w5 w7 w9"), Prompt(prompt="w4")]
        drafts = make_drafts(prompts, options, model.facts, model.tokenizer)
        assert [len(one.new_ids) for one in generate(model, drafts, 2)] == [4, 4]


def test_what_was_not_learned_is_refused_in_a_sentence(export, tiny, folder, in_place):
    for saved, way, known in (
        (tiny(), "ar", "mdm"),
        (tiny(), "prefix", "mdm"),
        (tiny(is_causal=True), "mdm", "ar"),
        (tiny(is_causal=True), "prefix", "ar"),
        (tiny()._replace(run_ways=RunWays(("mdm",), True)), "ar", "mdm"),
    ):
        path = export(saved, "other", overwrite=True)[0]
        with pytest.raises(ConfigError, match=f"--run-as={way} is not how .* use {known}, or"):
            ExportedModel(path, way=way)
        ExportedModel(path, way=known)
    shifted = ExportedModel(folder, way="mdm")
    with pytest.raises(DataError, match="predicts each token from the one before and needs"):
        Scorer(shifted, FIXED).score([Request((), (3, 4))])
    with pytest.raises(ValueError, match="The first token of a sequence is hidden"):
        load(folder, is_causal=False).infill(torch.tensor([[MASK, 3]]))
    for one, two in itertools.permutations((folder, in_place)):
        with pytest.raises(ConfigError, match="places of predictions differ"):
            Ensemble([ExportedModel(one, way="mdm"), ExportedModel(two, way="mdm")])
    with pytest.raises(ConfigError, match="prompts differ"):
        Ensemble([ExportedModel(folder, way="ar"), ExportedModel(folder, way="prefix")])


def test_perplexity_judges_one_export_in_every_way(folder, export, tiny, tmp_path, capsys):
    with ShardWriter(tmp_path / "tokens", np.uint16) as writer:
        writer.add_document(np.random.default_rng(0).integers(2, V, 100))
        writer.finish()
    data = ["--data", f"noise={tmp_path / 'tokens'}", "--seq-length", "10", "--draws", "4"]
    ways, out = ("ar", "mdm", "prefix"), tmp_path / "out.json"
    models = [word for _ in ways for word in ("--model", str(folder))]
    asked = [word for way in ways for word in ("--run-as", way)]
    given = ["--given-tokens", "5", "--out", str(out)]
    run_command(perplexity_command.run, None, [*models, *asked, *data, *given])
    assert f"{folder} as prefix less {folder} as ar" in capsys.readouterr().out
    found = {
        name.rpartition(" ")[2]: loss["noise"]
        for name, loss in json.loads(out.read_text())["models"].items()
    }
    assert list(found) == list(ways)
    shards = SourceWindows(open_tokens(tmp_path / "tokens"), 10, V)
    for way in ways:
        scorer = Scorer(ExportedModel(folder, way=way), ScoringSettings(draws=4))
        requests = choose_requests(shards, 256, 0, 5).requests
        losses = [-score.log_likelihood / 5 for score in scorer.score(requests)]
        assert found[way]["nats_per_token_of_windows"] == pytest.approx(losses, abs=1e-5)
    pure = export(tiny(), "pure")[0]
    for words, told in (
        ([*models, "--run-as", "ar", "--run-as", "mdm"], "--run-as is given 2 times for 3 --model"),
        ([*models[:2], "--given-tokens", "10"], "--given-tokens=10 leaves nothing to score"),
        (["--model", str(pure), "--run-as", "prefix"], "use mdm, or leave it out"),
    ):
        with pytest.raises(ConfigError, match=told):
            run_command(perplexity_command.run, None, [*words, *data])


def test_adapters_of_shifted_masked_diffusion_are_refused(export, tiny):
    path = export(tiny()._replace(run_ways=RunWays(("mdm", "ar", "prefix"), True)), "shifted")[0]
    with pytest.raises(ConfigError, match=r"or set is_causal to true in its config\.json"):
        plan_run(path, path / "none.yaml", [])
    path = export(tiny()._replace(run_ways=RunWays(("mdm",), True)), "alone")[0]
    with pytest.raises(ConfigError, match=r"adapt another export\.$"):
        plan_run(path, path / "none.yaml", [])


def test_what_an_export_says_of_its_ways_is_read_back(folder, in_place, export, tiny, tmp_path):
    assert read_export(folder).run_ways == SHIFTED
    assert read_export(in_place).run_ways == RunWays(("mdm", "ar", "prefix"), False)
    for place in (folder, in_place):
        checkpoint = import_to_checkpoint(open_foreign("hf", place), tmp_path / place.name)
        assert read_saved_model(read_manifest(checkpoint)) == read_export(place)
        assert check_export(checkpoint, place).relative < 1e-5
    assert "An autoregressive and masked-diffusion" in (folder / "README.md").read_text()
    assert "has to be given" in (folder / "README.md").read_text()
    assert "has to be given" not in (in_place / "README.md").read_text()
    assert read_export(export(tiny(), "pure")[0]).run_ways is None
    path = folder / "config.json"
    config = json.loads(path.read_text())
    # The one that it is set to is the usual one.
    path.write_text(json.dumps(config | {"is_causal": False}))
    assert read_export(folder).run_ways == RunWays(("mdm", "ar", "prefix"), True)
    path.write_text(json.dumps(config | {"run_ways": ["mdm"]}))
    with pytest.raises(ConversionError, match="lists no ways to run a model that runs as ar"):
        read_export(folder)
