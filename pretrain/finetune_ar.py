"""Fine-tunes with one objective: mdm finetune objective.kind=ar."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_mdm.cli.tree import main

if __name__ == "__main__":
    sys.exit(main(["finetune", *sys.argv[1:], "objective.kind=ar"]))
