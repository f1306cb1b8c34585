"""What a run costs: parameters, FLOPs and optimizer steps, all in closed form.

Symbols: d hidden size, L layers, a = heads * head width, k = groups * head width, f inner width of
the feed-forward block, V vocabulary, S sequence length, B global batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from megatron_mdm.config import Config, ModelConfig, ModelSize, ParameterConvention, find_convention
from megatron_mdm.core.errors import ConfigError
from megatron_mdm.diffusion.objectives import build_objective
from megatron_mdm.model.parameter import Parameter
from megatron_mdm.model.parameters import list_parameters


@dataclass(frozen=True)
class ParameterCount:
    """Trainable numbers of a model.

    Attributes:
        non_embedding: Transformer layers and final norm.
        embedding: Input embedding: the vocabulary's rows, V or `model.padded_vocab_size`, and one
            for the mask token unless it is one of these; the embedding of the noise level.
        head: Output head: the vocabulary's rows; 0 when it shares the embedding's weights.
        padding: Rows added to embedding and head so that they divide over ranks; never trained.
    """

    non_embedding: int
    embedding: int
    head: int
    padding: int

    @property
    def total(self) -> int:
        """Parameters that matter: all but the padding."""
        return self.non_embedding + self.embedding + self.head

    @property
    def padded_total(self) -> int:
        """Parameters that are allocated."""
        return self.total + self.padding


def count_parameters(model: ModelConfig) -> ParameterCount:
    """Counts the parameters of a model.

    Args:
        model: Shape of the transformer.

    Returns:
        The count by part. For as many groups as heads of width d / heads, without biases and norms
        of heads, `non_embedding` = L (4 d^2 + 3 d f + 2 d) + d.

    Source:
        arXiv 2410.18514, appendix; 169,897,728 for smdm-170M.
    """
    rows = list_parameters(model)
    sizes = {row.name: row.size(model) * _count_copies(row, model) for row in rows}
    kept = {
        row.stage: row.count_unpadded_rows(model) * model.hidden_size
        for row in rows
        if row.vocabulary is not None
    }
    padded = sum(sizes[row.name] for row in rows if row.vocabulary is not None)
    others = sum(
        sizes[row.name] for row in rows if row.role == "embedding" and row.vocabulary is None
    )
    return ParameterCount(
        non_embedding=sum(sizes.values()) - padded - others,
        embedding=kept["first"] + others,
        head=kept.get("last", 0),
        padding=padded - sum(kept.values()),
    )


def count_state_elements(config: Config) -> int:
    """Counts the numbers that the optimizer keeps in the shapes of parameters, in all."""
    return sum(
        len(config.optimizer.list_state_names(row.role))
        * row.size(config.model)
        * _count_copies(row, config.model)
        for row in list_parameters(config.model)
    )


def _count_copies(row: Parameter, model: ModelConfig) -> int:
    return model.num_layers if row.stage == "layers" else 1


def model_size(model: ModelConfig) -> ModelSize:
    """N of a model as scaling laws count it, in both conventions.

    Args:
        model: Shape of the transformer.

    Returns:
        Without embeddings: layers and final norm, `count_parameters`. With embeddings: as the
        scripts of the data-constrained family count, L (2 d (a + k) + 3 d f + 6 d) + V d, twice
        V d for an untied head. They give each layer 6 d beside its matrices where two norms have
        2 d, and leave out the final norm and the row of the mask token: for dc-* 0.01% to 0.04%
        more than is trained. What a budget buys depends on it: 25,722 steps of 256 windows of
        2,048 tokens for dc-117M at 1e19 FLOPs, 76,253 for dc-425M at 1e20.

    Source:
        arXiv 2507.15857, public code; arXiv 2410.18514, appendix.
    """
    d = model.hidden_size
    layers = model.num_layers * (layer_matmul_parameters(model) + 6 * d)
    matrices = 1 if model.tie_embeddings else 2
    return ModelSize(
        with_embeddings=layers + matrices * model.vocab_size * d,
        without_embeddings=count_parameters(model).non_embedding,
    )


def choose_flops_convention(config: Config) -> ParameterConvention:
    """Which N a run's `schedule.flops` counts.

    Args:
        config: The run.

    Returns:
        `schedule.flops_parameters`, or what the family of its preset counts.
    """
    return config.schedule.flops_parameters or find_convention(config.model.preset)


def six_nd_flops(model: ModelConfig, num_tokens: float, *, with_embeddings: bool = False) -> float:
    """Training compute by the rule of scaling laws, C = 6 N D.

    Args:
        model: Its parameters are N.
        num_tokens: Training tokens, D.
        with_embeddings: Count what embedding and head hold too, with the row of the mask token.

    Returns:
        FLOPs.

    Source:
        arXiv 2001.08361, section 2.1.
    """
    counts = count_parameters(model)
    return 6.0 * (counts.total if with_embeddings else counts.non_embedding) * num_tokens


def recomputed_flops_per_token(
    model: ModelConfig, seq_length: int, *, causal: float, recompute: str
) -> float:
    """FLOPs of matrix products that the backward pass recomputes, on top of the training FLOPs.

    Args:
        model: Shape of the transformer.
        seq_length: Tokens of a window, S.
        causal: Share of samples whose tokens attend to those before them only; True: all.
        recompute: `parallel.recompute`. full: the forward pass of every layer, a third of its
            FLOPs; none and selective: no matrix product.

    Returns:
        FLOPs per token of a full window.
    """
    if recompute != "full":
        return 0.0
    return model.num_layers * layer_flops_per_token(model, seq_length, causal=causal) / 3


def training_flops_per_token(
    model: ModelConfig, seq_length: int, *, causal: float, head_share: float
) -> float:
    """FLOPs of all matrix products, forward and backward, per token of a full window.

    A product costs 2 FLOPs per multiply-add, and its backward pass twice its forward pass, so:

    - linear layers: 6 L (2 d a + 2 d k + 3 d f), with relu2 2 d f;
    - attention scores and values: 12 L S a, half of it when causal, and 12 L a of a sink;
    - head: 6 d rows share, over the padded rows that are really multiplied.

    Norms, biases, activations, rotary embeddings and the embedding look-up are not counted.

    Args:
        model: Shape of the transformer.
        seq_length: Tokens of a window, S.
        causal: Share of samples whose tokens attend to those before them only; True: all.
        head_share: Share of positions whose logits are computed, in [0, 1]; see
            `Objective.predicted_share`.

    Returns:
        FLOPs per token.
    """
    layers = model.num_layers * layer_flops_per_token(model, seq_length, causal=causal)
    return layers + 6 * model.hidden_size * model.head_rows * head_share


def run_flops_per_token(config: Config, head_share: float | None = None) -> float:
    """FLOPs per token of a full window, forward and backward, of what a run's objective computes.

    Args:
        config: A checked configuration.
        head_share: Share of positions whose logits are computed; None: what the objective predicts.

    Returns:
        As `training_flops_per_token`.
    """
    objective, seq_length = build_objective(config), config.data.seq_length
    share = objective.predicted_share(seq_length) if head_share is None else head_share
    causal = objective.causal_share
    return training_flops_per_token(config.model, seq_length, causal=causal, head_share=share)


def layer_flops_per_token(model: ModelConfig, seq_length: int, *, causal: float) -> float:
    """FLOPs of one layer's matrix products, forward and backward; a third of them is forward.

    Args:
        model: Shape of the transformer.
        seq_length: Tokens of a window, S.
        causal: Share of samples whose tokens attend to those before them only; True: all.

    Returns:
        FLOPs per token of a full window: 6 (2 d a + 2 d k + 3 d f) + 12 S a, the last term halved
        when causal; with relu2 2 d f in place of 3 d f, with a sink 12 a besides.
    """
    width = model.num_attention_heads * model.head_width
    num_keys = seq_length * (1.0 - 0.5 * causal) + model.attention_sink
    attention = 12 * num_keys * width
    return 6 * layer_matmul_parameters(model) + attention


def count_steps(config: Config, num_windows: int, stated_samples: Fraction | None = None) -> int:
    """Optimizer steps of a run, from whichever length `schedule` gives.

    Args:
        config: A checked configuration.
        num_windows: Windows of all sources together.
        stated_samples: Samples that follow from the epochs of the sources, where `schedule` leaves
            the length to them.

    Returns:
        steps: as given. tokens: the fewest steps whose expected tokens, at the objective's mean
        length of a sample, reach it. epochs: the fewest steps that show epochs * num_windows
        samples, taking the decimal fraction at its word; so too for `stated_samples`. flops:
        C / (6 N B M) with M the mean length and N counted as `choose_flops_convention` says,
        rounded down, so that the budget is not exceeded.

    Raises:
        ConfigError: The FLOP budget does not pay for one step.

    Source:
        arXiv 2410.18514, public code: 18,710 steps for smdm-170M at 1e19. arXiv 2507.15857, public
        code: 25,722 steps for dc-117M at 1e19.
    """
    schedule, batch_size = config.schedule, config.batch.global_batch_size
    if schedule.steps is not None:
        return schedule.steps
    tokens_per_step = batch_size * build_objective(config).mean_length(config.data.seq_length)
    if schedule.tokens is not None:
        return math.ceil(schedule.tokens / Fraction(tokens_per_step))
    if schedule.epochs is not None:
        # Fraction of the text: 0.1 of 30 windows is 3 samples, not one more by a rounding error.
        return math.ceil(Fraction(str(schedule.epochs)) * num_windows / batch_size)
    if schedule.flops is None:
        if stated_samples is None:
            raise ValueError("a run without a length in schedule needs its sources' samples")
        return math.ceil(stated_samples / batch_size)
    budget = schedule.flops
    counted = choose_flops_convention(config)
    flops_per_step = 6.0 * model_size(config.model).count_in(counted) * tokens_per_step
    steps = int(budget / flops_per_step)
    if steps < 1:
        raise ConfigError(
            f"schedule.flops={budget:.3g} does not pay for one step of "
            f"batch.global_batch_size={batch_size}, which takes {flops_per_step:.3g} FLOPs: raise "
            "the budget or choose a smaller model or batch."
        )
    return steps


def layer_matmul_parameters(model: ModelConfig) -> int:
    """Parameters of a layer's matrices: query, key, value and output, and the feed-forward block's.

    Args:
        model: Shape of the transformer.

    Returns:
        2 d (a + k) + 3 d f; with relu2 2 d f in place of 3 d f.
    """
    rows = (row for row in list_parameters(model) if row.stage == "layers")
    return sum(row.size(model) for row in rows if row.role == "hidden")
