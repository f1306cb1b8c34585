"""Sampling where the noise is hybrid or uniform: tokens change until the end. Pure torch.

The file travels with every Hugging Face export, with its neighbours, and imports nothing else of
ours. As in `samplers.py`, what becomes of a sequence does not depend on its batch mates.

Shapes: B batch, S sequence, V logits of a position, T positions whose logits are needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .block_steps import count_unmasked_after
from .decoding import Decoding
from .interpolation import Interpolation, Marginals
from .sampler_state import (
    Denoiser,
    LogitSource,
    Window,
    WindowedDenoiser,
    check_tokens,
    make_generators,
)
from .samplers import SamplingStep, StepCallback
from .token_choice import choose_tokens, probability_of, scale_logits

# Times of the chances lie in (eps, 1 - eps), as in training.
_EPS = 1e-4
_TINY = 1e-300
_CLEAN = Marginals(1.0, 0.0, 0.0, 0.0, 0.0, 0.0)
# Tokens are corrected at nearly no temperature, until so many passes have brought nothing.
_CORRECTION_TEMPERATURE = 0.1
_PATIENCE = 32


@torch.no_grad()
def sample_noise(
    denoiser: Denoiser | WindowedDenoiser,
    x_BS: Tensor,
    noise: Interpolation,
    decoding: Decoding,
    *,
    mask_token_id: int,
    vocab_size: int,
    guidance_tokens_BS: Tensor | None = None,
    seeds: Sequence[int] | None = None,
    callback: StepCallback | None = None,
    tells_log_snr: bool = False,
) -> Tensor:
    """Generates a token for every mask token of every sequence; all other tokens stay.

    Args:
        denoiser: Maps tokens to logits of the clean token given all other positions.
        x_BS: Tokens [B, S], int64; any pattern of mask tokens.
        noise: That of training.
        decoding: Order, steps, choice of tokens; what is left open is decided by `resolve_noise`.
        mask_token_id: Id of the mask token; none is left at the end.
        vocab_size: Number of real tokens, V.
        guidance_tokens_BS: int64 [B, S], what the other pass of guidance sees at the positions
            that are not generated; not needed without guidance.
        seeds: One seed per sequence, within 64 bits; None: those of `decoding.seed`.
        callback: Called after every step.
        tells_log_snr: Tell the denoiser, a `WindowedDenoiser`, the log-SNR of each sequence at the
            time of its step; in self-correction at that of its last step.

    Returns:
        Tokens without masks [B, S], a new tensor.

    Raises:
        ValueError: The arguments do not fit each other.

    Source:
        arXiv 2503.04482, sections 4 and 5 (ancestral steps, self-correction).
    """
    decoding = decoding.resolve_noise(has_masks=noise.at(0.5).mask > 0)
    state = NoiseState(
        x_BS,
        noise,
        decoding,
        mask_token_id,
        vocab_size,
        guidance_tokens_BS,
        seeds,
        tells_log_snr=tells_log_snr,
    )
    step, correction = 0, Correction(state, decoding.correction_steps or 0)
    while state.is_unfinished(step) or correction.is_unfinished():
        if state.is_unfinished(step):
            state.take_step(denoiser, step)
        else:
            correction.take_step(denoiser)
        if callback is not None:
            callback(SamplingStep(step, state.x_BS.clone(), state.probability_BS.clone()))
        step += 1
    correction.restore_best()
    return state.end_sequences(decoding.end_token_id)


class _Chances(NamedTuple):
    """`Marginals` of T positions, float64 [T]."""

    clean_T: Tensor
    uniform_T: Tensor
    mask_T: Tensor


class NoiseState:
    """A batch that is being sampled; see `sample_noise` for the arguments.

    Attributes:
        x_BS: int64 [B, S], the tokens so far.
        probability_BS: float32 [B, S], what the model gave each token that stands there when it
            was put there; NaN at masks, at random tokens of the start, and where nothing is
            generated.
        generated_BS: Bool [B, S], where tokens are generated.
        generators: Stream of random numbers of each sequence.
        most_steps: Of the sequence that takes most.
    """

    def __init__(
        self,
        x_BS: Tensor,
        noise: Interpolation,
        decoding: Decoding,
        mask_token_id: int,
        vocab_size: int,
        guidance_tokens_BS: Tensor | None,
        seeds: Sequence[int] | None,
        *,
        tells_log_snr: bool = False,
    ) -> None:
        check_tokens(x_BS)
        self._noise, self._decoding = noise, decoding
        self._tells_log_snr = tells_log_snr
        self._mask_token_id, self._vocab_size = mask_token_id, vocab_size
        self._num_tokens = vocab_size - (mask_token_id < vocab_size)
        self._logits = LogitSource(x_BS, decoding, mask_token_id, vocab_size, guidance_tokens_BS)
        self.generators = make_generators(seeds, decoding, x_BS)
        self.generated_BS = x_BS == mask_token_id
        self.x_BS = x_BS.clone()
        self.probability_BS = torch.full(x_BS.shape, torch.nan, device=x_BS.device)
        self._num_generated = self.generated_BS.sum(1).tolist()
        self._num_steps = [decoding.num_steps or count for count in self._num_generated]
        self.most_steps = max(self._num_steps, default=0)
        # Under the order "adaptive": what has not been drawn yet.
        self._waiting_BS = self.generated_BS.clone()
        prior = self._list_chances(self.generated_BS, 0)
        uniforms_T = prior.clean_T + (1 - prior.clean_T) * self._draw(self.generated_BS)
        self.x_BS[self.generated_BS] = self._replace(uniforms_T, prior)

    def is_unfinished(self, step: int) -> bool:
        """Has a sequence steps left, after so many?"""
        pairs = zip(self._num_steps, self._num_generated, strict=True)
        return any(count and step < steps for steps, count in pairs)

    def take_step(self, denoiser: Denoiser | WindowedDenoiser, step: int) -> None:
        """Takes a step of every sequence that has steps left."""
        is_active_B = torch.tensor(
            [step < steps for steps in self._num_steps], device=self.x_BS.device
        )
        needed_BS = self.generated_BS & is_active_B[:, None]
        if self._decoding.order == "adaptive":
            needed_BS = needed_BS & self._waiting_BS
        logits_TV = self.compute_logits(denoiser, needed_BS, step)
        counts = needed_BS.sum(1).tolist()
        tokens_T = choose_tokens(logits_TV, self._decoding, counts, self.generators)
        if self._decoding.order == "adaptive":
            self._replace_worst(needed_BS, logits_TV, tokens_T, step)
        else:
            self._step_back(needed_BS, logits_TV, tokens_T, step)

    def compute_logits(
        self, denoiser: Denoiser | WindowedDenoiser, needed_BS: Tensor, step: int
    ) -> Tensor:
        """Logits [T, V] of the needed positions, after so many steps."""
        log_snr_B = self._find_log_snr(step) if self._tells_log_snr else None
        window = Window(0, self.x_BS.shape[1], step, log_snr_B)
        return self._logits.compute(denoiser, self.x_BS, needed_BS, window)

    def put(self, where_BS: Tensor, tokens_T: Tensor, logits_TV: Tensor) -> None:
        """Puts tokens, perhaps mask tokens; those that are new there with their probabilities."""
        is_mask_T, is_old_T = tokens_T == self._mask_token_id, tokens_T == self.x_BS[where_BS]
        found_T = probability_of(logits_TV, tokens_T.masked_fill(is_mask_T, 0)).float()
        found_T = torch.where(is_old_T, self.probability_BS[where_BS], found_T)
        self.x_BS[where_BS] = tokens_T
        self.probability_BS[where_BS] = found_T.masked_fill(is_mask_T, torch.nan)

    def end_sequences(self, end_token_id: int | None) -> Tensor:
        """The tokens, where those behind the first end of text are that token too."""
        if end_token_id is None:
            return self.x_BS
        is_end_BS = self.generated_BS & (self.x_BS == end_token_id)
        is_after_BS = (is_end_BS.cumsum(1) - is_end_BS.long()) > 0
        return self.x_BS.masked_fill(self.generated_BS & is_after_BS, end_token_id)

    def _step_back(self, needed_BS: Tensor, logits_TV: Tensor, tokens_T: Tensor, step: int) -> None:
        """Keeps each token, or draws it anew: p(z_s | z_t) of the process."""
        z_T, is_mask_T = self.x_BS[needed_BS], self.x_BS[needed_BS] == self._mask_token_id
        here_T = self._find_probability(logits_TV, z_T)
        later, earlier = (self._list_chances(needed_BS, step + n) for n in (0, 1))
        before_T, now_T = (
            torch.where(is_mask_T, at.mask_T, at.clean_T * here_T + at.uniform_T)
            for at in (earlier, later)
        )
        keeps_T = later.clean_T / earlier.clean_T * before_T / now_T
        decides_T, becomes_T = self._draw(needed_BS), self._draw(needed_BS)
        noise_T = self._replace(becomes_T, earlier)
        drawn_T = torch.where(becomes_T < earlier.clean_T, tokens_T, noise_T)
        new_T = torch.where(decides_T < keeps_T, z_T, drawn_T)
        self.put(needed_BS, new_T, logits_TV)

    def _replace_worst(
        self, needed_BS: Tensor, logits_TV: Tensor, tokens_T: Tensor, step: int
    ) -> None:
        """Draws the positions whose tokens fall farthest behind the likeliest, each once."""
        probs_TV = logits_TV.softmax(-1)
        z_T = self.x_BS[needed_BS]
        is_mask_T = z_T == self._mask_token_id
        here_T = probs_TV.gather(-1, z_T.masked_fill(is_mask_T, 0)[:, None]).squeeze(-1)
        gap_T = probs_TV.amax(-1) - here_T.masked_fill(is_mask_T, 0.0)
        chosen_T = torch.zeros_like(z_T, dtype=torch.bool)
        for row, part in list_parts(needed_BS):
            steps, size = self._num_steps[row], self._num_generated[row]
            done, due = (count_unmasked_after(step + n, steps, size) for n in (0, 1))
            best = gap_T[part].argsort(descending=True, stable=True)[: due - done]
            chosen_T[part.start + best] = True
        chosen_BS = torch.zeros_like(needed_BS)
        chosen_BS[needed_BS] = chosen_T
        self._waiting_BS &= ~chosen_BS
        self.put(chosen_BS, tokens_T[chosen_T], logits_TV[chosen_T])

    def _find_probability(self, logits_TV: Tensor, z_T: Tensor) -> Tensor:
        """Probability of what stands there under what is drawn from, float64 [T]."""
        known_T = z_T.masked_fill(z_T == self._mask_token_id, 0)
        if not self._decoding.temperature:
            return (logits_TV.argmax(-1) == known_T).double()
        return probability_of(scale_logits(logits_TV, self._decoding).double(), known_T)

    def _list_chances(self, needed_BS: Tensor, step: int) -> _Chances:
        """What the noise does to each of the T positions after so many steps of its sequence."""
        at = {
            steps: self._noise.at(min(1 - step / steps, 1 - _EPS)) if step < steps else _CLEAN
            for steps in set(self._num_steps)
        }
        rows = [at[steps][:3] for steps in self._num_steps]
        counts_B = needed_BS.sum(1)
        table_B3 = torch.tensor(rows, dtype=torch.float64, device=needed_BS.device)
        return _Chances(*table_B3.repeat_interleave(counts_B, dim=0).unbind(1))

    def _find_log_snr(self, step: int) -> Tensor:
        """Of each sequence before its step of that number, or its last one; float32 [B]."""
        shares = [min(step, steps - 1) / steps if steps else 0.0 for steps in self._num_steps]
        found = [self._noise.at(min(1 - share, 1 - _EPS)).log_snr for share in shares]
        return torch.tensor(found, dtype=torch.float32, device=self.x_BS.device)

    def _replace(self, uniforms_T: Tensor, at: _Chances) -> Tensor:
        """Turns draws in [a, 1) into random tokens and masks, as they are at a time."""
        number_T = (uniforms_T - at.clean_T) / at.uniform_T.clamp(min=_TINY)
        token_T = number_T.clamp(0, self._num_tokens - 1).long()
        token_T += token_T >= self._mask_token_id
        is_token_T = uniforms_T < at.clean_T + self._num_tokens * at.uniform_T
        return torch.where(is_token_T, token_T, self._mask_token_id)

    def _draw(self, where_BS: Tensor) -> Tensor:
        """Uniform numbers, float64 [T], from each sequence's own stream."""
        counts = where_BS.sum(1).tolist()
        drawn_T = torch.empty(sum(counts), dtype=torch.float64, device=where_BS.device)
        for part, generator in zip(torch.split(drawn_T, counts), self.generators, strict=True):
            if len(part):
                part.uniform_(generator=generator)
        return drawn_T


class Correction:
    """Improves finished sequences: one position a pass, as long as it helps.

    A pass draws a token for every position at a low temperature, and puts the surest one that
    differs. How often the likeliest token stands where it should is the measure; the best state
    that was seen is kept.

    Args:
        state: With all steps taken.
        num_passes: Most passes.
    """

    def __init__(self, state: NoiseState, num_passes: int) -> None:
        self._state, self._left = state, num_passes
        self._best: dict[int, tuple[float, Tensor, Tensor]] = {}
        self._since: dict[int, int] = {}
        self._cold = Decoding(temperature=_CORRECTION_TEMPERATURE)
        self._active_B = state.generated_BS.any(1)

    def is_unfinished(self) -> bool:
        """Is there a sequence left to improve, and a pass for it?"""
        return self._left > 0 and bool(self._active_B.any())

    def take_step(self, denoiser: Denoiser | WindowedDenoiser) -> None:
        """Takes one pass."""
        state = self._state
        needed_BS = state.generated_BS & self._active_B[:, None]
        logits_TV = state.compute_logits(denoiser, needed_BS, state.most_steps)
        z_T = state.x_BS[needed_BS]
        counts = needed_BS.sum(1).tolist()
        tokens_T = choose_tokens(logits_TV, self._cold, counts, state.generators)
        sure_T = probability_of(scale_logits(logits_TV, self._cold), tokens_T)
        sure_T = sure_T.masked_fill(tokens_T == z_T, -1.0)
        right_T = (logits_TV.argmax(-1) == z_T).double()
        chosen_T = torch.zeros_like(z_T, dtype=torch.bool)
        for row, part in list_parts(needed_BS):
            self._keep_best(row, float(right_T[part].mean()))
            best = int(sure_T[part].argmax())
            if sure_T[part][best] < 0 or self._since[row] >= _PATIENCE:
                self._active_B[row] = False
            else:
                chosen_T[part.start + best] = True
        chosen_BS = torch.zeros_like(needed_BS)
        chosen_BS[needed_BS] = chosen_T
        state.put(chosen_BS, tokens_T[chosen_T], logits_TV[chosen_T])
        self._left -= 1

    def restore_best(self) -> None:
        """Puts the best state of each sequence back."""
        for row, (_, x_S, probability_S) in self._best.items():
            self._state.x_BS[row], self._state.probability_BS[row] = x_S, probability_S

    def _keep_best(self, row: int, accuracy: float) -> None:
        self._since[row] = self._since.get(row, 0) + 1
        if row not in self._best or accuracy > self._best[row][0]:
            state = self._state
            self._best[row] = accuracy, state.x_BS[row].clone(), state.probability_BS[row].clone()
            self._since[row] = 0


def list_parts(where_BS: Tensor) -> list[tuple[int, slice]]:
    """Which of the T positions belong to which sequence, for those that have any."""
    parts, start = [], 0
    for row, count in enumerate(where_BS.sum(1).tolist()):
        if count:
            parts.append((row, slice(start, start + count)))
        start += count
    return parts
