"""What ranks do in test_time_embedding: a model with an embedding of the noise, looked into."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from cases import Overrides, batches_of, stage_of
from numpy.typing import NDArray

from megatron_mdm.checkpoint.restoring import load_weights
from megatron_mdm.checkpoint.storage import CheckpointReader, resolve_checkpoint
from megatron_mdm.diffusion.samples import LOG_SNR
from megatron_mdm.model.shards import name_shards

_SEED = 3


def look_into_a_pass(overrides: Overrides, step: float = 1.5e-3) -> dict[str, Any]:
    """A pass and its gradient, with an embedding that is not 0.

    Args:
        overrides: As for `cases.config_of`.
        step: Of the difference quotient, in a random direction of the embedding's weights.

    Returns:
        The weights and their gradient [H, F], the log-SNRs [B], what the embedding adds [B, H] and
        the gradient there [S, B, H], the slope of the loss by differences, and the direction.
    """
    with stage_of(overrides) as stage:
        embedding: Any = stage.model.time_embedding
        generator = torch.Generator().manual_seed(_SEED)
        weight_HF = embedding.weight
        weight_HF.data.copy_(0.05 * torch.randn(weight_HF.shape, generator=generator))
        direction_HF = torch.randn(weight_HF.shape, generator=generator)
        batch = batches_of(stage.config, 0, 1).read_step(0)[0]
        tensors = {
            name: torch.from_numpy(getattr(batch, name))
            for name in ("inputs_BS", "targets_BS", "weights_BS", "lengths_B")
        }
        inputs = {
            kind: {name: torch.from_numpy(one) for name, one in getattr(batch, kind).items()}
            for kind in ("model_inputs", "loss_inputs")
        }
        seen: dict[str, torch.Tensor] = {}

        def look(_: torch.nn.Module, given: tuple[Any, ...], made_SBH: torch.Tensor) -> None:
            made_SBH.retain_grad()
            seen["made"], seen["added"] = made_SBH, (made_SBH - given[0]).detach()

        hook = embedding.register_forward_hook(look)
        stage.model(**tensors, **inputs).sum().backward()
        hook.remove()
        losses = []
        with torch.no_grad():
            for sign in (1.0, -1.0):
                weight_HF += sign * step * direction_HF
                losses.append(stage.model(**tensors, **inputs).double().sum())
                weight_HF -= sign * step * direction_HF
        assert seen["made"].grad is not None
        return {
            "weight": weight_HF.detach().numpy(),
            "gradient": weight_HF.grad.numpy(),
            "log_snr": inputs["model_inputs"][LOG_SNR][:, 0].numpy(),
            "added": seen["added"].numpy(),
            "gradient_there": seen["made"].grad.numpy(),
            "slope": float(losses[0] - losses[1]) / (2 * step),
            "direction": direction_HF.numpy(),
        }


@torch.no_grad()
def held_out_losses(
    overrides: Overrides, folder: str, arrays: dict[str, NDArray[Any]]
) -> NDArray[np.float32]:
    """Held-out losses of samples, as a validation has them, of a checkpoint's model.

    Args:
        overrides: Of its run.
        folder: Where its checkpoints lie.
        arrays: `inputs`, `targets`, `weights` [B, S], `log_snr` [B, 1], `clean_chance` and
            `uniform_chance` [B, S].

    Returns:
        Weighted losses of each sample, float32 [B].
    """
    found = {name: torch.from_numpy(array) for name, array in arrays.items()}
    with stage_of(overrides) as stage:
        reader = CheckpointReader(resolve_checkpoint(Path(folder)))
        load_weights(reader, list(name_shards(stage.model, stage.mesh)))
        stage.model.eval()
        losses_B: torch.Tensor = stage.model(
            found["inputs"],
            found["targets"],
            found["weights"],
            model_inputs={LOG_SNR: found["log_snr"]},
            loss_inputs={name: found[name] for name in ("clean_chance", "uniform_chance")},
        )
        return losses_B.numpy()
