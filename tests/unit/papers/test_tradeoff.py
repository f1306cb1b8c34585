"""Quality against speed: what is written, how it is matched, and what is refused."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_mdm.core.errors import ConfigError
from megatron_mdm.core.options import run_command
from megatron_mdm.data.order import Permutation
from megatron_mdm.data.writer import ShardWriter
from megatron_mdm.diffusion.decoding import derive_seeds
from megatron_mdm.inference.exported import ExportedModel
from megatron_mdm.inference.repetition import distinct_n, token_entropy
from megatron_mdm.inference.requests import Request, ScoringSettings
from megatron_mdm.inference.scoring import Scorer
from megatron_mdm.studies.papers.text_quality import (
    TextLosses,
    judge_texts,
    nats_per_token,
)
from megatron_mdm.studies.papers.tradeoff import (
    Measured,
    Quality,
    TradeoffOptions,
    Way,
    write_texts,
)
from megatron_mdm.studies.papers.tradeoff_command import run_tradeoff
from megatron_mdm.studies.papers.tradeoff_findings import choose_match, describe_match
from megatron_mdm.studies.papers.tradeoff_matching import find_place, match_all, match_line

AR = Way("ar", 1.0)


def measured(way, nats, seconds, *, entropies=2.0, noise=0.0):
    """A way whose 200 texts of 10 tokens have so many nats per token, with a level of each text."""
    losses = TextLosses(10 * (nats + np.full(200, noise)), np.full(200, 10))
    entropies_N = np.full(200, entropies)
    return Measured(way, Quality(losses, entropies_N, (1.0, 1.0, 1.0)), ("", ""), {1: seconds})


def line(nats, seconds, **options):
    steps = (16, 32, 64, 128)
    return [
        measured(Way("mdm", 1.0, None, "random", 0.0, count), loss, [second], **options)
        for count, loss, second in zip(steps, nats, seconds, strict=False)
    ]


def matched(ar, points, seed=0):
    (found,) = match_all([*points, ar], [1], seed)
    return found


@pytest.mark.parametrize(
    ("losses", "verdict", "left", "weight"),
    [
        ([1.0, 2.0, 4.0], "matched", 1, 0.5),
        # Of several crossings the fastest counts.
        ([4.0, 2.0, 5.0, 3.0, 4.0], "matched", 3, 0.0),
        ([1.0, 5.0, 2.0, 4.0], "matched", 2, 0.5),
        ([4.0, 3.5, 5.0], "not_reached", 1, 0.0),
        ([5.0, 2.0, 3.0], "better", 2, 0.0),
    ],
)
def test_the_fastest_place_that_is_good_enough(losses, verdict, left, weight):
    assert find_place(np.array(losses), 3.0) == (verdict, left, weight)


def test_between_two_points_the_loss_is_linear_in_the_logarithm_of_the_speed():
    # 2 nats at the speed of AR, 3 at four times it: 2.5 at twice.
    found = matched(measured(AR, 2.5, [4.0]), line([3.0, 2.0], [1.0, 4.0]))
    assert found.verdict == "matched"
    assert found.steps == (32, 16)
    assert found.relative_speed == pytest.approx(2.0)
    assert found.interval == pytest.approx((2.0, 2.0))
    assert found.loss == pytest.approx(2.5)


def test_speeds_are_compared_round_by_round():
    # Each round had its own speed of the machine, and one round of MDM was disturbed.
    points = [measured(Way("mdm", 1.0, None, "random", 0.0, 16), 2.0, [1.0, 10.0, 9.0])]
    found = matched(measured(AR, 2.0, [2.0, 20.0, 2.2]), points)
    assert found.relative_speed == pytest.approx(2.0)


def test_nothing_is_said_beyond_what_was_measured():
    points = line([3.0, 2.0], [1.0, 4.0])
    missed = matched(measured(AR, 1.9, [4.0]), points)
    assert (missed.verdict, missed.share_reached) == ("not_reached", 0.0)
    assert missed.interval == (None, None)
    assert missed.steps == (32, 32)
    assert "no line of masked diffusion reaches the perplexity of AR T=1" in describe_match(missed)
    better = matched(measured(AR, 3.5, [4.0]), points)
    assert (better.verdict, better.relative_speed) == ("better", pytest.approx(4.0))
    assert "even with 16 steps, and writes at least 4.00 times" in describe_match(better)


def test_what_a_prompt_does_to_all_texts_is_not_noise():
    generator = np.random.default_rng(0)
    levels, own = generator.normal(0, 1.0, 200), generator.normal(0, 1.0, 200)
    points = line([3.0, 2.0], [1.0, 4.0], noise=levels)
    together = matched(measured(AR, 2.5, [4.0], noise=levels), points)
    assert together.interval == pytest.approx((2.0, 2.0))
    apart = matched(measured(AR, 2.5, [4.0], noise=own - own.mean()), points)
    # Levels of both: a standard error of sqrt(2 / 200) nats, where a nat is a factor of 4.
    reach = 4 ** (1.96 * math.sqrt(2 / 200))
    centre = 4 ** (0.5 - levels.mean())
    assert apart.interval[0] == pytest.approx(centre / reach, rel=0.06)
    assert apart.interval[1] == pytest.approx(centre * reach, rel=0.06)


def test_a_quality_that_few_resamples_reach_has_no_lower_end():
    noise = np.random.default_rng(1).normal(0, 1.0, 200)
    ar = measured(AR, 2.0, [4.0])
    found = matched(ar, line([3.0, 2.0], [1.0, 4.0], noise=noise - noise.mean()))
    assert 0.4 < found.share_reached < 0.6
    assert found.interval[0] is None
    assert found.interval[1] is not None


def test_entropy_is_told_at_the_place_and_text_by_text():
    points = line([3.0, 2.0], [1.0, 4.0])
    levels = np.random.default_rng(2).normal(0, 0.5, 200)
    for one, entropy in zip(points, (2.0, 1.0), strict=True):
        one.quality.entropies_N[:] = entropy + levels
    ar = measured(AR, 2.25, [4.0])
    ar.quality.entropies_N[:] = 1.5 + levels
    found = matched(ar, points)
    assert found.entropy == pytest.approx(1.25 + levels.mean())
    assert found.entropy_difference.mean == pytest.approx(-0.25)
    assert found.entropy_difference.standard_error == pytest.approx(0, abs=1e-9)
    assert "0.250 ± 0.000 below AR's, so it is less varied" in describe_match(found)


def test_a_varied_match_is_told_before_a_faster_one_that_repeats_itself():
    ar = measured(AR, 2.5, [4.0])
    chosen_RN = np.arange(200)[None]
    varied = match_line(ar, line([3.0, 2.0], [1.0, 4.0]), 1, chosen_RN)
    fast = match_line(ar, line([1.0, 1.0], [0.1, 0.4], entropies=0.5), 1, chosen_RN)
    missed = match_line(ar, line([4.0, 3.0], [1.0, 4.0]), 1, chosen_RN)
    assert choose_match([fast, varied, missed]) == varied
    assert choose_match([missed, fast]) == fast
    worse = match_line(ar, line([5.0, 4.0], [0.1, 0.4]), 1, chosen_RN)
    assert choose_match([worse, missed]) == missed


def test_ways_are_all_combinations_once():
    options = TradeoffOptions(
        steps=(8, 4, 8), guidance=(0.0, 1.0), ar_temperature=(1.0, 0.5), top_p=(1.0, 0.9)
    )
    names = [way.name for way in options.ways]
    assert names == [
        "MDM random T=1 w=0, 4 steps",
        "MDM random T=1 w=0, 8 steps",
        "MDM random T=1 w=1, 4 steps",
        "MDM random T=1 w=1, 8 steps",
        "AR T=1",
        "AR T=1 top-p=0.9",
        "AR T=0.5",
        "AR T=0.5 top-p=0.9",
    ]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"steps": (256,)}, "--steps=256 .* no more than --new-tokens=128"),
        ({"steps": (0,)}, "--steps=0 .* at least 1"),
        ({"steps": ()}, "--steps is empty"),
        ({"batch_sizes": (1, 65)}, "--batch-sizes=65 .* no more than --num-prompts=64"),
        ({"temperature": (0.0,)}, "--temperature=0 .* above 0"),
        ({"ar_temperature": (1.0, -1.0)}, "--ar-temperature=-1 .* above 0"),
        ({"order": ("confident",)}, "--order=confident .* one of confidence, "),
        ({"block_length": 16}, "--steps=4 .* at least 8"),
        ({"block_length": 0}, "--block-length=0 .* at least 1"),
        ({"top_p": (1.5,)}, "top_p=1.5 must be above 0"),
        ({"guidance": ()}, "--guidance is empty"),
        ({"num_prompts": 1, "batch_sizes": (1,)}, "--num-prompts=1 .* at least 2"),
    ],
)
def test_options_that_cannot_be_run_are_refused(changes, told):
    with pytest.raises(ConfigError, match=told):
        TradeoffOptions(**changes)


@pytest.fixture
def folders(export, tiny):
    return {
        "mdm": export(tiny(), "mdm")[0],
        "ar": export(tiny(is_causal=True), "ar", seed=1)[0],
        "judge": export(tiny(is_causal=True), "judge", seed=2)[0],
    }


def prompts_of(number, length, seed=0):
    drawn = np.random.default_rng(seed).integers(0, 19, (number, length))
    return [tuple(row) for row in drawn.tolist()]


def test_a_model_that_judges_its_own_texts_finds_its_entropy(folders):
    model = ExportedModel(folders["ar"])
    prompts = prompts_of(600, 4)
    options = TradeoffOptions(num_prompts=600, prompt_tokens=4, new_tokens=1, steps=(1,))
    for temperature in (1.0, 0.5):
        texts = write_texts(model, Way("ar", temperature), prompts, options)
        found = nats_per_token(judge_texts(texts, Scorer(model, ScoringSettings()).score))
        with torch.no_grad():
            logits_NV = model._model(torch.tensor(prompts)).logits[:, -1, :19].double()
        written_NV = (logits_NV / temperature).softmax(-1)
        expected = float(-(written_NV * logits_NV.log_softmax(-1)).sum(-1).mean())
        assert abs(found.mean - expected) < 3.5 * found.standard_error < 0.4


def test_masked_diffusion_writes_what_its_export_does_with_the_prompt_hidden(folders):
    model = ExportedModel(folders["mdm"])
    prompts = prompts_of(5, 6)
    options = TradeoffOptions(
        steps=(4,), num_prompts=5, prompt_tokens=6, new_tokens=8, batch_sizes=(1,), seed=3
    )
    tokens = torch.tensor([[*prompt, *[19] * 8] for prompt in prompts])
    for scale in (0.0, 1.5):
        way = Way("mdm", 0.9, None, "random", scale, 4)
        texts = write_texts(model, way, prompts, options)
        expected = model._model.infill(
            tokens,
            num_steps=4,
            order="random",
            temperature=0.9,
            guidance_scale=scale,
            seeds=derive_seeds(3, 5),
        )
        assert [[*one.context, *one.continuation] for one in texts] == expected.tolist()


def test_an_end_of_text_ends_nothing(folders):
    model = ExportedModel(folders["ar"])
    options = TradeoffOptions(num_prompts=64, prompt_tokens=3, new_tokens=20, steps=(4,))
    texts = write_texts(model, AR, prompts_of(64, 3), options)
    assert {len(text.continuation) for text in texts} == {20}
    ends = [text.continuation.index(0) for text in texts if 0 in text.continuation[:-1]]
    assert ends
    after = {text.continuation[-1] for text in texts if 0 in text.continuation[:-1]}
    assert after != {0}


@pytest.fixture
def shards(tmp_path):
    with ShardWriter(tmp_path / "held_out", np.uint16) as writer:
        writer.add_document(np.random.default_rng(0).integers(0, 19, 20 * 16 + 5))
        writer.finish()
    return tmp_path / "held_out"


@pytest.fixture
def words(folders, shards, tmp_path):
    def line(*more, **other):
        given = folders | {"data": shards, "out": tmp_path / "out", "num-prompts": 6}
        given |= {"prompt-tokens": 6, "new-tokens": 10, "repeats": 2} | other
        words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
        return [*words, *["--batch-sizes", "1", "4", "--steps", "2", "10"], *more]

    return line


def run(words):
    run_command(run_tradeoff, "", words)


def test_report_of_small_models(words, folders, shards, tmp_path, capsys):
    run(words("--guidance", "0", "1", "--ar-temperature", "0.5", "1"))
    out = tmp_path / "out"
    names = sorted(path.name for path in out.iterdir())
    assert names == [f"tradeoff.{ending}" for ending in ("html", "json", "md", "png")]
    tree = json.loads((out / "tradeoff.json").read_text())
    assert len(tree["ways"]) == 2 * 2 + 2
    for one in tree["ways"]:
        assert {size: len(rounds) for size, rounds in one["seconds"].items()} == {"1": 2, "4": 2}
        median = float(np.median(one["seconds"]["4"]))
        assert one["tokens_per_second"]["4"] == pytest.approx(40 / median)
        assert one["tokens_of_texts"] == [10] * 6
    assert len(tree["matches"]) == 2 * 2 * 2
    # The real texts, by the judge itself.
    judge = ExportedModel(folders["judge"])
    texts = [Request(*pair) for pair in _held_out_pairs(shards)]
    losses = judge_texts(texts, Scorer(judge, ScoringSettings()).score)
    assert tree["real"]["nats_of_texts"] == pytest.approx(losses.nats_N.tolist(), abs=1e-4)
    written = [text.continuation for text in texts]
    assert tree["real"]["entropy_of_texts"] == pytest.approx([token_entropy(w) for w in written])
    assert tree["real"]["distinct_2"] == pytest.approx(distinct_n(written, 2))
    told = capsys.readouterr().out
    assert "AR T=1 has" in told
    assert "1 text at once" in told
    assert "4 texts at once" in told
    table = (out / "tradeoff.md").read_text()
    assert "| MDM random T=1 w=1, 10 steps |" in table
    page = (out / "tradeoff.html").read_text()
    assert "AR T=0.5" in page
    assert "<svg" in page


def _held_out_pairs(shards):
    """Windows of 16 tokens in the order of the seed, cut behind the prompt, read by hand."""
    tokens = np.fromfile(f"{shards}.bin", dtype=np.uint16)
    windows = tokens[: 20 * 16].reshape(20, 16).tolist()
    chosen = Permutation(20, (0, 0xE7A1))(np.arange(6))
    return [(tuple(windows[n][:6]), tuple(windows[n][6:])) for n in chosen]


def test_a_judge_with_another_tokenizer_reads_the_text(words, export, tiny, tmp_path):
    other = _write_letters(tmp_path / "letters")
    judge = export(tiny(is_causal=True, seq_length=64), "letters-judge", tokenizer_dir=other)[0]
    run(words(judge=judge))
    tree = json.loads((tmp_path / "out" / "tradeoff.json").read_text())
    assert tree["judge_retokenizes"]
    # A word of two or three letters and a space for each token.
    assert all(2 * 10 < count <= 4 * 10 for count in tree["real"]["tokens_of_texts"])


def _write_letters(folder):
    letters = ["<eos>", " ", "w", "<", ">", "e", "o", "s", "u", *"0123456789"]
    vocabulary = {letter: number for number, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    fast.save_pretrained(folder)
    return folder


def test_what_cannot_be_run_is_refused_before_anything_starts(
    words, folders, export, tiny, tmp_path
):
    (tmp_path / "file").write_text("")
    short = export(tiny(is_causal=True, seq_length=12), "short")[0]
    cases = [
        ({"mdm": tmp_path / "none"}, (), r"--mdm=.*none has no config\.json"),
        ({"judge": tmp_path / "none"}, (), r"--judge=.*none has no config\.json"),
        ({"mdm": folders["ar"]}, (), r"--mdm=.*ar is an autoregressive model: give a masked-"),
        ({"ar": folders["mdm"]}, (), r"--ar=.*mdm is a masked-diffusion model: give an auto"),
        ({"judge": folders["mdm"]}, (), r"--judge=.*mdm is a masked-diffusion model"),
        ({"judge": short}, (), "make 16 tokens, and .*short takes 12"),
        ({"prompt-tokens": 30}, (), "make 40 tokens, and .*mdm takes 32"),
        ({"num-prompts": 21}, (), "has 20 windows of 16 tokens, fewer than --num-prompts=21"),
        ({"out": tmp_path / "file"}, (), "--out=.*file cannot be written"),
        ({"out": tmp_path / "file" / "deeper"}, (), "--out=.*deeper cannot be written"),
    ]
    for changes, more, told in cases:
        with pytest.raises(ConfigError, match=told):
            run(words(*more, **changes))
    assert not (tmp_path / "out").exists()


def test_models_with_different_tokenizers_are_not_compared(words, export, tiny, tmp_path):
    other = _write_letters(tmp_path / "letters")
    ar = export(tiny(is_causal=True), "letters-ar", tokenizer_dir=other)[0]
    with pytest.raises(ConfigError, match="has another tokenizer than --mdm"):
        run(words(ar=ar))
