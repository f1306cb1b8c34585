"""What ranks find out about attention that stops at the ends of documents."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from cases import Overrides, Stage, batches_of, engine_of, stage_of
from numpy.typing import NDArray
from torch import Tensor

from megatron_mdm.diffusion.objectives import build_objective
from megatron_mdm.diffusion.samples import SEGMENT_IDS
from megatron_mdm.distributed.mesh import seed_dropout
from megatron_mdm.model.attention import AttentionInputs
from megatron_mdm.model.attention_mask import build_attention_mask

# Documents of each of two sequences, in tokens.
LENGTHS = ((5, 1, 7, 3), (2, 9, 4, 1))


def packed(stage: Stage) -> tuple[Tensor, Tensor]:
    """Two windows of documents that have no token in common.

    Args:
        stage: A stage with at least 61 tokens and windows of 16.

    Returns:
        Tokens int64 [2, 16], and the documents' numbers int32 [2, 16].
    """
    documents_BS = torch.stack(
        [torch.repeat_interleave(torch.arange(4), torch.tensor(lengths)) for lengths in LENGTHS]
    )
    generator = torch.Generator().manual_seed(3)
    tokens_BS = torch.randint(0, 15, documents_BS.shape, generator=generator) + 15 * documents_BS
    return tokens_BS, documents_BS.int()


@torch.no_grad()
def packed_and_alone(overrides: Overrides) -> list[dict[str, NDArray[np.float32]]]:
    """Logits of each document inside its window, and as a sequence of its own.

    Args:
        overrides: As for `config_of`.

    Returns:
        For each document logits [tokens, V]: packed, alone, and packed without boundaries.
    """
    results = []
    with stage_of(overrides) as stage:
        tokens_BS, documents_BS = packed(stage)
        packed_BSV = stage.model(tokens_BS, model_inputs={SEGMENT_IDS: documents_BS})
        window_BSV = stage.model(tokens_BS)
        for sequence, lengths in enumerate(LENGTHS):
            for number in range(len(lengths)):
                here_S = documents_BS[sequence] == number
                alone_LV = stage.model(tokens_BS[sequence, here_S].unsqueeze(0))[0]
                logits = {
                    "packed": packed_BSV[sequence, here_S],
                    "alone": alone_LV,
                    "window": window_BSV[sequence, here_S],
                }
                results.append({name: values.numpy() for name, values in logits.items()})
    return results


@torch.no_grad()
def changed_tokens(
    overrides: Overrides, lengths: list[int] | None, lookahead: int | None = None
) -> dict[str, NDArray[Any]]:
    """Logits before and after each token in turn is changed.

    Args:
        overrides: As for `config_of`.
        lengths: Tokens of each sequence that count; None: all.
        lookahead: Tokens after itself that a token may see; None: all.

    Returns:
        The documents int32 [B, S], and whether the logits at a position changed with a token,
        bool [B, token, position].
    """
    with stage_of(overrides) as stage:
        tokens_BS, documents_BS = packed(stage)
        limits = {
            "lengths_B": None if lengths is None else torch.tensor(lengths),
            "model_inputs": {
                SEGMENT_IDS: documents_BS,
                **({} if lookahead is None else {"attention_reach": torch.tensor(lookahead)}),
            },
        }
        before_BSV = stage.model(tokens_BS, **limits)
        changed = []
        for position in range(tokens_BS.shape[1]):
            other_BS = tokens_BS.clone()
            other_BS[:, position] = 60
            after_BSV = stage.model(other_BS, **limits)
            changed.append((after_BSV != before_BSV).any(-1))
        return {"documents": documents_BS.numpy(), "changed": torch.stack(changed, 1).numpy()}


def embedding_gradients(overrides: Overrides) -> list[dict[str, NDArray[Any]]]:
    """Gradients of the embedding when one document of a window alone is predicted.

    Args:
        overrides: As for `config_of`; the embedding must be untied.

    Returns:
        For each document the tokens of that document and those of the others in its window, and
        the gradient [rows, H].
    """
    results = []
    with stage_of(overrides) as stage:
        tokens_BS, documents_BS = packed(stage)
        for sequence in range(2):
            tokens_1S, documents_1S = tokens_BS[[sequence]], documents_BS[[sequence]]
            for number in range(4):
                stage.model.zero_grad()
                here_1S = documents_1S == number
                losses_1 = stage.model(
                    tokens_1S,
                    targets_BS=tokens_1S.roll(-1, 1),
                    weights_BS=here_1S.float(),
                    model_inputs={SEGMENT_IDS: documents_1S},
                )
                losses_1.sum().backward()
                gradient = stage.model.embedding.word_embeddings.weight.grad
                results.append(
                    {
                        "own": tokens_1S[here_1S].numpy(),
                        "others": tokens_1S[~here_1S].numpy(),
                        "gradient": gradient.numpy().copy(),
                    }
                )
    return results


def losses_of_model_and_engine(overrides: Overrides) -> dict[str, NDArray[np.floating]]:
    """Losses of a batch by the model alone, and by the engine with and without its documents.

    Args:
        overrides: As for `config_of`.

    Returns:
        Losses [B], nats per token.
    """
    with stage_of(overrides) as stage:
        batch = batches_of(stage.config, 0, 1).read_step(0)[0]
        names = ("inputs_BS", "targets_BS", "weights_BS", "lengths_B")
        more = {name: torch.from_numpy(array) for name, array in batch.model_inputs.items()}
        with torch.no_grad():
            model_B = stage.model(
                **{name: torch.from_numpy(getattr(batch, name)) for name in names},
                model_inputs=more,
            )
        with engine_of(stage) as engine:
            engine_B = engine.evaluate(batch)
            window_B = engine.evaluate(dataclasses.replace(batch, model_inputs={}))
        losses = {"model": model_B, "engine": engine_B, "window": window_B}
        return {name: losses_B.numpy() for name, losses_B in losses.items()}


@torch.no_grad()
def kept_weights(overrides: Overrides) -> dict[str, Any]:
    """What attention dropout leaves of equal weights on values of one.

    Args:
        overrides: As for `config_of`; two heads of width 8 a rank.

    Returns:
        Outputs [S, B, 16] of two draws of the same place, and whether the generator that ranks
        share is as before.
    """
    with stage_of(overrides) as stage:
        stage.model.train()
        tokens_BS, documents_BS = packed(stage)
        told = {SEGMENT_IDS: documents_BS}
        mask = stage.model._build_attention_mask(tokens_BS, None, stage.model._rule, told)
        inputs = AttentionInputs(mask, stage.model.get_rotation(16, tokens_BS.device))
        core = stage.model.decoder.layers[0].self_attention.core_attention
        query_SBND = torch.zeros(16, 2, 2, 8)
        outputs = []
        for _ in range(2):
            seed_dropout(stage.mesh, stage.config.run.seed, 0, 0)
            before = torch.get_rng_state()
            outputs.append(core(query_SBND, query_SBND, query_SBND + 1, inputs).numpy())
        return {"outputs": outputs, "untouched": torch.equal(before, torch.get_rng_state())}


@torch.no_grad()
def hidden_states_of_both_masks(overrides: Overrides) -> list[NDArray[np.float32]]:
    """What Megatron's block makes of segments and of a mask by blocks.

    Args:
        overrides: As for `config_of`.

    Returns:
        Hidden states [S, B, H] of the segments and of the mask by blocks.
    """
    with stage_of(overrides) as stage:
        tokens_BS, documents_BS = packed(stage)
        size = tokens_BS.shape[1]
        return [
            stage.model.decoder(
                hidden_states=stage.model.embedding(tokens_BS, None),
                attention_mask=AttentionInputs(
                    build_attention_mask(
                        2,
                        size,
                        torch.tensor([16, 6]),
                        build_objective(stage.config).attention,
                        {SEGMENT_IDS: documents_BS},
                        device=tokens_BS.device,
                        block_sparse=block_sparse,
                    ),
                    stage.model.get_rotation(size, tokens_BS.device),
                ),
            ).numpy()
            for block_sparse in (False, True)
        ]
