"""Logits of a model that is divided over ranks, for a sampler that runs on one of them.

One rank of the last pipeline stage is the driver, all others are workers. With each call the driver
sends the tokens to the workers, which compute their part of the forward pass and wait for the next
call. Only the driver chooses tokens, so ranks cannot disagree on one.

Shapes: B batch, S sequence, H hidden, V rows of the head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mdm.diffusion.samples import LOG_SNR
from megatron_mdm.distributed.mesh import Mesh
from megatron_mdm.model.transformer import DiffusionTransformer

# Sequences, their length, and whether each has a length of its own, and a log-SNR.
_NUM_HEADER_FIELDS = 4


class DistributedForward:
    """The forward pass over tensor-parallel ranks and pipeline stages.

    Args:
        model: This rank's stage, not interleaved, without sequence parallelism. It is put into
            evaluation mode.
        mesh: This rank's place, in a world with one replica of the model.
        dtype: Dtype of the forward pass, into which the stage is cast.
    """

    def __init__(self, model: DiffusionTransformer, mesh: Mesh, dtype: torch.dtype) -> None:
        self._model = model.to(dtype).eval()
        self._mesh = mesh
        self._dtype = dtype
        self._is_amid_pass = False
        # Tensor-parallel ranks are neighbours, so the last stage's are the last ones.
        self._driver = mesh.world_size - mesh.tp.size

    @property
    def is_driver(self) -> bool:
        """Does the sampler run on this rank? The workers have to call `serve`."""
        return self._mesh.rank == self._driver

    def compute_logits(
        self,
        tokens_BS: Tensor,
        lengths: Sequence[int] | None = None,
        log_snr_B: Tensor | None = None,
    ) -> Tensor:
        """Runs the model. Only on the driver, while the workers serve.

        Args:
            tokens_BS: int64 [B, S], B and S at least 1.
            lengths: Tokens of each sequence that may be attended to, from its start; None: all.
            log_snr_B: float32 [B], of the noise, where the model takes it.

        Returns:
            float [B, S, V]; -inf for the mask token and for padding rows. What stands at or
            beyond a sequence's length means nothing.
        """
        device = self._mesh.device
        self._is_amid_pass = True
        has_lengths = lengths is not None
        lengths_B = torch.tensor(lengths, device=device) if has_lengths else None
        self._send([*tokens_BS.shape, int(has_lengths), int(log_snr_B is not None)])
        for tensor in (tokens_BS, lengths_B, log_snr_B):
            if tensor is not None:
                self._broadcast(tensor.contiguous())
        logits_BSV = self._forward(tokens_BS, lengths_B, log_snr_B)
        self._is_amid_pass = False
        return logits_BSV

    def serve(self) -> None:
        """Computes a worker's part of every call, until the driver stops."""
        device = self._mesh.device
        while True:
            header = torch.empty(_NUM_HEADER_FIELDS, dtype=torch.int64, device=device)
            self._broadcast(header)
            num_sequences, length, has_lengths, has_log_snr = header.tolist()
            if num_sequences == 0:
                return
            tokens_BS = torch.empty((num_sequences, length), dtype=torch.int64, device=device)
            self._broadcast(tokens_BS)
            lengths_B = log_snr_B = None
            if has_lengths:
                lengths_B = torch.empty(num_sequences, dtype=torch.int64, device=device)
                self._broadcast(lengths_B)
            if has_log_snr:
                log_snr_B = torch.empty(num_sequences, dtype=torch.float32, device=device)
                self._broadcast(log_snr_B)
            self._forward(tokens_BS, lengths_B, log_snr_B)

    def stop(self) -> None:
        """Ends `serve` on the workers. Only on the driver.

        After an error in the middle of a forward pass the workers still wait for its tensors and
        would read this message as one: the launcher ends them with this rank.
        """
        if not self._is_amid_pass:
            self._send([0] * _NUM_HEADER_FIELDS)

    @torch.no_grad()
    def _forward(
        self, tokens_BS: Tensor, lengths_B: Tensor | None, log_snr_B: Tensor | None
    ) -> Tensor:
        mesh = self._mesh
        pp = mesh.pp
        if not pp.is_first:
            shape = (tokens_BS.shape[1], tokens_BS.shape[0], self._model.config.hidden_size)
            hidden_SBH = torch.empty(shape, dtype=self._dtype, device=mesh.device)
            dist.recv(hidden_SBH, mesh.find_stage_rank(pp.rank - 1), mesh.get_group("pp"))
            self._model.set_input_tensor(hidden_SBH)
        told = {} if log_snr_B is None else {LOG_SNR: log_snr_B[:, None]}
        output: Tensor = self._model(tokens_BS, lengths_B=lengths_B, model_inputs=told)
        if not pp.is_last:
            dist.send(output.contiguous(), mesh.find_stage_rank(pp.rank + 1), mesh.get_group("pp"))
        return output

    def _send(self, header: list[int]) -> None:
        self._broadcast(torch.tensor(header, dtype=torch.int64, device=self._mesh.device))

    def _broadcast(self, tensor: Tensor) -> None:
        if self._mesh.world_size > 1:
            dist.broadcast(tensor, self._driver)
