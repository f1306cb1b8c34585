"""What DeepSpeed asks its `mpu` for, answered by Megatron's process groups."""

from __future__ import annotations

import torch.distributed as dist
from megatron.core import parallel_state


class MegatronMpu:
    """Adapter from `megatron.core.parallel_state` to DeepSpeed's model-parallel interface.

    DeepSpeed's "model parallel" is everything that is not data parallel: tensor ranks and pipeline
    stages together, over which it sums gradient norms.
    """

    def get_model_parallel_rank(self) -> int:
        """Place in the group of tensor ranks and stages of this replica."""
        return dist.get_rank(group=self.get_model_parallel_group())

    def get_model_parallel_world_size(self) -> int:
        """Size of the group of tensor ranks and stages of this replica."""
        return dist.get_world_size(group=self.get_model_parallel_group())

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """The group of tensor ranks and stages of this replica."""
        return parallel_state.get_model_parallel_group()

    def get_tensor_model_parallel_rank(self) -> int:
        """Place in the tensor-parallel group."""
        return parallel_state.get_tensor_model_parallel_rank()

    def get_tensor_model_parallel_world_size(self) -> int:
        """Size of the tensor-parallel group."""
        return parallel_state.get_tensor_model_parallel_world_size()

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup:
        """The tensor-parallel group."""
        return parallel_state.get_tensor_model_parallel_group()

    def get_pipeline_model_parallel_rank(self) -> int:
        """Pipeline stage."""
        return parallel_state.get_pipeline_model_parallel_rank()

    def get_pipeline_model_parallel_world_size(self) -> int:
        """Number of pipeline stages."""
        return parallel_state.get_pipeline_model_parallel_world_size()

    def get_pipeline_model_parallel_group(self) -> dist.ProcessGroup:
        """The group of stages of one tensor rank and replica."""
        return parallel_state.get_pipeline_model_parallel_group()

    def get_data_parallel_rank(self) -> int:
        """Replica."""
        return parallel_state.get_data_parallel_rank()

    def get_data_parallel_world_size(self) -> int:
        """Number of replicas."""
        return parallel_state.get_data_parallel_world_size()

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """The group of replicas of one tensor rank and stage."""
        return parallel_state.get_data_parallel_group()
