"""Backend (CUDA or CPU), process groups and the mesh of ranks."""
