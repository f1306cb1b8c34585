import sys

import pytest

from megatron_mdm.core.errors import ConfigError
from megatron_mdm.core.registry import Registry

NUMBERS = Registry(
    "a number", int, {"truth": "builtins:bool", "whole": "builtins:int", "text": "builtins:str"}
)


def test_names_and_places_lead_to_classes():
    assert NUMBERS.find("truth", "a.kind") is bool
    assert NUMBERS.find("signal:Signals", "a.kind") is __import__("signal").Signals


def test_a_module_is_loaded_when_it_is_asked_for(tmp_path, monkeypatch):
    (tmp_path / "own_numbers.py").write_text("class Own(int): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    registry = Registry("a number", int, {"own": "own_numbers:Own"})
    assert "own_numbers" not in sys.modules
    assert registry.find("own", "a.kind").__name__ == "Own"


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("thruth", ["a.kind=thruth", "did you mean truth?", "truth, whole, text", "module:Class"]),
        (3, ["a.kind=3", "truth, whole, text"]),
        ("os.path:join(x)", ["a.kind=os.path:join(x)", "not a known name"]),
        ("no_such_module:Own", ["a.kind=no_such_module:Own", "ModuleNotFoundError", "PYTHONPATH"]),
        ("builtins:nothing", ["a.kind=builtins:nothing", "is not a number", "builtins.int"]),
        ("text", ["a.kind=text", "is not a number"]),
        ("os.path:join", ["a.kind=os.path:join", "is not a number"]),
    ],
)
def test_what_cannot_be_found_is_said_with_field_value_and_remedy(name, parts):
    with pytest.raises(ConfigError) as caught:
        NUMBERS.find(name, "a.kind")
    for part in parts:
        assert part in str(caught.value)
