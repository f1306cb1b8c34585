"""Held-out loss on fixed windows and fixed noise: the same number for every layout."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Literal, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mdm.config import Config
from megatron_mdm.data.loader import Batch
from megatron_mdm.data.order import Permutation
from megatron_mdm.data.windows import Windows
from megatron_mdm.diffusion.likelihood import Estimate, NoiseBank, mean_with_standard_error
from megatron_mdm.diffusion.responses import masked_responses, predicted_responses
from megatron_mdm.diffusion.samples import TrainingSample, masked_sample, next_token_sample
from megatron_mdm.errors import DataError
from megatron_mdm.parallel.topology import Topology

Split = Literal["valid", "train"]
Report = Callable[[DataError | None], object]

# Each split has a choice of windows of its own, should the two ever be one set of shards.
_CHOICE_DOMAINS: dict[Split, int] = {"valid": 0x7A11D, "train": 0x72A14}


class Evaluator(Protocol):
    """What holds the weights that are judged, such as `training.engine.Engine`."""

    topology: Topology

    def evaluate(self, batch: Batch) -> Tensor | None:
        """Weighted losses of each sequence of a micro batch; None before the last stage."""
        ...


class Validator:
    """Estimates the negative log-likelihood of some windows.

    Masked diffusion uses the fixed-count bound whatever form it trains with: same expectation, less
    variance. AR needs no noise. There is no dropout.

    Args:
        config: The run.
        windows: The windows to choose from.
        split: `valid`: as many as `validation.num_samples`; `train`: `num_train_samples`.
    """

    def __init__(self, config: Config, windows: Windows, split: Split = "valid") -> None:
        settings = config.validation
        self._windows = windows
        self._seq_length = config.data.seq_length
        self._micro_batch = config.batch.micro_batch_size
        self._mask_id = config.model.mask_id
        self._is_ar = config.objective.kind == "ar"
        wanted = settings.num_samples if split == "valid" else settings.num_train_samples
        self.num_samples = min(wanted, windows.num_windows)
        self._draws = 1 if self._is_ar else settings.draws_per_sample
        self._bank = NoiseBank(self.num_samples, self._draws, settings.noise_seed)
        # Windows from all over the shards, the same ones every time.
        key = (settings.noise_seed, _CHOICE_DOMAINS[split])
        self._chosen = Permutation(windows.num_windows, key)(np.arange(self.num_samples))

    def __call__(self, engine: Evaluator, report: Report = lambda failure: None) -> Estimate:
        """Runs the estimate on all ranks.

        Args:
            engine: The engine whose weights are judged.
            report: Called before each micro batch, and once before, with what kept this rank from
                reading the next one. What it raises ends the estimate; it has to raise on all ranks
                in the same call, at the latest in the one after a failure was reported.

        Returns:
            Nats per token with its standard error, on every rank.

        Raises:
            DataError: This rank cannot read a window and `report` raised nothing.
        """
        topology = engine.topology
        values = torch.zeros(self.num_samples * self._draws, dtype=torch.float64)
        for slots, batch in self._batches(topology, report):
            losses_B = engine.evaluate(batch)
            if losses_B is not None and topology.reports_loss:
                values[slots] = losses_B[: len(slots)].cpu()
        values = values.to(topology.device)
        dist.all_reduce(values)
        per_sample = values.cpu().numpy().reshape(self.num_samples, self._draws).mean(axis=1)
        return mean_with_standard_error(per_sample, None if self._is_ar else self._bank.times_NK)

    @property
    def num_tokens(self) -> int:
        """Predicted tokens that the estimate rests on, a draw counted once."""
        return self.num_samples * (self._seq_length - self._is_ar)

    def _batches(self, topology: Topology, report: Report) -> Iterator[tuple[list[int], Batch]]:
        """Reads one ahead, so that all ranks hear of a failure before one of them lacks a batch."""
        calls = list(self._slots(topology.data_rank, topology.data_size))
        following = self._read(calls[0])
        report(following if isinstance(following, DataError) else None)
        for number, slots in enumerate(calls):
            batch = following
            if number + 1 < len(calls) and not isinstance(batch, DataError):
                following = self._read(calls[number + 1])
            report(following if isinstance(following, DataError) else None)
            if isinstance(batch, DataError):
                raise batch
            yield slots, batch

    def _read(self, slots: list[int]) -> Batch | DataError:
        # A shorter batch is filled up: pipeline stages expect one shape.
        filled = (slots + [0] * self._micro_batch)[: self._micro_batch]
        try:
            return Batch.stack([self._sample(slot) for slot in filled])
        except DataError as error:
            return error

    def _slots(self, rank: int, size: int) -> Iterator[list[int]]:
        total = self.num_samples * self._draws
        # Every replica makes the same number of calls: ZeRO-3 gathers weights in each.
        calls = -(-total // (self._micro_batch * size))
        for call in range(calls):
            start = (call * size + rank) * self._micro_batch
            yield list(range(start, min(start + self._micro_batch, total)))

    def _sample(self, slot: int) -> TrainingSample:
        sample, draw = divmod(slot, self._draws)
        window = self._windows.read_window(int(self._chosen[sample]))
        if window.exchanges:
            if self._is_ar:
                return predicted_responses(window)
            lengths = [one.learned_stop - one.response for one in window.exchanges]
            maskings = self._bank.maskings(sample, draw, lengths)
            return masked_responses(window, maskings, self._mask_id)
        length = len(window.tokens_S)
        if self._is_ar:
            return next_token_sample(window, length)
        masking = self._bank.masking(sample, draw, length)
        return masked_sample(window, masking.mask_L, masking.weight / length, self._mask_id)


class Validation:
    """What a validation measures: the held-out loss, that of training windows, and their gap.

    Args:
        config: The run.
        train: Training windows, judged if `validation.num_train_samples` is above 0.
        valid: Held-out windows, if there are any.
    """

    def __init__(self, config: Config, train: Windows, valid: Windows | None) -> None:
        self._noise_seed = config.validation.noise_seed
        self._held_out = None if valid is None else Validator(config, valid)
        judges_training = config.validation.num_train_samples > 0
        self._training = Validator(config, train, "train") if judges_training else None

    @property
    def is_empty(self) -> bool:
        """Is there nothing to measure?"""
        return self._held_out is None and self._training is None

    def __call__(
        self, engine: Evaluator, report: Report = lambda failure: None
    ) -> dict[str, float | int]:
        """Measures on all ranks.

        Args:
            engine: The engine whose weights are judged.
            report: As `Validator` calls it.

        Returns:
            Metrics by name, the same on every rank.

        Raises:
            DataError: This rank cannot read a window and `report` raised nothing.
        """
        found: dict[str, float | int] = {"valid/noise_seed": self._noise_seed}
        held_out = training = None
        if self._held_out is not None:
            held_out = self._held_out(engine, report)
            found["valid/nll_nats_per_token"] = held_out.mean
            found["valid/num_tokens"] = self._held_out.num_tokens
        if self._training is not None:
            training = self._training(engine, report)
            found["train/nll_nats_per_token"] = training.mean
        if held_out is not None and training is not None:
            found["valid/gap_nats_per_token"] = held_out.mean - training.mean
        return {**found, **_standard_errors(held_out, training)}


def _standard_errors(held_out: Estimate | None, training: Estimate | None) -> dict[str, float]:
    """Errors of what was measured; one window alone has none."""
    errors = {}
    if held_out is not None:
        errors["valid/nll_standard_error"] = held_out.standard_error
    if training is not None:
        errors["train/nll_standard_error"] = training.standard_error
    if held_out is not None and training is not None:
        # Windows of both are independent. Where they share noise the error is a little less.
        errors["valid/gap_standard_error"] = math.hypot(*errors.values())
    return {name: error for name, error in errors.items() if math.isfinite(error)}
