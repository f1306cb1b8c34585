"""Names and layouts of the parameters in training checkpoints and in exports, as a table.

Both directions read the same rows. All functions are pure and work on one tensor at a time.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_mdm.errors import ConversionError


@dataclass(frozen=True)
class Architecture:
    """The sizes that fix every parameter's shape, and what a config.json needs besides.

    Args:
        num_layers: Number of blocks.
        hidden_size: Width of the residual stream.
        num_attention_heads: Number of query heads, a multiple of `num_query_groups`.
        num_query_groups: Number of key and value heads.
        head_dim: Width of a head, even.
        ffn_hidden_size: Width of the SwiGLU layer.
        vocab_size: Number V of real tokens, ids 0..V-1.
        mask_token_id: Id of the mask token: V, or an id inside the vocabulary.
        tied: The first V rows of the embedding are the output layer.
        is_causal: An autoregressive baseline.
        max_position_embeddings: Sequence length of training, in tokens.
        rms_norm_eps: Epsilon of every RMSNorm.
        rotary_base: Base of the rotary position embedding.
        embedding_rows: Rows of the training embedding with padding, at least
            max(V, `mask_token_id` + 1).
        head_rows: Rows of the training output layer with padding, at least V.

    Raises:
        ConversionError: The sizes contradict each other.
    """

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    ffn_hidden_size: int
    vocab_size: int
    mask_token_id: int
    tied: bool
    is_causal: bool
    max_position_embeddings: int
    rms_norm_eps: float
    rotary_base: float
    embedding_rows: int
    head_rows: int

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_query_groups:
            raise ConversionError(
                f"num_query_groups={self.num_query_groups} does not divide "
                f"num_attention_heads={self.num_attention_heads}: correct the architecture."
            )
        if self.head_dim % 2:
            raise ConversionError(
                f"head_dim={self.head_dim} is odd, rotary positions need pairs: use an even one."
            )
        if self.embedding_rows < self.exported_embedding_rows:
            raise ConversionError(
                f"embedding_rows={self.embedding_rows} is less than the "
                f"{self.exported_embedding_rows} rows that vocab_size={self.vocab_size} and "
                f"mask_token_id={self.mask_token_id} need: add the mask token's row."
            )
        if not self.tied and self.head_rows < self.vocab_size:
            raise ConversionError(
                f"head_rows={self.head_rows} is less than vocab_size={self.vocab_size}: "
                "correct the architecture."
            )

    @property
    def exported_embedding_rows(self) -> int:
        """Rows of the embedding without padding: the real tokens and the mask token."""
        return max(self.vocab_size, self.mask_token_id + 1)


Split = Callable[[Tensor, Architecture], list[Tensor]]
Join = Callable[[list[Tensor], Architecture], Tensor]
Shape = Callable[[Architecture], tuple[int, ...]]


@dataclass(frozen=True)
class NameRow:
    """One row of the table.

    Args:
        training: Name in training checkpoints; `{i}` stands for the layer.
        hf: Names in exports, in the order in which `split` returns the tensors.
        shape: Shape of the training tensor.
        split: Training tensor to exported tensors.
        join: Exported tensors to training tensor.
    """

    training: str
    hf: tuple[str, ...]
    shape: Shape
    split: Split
    join: Join


def _keep(tensor: Tensor, arch: Architecture) -> list[Tensor]:
    return [tensor]


def _take(tensors: list[Tensor], arch: Architecture) -> Tensor:
    return tensors[0]


def _split_qkv(tensor: Tensor, arch: Architecture) -> list[Tensor]:
    per_group = arch.num_attention_heads // arch.num_query_groups
    grouped = tensor.unflatten(0, (arch.num_query_groups, per_group + 2, arch.head_dim))
    pieces = grouped.split([per_group, 1, 1], dim=1)
    return [piece.flatten(0, 2) for piece in pieces]


def _join_qkv(tensors: list[Tensor], arch: Architecture) -> Tensor:
    layout = (arch.num_query_groups, -1, arch.head_dim)
    return torch.cat([tensor.unflatten(0, layout) for tensor in tensors], dim=1).flatten(0, 2)


def _split_gate_up(tensor: Tensor, arch: Architecture) -> list[Tensor]:
    return list(tensor.chunk(2, dim=0))


def _join_gate_up(tensors: list[Tensor], arch: Architecture) -> Tensor:
    return torch.cat(tensors, dim=0)


def _crop_embedding(tensor: Tensor, arch: Architecture) -> list[Tensor]:
    return [tensor[: arch.exported_embedding_rows]]


def _crop_head(tensor: Tensor, arch: Architecture) -> list[Tensor]:
    return [tensor[: arch.vocab_size]]


def _pad_embedding(tensors: list[Tensor], arch: Architecture) -> Tensor:
    return _pad_rows(tensors[0], arch.embedding_rows)


def _pad_head(tensors: list[Tensor], arch: Architecture) -> Tensor:
    return _pad_rows(tensors[0], arch.head_rows)


def _pad_rows(tensor: Tensor, num_rows: int) -> Tensor:
    return torch.cat([tensor, tensor.new_zeros(num_rows - tensor.shape[0], tensor.shape[1])])


def _norm_shape(arch: Architecture) -> tuple[int, ...]:
    return (arch.hidden_size,)


def _qkv_shape(arch: Architecture) -> tuple[int, ...]:
    num_heads = arch.num_attention_heads + 2 * arch.num_query_groups
    return (num_heads * arch.head_dim, arch.hidden_size)


def _proj_shape(arch: Architecture) -> tuple[int, ...]:
    return (arch.hidden_size, arch.num_attention_heads * arch.head_dim)


def _layer(training: str, hf: tuple[str, ...], shape: Shape, split: Split, join: Join) -> NameRow:
    names = tuple(f"model.layers.{{i}}.{name}.weight" for name in hf)
    return NameRow(f"decoder.layers.{{i}}.{training}.weight", names, shape, split, join)


OUTPUT_LAYER = "output_layer.weight"

NAME_TABLE: tuple[NameRow, ...] = (
    NameRow(
        "embedding.word_embeddings.weight",
        ("model.embed_tokens.weight",),
        lambda arch: (arch.embedding_rows, arch.hidden_size),
        _crop_embedding,
        _pad_embedding,
    ),
    _layer("input_layernorm", ("input_layernorm",), _norm_shape, _keep, _take),
    _layer(
        "self_attention.linear_qkv",
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        _qkv_shape,
        _split_qkv,
        _join_qkv,
    ),
    _layer("self_attention.linear_proj", ("self_attn.o_proj",), _proj_shape, _keep, _take),
    _layer("pre_mlp_layernorm", ("post_attention_layernorm",), _norm_shape, _keep, _take),
    _layer(
        "mlp.linear_fc1",
        ("mlp.gate_proj", "mlp.up_proj"),
        lambda arch: (2 * arch.ffn_hidden_size, arch.hidden_size),
        _split_gate_up,
        _join_gate_up,
    ),
    _layer(
        "mlp.linear_fc2",
        ("mlp.down_proj",),
        lambda arch: (arch.hidden_size, arch.ffn_hidden_size),
        _keep,
        _take,
    ),
    NameRow("decoder.final_layernorm.weight", ("model.norm.weight",), _norm_shape, _keep, _take),
    NameRow(
        OUTPUT_LAYER,
        ("lm_head.weight",),
        lambda arch: (arch.head_rows, arch.hidden_size),
        _crop_head,
        _pad_head,
    ),
)

_ROWS = {row.training: row for row in NAME_TABLE}


def training_names(arch: Architecture) -> list[str]:
    """Lists the names of all training parameters in the table's order, layer by layer.

    Args:
        arch: The model's sizes; a tied model has no output layer.

    Returns:
        The names, each once.
    """
    per_layer = [row.training for row in NAME_TABLE if "{i}" in row.training]
    first, last = NAME_TABLE[0].training, [row.training for row in NAME_TABLE[-2:]]
    layers = [name.format(i=i) for i in range(arch.num_layers) for name in per_layer]
    return [name for name in [first, *layers, *last] if not (arch.tied and name == OUTPUT_LAYER)]


def training_shape(name: str, arch: Architecture) -> tuple[int, ...]:
    """Gives the shape of a training parameter, padding rows of the vocabulary included.

    Args:
        name: Name in a training checkpoint.
        arch: The model's sizes.

    Returns:
        The shape.

    Raises:
        ConversionError: The name is not in the table.
    """
    return _find_row(name, arch)[0].shape(arch)


def hf_shapes(name: str, arch: Architecture) -> list[tuple[str, tuple[int, ...]]]:
    """Gives the exported names and shapes of one training parameter.

    Args:
        name: Name in a training checkpoint.
        arch: The model's sizes.

    Returns:
        Pairs of exported name and shape.

    Raises:
        ConversionError: The name is not in the table.
    """
    empty = torch.empty(training_shape(name, arch), device="meta")
    return [(hf_name, tuple(tensor.shape)) for hf_name, tensor in to_hf(name, empty, arch)]


def to_hf(name: str, tensor: Tensor, arch: Architecture) -> list[tuple[str, Tensor]]:
    """Converts one training parameter to its exported tensors.

    Args:
        name: Name in a training checkpoint.
        tensor: The full, unsharded parameter in Megatron's layout, any dtype.
        arch: The model's sizes.

    Returns:
        Pairs of exported name and tensor; the tensors may be views of the input.

    Raises:
        ConversionError: The name is not in the table or the shape is not the architecture's.
    """
    row, layer = _find_row(name, arch)
    _check_shape(name, tensor, row.shape(arch))
    hf_names = [hf_name.format(i=layer) for hf_name in row.hf]
    return list(zip(hf_names, row.split(tensor, arch), strict=True))


def from_hf(name: str, load: Callable[[str], Tensor], arch: Architecture) -> Tensor:
    """Builds one training parameter from its exported tensors, the inverse of `to_hf`.

    Args:
        name: Name in a training checkpoint.
        load: Returns the tensor of an exported name.
        arch: The model's sizes.

    Returns:
        The full parameter in Megatron's layout; padding rows of the vocabulary are 0.

    Raises:
        ConversionError: The name is not in the table or a shape is not the architecture's.
    """
    tensors = []
    for hf_name, shape in hf_shapes(name, arch):
        tensor = load(hf_name)
        _check_shape(hf_name, tensor, shape)
        tensors.append(tensor)
    return _find_row(name, arch)[0].join(tensors, arch)


def _find_row(name: str, arch: Architecture) -> tuple[NameRow, int | None]:
    match = re.fullmatch(r"(decoder\.layers\.)(\d+)(\..+)", name)
    layer = int(match[2]) if match else None
    row = _ROWS.get(f"{match[1]}{{i}}{match[3]}" if match else name.replace("{", ""))
    too_deep = layer is not None and layer >= arch.num_layers
    if row is None or too_deep or (arch.tied and name == OUTPUT_LAYER):
        raise ConversionError(
            f"The parameter {name} is not one of this architecture ({arch.num_layers} layers, "
            f"tied={arch.tied}): convert it with the configuration it was trained with."
        )
    return row, layer


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ConversionError(
            f"The parameter {name} has the shape {tuple(tensor.shape)} where the architecture "
            f"says {shape}: convert it with the configuration it was trained with."
        )
