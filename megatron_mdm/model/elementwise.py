"""Norm, rotary embedding and activations: what a layer does between its matrix products.

These operations cost memory traffic, not arithmetic: on a CPU a third of a step if each writes a
tensor of its own. The functions here save only their inputs for the backward pass and write each
result once, in place where possible. Compiled, each is one kernel.

Shapes: S sequence, B batch, N heads, D head width, H hidden, F inner width of the feed-forward
block.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_mdm.model.compilation import compile_function

try:
    # NVIDIA's apex, built from source; the PyPI package of that name has no such module.
    from apex.normalization.fused_layer_norm import fused_rms_norm_affine
except ImportError:
    fused_rms_norm_affine = None


class Rotation(NamedTuple):
    """Rotary embedding of every token.

    Attributes:
        cos_SD: float32 [S, D / 2]; [B, 1, S, D / 2] where sequences differ.
        sin_SD: As `cos_SD`.
    """

    cos_SD: Tensor
    sin_SD: Tensor

    @classmethod
    def build(cls, seq_length: int, width: int, base: float, device: torch.device) -> Rotation:
        """Angles p * base^(-2 i / D) of positions p and pairs i.

        Args:
            seq_length: Positions, S.
            width: Head width, D, even.
            base: Base of the angles; nearly the wave length of the slowest pair over 2 pi.
            device: Where the tables live.

        Returns:
            The tables. Pair i is made of components i and i + D / 2.

        Source:
            Su et al. 2021, "RoFormer", section 3.4.2; pairs as in the code of
            arXiv 2302.13971.
        """
        exponents = torch.arange(0, width, 2, dtype=torch.float32, device=device) / width
        positions = torch.arange(seq_length, dtype=torch.float32, device=device)
        angles_SD = torch.outer(positions, base**-exponents)
        return cls(angles_SD.cos(), angles_SD.sin())

    def take_first(self, seq_length: int) -> Rotation:
        """The tables of the first positions.

        Args:
            seq_length: How many, S.

        Returns:
            Views of the tables.
        """
        return Rotation(self.cos_SD[:seq_length], self.sin_SD[:seq_length])

    def gather(self, position_ids_BS: Tensor) -> Rotation:
        """Gathers the tables of tokens whose positions are not their places in the sequence.

        Args:
            position_ids_BS: int64 [B, S], each token's position.

        Returns:
            Tables of every sequence.
        """
        return Rotation(*(table[position_ids_BS].unsqueeze(1) for table in self))


def rotate(x_SBND: Tensor, rotation: Rotation, *, compiled: bool = False) -> Tensor:
    """Turns queries or keys by their positions, and brings heads before positions.

    Args:
        x_SBND: float [S, B, N, D].
        rotation: Of those S tokens.
        compiled: By torch.compile.

    Returns:
        float [B, N, S, D] of the same dtype, contiguous; computed in float32.
    """
    cos_SD, sin_SD = rotation
    x_BNSD = x_SBND.permute(1, 2, 0, 3)
    if compiled:
        rotated: Tensor = _compile(_rotate_plainly)(x_BNSD, cos_SD, sin_SD)
        return rotated
    return _Rotate.apply(x_BNSD, cos_SD, sin_SD)


def swiglu(gate_and_value: Tensor, *, compiled: bool = False) -> Tensor:
    """silu(gate) * value.

    Args:
        gate_and_value: float [..., 2 F]: F columns of gates, then F of values.
        compiled: By torch.compile.

    Returns:
        float [..., F].

    Source:
        arXiv 2002.05202.
    """
    if compiled:
        product: Tensor = _compile(_swiglu)(gate_and_value)
        return product
    return _SwiGLU.apply(gate_and_value)


def squared_relu(inner: Tensor, *, compiled: bool = False) -> Tensor:
    """max(x, 0)^2.

    Args:
        inner: float [..., F].
        compiled: By torch.compile.

    Returns:
        float [..., F].

    Source:
        arXiv 2109.08668.
    """
    if compiled:
        squares: Tensor = _compile(_squared_relu)(inner)
        return squares
    return _SquaredReLU.apply(inner)


def rms_norm(hidden: Tensor, weight_H: Tensor, eps: float, *, compiled: bool = False) -> Tensor:
    """Root-mean-square norm of the last dimension: x / sqrt(mean(x^2) + eps) * weight.

    Args:
        hidden: float [..., H].
        weight_H: float [H].
        eps: Added to the mean square.
        compiled: By torch.compile; a GPU has a fused kernel for it without.

    Returns:
        The shape and dtype of `hidden`.

    Source:
        arXiv 1910.07467.
    """
    if hidden.is_cuda:
        if fused_rms_norm_affine is not None:
            return fused_rms_norm_affine(hidden, weight_H, weight_H.shape, eps)
        return F.rms_norm(hidden, weight_H.shape, weight_H, eps)
    if compiled:
        normed: Tensor = _compile(_rms_norm)(hidden, weight_H, eps)
        return normed
    if hidden.dtype in (torch.bfloat16, torch.float16):
        return F.rms_norm(hidden, weight_H.shape, weight_H, eps)
    return fused_rms_norm(hidden, weight_H, eps)


def fused_rms_norm(hidden: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """`rms_norm` in the dtype of its input, which is all that it saves, as a GPU's kernels do.

    Args:
        hidden: float [..., H].
        weight_H: float [H].
        eps: Added to the mean square.

    Returns:
        The shape and dtype of `hidden`.
    """
    normed: Tensor = _RMSNorm.apply(hidden, weight_H, eps, weight_H.shape[0], None)
    return normed


def split_rms_norm(
    part: Tensor,
    weight_H: Tensor,
    eps: float,
    *,
    width: int,
    sum_over_ranks: Callable[[Tensor], Tensor],
) -> Tensor:
    """`rms_norm` of rows that are divided over ranks.

    Args:
        part: float [..., H], this rank's columns.
        weight_H: float [H], theirs.
        eps: Added to the mean square.
        width: Columns on all ranks.
        sum_over_ranks: Sums a tensor over them, perhaps in place.

    Returns:
        The shape and dtype of `part`; computed in float32 or wider.
    """
    wide = torch.promote_types(part.dtype, torch.float32)
    normed: Tensor = _RMSNorm.apply(part.to(wide), weight_H.to(wide), eps, width, sum_over_ranks)
    return normed.to(part.dtype)


@functools.cache
def _compile(function: Callable[..., Tensor]) -> Callable[..., Any]:
    return compile_function(function)


def _rotate_plainly(x_BNSD: Tensor, cos_SD: Tensor, sin_SD: Tensor) -> Tensor:
    first, second = x_BNSD.float().chunk(2, dim=-1)
    halves = (first * cos_SD - second * sin_SD, second * cos_SD + first * sin_SD)
    return torch.cat(halves, dim=-1).to(x_BNSD.dtype).contiguous()


def _rms_norm(hidden: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    return F.rms_norm(hidden, weight_H.shape, weight_H, eps)


def _swiglu(gate_and_value: Tensor) -> Tensor:
    gate, value = gate_and_value.chunk(2, dim=-1)
    return F.silu(gate) * value


def _squared_relu(inner: Tensor) -> Tensor:
    return F.relu(inner).square()


class _Rotate(torch.autograd.Function):
    """Saves the tables alone: the backward pass rotates the gradient back."""

    @staticmethod
    def forward(ctx: Any, x_BNSD: Tensor, cos_SD: Tensor, sin_SD: Tensor) -> Tensor:
        ctx.save_for_backward(cos_SD, sin_SD)
        return _turn(x_BNSD, cos_SD, sin_SD, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos_SD, sin_SD = ctx.saved_tensors
        return _turn(grads[0], cos_SD, sin_SD, -1), None, None


def _turn(x_BNSD: Tensor, cos_SD: Tensor, sin_SD: Tensor, sign: int) -> Tensor:
    if x_BNSD.dtype not in (torch.float32, torch.float64):
        return _turn(x_BNSD.float(), cos_SD, sin_SD, sign).to(x_BNSD.dtype)
    out_BNSD = torch.empty_like(x_BNSD, memory_format=torch.contiguous_format)
    first, second = x_BNSD.chunk(2, dim=-1)
    out_first, out_second = out_BNSD.chunk(2, dim=-1)
    torch.mul(first, cos_SD, out=out_first)
    out_first.addcmul_(second, sin_SD, value=-sign)
    torch.mul(second, cos_SD, out=out_second)
    out_second.addcmul_(first, sin_SD, value=sign)
    return out_BNSD


class _SwiGLU(torch.autograd.Function):
    """Saves its input alone, and writes both gradients into one tensor for the matrix product."""

    @staticmethod
    def forward(ctx: Any, gate_and_value: Tensor) -> Tensor:
        ctx.save_for_backward(gate_and_value)
        gate, value = gate_and_value.chunk(2, dim=-1)
        return F.silu(gate).mul_(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (gate_and_value,) = ctx.saved_tensors
        gate, value = gate_and_value.chunk(2, dim=-1)
        grad = torch.empty_like(gate_and_value)
        grad_gate, grad_value = grad.chunk(2, dim=-1)
        buffer = F.silu(gate)
        torch.mul(grads[0], buffer, out=grad_value)
        torch.mul(grads[0], value, out=buffer)
        torch.ops.aten.silu_backward.grad_input(buffer, gate, grad_input=grad_gate)
        return grad


class _SquaredReLU(torch.autograd.Function):
    """Saves its input alone."""

    @staticmethod
    def forward(ctx: Any, inner: Tensor) -> Tensor:
        ctx.save_for_backward(inner)
        return F.relu(inner).square_()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (inner,) = ctx.saved_tensors
        return F.relu(inner).mul_(2).mul_(grads[0])


class _RMSNorm(torch.autograd.Function):
    """Saves its input and one number per row.

    With r = (mean(x^2) + eps)^(-1/2) and y = x r w, for a gradient g of y:
    dx = r (g w) - x r^3 / H sum(g w x), dw = sum over rows of g x r. Both sums are products of the
    matrix g x, with w and with r. Of divided rows the mean and the first sum are those of all
    ranks.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight_H: Tensor,
        eps: float,
        width: int,
        sum_over_ranks: Callable[[Tensor], Tensor] | None,
    ) -> Tensor:
        x_MH = hidden.reshape(-1, weight_H.shape[0])
        squares_M1 = torch.linalg.vector_norm(x_MH, dim=-1, keepdim=True).square_()
        if sum_over_ranks is not None:
            squares_M1 = sum_over_ranks(squares_M1)
        r_M1 = squares_M1.div_(width).add_(eps).rsqrt_()
        ctx.save_for_backward(hidden, weight_H, r_M1)
        ctx.width, ctx.sum_over_ranks = width, sum_over_ranks
        return (x_MH * r_M1).mul_(weight_H).view(hidden.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        hidden, weight_H, r_M1 = ctx.saved_tensors
        x_MH, grad_MH = (x.reshape(-1, weight_H.shape[0]) for x in (hidden, grads[0]))
        products_MH = grad_MH * x_MH
        grad_weight_H = r_M1.squeeze(1) @ products_MH
        sums_M1 = (products_MH @ weight_H).unsqueeze(1)
        if ctx.sum_over_ranks is not None:
            sums_M1 = ctx.sum_over_ranks(sums_M1)
        grad_x_MH = torch.mul(grad_MH, weight_H, out=products_MH).mul_(r_M1)
        sums_M1.mul_(r_M1**3).div_(ctx.width)
        grad_x_MH.addcmul_(x_MH, sums_M1, value=-1)
        return grad_x_MH.view(hidden.shape), grad_weight_H, None, None, None
