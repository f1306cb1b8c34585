"""The scaling lab: sweeps of runs, and plans for a budget."""
