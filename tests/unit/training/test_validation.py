from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from megatron_mdm.config import parse_config
from megatron_mdm.diffusion.samples import TextWindow
from megatron_mdm.distributed.mesh import Dimension, Mesh
from megatron_mdm.training import validation
from megatron_mdm.training.data_plan import DataContent
from megatron_mdm.training.validation import Validation, Validator

SEQ, VOCAB = 4, 3
# Read elsewhere: these windows could not tell it.
CONTENT = DataContent("training windows", "held-out windows")


class MemoryWindows:
    """Window w holds the digits of w, base 3; a document is so many windows."""

    def __init__(self, num_windows, document_windows=1, document_numbers=None):
        self.num_windows = num_windows
        self._document_windows = document_windows
        self._document_numbers = document_numbers

    def find_documents(self, number_N):
        return (number_N // self._document_windows)[:, None]

    def read_window(self, window):
        assert 0 <= window < self.num_windows
        digits = [window // VOCAB**place % VOCAB for place in range(SEQ)]
        return TextWindow(np.array(digits, dtype=np.int64), self._document_numbers)


def uniform(inputs_S):
    return np.full((len(inputs_S), VOCAB), -math.log(VOCAB))


def peculiar(inputs_S):
    """Log-probabilities that depend on the position and on every input token."""
    place = np.arange(len(inputs_S))
    key = (inputs_S * (place + 1)).sum() + 1.7 * place
    logits_SV = 2 * np.sin(key[:, None] * (1 + np.arange(VOCAB)))
    return logits_SV - np.log(np.exp(logits_SV).sum(axis=1, keepdims=True))


class FakeEngine:
    """Computes losses row by row in float64, and remembers what it was given."""

    def __init__(self, log_probs, rank=0, size=1, pipeline=(0, 1), tensor=(0, 1)):
        world = size * pipeline[1] * tensor[1]
        self.mesh = Mesh(
            torch.device("cpu"),
            0,
            world,
            dp=Dimension(rank, size),
            tp=Dimension(*tensor),
            pp=Dimension(*pipeline),
        )
        self._log_probs = log_probs
        self.batches = []

    def evaluate(self, batch):
        self.batches.append(batch)
        if not self.mesh.pp.is_last:
            return None
        rows = zip(batch.inputs_BS, batch.targets_BS, batch.weights_BS, strict=True)
        losses = [
            -(weights * self._log_probs(inputs)[np.arange(SEQ), targets]).sum()
            for inputs, targets, weights in rows
        ]
        return torch.tensor(losses, dtype=torch.float64)


def config_of(micro=2, kind="mdm", **settings):
    return parse_config(
        {
            "run": {"dir": "unused"},
            "model": {
                "num_layers": 1,
                "hidden_size": 8,
                "num_attention_heads": 2,
                "ffn_hidden_size": 8,
                "vocab_size": VOCAB,
            },
            "objective": {"kind": kind},
            "data": {"train": [{"path": "unused"}], "seq_length": SEQ},
            "batch": {"micro_batch_size": micro, "global_batch_size": micro},
            "schedule": {"steps": 1},
            "validation": settings,
        }
    )


def validator_of(num_windows=11, split="valid", **settings):
    return Validator(config_of(**settings), MemoryWindows(num_windows), "some", split)


class Sums:
    """An all-reduce over ranks that run one after the other."""

    def __init__(self):
        self.parts = []
        self.total = None

    def __call__(self, values):
        if self.total is None:
            self.parts.append(values.clone())
        else:
            values.copy_(self.total)


@pytest.fixture
def sums(monkeypatch):
    sums = Sums()
    monkeypatch.setattr(validation.dist, "all_reduce", sums)
    return sums


def estimate(sums, validator, engines):
    """The estimates of all ranks, each after it has seen the sum; of the last one all."""
    sums.parts, sums.total = [], None
    for engine in engines:
        validator(engine)
    sums.total = torch.stack(sums.parts).sum(0)
    found = [validator(engine) for engine in engines]
    sums.judged, sums.num_predicted = found[-1]
    losses = [(*judged.mean("nll"), *judged.mean("nll_given_first")) for judged, _ in found]
    assert len(set(losses)) == len({count for _, count in found}) == 1
    return found[0][0].mean("nll")


@pytest.mark.parametrize("kind", ["mdm", "ar"])
@pytest.mark.parametrize("draws", [1, 3])
def test_a_uniform_model_costs_the_logarithm_of_the_vocabulary_without_error(sums, kind, draws):
    validator = validator_of(num_windows=40, kind=kind, draws_per_sample=draws)
    found = estimate(sums, validator, [FakeEngine(uniform)])
    # Weights are float32: 1/3 of a token is off in the eighth digit.
    assert found.mean == pytest.approx(math.log(VOCAB), rel=1e-7)
    assert found.standard_error == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("kind", ["mdm", "ar"])
def test_every_micro_batch_and_data_parallel_size_gives_the_same_numbers(sums, kind):
    def found(micro, size):
        validator = validator_of(micro=micro, kind=kind, draws_per_sample=2)
        return estimate(sums, validator, [FakeEngine(peculiar, rank, size) for rank in range(size)])

    alone = found(1, 1)
    assert alone.standard_error > 0
    for micro, size in itertools.product(range(1, 8), range(1, 5)):
        assert found(micro, size) == alone


def test_only_the_first_tensor_rank_of_the_last_stage_counts(sums):
    validator = validator_of()
    alone = estimate(sums, validator, [FakeEngine(peculiar)])
    places = [
        FakeEngine(peculiar, pipeline=(stage, 2), tensor=(rank, 2))
        for stage in range(2)
        for rank in range(2)
    ]
    assert estimate(sums, validator, places) == alone


@pytest.mark.parametrize("kind", ["mdm", "ar"])
def test_every_call_uses_the_same_windows_and_noise(sums, kind):
    one, other = FakeEngine(peculiar), FakeEngine(uniform)
    validator_of(kind=kind)(one)
    validator = validator_of(kind=kind)
    validator(FakeEngine(uniform))
    validator(other)
    assert len(one.batches) == len(other.batches)
    for batch, again in zip(one.batches, other.batches, strict=True):
        for field in ("inputs_BS", "targets_BS", "weights_BS", "lengths_B"):
            np.testing.assert_array_equal(getattr(batch, field), getattr(again, field))


def test_another_noise_seed_chooses_other_windows_and_masks(sums):
    def first_batch(seed):
        engine = FakeEngine(uniform)
        validator_of(num_windows=60, micro=20, num_samples=20, noise_seed=seed)(engine)
        return engine.batches[0]

    assert not np.array_equal(first_batch(0).targets_BS, first_batch(1).targets_BS)
    assert not np.array_equal(first_batch(0).weights_BS, first_batch(1).weights_BS)


def windows_seen(validator, size=1):
    """The windows of all slots, fillers left out by their place at the end."""
    engines = [FakeEngine(uniform, rank, size) for rank in range(size)]
    for engine in engines:
        validator(engine)
    assert len({len(engine.batches) for engine in engines}) == 1
    calls = [batch for call in zip(*(e.batches for e in engines), strict=True) for batch in call]
    targets = np.concatenate([batch.targets_BS for batch in calls])
    found = (targets * VOCAB ** np.arange(SEQ)).sum(axis=1).tolist()
    # Both forms of the loss judge the same windows, in the same order.
    half = validator.num_samples
    assert found[:half] == found[half : 2 * half]
    return found[:half]


def test_more_samples_than_windows_take_every_window_once(sums):
    validator = validator_of(num_windows=11, micro=1, num_samples=256)
    assert validator.num_samples == 11
    assert sorted(windows_seen(validator)) == list(range(11))
    assert validator(FakeEngine(uniform))[1] == 11 * SEQ


def test_fewer_samples_than_windows_take_different_ones_from_all_over(sums):
    seen = windows_seen(validator_of(num_windows=80, micro=1, num_samples=20))
    assert len(set(seen)) == 20
    assert min(seen) < 20
    assert max(seen) > 60


def test_every_call_of_the_engine_is_a_full_micro_batch_on_every_rank(sums):
    for size in (1, 2, 3):
        engines = [FakeEngine(peculiar, rank, size) for rank in range(size)]
        validator = validator_of(num_windows=7, micro=3)
        for engine in engines:
            validator(engine)
            assert {len(batch.inputs_BS) for batch in engine.batches} == {3}
            assert len(engine.batches) == math.ceil(2 * 7 / (3 * size))


def test_autoregressive_validation_ignores_draws_and_counts_its_predictions(sums):
    once, thrice = validator_of(kind="ar"), validator_of(kind="ar", draws_per_sample=3)
    found = estimate(sums, once, [FakeEngine(peculiar)])
    assert sums.num_predicted == 11 * (SEQ - 1)
    assert estimate(sums, thrice, [FakeEngine(peculiar)]) == found
    assert sums.num_predicted == 11 * (SEQ - 1)
    # AR predicts no first tokens, so both losses are one.
    np.testing.assert_array_equal(sums.judged.nll_N, sums.judged.nll_given_first_N)


def test_autoregressive_validation_is_the_mean_over_windows_of_the_mean_over_predictions(sums):
    found = estimate(sums, validator_of(num_windows=11, kind="ar"), [FakeEngine(peculiar)])
    windows = [MemoryWindows(11).read_window(window).tokens_S for window in range(11)]
    values = [
        -np.mean([peculiar(x0_S)[place, x0_S[place + 1]] for place in range(SEQ - 1)])
        for x0_S in windows
    ]
    assert found.mean == pytest.approx(np.mean(values), rel=1e-6)
    assert found.standard_error == pytest.approx(np.std(values, ddof=1) / math.sqrt(11), rel=1e-5)


def exact_bound(x0_S, places=range(SEQ)):
    """Nats per token: the mean over counts, over masks of a count, and over masked tokens."""
    by_count = []
    for count in range(1, len(places) + 1):
        means = []
        for masked in itertools.combinations(places, count):
            inputs_S = x0_S.copy()
            inputs_S[list(masked)] = VOCAB
            log_probs_SV = peculiar(inputs_S)
            means.append(-np.mean([log_probs_SV[place, x0_S[place]] for place in masked]))
        by_count.append(np.mean(means))
    return np.mean(by_count)


DOCUMENTS = np.array([0, 0, 1, 1], dtype=np.int32)


@pytest.mark.parametrize(("draws", "documents"), [(1, None), (3, None), (1, DOCUMENTS)])
def test_the_mean_over_banks_of_draws_is_the_enumerated_bound(sums, draws, documents):
    num_windows, num_banks = 5, 1500
    windows = MemoryWindows(num_windows, document_numbers=documents)
    judged = [
        Validator(config_of(micro=5, draws_per_sample=draws, noise_seed=seed), windows, "some")(
            FakeEngine(peculiar)
        )[0]
        for seed in range(num_banks)
    ]
    # With the first token of each document given, those that AR predicts are left.
    given_first = range(1, SEQ) if documents is None else [1, 3]
    for kind, places in (("nll", range(SEQ)), ("nll_given_first", given_first)):
        texts = [windows.read_window(window).tokens_S for window in range(num_windows)]
        exact = np.mean([exact_bound(x0_S, places) for x0_S in texts])
        found = np.array([one.mean(kind).mean for one in judged])
        error = found.std(ddof=1) / math.sqrt(num_banks)
        assert error < 0.01 * exact
        assert abs(found.mean() - exact) < 3.5 * error


@pytest.mark.parametrize("documents", [None, DOCUMENTS])
def test_masked_diffusion_given_first_judges_the_tokens_that_ar_predicts(sums, documents):
    """A uniform model shows how often each token is hidden: its weights are all there is to see."""
    windows = MemoryWindows(3, document_numbers=documents)
    mdm, ar = FakeEngine(uniform), FakeEngine(uniform)
    counted = {
        kind: Validator(config_of(micro=1, kind=kind, draws_per_sample=400), windows, "")(engine)[1]
        for kind, engine in (("mdm", mdm), ("ar", ar))
    }
    given_first = np.concatenate([batch.weights_BS for batch in mdm.batches[3 * 400 :]])
    predicted = np.roll(np.concatenate([batch.weights_BS for batch in ar.batches]), 1, axis=1)
    np.testing.assert_array_equal(given_first.any(axis=0), predicted.any(axis=0))
    np.testing.assert_allclose(given_first.mean(axis=0), predicted.mean(axis=0), atol=0.06)
    assert counted == {"mdm": 3 * SEQ, "ar": 3 * int(predicted[0].astype(bool).sum())}


def test_a_window_whose_documents_have_one_token_each_costs_nothing_given_those(sums):
    alone = MemoryWindows(3, document_numbers=np.arange(SEQ, dtype=np.int32))
    judged, counted = Validator(config_of(), alone, "some")(FakeEngine(peculiar))
    assert judged.nll_N.min() > 0
    assert not judged.nll_given_first_N.any()
    assert counted == 3 * SEQ


def test_windows_of_one_document_are_not_taken_for_independent(sums):
    """Ten documents of eight windows: the error of a mean over documents, computed plainly."""
    windows = MemoryWindows(80, document_windows=8)
    found = estimate(sums, Validator(config_of(kind="ar"), windows, "some"), [FakeEngine(peculiar)])
    judged = sums.judged
    means = [judged.nll_N[judged.document_N == document].mean() for document in range(10)]
    assert found.clustered_error == pytest.approx(np.std(means, ddof=1) / math.sqrt(10))
    assert found.clustered_error != pytest.approx(found.standard_error, rel=0.01)


@pytest.mark.parametrize("kind", ["mdm", "ar"])
def test_training_windows_are_judged_as_held_out_ones_are(sums, kind):
    """All windows of both splits: then the choice does not matter, and the estimate is the same."""
    held_out, training = (
        estimate(
            sums,
            validator_of(split=split, kind=kind, num_train_samples=256),
            [FakeEngine(peculiar)],
        )
        for split in ("valid", "train")
    )
    # Each window has another slot of the noise bank, if there is noise.
    if kind == "ar":
        assert training == pytest.approx(held_out, rel=1e-12)
    assert abs(training.mean - held_out.mean) < 4 * held_out.standard_error
    assert training.standard_error == pytest.approx(held_out.standard_error, rel=0.5)


def test_both_objectives_choose_the_same_training_windows_and_others_than_held_out_ones(sums):
    options = {"num_windows": 60, "micro": 1, "num_samples": 25, "num_train_samples": 20}
    mdm, held_out = (windows_seen(validator_of(split=split, **options)) for split in SPLITS)
    engine = FakeEngine(uniform)
    validator_of(split="train", kind="ar", **options)(engine)
    inputs = np.concatenate([batch.inputs_BS for batch in engine.batches])
    assert (inputs * VOCAB ** np.arange(SEQ)).sum(axis=1).tolist() == mdm
    assert len(set(mdm)) == 20
    assert min(mdm) < 15
    assert max(mdm) > 45
    assert set(mdm) != set(held_out)


SPLITS = ("train", "valid")


def test_the_gap_is_the_held_out_loss_less_that_of_training_with_the_error_of_a_difference(sums):
    config = config_of(num_samples=7, num_train_samples=5, noise_seed=3)
    train, valid = MemoryWindows(40), MemoryWindows(30)
    alone = [
        Validator(config, windows, "some", split)
        for windows, split in zip((train, valid), SPLITS, strict=True)
    ]
    training, held_out = (estimate(sums, one, [FakeEngine(peculiar)]) for one in alone)
    sums.parts, sums.total = [], None
    found, judged = Validation(config, train, valid, CONTENT)(FakeEngine(peculiar))
    variance = held_out.standard_error**2 + training.standard_error**2
    matched = judged.mean("nll_given_first")
    expected = {
        "valid/noise_seed": 3,
        "valid/nll_nats_per_token": held_out.mean,
        "valid/nll_standard_error": held_out.standard_error,
        "valid/nll_given_first_nats_per_token": matched.mean,
        "valid/nll_given_first_standard_error": matched.standard_error,
        "valid/num_tokens": 7 * SEQ,
        "train/nll_nats_per_token": training.mean,
        "train/nll_standard_error": training.standard_error,
        "valid/gap_nats_per_token": held_out.mean - training.mean,
        "valid/gap_standard_error": pytest.approx(math.sqrt(variance)),
    }
    assert {name: found[name] for name in expected} == expected
    # Every window is a document of its own here.
    assert found["valid/nll_clustered_error"] == pytest.approx(held_out.standard_error)
    assert found["valid/gap_clustered_error"] == pytest.approx(math.sqrt(variance))


def test_without_training_windows_to_judge_there_is_no_gap_and_without_either_nothing(sums):
    train, valid = MemoryWindows(40), MemoryWindows(30)
    found, _ = Validation(config_of(), train, valid, CONTENT)(FakeEngine(peculiar))
    assert {name.split("/")[0] for name in found} == {"valid"}
    assert "valid/gap_nats_per_token" not in found
    only_training = Validation(config_of(num_train_samples=5), train, None, CONTENT)
    found, judged = only_training(FakeEngine(peculiar))
    assert judged is None
    losses = ("train/nll", "train/nll_given_first")
    ends = ("nats_per_token", "standard_error", "clustered_error")
    assert found.keys() == {
        "valid/noise_seed",
        *(f"{loss}_{end}" for loss, end in itertools.product(losses, ends)),
    }
    assert not only_training.is_empty
    assert Validation(config_of(), train, None, CONTENT).is_empty


def test_one_window_has_a_loss_and_no_error(sums):
    alone = Validation(config_of(), MemoryWindows(40), MemoryWindows(1), CONTENT)
    found, _ = alone(FakeEngine(peculiar))
    assert math.isfinite(found["valid/nll_nats_per_token"])
    assert not any(name.endswith("_error") for name in found)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # 2% of 3 passes for 40 samples of 1,000 steps, in 2 passes for a window.
        ({}, 256),
        ({"every_steps": 100}, 120),
        ({"every_steps": 5000}, 256),
        ({"every_steps": 100, "draws_per_sample": 2}, 60),
        ({"every_steps": 10}, 0),
        ({"every_epochs": 0.5}, 60),
        ({"every_steps": 10, "num_train_samples": 7}, 7),
        ({"num_train_samples": 0}, 0),
    ],
)
def test_by_default_training_windows_take_little_of_a_runs_time(settings, expected):
    for kind in ("mdm", "ar"):
        config = config_of(micro=40, kind=kind, **settings)
        assert validation.count_train_samples(config, 4000, num_steps=1000) == expected


def test_without_held_out_windows_those_of_training_are_judged_where_asked_for():
    train = MemoryWindows(40)
    assert Validation(config_of(micro=40), train, None, CONTENT, num_steps=1000).is_empty
    assert not Validation(config_of(num_train_samples=5), train, None, CONTENT).is_empty


def test_a_mixture_is_judged_by_both_losses_and_the_other_windows_are_kept(sums):
    train, valid = MemoryWindows(40), MemoryWindows(30)
    settings = {"num_samples": 7, "num_train_samples": 5, "draws_per_sample": 3}
    measured, windows = {}, {}
    for kind in ("ar", "mdm", "mixture"):
        sums.parts, sums.total = [], None
        validation = Validation(config_of(kind=kind, **settings), train, valid, CONTENT)
        measured[kind], windows[kind] = validation(FakeEngine(peculiar))
        assert [one.judge for one in validation.further] == ["mdm"] * (kind == "mixture")
    mixed = measured["mixture"]
    for name in ("valid/nll_nats_per_token", "train/nll_standard_error", "valid/num_tokens"):
        assert mixed[name] == measured["ar"][name]
    for split in ("valid", "train"):
        name = f"{split}/nll_nats_per_token"
        assert mixed[f"{split}/as_ar_nll_nats_per_token"] == measured["ar"][name]
        assert f"{split}/as_mdm_nll_standard_error" in mixed
    # The engine of this test judges a token by what is seen where it is asked for.
    (other,) = validation.further
    assert other.mean("nll").mean == mixed["valid/as_mdm_nll_nats_per_token"]
    assert other.windows == windows["ar"].windows
    assert not any("/as_" in name for kind in ("ar", "mdm") for name in measured[kind])
