from __future__ import annotations

import pytest

from megatron_mdm.config.objective import OBJECTIVES
from megatron_mdm.core.errors import ConfigError, DataError
from megatron_mdm.core.files import write_json_whole
from megatron_mdm.studies.benchmarks.parity import Outcome, judge, measure_parity
from megatron_mdm.studies.benchmarks.parity_cases import (
    TOLERANCES,
    list_cases,
    list_groups,
    list_references,
)
from megatron_mdm.studies.benchmarks.settings import ParitySettings

FOUND = Outcome(losses=[6.0, 5.0], grad_norms=[2.0, 1.0], held_out=[5.5])


def test_every_objective_of_the_package_is_compared_in_both_dtypes():
    kinds = {tree["objective"]["kind"] for tree in list_references().values()}
    assert kinds == set(OBJECTIVES.names)
    cases = list_cases(tiny=False)
    for reference in list_references():
        assert {case.dtype for case in cases if case.reference == reference} >= set(TOLERANCES)
    assert {case.group for case in cases} | {"resume"} == set(list_groups())
    assert len({case.name for case in cases}) == len(cases)


@pytest.mark.parametrize(
    ("dtype", "losses", "grad_norms", "held_out", "is_close"),
    [
        ("fp32", [6.0005, 5.0], [2.0, 1.0], [5.5], True),
        ("fp32", [6.0005, 5.0006], [2.0, 1.0], [5.5], False),
        ("fp32", [6.0, 5.0], [2.003, 1.0], [5.5], False),
        ("bf16", [6.05, 5.0], [2.05, 1.0], [5.51], True),
        ("bf16", [6.0, 5.0], [2.0, 1.0], [5.6], False),
        ("bf16", [6.0, float("nan")], [2.0, 1.0], [5.5], False),
    ],
)
def test_a_case_is_close_within_the_tolerances_of_its_dtype(
    dtype, losses, grad_norms, held_out, is_close
):
    judged = judge(dtype, FOUND, lambda: Outcome(losses, grad_norms, held_out))
    assert judged["is_close"] is is_close


def test_a_case_that_fails_or_trains_too_little_is_said_and_ends_nothing():
    def fail() -> Outcome:
        raise RuntimeError("CUDA error: no kernel")

    assert judge("fp32", FOUND, fail)["error"] == "RuntimeError: CUDA error: no kernel"
    short = judge("fp32", FOUND, lambda: Outcome([6.0], [2.0], [5.5]))
    assert short == {"is_close": False, "error": "1 steps were trained, not 2"}


def test_references_of_another_version_and_unknown_groups_are_refused(tmp_path):
    write_json_whole(tmp_path / "references.json", {"mdm_whole": FOUND._asdict()})
    settings = ParitySettings(pack=tmp_path, device="cpu")
    with pytest.raises(DataError, match=r"knows no \w+ and so is of another version"):
        measure_parity(tmp_path, settings)
    with pytest.raises(ConfigError, match="--groups=engines is unknown: use some of mdm, ar"):
        measure_parity(tmp_path, ParitySettings(pack=tmp_path, groups=("engines",)))
