"""What ranks find out about windows of prompts and responses."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from cases import Overrides, engine_of, stage_of
from numpy.typing import NDArray

from megatron_mdm.config import Config
from megatron_mdm.data.loader import Batch
from megatron_mdm.data.order import DocumentKey
from megatron_mdm.diffusion.absorbing import AbsorbingProcess
from megatron_mdm.diffusion.likelihood import NoiseBank
from megatron_mdm.diffusion.responses import (
    corrupt_held_out_responses,
    insert_corruptions,
    number_pairs,
    predict_responses,
)
from megatron_mdm.diffusion.samples import SEGMENT_IDS, PromptResponseSpan, Sample, TextWindow

FINETUNING = {"finetuning.enabled": True}
# Tokens of prompt and response of the pairs of three windows of 16.
SIZES = (((2, 3), (1, 6), (3, 1)), ((4, 8),), ((1, 1), (2, 2), (3, 3), (1, 2)))


class PairWindows:
    """Windows of random tokens in memory, divided into pairs; the rest is padding.

    Args:
        config: The run.
    """

    num_windows = 12

    def __init__(self, config: Config) -> None:
        generator = np.random.default_rng(6)
        shape = (self.num_windows, config.data.seq_length)
        self._tokens = generator.integers(1, config.model.vocab_size, shape)

    def read_window(
        self, window: int, shift: int = 0, document_key: DocumentKey | None = None
    ) -> TextWindow:
        """Reads a window.

        Args:
            window: Index.
            shift: Always 0.
            document_key: Always None.

        Returns:
            Tokens and pairs.
        """
        pairs, start = [], 0
        for prompt, response in SIZES[window % len(SIZES)]:
            stop = start + prompt + response
            pairs.append(PromptResponseSpan(start, start + prompt, stop, stop))
            start = stop
        mean = float(np.mean([len(sizes) for sizes in SIZES]))
        return TextWindow(self._tokens[window].copy(), pairs=tuple(pairs), pairs_per_window=mean)


def _sample(window: TextWindow, kind: str, bank: NoiseBank, number: int) -> Sample:
    if kind == "ar":
        return predict_responses(window)
    draw, process = bank.draw(number, 0), AbsorbingProcess(mask_token_id=61)
    return insert_corruptions(window, corrupt_held_out_responses(window, process, draw))


def losses_packed_and_alone(overrides: Overrides) -> list[tuple[float, float]]:
    """Losses of whole windows, and the sums of the losses of their pairs in windows alone.

    Args:
        overrides: As for `config_of`; a micro batch of one sequence.

    Returns:
        Both for each of three windows.
    """
    found = []
    with stage_of(overrides) as stage, engine_of(stage) as engine:
        source, kind = PairWindows(stage.config), stage.config.objective.kind
        bank = NoiseBank(len(SIZES), 1, seed=4)

        def loss(sample: Sample) -> float:
            losses_B = engine.evaluate(Batch.stack([sample]))
            assert losses_B is not None
            return losses_B.item()

        for number in range(len(SIZES)):
            window = source.read_window(number)
            packed = _sample(window, kind, bank, number)
            numbers_S = number_pairs(window)
            alone = 0.0
            for pair in range(len(SIZES[number])):
                alone += loss(_cut_out(packed, numbers_S == pair))
            found.append((loss(packed), alone))
    return found


def _cut_out(sample: Sample, here_S: NDArray[np.bool_]) -> Sample:
    """A pair at the start of a window that holds nothing else."""
    size = int(here_S.sum())

    def moved(row_S: NDArray[Any]) -> NDArray[Any]:
        out_S = np.zeros_like(row_S)
        out_S[:size] = row_S[here_S]
        return out_S

    return Sample(moved(sample.inputs_S), moved(sample.targets_S), moved(sample.weights_S), size)


def steps_with_other_targets_at_prompts(overrides: Overrides) -> list[tuple[float, list[float]]]:
    """A step on a window, and on one whose targets outside of responses are others.

    Args:
        overrides: As for `config_of`; a micro and a global batch of one sequence.

    Returns:
        Of each the loss, and sums that any difference of a gradient would move: the weights after
        the step.
    """
    found = []
    for other in (False, True):
        with stage_of(overrides) as stage, engine_of(stage) as engine:
            kind = stage.config.objective.kind
            window = PairWindows(stage.config).read_window(0)
            sample = _sample(window, kind, NoiseBank(1, 1, seed=4), 0)
            if other:
                targets_S = np.where(sample.weights_S > 0, sample.targets_S, 7)
                sample = sample._replace(targets_S=targets_S)
            result = engine.train_step(0, [Batch.stack([sample])], lr=1e-2)
            sums = [float(shard.parameter.double().sum()) for shard in engine.shards]
            found.append((float(result.loss_sum), sums))
    return found


def gradient_of_prompt_logits(overrides: Overrides) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Where the gradient of the loss with respect to the model's last hidden states is not zero.

    Args:
        overrides: As for `config_of`.

    Returns:
        Bool [S] of the gradient and of the weights.
    """
    with stage_of(overrides) as stage:
        kind = stage.config.objective.kind
        sample = _sample(PairWindows(stage.config).read_window(0), kind, NoiseBank(1, 1, seed=4), 0)
        batch = Batch.stack([sample])
        seen: list[torch.Tensor] = []

        def keep(_: Any, __: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            hidden.retain_grad()
            seen.append(hidden)

        handle = stage.model.decoder.register_forward_hook(keep)
        losses_B = stage.model(
            torch.from_numpy(batch.inputs_BS),
            targets_BS=torch.from_numpy(batch.targets_BS),
            weights_BS=torch.from_numpy(batch.weights_BS),
            positions_M=torch.from_numpy(np.flatnonzero(batch.weights_BS)),
            model_inputs={SEGMENT_IDS: torch.from_numpy(batch.model_inputs[SEGMENT_IDS])},
        )
        losses_B.sum().backward()
        handle.remove()
        (hidden_SBH,) = seen
        assert hidden_SBH.grad is not None
        return (hidden_SBH.grad[:, 0].abs().sum(-1) > 0).numpy(), sample.weights_S > 0
