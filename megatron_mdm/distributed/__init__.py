"""Backend (CUDA or CPU), process groups and the topology of ranks."""
