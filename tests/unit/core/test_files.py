from __future__ import annotations

import json
import math

import numpy as np
import pytest

from megatron_mdm.core.files import format_json, write_json_whole


def test_numbers_that_json_lacks_are_texts_wherever_they_stand(tmp_path):
    tree = {"a": [1.5, math.nan, (math.inf, {"b": -math.inf})], "c": np.float64("nan"), "d": "é"}
    write_json_whole(tmp_path / "tree.json", tree)

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    found = json.loads((tmp_path / "tree.json").read_text("utf-8"), parse_constant=refuse)
    assert found == {"a": [1.5, "nan", ["inf", {"b": "-inf"}]], "c": "nan", "d": "é"}


def test_anything_else_is_an_error_or_what_is_made_of_it(tmp_path):
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_json_whole(tmp_path / "tree.json", {"a": 1j})
    assert not list(tmp_path.iterdir())
    assert format_json({"a": 1j}, default=str) == '{"a": "1j"}'
