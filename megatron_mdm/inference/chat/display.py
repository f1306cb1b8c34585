"""An answer on the terminal while it is written: masks, what is there, what is new."""

from __future__ import annotations

from itertools import groupby
from types import TracebackType

import torch
from rich.console import Console
from rich.live import Live
from rich.text import Text
from torch import Tensor

from megatron_mdm.diffusion.samplers import SamplingStep
from megatron_mdm.inference.replay.pieces import PieceReader

_BLOCK = "\u2591"
_STYLES = {"mask": "dim", "new": "bold cyan", "old": ""}


class LiveAnswer:
    """Shows every step of one sequence; a sampler's callback.

    Args:
        console: Where.
        pieces: How tokens are shown.
        num_given: Tokens of the prompt, which are not shown.
        mask_token_id: Shown as a block.
        end_token_id: Nothing from it on is shown; None: no token ends the answer.
    """

    def __init__(
        self,
        console: Console,
        pieces: PieceReader,
        num_given: int,
        mask_token_id: int,
        end_token_id: int | None,
    ) -> None:
        self._pieces, self._num_given = pieces, num_given
        self._mask_token_id, self._end_token_id = mask_token_id, end_token_id
        self._before_S = torch.empty(0, dtype=torch.int64)
        # Without a thread of its own, which an interrupt could leave behind.
        self._live = Live(console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> LiveAnswer:
        self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._live.stop()

    def __call__(self, step: SamplingStep) -> None:
        """Shows a step."""
        tokens_S = step.x_BS[0, self._num_given :].cpu()
        self._live.update(self.render(tokens_S), refresh=True)

    def render(self, tokens_S: Tensor) -> Text:
        """Writes a state of the answer.

        Args:
            tokens_S: int64 [S], the tokens after the prompt; those of an autoregressive model so
                far.

        Returns:
            Its text in styles; what differs from the state before is new.
        """
        before = self._before_S.tolist()
        self._before_S = tokens_S
        tokens = tokens_S.tolist()
        if self._end_token_id in tokens:
            tokens = tokens[: tokens.index(self._end_token_id)]
        told = []
        for place, token in enumerate(tokens):
            if token == self._mask_token_id:
                told.append(("mask", _BLOCK.encode()))
                continue
            piece = self._pieces.read_piece(token)
            is_old = place < len(before) and before[place] == token
            told.append(("old" if is_old else "new", piece.raw or piece.text.encode()))
        text = Text()
        for name, group in groupby(told, key=lambda one: one[0]):
            # The bytes of neighbours may make whole characters.
            content = b"".join(raw for _, raw in group).decode("utf-8", "replace")
            text.append(content, style=_STYLES[name])
        return text
