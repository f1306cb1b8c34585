"""What the recipes of containers install can be found in a registry, in versions that fit."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]


def test_the_recipes_versions_are_found_and_fit(ask_registry):
    script = REPO / "tools/containers/install.sh"
    command = [str(script), sys.executable, "", "--dry-run", "--ignore-installed"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    installed = done.stdout.splitlines()[-1]
    assert installed.startswith("Would install ")
    (torch,) = re.findall(r"^torch(==.*)", (REPO / "requirements.txt").read_text(), re.MULTILINE)
    assert f"torch-{torch.removeprefix('==')}" in installed
    assert "megatron_mdm-" in installed
