"""The replay page in a real browser shows what the sampler did, at every step."""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from megatron_mdm.corpus.tokenizer_training import train_byte_level_bpe
from megatron_mdm.diffusion.decoding import Decoding
from megatron_mdm.diffusion.samplers import SamplingStep, sample, sample_left_to_right
from megatron_mdm.inference.replay.page import ReplayedSample, write_replay
from megatron_mdm.inference.replay.pieces import PieceReader
from megatron_mdm.inference.replay.trace import Tracer

# Harmful as markup, invisible, or no whole character as single tokens.
NASTY = ["</script>", "<b>", "<!--", "&amp;", "'\"`", "\u202e", "\U0001f600", "\u20ac\u0142", "\r"]
TEXT = "".join(NASTY) * 3 + "def f(x):\n    return x\n\n\tpass  # done\n" * 3
# The tokenizer has not seen them, so each is one token per byte.
UNSEEN = "\u65e5\u00e9"
NUM_NEW, LONG_NEW, LONG_STEPS = 24, 256, 128

# What a person sees of each position: text, is it a mask, given, new, and its probability.
SHOWN = """
[...document.querySelectorAll("#tokens .token")].map((box, position) => ({
  text: [...document.querySelectorAll(`#tokens [data-position="${position}"]`)].map(
    (part) => part.textContent).join("\\n"),
  mask: box.classList.contains("mask") && box.getAttribute("role") === "img",
  given: box.classList.contains("given"),
  now: box.classList.contains("now"),
  probability: (/probability ([0-9.]+)/.exec(box.title) || [null, null])[1],
}))
"""


class Made(NamedTuple):
    """A sample with what the sampler reported after each step, for one sequence."""

    replayed: ReplayedSample
    states: list[tuple[list[int], list[float]]]


@pytest.fixture(scope="session")
def tokenizer():
    trained = train_byte_level_bpe([TEXT] * 3, 330)
    return PreTrainedTokenizerFast(tokenizer_object=trained, eos_token="<|endoftext|>")


def make(tokenizer, decoding, num_new, *, is_causal=False) -> Made:
    """Runs the sampler with random logits that do not depend on what is revealed."""
    vocab_size = len(tokenizer)
    mask_id = vocab_size
    prompt, suffix = tokenizer.encode("x </script> "), tokenizer.encode("\n<b>end</b>")
    generator = torch.Generator().manual_seed(7)
    length = len(prompt) + num_new + len(suffix)
    logits_SV = 3 * torch.randn(length, vocab_size, generator=generator)
    # Every token that has something to it turns up somewhere.
    wanted = tokenizer.encode(UNSEEN + TEXT)
    for index, token in enumerate(wanted[:num_new]):
        logits_SV[len(prompt) + index - is_causal, token] += (
            20.0 if index < len(UNSEEN.encode()) else 9.0
        )

    def denoiser(x_BS):
        return logits_SV[: x_BS.shape[1]].expand(len(x_BS), -1, -1)

    reveals: list[SamplingStep] = []
    given = torch.tensor([prompt])
    initial = torch.tensor([[*prompt, *[mask_id] * num_new, *([] if is_causal else suffix)]])
    tracer = Tracer(initial, [0])

    def follow(reveal):
        reveals.append(reveal)
        tracer(reveal)

    options = {"mask_token_id": mask_id, "seeds": [3], "callback": follow}
    if is_causal:
        ahead = decoding.override({"max_new_tokens": num_new})
        sample_left_to_right(denoiser, given, ahead, **options)
    else:
        sample(denoiser, initial, decoding, **options)
    nothing = [float("nan")] * initial.shape[1]
    states = [(initial[0].tolist(), nothing)]
    for reveal in reveals:
        seen = reveal.x_BS.shape[1]
        tokens = reveal.x_BS[0].tolist() + initial[0, seen:].tolist()
        states.append((tokens, reveal.probability_BS[0].tolist() + nothing[seen:]))
    replayed = ReplayedSample(
        title="<i>the &amp; sample</i>",
        num_prompt_tokens=len(prompt),
        num_suffix_tokens=0 if is_causal else len(suffix),
        trace=tracer.trace(0, initial.shape[1]),
        texts=("x </script> ", "<u>new</u>", "\n<b>end</b>"),
        settings={"order": decoding.order, "note": "<script>alert(1)</script>"},
    )
    return Made(replayed, states)


@pytest.fixture(scope="session")
def made(tokenizer) -> list[Made]:
    return [
        make(tokenizer, Decoding(num_steps=9), NUM_NEW),
        make(tokenizer, Decoding(num_steps=12, temperature=1.0, remasking=0.3), NUM_NEW),
        make(tokenizer, Decoding(temperature=0.5), NUM_NEW, is_causal=True),
        make(tokenizer, Decoding(num_steps=LONG_STEPS, order="random"), LONG_NEW),
    ]


@pytest.fixture(scope="session")
def file(made, tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("pages") / "replay.html"
    write_replay(
        path,
        [one.replayed for one in made],
        model_name="a </title><b>model</b>",
        mask_token_id=len(tokenizer),
        pieces=PieceReader(tokenizer),
    )
    return path


@pytest.fixture
def opened(page, file):
    page.requests.clear()
    page.problems.clear()
    page.open("about:blank")
    page.open(file.as_uri())
    yield page
    assert page.problems == []


def glyphs(text):
    return text.replace(" ", "\u00b7").replace("\n", "\u21b5").replace("\t", "\u21e5")


def joined(pieces):
    """Texts of neighbours; where several together are characters, all stand with the first."""
    texts = ["" if piece is None else piece.text for piece in pieces]
    start = 0
    while start < len(pieces):
        end, raw = start, b""
        while end < len(pieces) and pieces[end] is not None and pieces[end].raw:
            raw, end = raw + pieces[end].raw, end + 1
            with contextlib.suppress(UnicodeDecodeError):
                texts[start:end] = [raw.decode("utf-8")] + ["\u2025"] * (end - start - 1)
                break
        else:
            end = start + 1
        start = end
    return texts


def expected(one: Made, step: int, tokenizer):
    """What the sampler's own reports say a page should show after a number of steps."""
    reader = PieceReader(tokenizer)
    mask_id, first = len(tokenizer), one.replayed.num_prompt_tokens
    tokens, probabilities = one.states[step]
    end = len(tokens) - one.replayed.num_suffix_tokens
    before = one.states[step - 1] if step else one.states[0]
    pieces = [None if token == mask_id else reader.read_piece(token) for token in tokens]
    texts = joined(pieces[:first]) + joined(pieces[first:end]) + joined(pieces[end:])
    shown = []
    for position, (token, text) in enumerate(zip(tokens, texts, strict=True)):
        is_given = not first <= position < end
        number = probabilities[position]
        is_new = token != before[0][position] or (
            number == number and number != before[1][position]
        )
        shown.append(
            {
                "text": text if is_given else glyphs(text),
                "mask": token == mask_id,
                "given": is_given,
                "now": is_new,
                "probability": None if number != number else f"{round(1000 * number) / 1000:.3f}",
            }
        )
    return shown


@pytest.mark.parametrize("index", range(4), ids=["plain", "remasking", "causal", "long"])
def test_every_step_is_shown_as_the_sampler_reported_it(opened, made, tokenizer, index):
    one = made[index]
    num_steps = len(one.states) - 1
    assert num_steps == [9, 12, NUM_NEW, LONG_STEPS][index]
    for _ in range(index):
        opened.press("PageDown")
    for step in range(num_steps + 1):
        if step:
            opened.press("ArrowRight")
        assert opened.evaluate(SHOWN) == expected(one, step, tokenizer), step
        status = opened.evaluate("document.getElementById('status').textContent")
        masks = one.states[step][0].count(len(tokenizer))
        assert f"Step {step} of {num_steps}" in status
        assert f"{masks} masks left" in status
    opened.press("ArrowRight")
    assert opened.evaluate(SHOWN) == expected(one, num_steps, tokenizer)
    for step in range(num_steps - 1, max(-1, num_steps - 15), -1):
        opened.press("ArrowLeft")
        assert opened.evaluate(SHOWN) == expected(one, step, tokenizer), step


def test_every_control_goes_where_it_says(opened, made, tokenizer):
    def is_at(index, step):
        return opened.evaluate(SHOWN) == expected(made[index], step, tokenizer)

    for selector, step in [("#forward", 1), ("#last", 9), ("#back", 8), ("#first", 0)]:
        opened.click(selector)
        assert is_at(0, step), selector
    opened.press("End")
    assert is_at(0, 9)
    opened.press("Home")
    assert is_at(0, 0)
    opened.click("#map")
    assert is_at(0, 5)
    opened.click("#next-sample")
    assert is_at(1, 0)
    opened.click("#previous-sample")
    assert is_at(0, 0)
    slide = "(s => { s.value = 4; s.dispatchEvent(new Event('input')); })"
    opened.evaluate(f"{slide}(document.getElementById('slider'))")
    assert is_at(0, 4)
    assert opened.evaluate("location.hash") == "#sample=0&step=4"


def test_the_address_names_sample_and_step(opened, file, made, tokenizer):
    opened.open("about:blank")
    opened.open(f"{file.as_uri()}#sample=1&step=7")
    assert opened.evaluate(SHOWN) == expected(made[1], 7, tokenizer)


def test_the_replay_runs_to_the_end_and_stops(opened):
    fastest = "(s => { s.value = 64; s.dispatchEvent(new Event('change')); })"
    opened.evaluate(f"{fastest}(document.getElementById('speed'))")
    opened.press(" ")
    assert opened.evaluate("document.getElementById('play').textContent") == "Pause"
    for _ in range(500):
        if opened.evaluate("document.getElementById('play').textContent") == "Play":
            break
        opened.evaluate("1")
    assert "Step 9 of 9" in opened.evaluate("document.getElementById('status').textContent")


def test_markup_in_tokens_texts_and_names_is_text(opened, tokenizer, made):
    assert (
        opened.evaluate("document.querySelectorAll('main b:not(#status b, #text b)').length") == 0
    )
    assert opened.evaluate("document.scripts.length") == 2
    assert (
        opened.evaluate("document.querySelector('h1').textContent")
        == "a </title><b>model</b>, step by step"
    )
    assert "</script>" in opened.evaluate("document.getElementById('text').textContent")
    assert "alert(1)" in opened.evaluate("document.getElementById('settings').textContent")
    shown = {piece.text for piece in map(PieceReader(tokenizer).read_piece, made[0].states[-1][0])}
    assert any("\\x" in text for text in shown)
    opened.press("End")
    whole = opened.evaluate("document.getElementById('tokens').textContent")
    assert "\u65e5\u2025\u2025\u00e9\u2025" in whole


def test_the_page_asks_for_nothing_but_itself(opened, file):
    opened.press("End")
    assert [address for address in opened.requests if address != "about:blank"] == [file.as_uri()]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_stands_out_from_what_lies_behind_it(opened, theme):
    """Contrast of at least 4.5 (WCAG 2.2, 1.4.3) on every colour of probability."""
    opened.emulate("prefers-color-scheme", theme)
    opened.press("End")
    worst = opened.evaluate(CONTRASTS)
    opened.emulate("prefers-color-scheme", "")
    assert worst >= 4.5


# A canvas turns any colour of CSS into bytes of sRGB.
CONTRASTS = """
(() => {
  const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const luminance = (color) => {
    context.fillStyle = color;
    context.fillRect(0, 0, 1, 1);
    const [r, g, b] = [...context.getImageData(0, 0, 1, 1).data].slice(0, 3).map((byte) => {
      const c = byte / 255;
      return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ratio = (one, two) => {
    const [low, high] = [luminance(one), luminance(two)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  };
  const box = document.querySelector("#tokens .chosen");
  box.style.transition = "none";
  const ratios = [];
  for (let share = 0; share <= 1; share += 0.05) {
    box.style.setProperty("--fill", fillOf(share));
    const style = getComputedStyle(box);
    ratios.push(ratio(style.color, style.backgroundColor));
  }
  const card = getComputedStyle(document.querySelector(".card")).backgroundColor;
  for (const name of [".given", ".legend", "dt", "#status"]) {
    const behind = name === "dt" ? getComputedStyle(document.body).backgroundColor : card;
    ratios.push(ratio(getComputedStyle(document.querySelector(name)).color, behind));
  }
  return Math.min(...ratios);
})()
"""
