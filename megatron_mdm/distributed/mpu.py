"""What DeepSpeed asks its `mpu` for, answered by the mesh."""

from __future__ import annotations

import torch.distributed as dist

from megatron_mdm.distributed.mesh import Mesh


class MegatronMpu:
    """Adapter from the mesh to DeepSpeed's model-parallel interface.

    DeepSpeed's "model parallel" is everything that is not data parallel: tensor ranks and pipeline
    stages together, over which it sums gradient norms.

    Args:
        mesh: This process's place.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh

    def get_model_parallel_rank(self) -> int:
        """Place in the group of tensor ranks and stages of this replica."""
        return dist.get_rank(self.get_model_parallel_group())

    def get_model_parallel_world_size(self) -> int:
        """Size of the group of tensor ranks and stages of this replica."""
        return self._mesh.tp.size * self._mesh.pp.size

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """The group of tensor ranks and stages of this replica."""
        return self._mesh.get_group("tp+pp")

    def get_tensor_model_parallel_rank(self) -> int:
        """Place in the tensor-parallel group."""
        return self._mesh.tp.rank

    def get_tensor_model_parallel_world_size(self) -> int:
        """Size of the tensor-parallel group."""
        return self._mesh.tp.size

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup:
        """The tensor-parallel group."""
        return self._mesh.get_group("tp")

    def get_pipeline_model_parallel_rank(self) -> int:
        """Pipeline stage."""
        return self._mesh.pp.rank

    def get_pipeline_model_parallel_world_size(self) -> int:
        """Number of pipeline stages."""
        return self._mesh.pp.size

    def get_pipeline_model_parallel_group(self) -> dist.ProcessGroup:
        """The group of stages of one tensor rank and replica."""
        return self._mesh.get_group("pp")

    def get_data_parallel_rank(self) -> int:
        """Replica."""
        return self._mesh.dp.rank

    def get_data_parallel_world_size(self) -> int:
        """Number of replicas."""
        return self._mesh.dp.size

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """The group of replicas of one tensor rank and stage."""
        return self._mesh.get_group("dp")
