"""Held-out loss on fixed windows and fixed noise: the same number for every layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from megatron_mdm.config import Config
from megatron_mdm.data.loader import Batch
from megatron_mdm.data.order import Permutation
from megatron_mdm.data.windows import Windows, document_numbers
from megatron_mdm.diffusion.likelihood import Estimate, NoiseBank, mean_with_standard_error
from megatron_mdm.diffusion.objectives import TrainingSample, masked_sample, next_token_sample
from megatron_mdm.training.engine import Engine


class Validator:
    """Estimates the held-out negative log-likelihood.

    Masked diffusion uses the fixed-count bound whatever form it trains with: same expectation, less
    variance. AR needs no noise.

    Args:
        config: The run.
        windows: Held-out windows.
    """

    def __init__(self, config: Config, windows: Windows) -> None:
        settings = config.validation
        self._windows = windows
        self._seq_length = config.data.seq_length
        self._micro_batch = config.batch.micro_batch_size
        self._mask_id = config.model.mask_id
        self._is_ar = config.objective.kind == "ar"
        self._document_attention = config.data.attention == "document"
        self.num_samples = min(settings.num_samples, windows.num_windows)
        self._draws = 1 if self._is_ar else settings.draws_per_sample
        self._bank = NoiseBank(self.num_samples, self._draws, settings.noise_seed)
        # Windows from all over the held-out shards, the same ones every time.
        choice = Permutation(windows.num_windows, (settings.noise_seed, 0x7A11D))
        self._chosen = choice(np.arange(self.num_samples))

    def __call__(
        self, engine: Engine, mark_progress: Callable[[], object] = lambda: None
    ) -> Estimate:
        """Runs the estimate on all ranks.

        Args:
            engine: The engine whose weights are judged.
            mark_progress: Called before each micro batch.

        Returns:
            Nats per token with its standard error, on every rank.
        """
        topology = engine.topology
        values = torch.zeros(self.num_samples * self._draws, dtype=torch.float64)
        for slots in self._slots(topology.data_rank, topology.data_size):
            # A shorter batch is filled up: pipeline stages expect one shape.
            filled = (slots + [0] * self._micro_batch)[: self._micro_batch]
            mark_progress()
            losses_B = engine.evaluate(Batch.stack([self._sample(slot) for slot in filled]))
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

    def _slots(self, rank: int, size: int) -> Iterator[list[int]]:
        total = self.num_samples * self._draws
        # Every replica makes the same number of calls: ZeRO-3 gathers weights in each.
        calls = -(-total // (self._micro_batch * size))
        for call in range(calls):
            start = (call * size + rank) * self._micro_batch
            yield list(range(start, min(start + self._micro_batch, total)))

    def _sample(self, slot: int) -> TrainingSample:
        sample, draw = divmod(slot, self._draws)
        window = int(self._chosen[sample])
        x0_S = self._windows.read(window)
        documents_S = self._documents(window, x0_S)
        if self._is_ar:
            return next_token_sample(x0_S, len(x0_S), documents_S)
        masking = self._bank.masking(sample, draw, len(x0_S))
        weight = masking.weight / len(x0_S)
        return masked_sample(x0_S, masking.mask_L, weight, self._mask_id, documents_S)

    def _documents(self, window: int, x0_S: NDArray[np.int64]) -> NDArray[np.int32] | None:
        if not self._document_attention:
            return None
        eod_token_id = self._windows.source_of(window).eod_token_id
        if eod_token_id is None:
            raise ValueError("document attention needs the end-of-document token of every source")
        return document_numbers(x0_S, eod_token_id)
