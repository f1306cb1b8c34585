"""Studies of many runs: costs, laws, sweeps, the papers' experiments, benchmarks."""
