"""`make demo` in a folder of its own with fewer passes: what it makes, and nothing twice."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import yaml
from commands import REPO, run_all

EPOCHS = 2


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo's folder, and what it printed the first and the second time."""
    root = tmp_path_factory.mktemp("demo")
    shutil.copytree(REPO / "configs/demo", root / "configs/demo")
    path = root / "configs/demo/base.yaml"
    tree = yaml.safe_load(path.read_text())
    tree["schedule"] |= {"epochs": EPOCHS, "warmup_steps": 2}
    tree["run"] |= {"device": "cpu", "num_threads": 1}
    tree["validation"] |= {"every_steps": 8}
    path.write_text(yaml.safe_dump(tree))
    printed = []
    for _ in range(2):
        (result,) = run_all([REPO / "tools/demo.py"], cwd=root)
        printed.append(result.succeeded().output)
    return root / "runs/demo", *printed


def test_the_demo_ends_in_one_page_that_stands_alone(demo):
    folder, output, _ = demo
    assert re.search(r"\d+ s: open runs/demo/demo\.html", output)
    html = (folder / "demo.html").read_text(encoding="utf-8")
    links = re.findall(r"""(?:\b(?:src|href)\s*=\s*|url\()["']?([^"'\s>)]+)""", html)
    assert [link for link in links if not link.startswith(("#", "data:"))] == []
    for heading in ("While they learned", "A dozen questions", "How the MDM fills in", "Next"):
        assert f"<h2>{heading}</h2>" in html
    assert html.count("Fact: ") >= 12
    assert "srcdoc" in html
    for name in ("demo.png", "demo.md", "replay.html", "mdm/hf/model.safetensors"):
        assert (folder / name).stat().st_size > 0, name


def test_both_models_were_asked_the_same_and_ar_nothing_in_place(demo):
    tree = json.loads((demo[0] / "demo.json").read_text())
    asked = {(one["objective"], one["direction"]): one["num_questions"] for one in tree["answers"]}
    assert asked == {
        ("ar", "forward"): 80,
        ("ar", "reverse"): 80,
        ("mdm", "forward"): 80,
        ("mdm", "reverse"): 80,
        ("mdm", "in_place"): 80,
    }
    # Held out are the sentences that nobody told.
    told, untold = (
        {json.loads(line)["response"] for line in (demo[0] / f"data/{name}.jsonl").open()}
        for name in ("told", "untold")
    )
    assert (len(told), len(untold), told & untold) == (320, 80, set())


def test_what_is_next_is_said_and_nothing_is_trained_twice(demo):
    _, first, again = demo
    assert "next: " in first
    assert " report --run runs/demo/mdm" in first
    assert first.count("mdm: done") == 1
    assert "2 of them done or left out" in again
    assert "mdm: started" not in again
