from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from megatron_mdm.core.statistics import (
    clustered_mean,
    degrees_of_mean,
    mean_with_standard_error,
    student_reach,
)
from megatron_mdm.diffusion.absorbing import AbsorbingProcess
from megatron_mdm.diffusion.likelihood import NoiseBank, estimate_nll, weighted_nll
from megatron_mdm.diffusion.noise import CounterNoise, Purpose

V, L, MASK = 3, 4, 3
SEQUENCES = torch.tensor(list(itertools.product(range(V), repeat=L)))
GENERATOR = torch.Generator().manual_seed(0)
JOINT = torch.rand(V**L, generator=GENERATOR, dtype=torch.float64).pow(2)
JOINT /= JOINT.sum()
TABLE = 2 * torch.randn((V + 1) ** L, L, V, generator=GENERATOR, dtype=torch.float64)
X0 = SEQUENCES[47].numpy()


def exact_conditionals(tokens_BS):
    """Log p(x_i | visible tokens) of the joint."""
    agrees_BNS = (tokens_BS[:, None] == SEQUENCES) | (tokens_BS[:, None] == MASK)
    weights_BN = agrees_BNS.all(-1) * JOINT
    one_hot_NSV = torch.nn.functional.one_hot(SEQUENCES, V).double()
    marginals_BSV = torch.einsum("bn,nsv->bsv", weights_BN, one_hot_NSV)
    return (marginals_BSV / weights_BN.sum(1)[:, None, None]).log()


def random_denoiser(tokens_BS):
    """Unrelated logits for every pattern of tokens and masks."""
    return TABLE[(tokens_BS * (V + 1) ** torch.arange(L)).sum(1)]


def exact_bound(denoiser, x0_S, eps: float | None) -> float:
    """The bound by quadrature over p and a sum over all subsets, in nats per sequence."""
    nodes, areas = np.polynomial.legendre.leggauss(8)
    low = eps or 0.0
    total = 0.0
    for bits in itertools.product([False, True], repeat=L):
        hidden = torch.tensor(bits)
        x0 = torch.from_numpy(x0_S)
        log_probs = denoiser(torch.where(hidden, MASK, x0)[None])[0].log_softmax(-1)
        cost = -log_probs[torch.arange(L), x0][hidden].sum().item()
        p = low + (1 - low) * (nodes + 1) / 2
        if any(bits):
            count = sum(bits)
            total += cost * float((areas / 2 * p ** (count - 1) * (1 - p) ** (L - count)).sum())
    return total


def estimate(denoiser, *, eps=None, num_draws=4096, seed=1, **options):
    return estimate_nll(
        denoiser, X0, mask_token_id=MASK, num_draws=num_draws, seed=seed, eps=eps, **options
    )


def test_with_exact_conditionals_the_estimate_is_the_log_likelihood():
    exact = -math.log(JOINT[47])
    assert exact_bound(exact_conditionals, X0, None) == pytest.approx(exact, abs=1e-12)
    mean, error = estimate(exact_conditionals)
    assert abs(mean - exact) < 4 * error
    assert error < 0.05 * exact


@pytest.mark.parametrize("eps", [None, 1e-3, 0.2])
@pytest.mark.parametrize("seed", [1, 2])
def test_the_estimate_is_unbiased_for_any_denoiser(eps, seed):
    mean, error = estimate(random_denoiser, eps=eps, seed=seed)
    assert abs(mean - exact_bound(random_denoiser, X0, eps)) < 4 * error


@pytest.mark.parametrize("eps", [None, 1e-3])
def test_the_standard_error_is_honest(eps):
    exact = exact_bound(random_denoiser, X0, eps)
    estimates = [estimate(random_denoiser, eps=eps, num_draws=64, seed=seed) for seed in range(150)]
    means, errors = np.array(estimates).T
    true_error = means.std(ddof=1)
    # Strata only lower the true error. 150 seeds know it to about 6 %.
    assert true_error < 1.2 * math.sqrt((errors**2).mean())
    assert true_error > 0.3 * math.sqrt((errors**2).mean())
    # Weights of 1 / p have a heavy tail, and with 64 Bernoulli draws it is often not seen yet.
    assert np.mean(np.abs(means - exact) < 2 * errors) > (0.93 if eps is None else 0.85)
    assert abs(means.mean() - exact) < 4 * true_error / math.sqrt(len(means))


@pytest.mark.parametrize("num_draws", [8, 16, 32, 64])
def test_intervals_of_few_draws_hold_the_exact_bound(num_draws):
    exact = exact_bound(random_denoiser, X0, None)
    found = [estimate(random_denoiser, num_draws=num_draws, seed=seed) for seed in range(500)]
    degrees = degrees_of_mean(num_draws, is_stratified=True)
    covered = np.mean([abs(mean - exact) <= student_reach(err, degrees) for mean, err in found])
    # Binomial noise of 500 intervals is 0.01.
    assert covered >= 0.95 - 3 * (0.95 * 0.05 / 500) ** 0.5


def test_a_uniform_predictor_costs_ln_v_a_token_without_error():
    mean, error = estimate(lambda tokens_BS: torch.zeros(*tokens_BS.shape, V), num_draws=50)
    assert mean == pytest.approx(L * math.log(V), rel=1e-12)
    assert error < 1e-12


def test_the_batch_size_does_not_change_the_estimate():
    one = estimate(random_denoiser, num_draws=50)
    assert estimate(random_denoiser, num_draws=50, batch_size=7) == pytest.approx(one, rel=1e-12)


def test_the_seed_fixes_the_estimate():
    assert estimate(random_denoiser, num_draws=8) == estimate(random_denoiser, num_draws=8)
    assert estimate(random_denoiser, num_draws=8) != estimate(random_denoiser, num_draws=8, seed=2)


def test_a_single_draw_has_no_standard_error():
    assert math.isnan(estimate(random_denoiser, num_draws=1).standard_error)


def test_weighted_nll_is_the_weighted_sum_of_surprisals():
    rng = np.random.default_rng(0)
    logits, weights = rng.normal(size=(2, 5, 7)), rng.random((2, 5))
    targets = rng.integers(0, 7, (2, 5))
    expected = [
        math.fsum(
            weights[b, s]
            * (math.log(math.fsum(np.exp(logits[b, s]))) - logits[b, s, targets[b, s]])
            for s in range(5)
        )
        for b in range(2)
    ]
    tensors = [torch.from_numpy(array) for array in (logits, targets, weights)]
    torch.testing.assert_close(
        weighted_nll(*tensors, torch.float64), torch.tensor(expected, dtype=torch.float64)
    )
    assert weighted_nll(tensors[0].bfloat16(), *tensors[1:]).dtype == torch.float32


def test_positions_without_weight_do_not_count_whatever_their_logits():
    logits = torch.zeros(1, 3, V)
    logits[0, 0] = -torch.inf
    logits[0, 1, 2] = -torch.inf
    nll = weighted_nll(logits, torch.tensor([[0, 2, 1]]), torch.tensor([[0.0, 0.0, 2.0]]))
    torch.testing.assert_close(nll, torch.tensor([2 * math.log(V)]))


def corrupt(draw, length):
    """Zeros of which those that are hidden became 1, and weights."""
    zeros_L = np.zeros(length, dtype=np.int64)
    return AbsorbingProcess(1).corrupt_held_out(zeros_L, draw.time, draw.uniforms(length))


def count_hidden(draw, length):
    return int(corrupt(draw, length).xt_L.sum())


def test_a_bank_gives_every_checkpoint_the_same_masks():
    one, other = NoiseBank(8, 2, seed=5), NoiseBank(8, 2, seed=5)
    later = [corrupt(other.draw(sample, 1), 50) for sample in range(7, -1, -1)][::-1]
    for sample in range(8):
        mine = corrupt(one.draw(sample, 1), 50)
        np.testing.assert_array_equal(mine.xt_L, later[sample].xt_L)
        np.testing.assert_array_equal(mine.weights_L, later[sample].weights_L)


def test_the_draws_of_a_bank_take_every_count_once():
    bank = NoiseBank(16, 4, seed=5)
    counts = [
        count_hidden(bank.draw(sample, draw), 64) for sample in range(16) for draw in range(4)
    ]
    assert sorted(counts) == list(range(1, 65))
    # The four draws of one sample lie a quarter of the range apart.
    for own in np.reshape(counts, (16, 4)):
        assert np.diff(np.sort(own)).tolist() == [16, 16, 16]


def test_over_seeds_every_sample_of_a_bank_meets_every_noise_level():
    counts = [count_hidden(NoiseBank(64, 1, seed).draw(0, 0), 20) for seed in range(1000)]
    found = np.bincount(counts, minlength=21)[1:]
    assert ((found - 50) ** 2 / 50).sum() < 50.8  # chi-square, 19 degrees, 1 in 10,000


def test_a_bank_shares_no_draw_with_training():
    training = CounterNoise(5).uniforms(Purpose.MASK, 3, 64)
    hidden = corrupt(NoiseBank(8, 1, seed=5).draw(3, 0), 64).xt_L == 1
    smallest = np.zeros(64, dtype=bool)
    smallest[np.argsort(training)[: hidden.sum()]] = True
    assert (hidden != smallest).any()


@pytest.mark.parametrize("draws", [1, 4])
def test_standard_error_of_stratified_draws_is_the_spread_over_seeds(draws):
    """Values with a strong dependence on t, a window effect, and noise: as in a validation."""
    rng = np.random.default_rng(0)
    num_samples, means, errors = 128, [], []
    for seed in range(300):
        times_NK = NoiseBank(num_samples, draws, seed).times_NK
        windows_N1 = rng.normal(0, 0.3, (num_samples, 1))
        noise_NK = rng.normal(0, 0.4, times_NK.shape)
        values_NK = 2 + 3 * times_NK**2 - np.cos(2 * times_NK) + windows_N1 + noise_NK
        mean, error = mean_with_standard_error(values_NK.mean(axis=1), times_NK)
        means.append(mean)
        errors.append(error)
    true_error = np.sqrt((0.3**2 + 0.4**2 / draws) / num_samples)
    # 300 seeds give the spread to 4%; each standard error is known to about 6%.
    assert np.std(means) == pytest.approx(true_error, rel=0.16)
    assert np.mean(errors) == pytest.approx(true_error, rel=0.05)


def test_with_a_cluster_for_each_value_both_errors_are_one():
    generator = np.random.default_rng(5)
    values_N, times_NK = generator.normal(size=40), NoiseBank(40, 2, 0).times_NK
    for times in (None, times_NK):
        found = clustered_mean(values_N, np.arange(40), times)
        assert found.clustered_error == pytest.approx(found.standard_error)
    assert math.isnan(clustered_mean(values_N, np.zeros(40, dtype=np.int64)).clustered_error)
