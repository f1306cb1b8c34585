"""AR and diffusion, each at its best, on the same tokens: mdm contest."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_mdm.cli.tree import run_door

if __name__ == "__main__":
    sys.exit(run_door("contest"))
