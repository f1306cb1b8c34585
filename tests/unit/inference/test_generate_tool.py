"""tools/generate.py with exported models: what it prints and writes, and what it refuses."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_mdm.corpus.tokenizer import load_tokenizer
from megatron_mdm.diffusion.decoding import derive_seeds
from megatron_mdm.reporting.report import write_report

PROMPTS = [
    {"prompt": "the cat", "suffix": " mat.", "length": 5},
    {"prompt": "", "length": 9},
    {"prompt": "on", "suffix": ""},
    {"prompt": "the cat sat on the mat.", "length": 5},
    {"prompt": "a\u20acb"},
]
SAMPLED = ["--temperature", "1", "--num-samples", "2", "--length", "7"]


def records(output):
    return [json.loads(line) for line in output.splitlines()]


@pytest.fixture
def prompts(tmp_path):
    def write(requests):
        path = tmp_path / "prompts.jsonl"
        path.write_text("".join(json.dumps(request) + "\n" for request in requests))
        return path

    return write


def test_prints_prompt_new_tokens_and_suffix(exported, loaded, tool):
    tokenizer = loaded("mdm")[1]
    options = ["--model", exported["mdm"], "--prompt", "the cat", "--suffix", " mat.", "--jsonl"]
    options += ["--temperature", 1, "--steps", 3, "--length", 6]
    status, out, err = tool(*options, "--num-samples", 3)
    made = records(out)
    assert (status, err) == (0, "")
    assert [(record["request"], record["sample"]) for record in made] == [(0, 0), (0, 1), (0, 2)]
    prompt, suffix = tokenizer.encode("the cat"), tokenizer.encode(" mat.")
    for record in made:
        new = record["ids"][len(prompt) : -len(suffix)]
        assert record["ids"] == [*prompt, *new, *suffix]
        assert len(new) == 6
        assert max(new) < len(tokenizer)
        assert record["completion"] == tokenizer.decode(new)
        assert record["text"] == tokenizer.decode(record["ids"])
    assert len({record["completion"] for record in made}) == 3
    assert tool(*options)[1] == out.splitlines(keepends=True)[0]
    assert tool(*options, "--seed", 1)[1] != out.splitlines(keepends=True)[0]


def test_plain_output_is_the_texts_in_the_order_of_the_prompts(exported, tool):
    options = ["--model", exported["ar"], "--length", 2]
    status, out, _ = tool(*options, "--prompt", "the mat.", "--prompt", "cat")
    assert status == 0
    assert re.match(r"the mat\.(.|\n)*\ncat", out)


def reference(model, tokenizer, request, seed, length=7, **options):
    """Ids of one sample alone, straight from the model."""

    def encode(text):
        return torch.tensor([tokenizer.encode(text)], dtype=torch.long)

    suffix = request.get("suffix")
    ids = model.generate(
        encode(request["prompt"]),
        max_new_tokens=request.get("length", length),
        suffix_ids=None if suffix is None else encode(suffix),
        seeds=[seed],
        **options,
    )
    return ids[0].tolist()


@pytest.mark.parametrize("kind", ["mdm", "ar"])
def test_samples_do_not_depend_on_their_batch(exported, loaded, tool, prompts, kind):
    requests = [r for r in PROMPTS if kind == "mdm" or (r["prompt"] and "suffix" not in r)]
    options = ["--model", exported[kind], "--prompts", prompts(requests), "--jsonl", *SAMPLED]
    given = {"temperature": 1.0}
    if kind == "mdm":
        options += ["--guidance-scale", "0.5", "--order", "random", "--steps", "4"]
        given |= {"guidance_scale": 0.5, "order": "random", "num_steps": 4}
    outputs = [tool(*options, "--batch-size", size)[1] for size in (1, 3, 16)]
    assert outputs[1] == outputs[0]
    assert outputs[2] == outputs[0]
    model, tokenizer = loaded(kind)
    made = records(outputs[0])
    assert [(r["request"], r["sample"]) for r in made] == [
        (request, sample) for request in range(len(requests)) for sample in range(2)
    ]
    for record in made:
        seed = derive_seeds(0, len(requests))[record["request"]]
        seed = derive_seeds(seed, 2)[record["sample"]]
        ids = reference(model, tokenizer, requests[record["request"]], seed, **given)
        if kind == "ar":
            end = model.config.eos_token_id
            ids = ids[: ids.index(end) + 1] if end in ids else ids
        assert record["ids"] == ids


def test_a_sample_stays_when_prompts_follow_or_samples_are_added(exported, tool):
    options = ["--model", exported["mdm"], "--jsonl", "--temperature", 1, "--length", 5]
    alone = tool(*options, "--prompt", "the")[1]
    more = tool(*options, "--prompt", "the", "--prompt", "cat sat", "--num-samples", 2)[1]
    assert more.splitlines()[0] == alone.strip()


@pytest.mark.parametrize("kind", ["mdm", "ar"])
def test_the_end_of_text_can_stop_a_sample_be_kept_or_be_forbidden(exported, loaded, tool, kind):
    tokenizer = loaded(kind)[1]
    end = tokenizer.eos_token_id
    options = ["--model", exported[kind], "--prompt", "the cat", "--jsonl", "--length", 12]
    options += ["--temperature", 30, "--num-samples", 64, "--batch-size", 64]
    options += ["--order", "random"] if kind == "mdm" else []
    samples = {
        choice: records(tool(*options, "--end-of-text", choice)[1])
        for choice in ("stop", "keep", "forbid")
    }
    start = len(tokenizer.encode("the cat"))
    new = {name: [record["ids"][start:] for record in made] for name, made in samples.items()}
    assert any(end in ids for ids in new["stop"])
    for ids, record in zip(new["stop"], samples["stop"], strict=True):
        before = ids[: ids.index(end)] if end in ids else ids
        rest = ids[len(before) :]
        assert rest == ([end] * (1 if kind == "ar" else 12 - len(before)) if rest else [])
        assert record["completion"] == tokenizer.decode(before)
    assert any(end in ids and set(ids[ids.index(end) :]) != {end} for ids in new["keep"])
    assert all(len(ids) == 12 for ids in new["keep"] + new["forbid"])
    assert not any(end in ids for ids in new["forbid"])
    # Without a suffix the end stops a text, unless told otherwise.
    assert records(tool(*options)[1]) == samples["stop"]
    if kind == "mdm":
        _, out, _ = tool(*options, "--suffix", "x")
        kept = records(tool(*options, "--suffix", "x", "--end-of-text", "keep")[1])
        assert records(out) == kept


def test_guidance_compares_with_the_text_in_the_prompts_place(exported, loaded, tool):
    model, tokenizer = loaded("mdm")
    options = ["--model", exported["mdm"], "--prompt", "the cat sat", "--suffix", ".", "--jsonl"]
    options += ["--length", 1, "--guidance-scale", 3]
    prompt, other, dot = map(tokenizer.encode, ("the cat sat", " mat", "."))
    mask = model.config.mask_token_id
    padded = [mask] * (len(prompt) - len(other)) + other
    hidden = {(): [mask] * (len(prompt) + 1 + len(dot)), (" mat",): [*padded, mask, *dot]}
    for text, unconditional in hidden.items():
        rows = torch.tensor([[*prompt, mask, *dot], unconditional])
        with torch.no_grad():
            given, free = model(rows).logits[:, len(prompt)]
        best = int((free + 4.0 * (given - free)).argmax())
        extra = ["--guidance-prompt", *text] if text else []
        assert records(tool(*options, *extra)[1])[0]["ids"][len(prompt)] == best


def test_the_cache_refreshed_at_every_step_changes_nothing(exported, tool):
    options = ["--model", exported["mdm"], "--prompt", "the cat", "--jsonl", "--length", 12]
    options += ["--block-length", 4]
    exact = tool(*options, "--cache", "--cache-refresh-steps", 1)
    assert exact[0] == 0
    assert exact[1] == tool(*options)[1]


def test_defaults_of_the_model_count_where_nothing_is_given(exported, tool, tmp_path):
    folder = tmp_path / "own"
    shutil.copytree(exported["mdm"], folder)
    defaults = {"order": "left_to_right", "num_steps": 2, "temperature": 1.0}
    (folder / "mdm_generation_config.json").write_text(json.dumps(defaults))
    prompt = ["--prompt", "the", "--length", 8, "--jsonl"]
    explicit = ["--order", "left_to_right", "--steps", 2, "--temperature", 1]
    assert tool("--model", folder, *prompt) == tool("--model", exported["mdm"], *prompt, *explicit)
    assert tool("--model", folder, *prompt, "--order", "entropy") == tool(
        "--model", exported["mdm"], *prompt, *explicit, "--order", "entropy"
    )


def test_the_report_shows_the_samples(exported, tool, prompts, tmp_path):
    file, run_dir = tmp_path / "samples.json", tmp_path / "run"
    run_dir.mkdir()
    options = ["--model", exported["mdm"], "--prompts", prompts(PROMPTS), *SAMPLED, "--jsonl"]
    _, out, _ = tool(*options, "--output", file)
    entries, made = json.loads(file.read_text()), records(out)
    assert [entry["kind"] for entry in entries] == [
        "infill" if "suffix" in request else "prompt" for request in PROMPTS
    ]
    for number, entry in enumerate(entries):
        assert entry["completions"] == [
            record["completion"] for record in made if record["request"] == number
        ]
        assert entry["settings"]["length"] == PROMPTS[number].get("length", 7)
        assert entry["settings"]["temperature"] == 1.0
    html = write_report(run_dir, samples_path=file).read_text(encoding="utf-8")
    assert html.count('<article class="sample">') == len(PROMPTS)


@pytest.mark.parametrize("kind", ["mdm", "ar"])
def test_the_replay_ends_in_the_samples(exported, tool, prompts, tmp_path, kind):
    file = tmp_path / "page.html"
    options = ["--model", exported[kind], "--html", file, "--jsonl", "--temperature", 1]
    options += ["--prompt", "the cat", "--prompt", "on", "--num-samples", 2, "--length", 6]
    options += ["--suffix", "</script>"] if kind == "mdm" else []
    status, out, _ = tool(*options)
    assert status == 0
    page = file.read_text(encoding="utf-8")
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    samples, made = json.loads(data)["samples"], records(out)
    assert len(samples) == len(made) == 4
    for sample, record in zip(samples, made, strict=True):
        ids, length = list(sample["initial"]), len(sample["initial"])
        assert ids.count(-1) == length - sample["prompt"] - sample["suffix"]
        for step in sample["steps"]:
            for at in range(0, len(step), 3):
                ids[step[at]] = step[at + 1]
        assert ids == record["ids"]
        assert sample["texts"] == [record["prompt"], record["completion"], record["suffix"] or ""]


def test_a_bar_is_shown_only_where_it_is_asked_for(exported, tool):
    options = ["--model", exported["mdm"], "--prompt", "the", "--length", 6, "--batch-size", 1]
    assert tool(*options)[2] == ""
    _, out, err = tool(*options, "--progress", "--num-samples", 2)
    # Two samples of six steps, whatever the bar has got to when it is drawn.
    assert "/12 [" in err
    assert "step/s" in err
    assert "step" not in out


def test_a_reader_that_goes_away_ends_nothing_in_an_error(exported, tool, monkeypatch, tmp_path):
    file = tmp_path / "samples.json"
    options = ["--model", exported["mdm"], "--prompt", "the", "--length", 4, "--num-samples", 3]
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        status, _, err = tool(*options, "--batch-size", 1, "--output", file)
        assert (status, err) == (0, "")
    assert len(json.loads(file.read_text())[0]["completions"]) == 3


def test_text_that_a_terminal_cannot_show_is_printed_as_escapes(exported, tool, monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    status, _, err = tool("--model", exported["mdm"], "--prompt", "\u20ac", "--length", 2)
    assert (status, err) == (0, "")
    assert written.getvalue().startswith(b"\\u20ac")


def test_a_tokenizer_that_was_replaced_is_told_of(exported, tool, tmp_path):
    folder = tmp_path / "replaced"
    shutil.copytree(exported["mdm"], folder)
    options = ["--model", folder, "--prompt", "the", "--length", 2]
    sha256 = load_tokenizer(str(folder)).sha256
    for recorded, told in ((sha256, False), ("ab" * 32, True)):
        record = {"name": "gone", "sha256": recorded, "vocab_size": 272}
        record |= {"eod_token": "<|endoftext|>", "eod_token_id": 0}
        (folder / "training_metadata.json").write_text(json.dumps({"tokenizer": record}))
        status, _, err = tool(*options)
        assert status == 0
        assert ("is not the one that made the training data (gone, sha256 abababab" in err) == told


def test_a_written_mask_token_is_ordinary_text_to_the_tool(exported, loaded, tool):
    tokenizer = loaded("mdm")[1]
    assert tokenizer.mask_token_id in tokenizer.encode(f"the{tokenizer.mask_token}")
    text = f"the {tokenizer.mask_token} cat"
    status, out, err = tool("--model", exported["mdm"], "--prompt", text, "--length", 2)
    assert (status, err) == (0, "")
    assert out.startswith(text)


def test_exported_models_are_run_without_megatron(exported):
    program = (
        "import sys; from megatron_mdm.cli.tree import main; "
        "main(['generate', '--model', sys.argv[1], '--prompt', 'the', '--length', '2']); "
        "print([name for name in sys.modules if name.split('.')[0] in ('megatron', 'deepspeed')])"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, exported["mdm"]],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).resolve().parents[3],
    )
    assert run.stdout.endswith("\n[]\n")


def errors(exported, cut, tmp_path):
    mdm, ar = ["--model", exported["mdm"]], ["--model", exported["ar"]]
    the, empty, short = ["--prompt", "the"], ["--prompt", ""], ["--length", 8]
    none = tmp_path / "none"
    return [
        ([*the, "--model", none], "has no config.json"),
        ([*the, "--model", cut], "cannot be loaded"),
        ([*the, "--checkpoint", none], "none holds no checkpoint"),
        ([*mdm, *the, "--length", 60], "60 of them asked for and 0 of a suffix"),
        ([*mdm, *the, "--length", 0], "max_new_tokens=0 must be 1 or more"),
        ([*mdm, *the, "--num-samples", 0], "--num-samples=0 must be 1 or more"),
        ([*mdm, *the, "--batch-size", -1], "--batch-size=-1 must be 1 or more"),
        ([*mdm, *the, "--order", "best"], "order='best' is unknown"),
        ([*mdm, *the, "--steps", 0], "num_steps=0 must be 1 or more"),
        ([*mdm, *the, "--top-k", 3, "--temperature", 0], "top_k=3 has no effect at temperature=0"),
        ([*mdm, *the, "--length", 8, "--steps", 2, "--block-length", 2], "fewer than the 4 blocks"),
        ([*mdm, *the, "--guidance-prompt", "x"], "--guidance-prompt has no effect"),
        (
            [*mdm, *the, "--guidance-prompt", "a b c", "--guidance-scale", 1, "--length", 8],
            "has 5 tokens, more",
        ),
        ([*mdm, *the, *short, "--cache-refresh-steps", 2], "no effect without a cache"),
        ([*mdm, *the, "--prompts-format", "json"], "it belongs to --prompts"),
        ([*mdm, *the, "--tensor-parallel", 2], "--tensor-parallel=2 belongs to --checkpoint"),
        ([*mdm, *the, "--tokenizer", "x"], "--tokenizer=x belongs to --checkpoint"),
        ([*mdm, "--prompts", none], "cannot be read"),
        ([*mdm, *the, "--html", none / "x.html"], "none does not exist"),
        ([*mdm, *the, "--output", tmp_path], "cannot be written"),
        ([*ar, *empty], "Prompt 1 has no context"),
        ([*ar, *the, "--suffix", "x"], "Prompt 1 has a suffix"),
        ([*ar, *the, "--order", "random"], "order='random' is for masked diffusion"),
        ([*ar, *the, "--guidance-scale", 1], "guidance_scale=1.0 is for masked diffusion"),
    ]


def test_errors_are_one_sentence(exported, tool, tmp_path):
    cut = tmp_path / "cut"
    shutil.copytree(exported["mdm"], cut)
    with (cut / "model.safetensors").open("r+b") as file:
        file.truncate(5000)
    for arguments, message in errors(exported, cut, tmp_path):
        status, out, err = tool(*arguments)
        assert (status, out) == (2, ""), (arguments, err)
        assert err.startswith("error: "), err
        assert err.count("\n") == 1, err
        assert message in err


def test_several_processes_are_refused_where_one_does_the_work(exported, tool, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    _, _, err = tool("--model", exported["mdm"], "--prompt", "the")
    assert "--model runs in one process, but 2 were launched" in err
    _, _, err = tool("--model", exported["mdm"], "--prompts", "-")
    assert "--prompts=- cannot be read by 2 processes" in err
