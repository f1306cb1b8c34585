"""The notebook of docs/ runs on any export, and its estimate is that of the likelihood bound."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

NOTEBOOK = Path(__file__).resolve().parents[3] / "docs" / "explore.ipynb"


def read_code():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def bound_exactly(names, text):
    """The mean over all sets of hidden tokens, each number of them equally likely."""
    given = len(names["encode"]("Fact:"))
    tokens = [*names["encode"]("Fact:" + text), names["END"]]
    places = range(given, len(tokens))
    total = 0.0
    for count in range(1, len(places) + 1):
        chosen = list(itertools.combinations(places, count))
        for hidden in chosen:
            ids = [names["MASK"] if place in hidden else one for place, one in enumerate(tokens)]
            log_p = names["predict"](ids)
            nats = -sum(log_p[place, tokens[place]].item() for place in hidden)
            total += nats / count / len(chosen)
    # L / l over the l hidden ones, and a mean over L numbers l.
    return total


def test_the_cells_run_in_order_on_an_export(export, tiny, tmp_path, monkeypatch, capsys):
    folder, _, _ = export(tiny())
    (tmp_path / "runs/demo/mdm").mkdir(parents=True)
    folder.rename(tmp_path / "runs/demo/mdm/hf")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    names: dict = {}
    for number, cell in enumerate(read_code()):
        exec(compile(cell, f"cell {number}", "exec"), names)
    names["plt"].close("all")
    told = capsys.readouterr().out
    assert told.count(" nats ") == len(names["sentences"])
    # Each step writes one token.
    masks = [state.count(names["MASK"]) for state in names["states"]]
    assert masks == list(range(len(names["states"])))[::-1]
    assert names["MASK"] not in names["states"][-1]
    first = names["predict"](names["states"][0])
    entropy = torch.distributions.Categorical(logits=first).entropy()
    assert names["entropies"][0] == pytest.approx(entropy.tolist(), abs=1e-4)
    text = names["sentences"][0]
    nats, error = names["score"](text, num_draws=4096)
    assert nats == pytest.approx(bound_exactly(names, text), abs=4 * error)
    assert error < 0.05 * nats
