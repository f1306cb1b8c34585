from __future__ import annotations

import pytest

from megatron_mdm.errors import ConfigError
from megatron_mdm.parallel.topology import launched_world_size


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)


def test_without_a_launcher_there_is_one_process():
    assert launched_world_size() == 1


def test_tasks_that_do_not_know_of_each_other_are_refused(monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    with pytest.raises(ConfigError, match=r"srun started 2 tasks, .*pretrain.sbatch does\.$"):
        launched_world_size()


def test_a_launcher_below_srun_is_believed(monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    monkeypatch.setenv("WORLD_SIZE", "16")
    assert launched_world_size() == 16
