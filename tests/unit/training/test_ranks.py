from __future__ import annotations

import os
import subprocess
import sys
import time

from megatron_mdm.training.ranks import RankBoard, RankPlace, format_places


def test_every_rank_reads_what_the_others_wrote_and_one_has_the_last_word(tmp_path):
    boards = [RankBoard(tmp_path, rank, 3) for rank in range(3)]
    boards[0].write(7, "training", 100.0)
    boards[2].write(6, "saving", 99.0)
    (tmp_path / "ranks" / "rank-1.json").write_text('{"rank": 1, "ho')
    first, damaged, third = boards[1].read()
    assert (first.rank, first.step, first.place, first.since) == (0, 7, "training", 100.0)
    assert (first.pid, third.step, damaged) == (os.getpid(), 6, None)
    assert [board.claim_last_word() for board in boards] == [True, False, False]
    boards[0].clean()
    assert boards[0].read() == [None, None, None]
    assert boards[1].claim_last_word()


def test_a_process_that_was_killed_is_found_dead_before_and_after_it_is_reaped(tmp_path):
    program = (
        "import sys, time; from pathlib import Path; "
        "from megatron_mdm.training.ranks import RankBoard; "
        "RankBoard(Path(sys.argv[1]), 1, 2).write(3, 'training', 0.0); "
        "print('written', flush=True); time.sleep(60)"
    )
    board = RankBoard(tmp_path, 0, 2)
    board.write(3, "training", 0.0)
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as peer:
        assert peer.stdout.readline() == "written\n"
        assert board.find_dead_ranks() == []
        peer.kill()
        deadline = time.monotonic() + 10
        while board.find_dead_ranks() != [1]:
            assert time.monotonic() < deadline
        peer.wait()
        assert board.find_dead_ranks() == [1]


def test_a_table_marks_the_ranks_that_others_wait_for():
    now = time.time()
    places = [
        RankPlace(0, "a", 11, 5, "training", now - 60, now),
        RankPlace(1, "a", 12, 4, "saving", now - 60, now),
        RankPlace(2, "b", 13, 5, "training", now - 60, now - 60),
        None,
    ]
    lines = format_places(places, silent_after_seconds=10).splitlines()
    assert [line.partition("<-- ")[2] for line in lines] == [
        "",
        "behind",
        "silent for 60 s",
        "silent",
    ]
    assert "step 4: saving for 60 s" in lines[1]
