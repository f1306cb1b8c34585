"""Training of masked-diffusion language models on Megatron-Core and DeepSpeed."""

__version__ = "0.1.0"
