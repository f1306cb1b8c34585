"""Law files: a round trip, and files that are refused."""

from __future__ import annotations

import json
import math

import pytest

from megatron_mdm.config import ModelSize
from megatron_mdm.core.errors import DataError, MdmError
from megatron_mdm.studies.laws.forms import ChinchillaLaw, DataConstrainedLaw, GeometricLaw
from megatron_mdm.studies.laws.storage import LawFile, read_law, write_law

LAW = DataConstrainedLaw(400.0, 900.0, 1.7, 0.34, 0.31, 12.0, math.inf)
FILE = LawFile(
    law=LAW,
    parameters="with_embeddings",
    objective="mdm",
    vocab_size=50257,
    fitted=("token_reuse",),
    huber_objective=0.01,
    num_runs=3,
    ranges={"num_parameters": (1e6, 1e9), "epochs": (1.0, 40.0)},
    bootstrap=(LAW, DataConstrainedLaw(401.0, 900.0, 1.7, 0.34, 0.31, 13.0, math.inf)),
    source="fitted to runs.csv",
)


@pytest.mark.parametrize(
    "file",
    [
        FILE,
        LawFile(ChinchillaLaw(400.0, 900.0, 1.7, 0.34, 0.31)),
        LawFile(GeometricLaw(400.0, 900.0, 1.7, 0.34, 0.31, 0.0, 1.0)),
    ],
)
def test_what_is_written_is_read(tmp_path, file):
    path = tmp_path / "law.json"
    write_law(path, file)
    assert read_law(path) == file
    assert [one.name for one in tmp_path.iterdir()] == ["law.json"]


def test_the_file_is_plain_json_of_the_format(tmp_path):
    write_law(tmp_path / "law.json", FILE)
    tree = json.loads((tmp_path / "law.json").read_text(), parse_constant=pytest.fail)
    assert tree["format_version"] == 1
    assert tree["form"] == "data_constrained"
    assert tree["constants"]["token_reuse"] == 12
    assert tree["constants"]["parameter_reuse"] is None  # infinite
    assert tree["ranges"]["epochs"] == [1, 40]
    assert (tree["loss_unit"], tree["parameters"]) == ("nats per token", "with_embeddings")
    assert tree["bootstrap"][1]["token_reuse"] == 13


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("format_version",), 9, "format_version is 9 .*1"),
        (("loss_unit",), "bits per byte", "loss_unit is bits per byte"),
        (
            ("parameters",),
            "active",
            "parameters is active .*with_embeddings",
        ),
        (("form",), "cubic", "form=cubic is not a known name.*chinchilla"),
        (("objective",), "vae", "objective is vae"),
        (("constants", "token_scale"), -3.0, "constants.token_scale is -3.0: give a number above"),
        (("constants", "token_scale"), None, "constants.token_scale is None"),
        (("constants", "token_scale"), math.nan, "constants.token_scale is nan"),
        (("constants", "speed"), 1.0, "constants has .*speed.*but the form data_constrained has"),
        (("bootstrap", 1, "token_reuse"), 0.0, "bootstrap.1.token_reuse is 0.0"),
        (("ranges", "epochs"), [4.0, 1.0], "ranges.epochs is"),
        (("num_runs",), "many", "num_runs is many"),
        (("surprise",), 1, "surprise is 1"),
    ],
)
def test_files_that_hold_no_valid_law_are_refused(tmp_path, path, value, message):
    write_law(tmp_path / "law.json", FILE)
    tree = json.loads((tmp_path / "law.json").read_text())
    place = tree
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (tmp_path / "law.json").write_text(json.dumps(tree))
    with pytest.raises(MdmError, match=message):
        read_law(tmp_path / "law.json")


def test_a_law_takes_its_own_n_of_a_size_and_none_where_it_does_not_say():
    size = ModelSize(with_embeddings=1e4, without_embeddings=1e2)
    run = {"size": size, "num_tokens": 1e8, "unique_tokens": 1e8}
    law = ChinchillaLaw(400.0, 900.0, 1.7, 0.5, 0.25)
    # 900 / 1e8^0.25 = 9; 400 / 1e4^0.5 = 4, 400 / 1e2^0.5 = 40.
    assert LawFile(law, "with_embeddings").expected_loss(**run) == pytest.approx(14.7)
    assert LawFile(law, "without_embeddings").expected_loss(**run) == pytest.approx(50.7)
    with pytest.raises(DataError, match="does not say whether its parameters were counted with"):
        LawFile(law).expected_loss(**run)


def test_files_that_are_no_law_files_are_refused(tmp_path):
    with pytest.raises(DataError, match="cannot be read as a law file"):
        read_law(tmp_path / "none.json")
    (tmp_path / "text.json").write_text("not json")
    with pytest.raises(DataError, match=r"text\.json: it is no law file"):
        read_law(tmp_path / "text.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(DataError, match=r"list\.json: it is no law file"):
        read_law(tmp_path / "list.json")
