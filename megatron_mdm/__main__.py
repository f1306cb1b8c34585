"""`python -m megatron_mdm` is `mdm`."""

import sys
from pathlib import Path

if not __package__:
    # Started by its path, from a clone that is not installed.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from megatron_mdm.cli.tree import main

if __name__ == "__main__":
    sys.exit(main())
