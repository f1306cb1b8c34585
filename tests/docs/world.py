"""A folder in which documented commands run as printed: the repository, with smaller runs."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import yaml
from documented import REPO, Block

LARGEST_SOURCE_BYTES = 12_000
LIMIT_SECONDS = 420


class World:
    """The folder.

    Args:
        root: An empty folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in ("tools", "pretrain", "tests", "docs"):
            (root / name).symlink_to(REPO / name)
        shutil.copytree(REPO / "configs", root / "configs")
        programs = root / ".venv/bin"
        programs.mkdir(parents=True)
        python = shlex.quote(sys.executable)
        for name, arguments in (
            ("mdm", f"{REPO}/megatron_mdm/__main__.py"),
            ("python", ""),
            ("torchrun", "-m torch.distributed.run"),
            ("deepspeed", str(Path(sys.executable).parent / "deepspeed")),
        ):
            script = programs / name
            script.write_text(f'#!/bin/sh\nexec {python} {arguments} "$@"\n')
            script.chmod(0o755)
        self.sources = root / "sources"
        self.sources.mkdir()
        for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
            if 0 < file.stat().st_size < LARGEST_SOURCE_BYTES:
                shutil.copy(file, self.sources)

    def shrink_config(self, name: str, **sections: dict) -> None:
        """Overrides fields of a recipe, section by section."""
        path = self.root / "configs" / name
        tree = yaml.safe_load(path.read_text())
        for section, fields in sections.items():
            tree[section] = {**tree.get(section, {}), **fields}
        path.write_text(yaml.safe_dump(tree, sort_keys=False))

    def run(self, text: str) -> str:
        """Runs commands in a shell, all of which have to succeed; returns what they print."""
        environment = {
            name: value
            for name, value in os.environ.items()
            if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
        }
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", text],
            cwd=self.root,
            env=environment | {"PYTHONWARNINGS": "ignore", "CUDA_VISIBLE_DEVICES": ""},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=LIMIT_SECONDS,
        )
        assert done.returncode == 0, f"{text}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout + done.stderr

    def run_blocks(self, blocks: list[Block], instead: dict[str, str]) -> list[str]:
        """Runs documented blocks in turn, with words replaced by cheaper ones, each at least once.

        Returns what each printed.
        """
        unused, printed = set(instead), []
        for block in blocks:
            text = block.text
            for word, other in instead.items():
                if word in text:
                    unused.discard(word)
                    text = text.replace(word, other)
            printed.append(self.run(text))
        assert not unused
        return printed
