"""Machines that a run may go to: what one GPU holds and computes, and how fast GPUs talk."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from megatron_mdm.core.errors import ConfigError
from megatron_mdm.model.memory import Dtype


@dataclass(frozen=True)
class Cluster:
    """Equal nodes of equal GPUs, and what the estimate assumes of them.

    Attributes:
        memory_bytes: Memory of a GPU.
        bf16_flops: Dense bf16 peak of a GPU, FLOP/s.
        fp32_flops: Float32 peak of a GPU outside its tensor cores, FLOP/s.
        gpus_per_node: GPUs with fast links to each other.
        node_bytes_per_second: What a GPU sends to others of its node, one direction.
        network_bytes_per_second: What a GPU sends to other nodes, one direction.
        latency_seconds: From the start of a message to its first byte. An assumption.
        efficiency: Share of the peak that a model's computation reaches. An assumption, not a
            measurement.
        overlap: Share of the communication that DeepSpeed starts beside computation which costs no
            time of its own. An assumption.
        memory_reserve: Share of a GPU's memory that a layout must leave free, for the CUDA context,
            communication buffers and what the allocator wastes. An assumption.
    """

    memory_bytes: float
    bf16_flops: float
    fp32_flops: float
    gpus_per_node: int
    node_bytes_per_second: float
    network_bytes_per_second: float
    latency_seconds: float = 10e-6
    efficiency: float = 0.55
    overlap: float = 0.5
    memory_reserve: float = 0.08

    def peak_flops(self, dtype: Dtype) -> float:
        """Peak of a GPU in a dtype of forward and backward, FLOP/s."""
        return self.bf16_flops if dtype == "bf16" else self.fp32_flops

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not value > 0 and not (value == 0 and field.name in _MAY_BE_ZERO):
                raise ConfigError(f"{field.name}={value:g} must be greater than 0: correct it.")
        for name in ("efficiency", "overlap", "memory_reserve"):
            if getattr(self, name) > 1:
                raise ConfigError(
                    f"{name}={getattr(self, name):g} is a share: give a number up to 1, such as "
                    f"{getattr(Cluster, name):g}."
                )


_MAY_BE_ZERO = ("latency_seconds", "overlap", "memory_reserve")

# Data sheets give bf16 with sparsity, of which a half is dense, and NVLink in both directions
# together. One network card of the DGX system stands for each GPU.
CLUSTERS: dict[str, Cluster] = {
    # NVIDIA A100 80GB SXM: 312 TFLOPS dense bf16, 19.5 fp32, NVLink 600 GB/s; DGX A100: eight GPUs,
    # eight ports of HDR InfiniBand at 200 Gbit/s.
    "a100": Cluster(80e9, 312e12, 19.5e12, 8, 300e9, 25e9),
    # NVIDIA H100 SXM: 1,979 TFLOPS bf16 with sparsity, 67 fp32, 80 GB, NVLink 900 GB/s; DGX H100:
    # eight GPUs, eight ports of NDR InfiniBand at 400 Gbit/s.
    "h100": Cluster(80e9, 989e12, 67e12, 8, 450e9, 50e9),
    # NVIDIA H200 SXM: the computation and links of H100 with 141 GB.
    "h200": Cluster(141e9, 989e12, 67e12, 8, 450e9, 50e9),
    # NVIDIA DGX B200: for eight GPUs 36 PFLOPS bf16 with sparsity, 600 TFLOPS fp32 and 1,440 GB;
    # NVLink 1.8 TB/s a GPU; eight ports at 400 Gbit/s.
    "b200": Cluster(180e9, 2250e12, 75e12, 8, 900e9, 50e9),
}


def cluster_of(name: str, **overrides: float | None) -> Cluster:
    """A preset with some of its numbers replaced.

    Args:
        name: A key of `CLUSTERS`.
        **overrides: Fields of `Cluster`; None leaves the preset's number.

    Returns:
        The cluster.

    Raises:
        ConfigError: There is no such preset, or a number is out of its range.
    """
    if name not in CLUSTERS:
        raise ConfigError(
            f"The cluster {name} is not known: use {', '.join(CLUSTERS)}, and options such as "
            "--memory-bytes for another machine."
        )
    given = {field: value for field, value in overrides.items() if value is not None}
    return replace(CLUSTERS[name], **given)  # type: ignore[arg-type]
