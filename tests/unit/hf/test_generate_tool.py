from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForMaskedLM

from megatron_mdm.errors import run_entry_point

TOOL = Path(__file__).resolve().parents[3] / "tools" / "generate.py"


@pytest.fixture
def tool(monkeypatch, capsys):
    """Runs the tool in this process and returns (exit status, stdout, stderr)."""
    spec = importlib.util.spec_from_file_location("generate_tool", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, arguments)])
        status = run_entry_point(module.main)
        return status, *capsys.readouterr()

    return run


def load(folder):
    return AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True).eval()


def test_prints_prompt_new_tokens_and_suffix(tiny, export, tool):
    folder, _, _ = export(tiny())
    options = ["--model", folder, "--prompt", "w3 w4", "--length", 6, "--steps", 3, "--json"]
    status, out, _ = tool(*options, "--suffix", "w9", "--temperature", 1, "--num-samples", 3)
    samples = [json.loads(line) for line in out.splitlines()]
    assert status == 0
    assert [sample["sample"] for sample in samples] == [0, 1, 2]
    for sample in samples:
        assert len(sample["ids"]) == 9
        assert sample["ids"][:2] == [3, 4]
        assert sample["ids"][-1] == 9
        assert max(sample["ids"]) < 19
    _, alone, _ = tool(*options, "--suffix", "w9", "--temperature", 1)
    assert alone == out.splitlines(keepends=True)[0]
    _, other_seed, _ = tool(*options, "--suffix", "w9", "--temperature", 1, "--seed", 1)
    assert other_seed != alone


def test_plain_output_is_the_text(tiny, export, tool):
    folder, _, _ = export(tiny(is_causal=True))
    status, out, _ = tool("--model", folder, "--prompt", "w3", "--length", 2)
    assert status == 0
    assert out.startswith("w3 ")


def test_errors_are_one_sentence(tiny, export, tool, tmp_path):
    folder, _, _ = export(tiny())
    cut, _, _ = export(tiny(), "cut")
    with (cut / "model.safetensors").open("r+b") as file:
        file.truncate(5000)
    cases = [
        (["--model", cut, "--prompt", "w3"], "cannot be loaded"),
        (["--model", tmp_path / "none", "--prompt", ""], "has no config.json"),
        (["--model", folder, "--prompt", "w3", "--length", 32], "max_position_embeddings=32"),
        (["--model", folder, "--prompt", "w3", "--length", 4, "--order", "best"], "order='best'"),
        (["--model", folder, "--prompt", "w3", "--length", 4, "--num-samples", 0], "num-samples"),
    ]
    for arguments, message in cases:
        status, out, err = tool(*arguments)
        assert (status, out) == (2, "")
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert message in err


def test_causal_model_continues_greedily_and_stops_at_the_end_of_text(tiny, export):
    model = load(export(tiny(is_causal=True))[0])
    prompt = torch.tensor([[3, 4], [7, 8]])
    expected = prompt
    with torch.no_grad():
        for _ in range(8):
            best = model(expected).logits[:, -1].argmax(-1)
            expected = torch.cat([expected, best[:, None]], dim=1)
    model.config.eos_token_id = None
    assert torch.equal(model.generate(prompt, max_new_tokens=8), expected)
    model.config.eos_token_id = int(expected[0, 4])
    ended = model.generate(prompt[:1], max_new_tokens=8)
    first_end = expected[0, 2:].tolist().index(int(expected[0, 4]))
    assert torch.equal(ended, expected[:1, : 2 + first_end + 1])


def test_causal_model_refuses_to_fill_the_middle(tiny, export):
    model = load(export(tiny(is_causal=True))[0])
    with pytest.raises(ValueError, match="cannot fill masks"):
        model.infill(torch.tensor([[3, 19]]))
    with pytest.raises(ValueError, match="suffix"):
        model.generate(torch.tensor([[3]]), suffix_ids=torch.tensor([[4]]), max_new_tokens=2)


def test_infill_ignores_padding_and_keeps_given_tokens(tiny, export):
    model = load(export(tiny())[0])
    alone = model.infill(torch.tensor([[3, 19, 19, 5]]), temperature=0.8, seed=4)
    batch = torch.tensor([[3, 19, 19, 5, 1, 1], [19, 2, 19, 19, 6, 19]])
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6])
    filled = model.infill(batch, mask, temperature=0.8, seed=4)
    assert torch.equal(filled[0, :4], alone[0])
    assert torch.equal(filled[batch != 19], batch[batch != 19])
    assert (filled < 19).all()


def test_guidance_compares_with_a_pass_that_does_not_see_the_prompt(tiny, export):
    model = load(export(tiny())[0])
    tokens = torch.tensor([[3, 7, 19]])
    with torch.no_grad():
        conditional = model(tokens).logits[0, 2]
        unconditional = model(torch.full((1, 3), 19)).logits[0, 2]
    guided = unconditional + 4.0 * (conditional - unconditional)
    assert model.infill(tokens, guidance_scale=3.0)[0, 2] == guided.argmax()
