"""The scaling lab: sweeps of runs, plans for a budget, and where diffusion beats autoregression."""
