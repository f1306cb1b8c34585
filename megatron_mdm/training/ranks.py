"""Where each rank of a run stands: one small file per rank in `run.dir/ranks`."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_mdm.core.files import name_temporary

FOLDER_NAME = "ranks"


@dataclass(frozen=True)
class RankPlace:
    """What a rank last said of itself.

    Attributes:
        rank: Global rank.
        host: Its machine.
        pid: Its process there.
        step: Optimizer steps taken.
        place: What it is doing.
        since: When it began that, seconds since 1970.
        heard: When it wrote this, seconds since 1970.
    """

    rank: int
    host: str
    pid: int
    step: int
    place: str
    since: float
    heard: float


class RankBoard:
    """Writes this rank's place and reads those of all."""

    def __init__(self, run_dir: Path, rank: int, world_size: int) -> None:
        self.rank = rank
        self.world_size = world_size
        self._folder = run_dir / FOLDER_NAME
        self._host = socket.gethostname()

    def clean(self) -> None:
        """Removes what an earlier run left. Only for the first rank, before the others write."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def write(self, step: int, place: str, since: float) -> None:
        """Replaces this rank's file, without fsync: the file of a machine that fails is of no use.

        Args:
            step: Optimizer steps taken.
            place: What the rank is doing.
            since: When it began that, seconds since 1970.

        Raises:
            OSError: The folder cannot be written.
        """
        record = RankPlace(self.rank, self._host, os.getpid(), step, place, since, time.time())
        path = self._name_file(self.rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = name_temporary(path)
        temporary.write_text(json.dumps(asdict(record)) + "\n", encoding="utf-8")
        os.replace(temporary, path)

    def read(self) -> list[RankPlace | None]:
        """What each rank last said, None where there is no readable file."""
        places: list[RankPlace | None] = []
        for rank in range(self.world_size):
            try:
                text = self._name_file(rank).read_text(encoding="utf-8")
                places.append(RankPlace(**json.loads(text)))
            except (OSError, ValueError, TypeError):
                places.append(None)
        return places

    def find_dead_ranks(self) -> list[int]:
        """Ranks of this machine whose process has ended; those of others cannot be seen."""
        return [
            place.rank
            for place in self.read()
            if place is not None and place.host == self._host and not _is_alive(place.pid)
        ]

    def claim_last_word(self) -> bool:
        """Asks to be the one rank that tells the user how the run ends.

        Returns:
            True for the first rank that asks.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / "last-word").open("x").close()
        except FileExistsError:
            return False
        except OSError:
            # Better twice than never.
            return True
        return True

    def _name_file(self, rank: int) -> Path:
        return self._folder / f"rank-{rank}.json"


def format_places(places: Sequence[RankPlace | None], silent_after_seconds: float) -> str:
    """Formats a table of all ranks that marks those which keep the others waiting.

    Args:
        places: As `RankBoard.read` returns them.
        silent_after_seconds: A rank that has written nothing for so long is silent: its process
            or machine stands still or is gone.

    Returns:
        One line per rank.
    """
    now = time.time()
    known = [place for place in places if place is not None]
    furthest = max((place.step for place in known), default=0)
    lines = []
    for rank, place in enumerate(places):
        if place is None:
            lines.append(f"rank {rank:4d}  has written nothing  <-- silent")
            continue
        line = (
            f"rank {rank:4d}  {place.host} pid {place.pid}  step {place.step}: {place.place} "
            f"for {now - place.since:.0f} s"
        )
        if now - place.heard > silent_after_seconds:
            line += f"  <-- silent for {now - place.heard:.0f} s"
        elif place.step < furthest:
            line += "  <-- behind"
        lines.append(line)
    return "\n".join(lines)


def _is_alive(pid: int) -> bool:
    try:
        # The state follows the name, which may hold anything, in parentheses. Z and X: dead.
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        return state.rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return not Path("/proc").is_dir()
    except (OSError, IndexError):
        return False
