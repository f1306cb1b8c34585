"""Selective and full recomputation: layers that keep less for their backward pass.

Shapes: S sequence, B batch, H hidden.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, Literal

import torch
from megatron.core.tensor_parallel import checkpoint, get_cuda_rng_tracker
from torch import Tensor, nn

from megatron_mdm.model.block import Block

Recompute = Literal["none", "selective", "full"]


class SelectiveRecomputeLayer(Block):
    """Selective recomputation: the outputs of the norms and of the activation are not kept.

    Matrix products would keep them as their inputs, for the gradients of their weights. Each
    follows from a tensor that is kept anyway, by a few operations without randomness, so autograd
    keeps a function that recomputes it instead.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._recomputes: list[tuple[Tensor, Callable[[], Tensor]]] = []
        for module in (self.input_layernorm, self.pre_mlp_layernorm, self.mlp.activation):
            module.register_forward_hook(self._remember)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the layer; arguments and results are Megatron's."""
        if not (self.training and torch.is_grad_enabled()):
            return super().forward(*args, **kwargs)
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack):
                return super().forward(*args, **kwargs)
        finally:
            self._recomputes.clear()

    def _remember(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if not (self.training and torch.is_grad_enabled()):
            return
        inputs = [tensor.detach() for tensor in args]

        def recompute() -> Tensor:
            # As a module, so that ZeRO-3 fetches its weights.
            with torch.no_grad():
                recomputed: Tensor = module(*inputs)
            return recomputed

        # The output is held until the layer ends: another tensor must not get its address.
        self._recomputes.append((output, recompute))

    def _pack(self, tensor: Tensor) -> Tensor | Callable[[], Tensor]:
        for output, recompute in self._recomputes:
            if tensor.data_ptr() == output.data_ptr() and tensor.shape == output.shape:
                return recompute
        return tensor


class FullRecomputeLayer(Block):
    """Full recomputation: the layer keeps its input alone, and runs again in the backward pass."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Any = None, **others: Any
    ) -> tuple[Tensor, None]:
        """Runs the layer.

        Args:
            hidden_states: float [S, B, H]; the names are Megatron's.
            attention_mask: What attention needs to know of positions. Megatron's own recomputation
                would save it, and then it has to be a tensor.
            **others: What Megatron passes besides, in training None each.

        Returns:
            float [S, B, H], and no context.
        """

        def run(hidden_SBH: Tensor) -> Tensor:
            with self._fork_dropout():
                output: Tensor = super(FullRecomputeLayer, self).forward(
                    hidden_SBH, attention_mask, **others
                )[0]
            return output

        if not (self.training and torch.is_grad_enabled()):
            return run(hidden_states), None
        with self._fork_dropout():
            return checkpoint(run, False, hidden_states), None

    def _fork_dropout(self) -> contextlib.AbstractContextManager[None]:
        # With sequence parallelism Megatron runs all layers inside one fork of the generator that
        # differs between ranks, and attention forks it once more. The backward pass runs outside of
        # Megatron's fork, where the generator stands elsewhere. A fork around the saving of the
        # generator's state and around both runs lets them draw the same dropout.
        if not self.config.sequence_parallel:
            return contextlib.nullcontext()
        fork: contextlib.AbstractContextManager[None] = get_cuda_rng_tracker().fork()
        return fork


LAYERS: dict[Recompute, type[Block]] = {
    "none": Block,
    "selective": SelectiveRecomputeLayer,
    "full": FullRecomputeLayer,
}


def _unpack(kept: Tensor | Callable[[], Tensor]) -> Tensor:
    return kept if isinstance(kept, Tensor) else kept()
