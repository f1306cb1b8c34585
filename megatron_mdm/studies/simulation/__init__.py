"""A thousand ranks in one process: what a layout sends and holds, and whether it ends."""
