"""generate and infill of the exported model: batches, padding, cache, guidance, ends."""

from __future__ import annotations

import functools

import pytest
import torch
from exported_code import MASK, random_model

PROMPTS = [[3, 16, 7, 2], [5], [1, 4, MASK, 8, 10, 2, 17], [9, 9]]
SUFFIXES = [[6], [1, 2, 3], [11, 12], [18]]
SEEDS = [11, 12, 13, 14]
PAD = 2

OPTIONS = {
    "confidence": {"order": "confidence", "temperature": 0.0},
    "nothing but the defaults": {},
    "entropy in few steps": {"order": "entropy", "num_steps": 3},
    "margin in blocks": {"order": "margin", "block_length": 3, "num_steps": 5},
    "random, sampled": {"order": "random", "temperature": 0.8, "num_steps": 4},
    "left to right, nucleus": {"order": "left_to_right", "temperature": 0.9, "top_p": 0.8},
    "ancestral, top k": {"order": "ancestral", "num_steps": 6, "temperature": 1.0, "top_k": 5},
    "threshold": {"threshold": 0.3, "block_length": 4},
    "remasking": {"remasking": 0.4, "num_steps": 12, "temperature": 0.7},
    "guidance": {"guidance_scale": 1.5, "num_steps": 5},
    "an end and forbidden tokens": {"end_token_id": 7, "forbidden_token_ids": [3, 4, 8]},
}


@functools.cache
def mdm():
    return random_model(eos_token_id=None, pad_token_id=PAD)


@functools.cache
def causal():
    return random_model(is_causal=True, eos_token_id=None, pad_token_id=PAD, qk_norm=True)


def batch(rows, side, pad=MASK):
    """Pads rows with mask tokens, the worst that padding can be: (tokens, attention mask).

    On the "middle" side only the first token comes before the padding.
    """
    width = max(map(len, rows)) + 1
    tokens, mask = torch.full((len(rows), width), pad), torch.zeros(len(rows), width).long()
    for i, row in enumerate(rows):
        first = {"right": 0, "left": width - len(row), "middle": width - len(row)}[side]
        at = torch.arange(first, first + len(row))
        if side == "middle":
            at[0] = 0
        tokens[i, at], mask[i, at] = torch.tensor(row), 1
    return tokens, mask


@pytest.mark.parametrize("cache", [{}, {"use_cache": True}], ids=["plain", "cached"])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_sequence_depends_neither_on_batch_mates_nor_on_padding(name, cache):
    model, options = mdm(), OPTIONS[name] | cache
    for side, suffix_side in (("left", "right"), ("right", "left")):
        prompts, prompt_mask = batch(PROMPTS, side)
        suffixes, suffix_mask = batch(SUFFIXES, suffix_side)
        whole = model.generate(
            prompts,
            prompt_mask,
            suffix_ids=suffixes,
            suffix_attention_mask=suffix_mask,
            max_new_tokens=6,
            seeds=SEEDS,
            **options,
        )
        width = prompts.shape[1]
        assert whole.shape == (4, width + 6 + 4)
        for i, (prompt, suffix) in enumerate(zip(PROMPTS, SUFFIXES, strict=True)):
            alone = model.generate(
                torch.tensor([prompt]),
                suffix_ids=torch.tensor([suffix]),
                max_new_tokens=6,
                seeds=SEEDS[i : i + 1],
                **options,
            )
            start, stop = width - len(prompt), width + 6 + len(suffix)
            assert whole[i, start:stop].tolist() == alone[0].tolist()
            assert (whole[i, :start] == PAD).all()
            assert (whole[i, stop:] == PAD).all()
            assert (alone < 19).all()
            assert alone[0, -len(suffix) :].tolist() == suffix


@pytest.mark.parametrize("cache", [{}, {"use_cache": True}], ids=["plain", "cached"])
@pytest.mark.parametrize("name", OPTIONS)
def test_infill_of_a_sequence_depends_on_nothing_else(name, cache):
    model, options = mdm(), OPTIONS[name] | cache
    rows = [[MASK, 3, MASK, MASK, 5], [1] * 9 + [MASK] * 7, [2, 2], [MASK] * 7 + [4]]
    for side in ("left", "right", "middle"):
        tokens, mask = batch(rows, side)
        whole = model.infill(tokens, mask, seeds=SEEDS, **options)
        assert torch.equal(whole[mask == 0], tokens[mask == 0])
        for i, row in enumerate(rows):
            alone = model.infill(torch.tensor([row]), seeds=SEEDS[i : i + 1], **options)
            assert whole[i][mask[i] == 1].tolist() == alone[0].tolist()
            assert (alone < 19).all()


@pytest.mark.parametrize("name", OPTIONS)
def test_cache_refreshed_at_every_step_changes_no_token(name):
    prompts, mask = batch(PROMPTS, "left")
    generate = functools.partial(mdm().generate, prompts, mask, max_new_tokens=8, seed=3)
    exact = generate(**OPTIONS[name])
    cached = generate(use_cache=True, cache_refresh_steps=1, **OPTIONS[name])
    assert torch.equal(cached, exact)


def test_cache_computes_a_block_instead_of_the_sequence():
    model, widths = mdm(), []
    hook = model.model.register_forward_hook(lambda _, args, __: widths.append(args[0].shape[1]))
    prompt = torch.tensor([[3, 16, 7, 2, 5, 1, 4]])
    model.generate(prompt, max_new_tokens=6, order="confidence", block_length=3, use_cache=True)
    hook.remove()
    assert widths == [13, 3, 3, 13, 3, 3]


def test_first_step_takes_the_surest_token_of_the_logits():
    model, tokens = mdm(), torch.tensor([[3, MASK, 7, MASK, MASK]])
    states = []
    filled = model.infill(tokens, callback=states.append)
    with torch.no_grad():
        probs = model(tokens).logits[0].softmax(-1).masked_fill(tokens[0, :, None] != MASK, 0)
    best = int(probs.amax(-1).argmax())
    first = states[0]
    assert first.x_BS[0, best] == probs[best].argmax()
    assert (first.x_BS == MASK).sum() == 2
    torch.testing.assert_close(first.probability_BS[0, best], probs[best].amax().float())
    assert torch.equal(states[-1].x_BS, filled)


@pytest.mark.parametrize("is_causal", [False, True])
def test_callback_sees_the_layout_of_the_result(is_causal):
    states = []
    prompts, mask = batch([row for row in PROMPTS if MASK not in row], "right")
    result = (causal() if is_causal else mdm()).generate(
        prompts, mask, max_new_tokens=3, callback=states.append
    )
    assert [state.step for state in states] == [0, 1, 2]
    assert torch.equal(states[-1].x_BS, result)
    width = prompts.shape[1]
    for state in states:
        assert torch.equal(state.x_BS[:, :width], result[:, :width])
        assert state.probability_BS[:, :width].isnan().all()
    assert not states[-1].probability_BS[:, width:].isnan().any()


def test_seeds_number_the_sequences():
    model, options = mdm(), {"max_new_tokens": 8, "temperature": 1.0}
    prompt = torch.tensor([[3, 4]])
    three = model.generate(prompt.expand(3, -1), seed=5, **options)
    assert torch.equal(three[:1], model.generate(prompt, seed=5, **options))
    assert not torch.equal(three[0], three[1])
    assert not torch.equal(three[:1], model.generate(prompt, seed=6, **options))


def guided(model, seen, hidden, scale):
    with torch.no_grad():
        conditional, unconditional = (model(x).logits[0] for x in (seen, hidden))
    return (unconditional + (scale + 1) * (conditional - unconditional)).argmax(-1)


def test_guidance_compares_with_masks_or_with_other_tokens():
    model = mdm()
    prompt, suffix, other = (torch.tensor([row]) for row in ([3, 7], [9], [1, 1]))
    mask = torch.tensor([[MASK]])
    seen = torch.cat([prompt, mask, suffix], dim=1)
    options = {"max_new_tokens": 1, "guidance_scale": 3.0, "suffix_ids": suffix}
    everything_hidden = guided(model, seen, torch.full((1, 4), MASK), 3.0)
    assert model.generate(prompt, **options)[0, 2] == everything_hidden[2]
    replaced = torch.cat([other, mask, suffix], dim=1)
    expected = guided(model, seen, replaced, 3.0)
    assert model.generate(prompt, guidance_ids=other, **options)[0, 2] == expected[2]
    assert model.infill(seen, guidance_ids=replaced, guidance_scale=3.0)[0, 2] == expected[2]
    part = torch.tensor([[True, False, False, False]])
    expected = guided(model, seen, seen.masked_fill(part, MASK), 3.0)
    assert model.infill(seen, prompt_mask=part, guidance_scale=3.0)[0, 2] == expected[2]


def test_guidance_ids_are_padded_like_the_prompt():
    model, others = mdm(), [[1, 1, 2, 2], [8], [0] * 7, [3, 12]]
    options = {"guidance_scale": 2.0, "max_new_tokens": 4, "temperature": 0.0}
    for side in ("left", "right"):
        prompts, mask = batch(PROMPTS, side)
        whole = model.generate(prompts, mask, guidance_ids=batch(others, side)[0], **options)
        for i, (prompt, other) in enumerate(zip(PROMPTS, others, strict=True)):
            prompt, other = torch.tensor([prompt]), torch.tensor([other])
            alone = model.generate(prompt, guidance_ids=other, **options)
            assert torch.equal(whole[i, -4:], alone[0, -4:])


def test_sequences_end_at_the_end_token_unless_told_otherwise():
    model = random_model()
    prompt = torch.tensor([[3, 16, 7]])
    options = {"max_new_tokens": 6, "order": "left_to_right", "temperature": 0.0}
    free = model.generate(prompt, **options)
    model.config.eos_token_id = end = int(free[0, 5])
    new = free[0, 3:].tolist()
    ended = new[: new.index(end)] + [end] * (6 - new.index(end))
    assert len(set(new[new.index(end) :])) > 1
    generate = functools.partial(model.generate, prompt, **options)
    assert generate()[0, 3:].tolist() == ended
    assert torch.equal(generate(stop_at_end=False), free)
    assert torch.equal(generate(suffix_ids=prompt[:, :0]), free)
    explicit = generate(suffix_ids=prompt[:, :0], end_token_id=end)
    assert explicit[0, 3:].tolist() == ended
    masked = torch.cat([prompt, torch.full((1, 6), MASK)], dim=1)
    assert torch.equal(model.infill(masked, order="left_to_right"), free)


def naive_continuation(model, row, num_new):
    tokens = torch.tensor([row])
    with torch.no_grad():
        for _ in range(num_new):
            best = model(tokens).logits[:, -1].argmax(-1)
            tokens = torch.cat([tokens, best[:, None]], dim=1)
    return tokens[0].tolist()


@pytest.mark.parametrize("side", ["left", "right"])
def test_causal_model_continues_as_without_a_cache(side):
    model, rows = causal(), [[3, 16, 7, 2], [5], [1, 4, 2, 8, 10, 2, 17]]
    prompts, mask = batch(rows, side)
    width = prompts.shape[1]
    greedy = {"max_new_tokens": 7, "temperature": 0.0}
    whole = model.generate(prompts, mask, **greedy)
    for i, row in enumerate(rows):
        expected = naive_continuation(model, row, 7)
        assert whole[i].tolist() == [PAD] * (width - len(row)) + expected
    assert torch.equal(whole, model.generate(prompts, mask, use_cache=True, **greedy))
    best = model.generate(prompts, mask, max_new_tokens=7, temperature=1.0, top_k=1)
    assert torch.equal(best, whole)


def test_causal_model_stops_when_every_sequence_has_ended():
    model = random_model(is_causal=True)
    expected = naive_continuation(model, [3, 4], 8)
    model.config.eos_token_id = end = expected[5]
    stop = expected.index(end, 2) + 1
    result = model.generate(torch.tensor([[3, 4]]), max_new_tokens=8, temperature=0.0)
    assert result[0].tolist() == expected[:stop]
    greedy = {"max_new_tokens": 8, "temperature": 0.0}
    free = model.generate(torch.tensor([[3, 4]]), stop_at_end=False, **greedy)
    assert free[0].tolist() == expected


def test_causal_model_refuses_what_is_for_masked_diffusion():
    prompt = torch.tensor([[3, 4]])
    for name, value in {
        "order": "random",
        "num_steps": 3,
        "guidance_scale": 1.0,
        "block_length": 2,
        "threshold": 0.5,
        "remasking": 0.1,
        "suffix_ids": prompt,
        "guidance_ids": prompt,
    }.items():
        with pytest.raises(ValueError, match=f"{name}.*autoregressive"):
            causal().generate(prompt, max_new_tokens=2, **{name: value})
    with pytest.raises(ValueError, match="cache_refresh_steps"):
        causal().generate(prompt, use_cache=True, cache_refresh_steps=2)
    with pytest.raises(ValueError, match="cannot fill masks"):
        causal().infill(prompt)
    with pytest.raises(ValueError, match="0 tokens"):
        causal().generate(prompt, torch.tensor([[0, 0]]), max_new_tokens=2)


def test_length_counts_real_tokens_only():
    model = mdm()
    prompt = torch.zeros(2, 30, dtype=torch.long)
    mask = torch.ones_like(prompt)
    mask[:, :10] = 0
    assert model.generate(prompt, mask, max_new_tokens=12, num_steps=1).shape == (2, 42)
    with pytest.raises(ValueError, match="33 tokens, more than max_position_embeddings=32"):
        model.generate(prompt, mask, max_new_tokens=13)
    with pytest.raises(ValueError, match="33 tokens"):
        causal().generate(prompt, mask, max_new_tokens=13)


def test_an_empty_prompt_is_generated_from_nothing():
    # With masks alone all positions have the same logits, so the order must not look at them.
    generate = functools.partial(mdm().generate, max_new_tokens=5, order="left_to_right")
    empty, padded = torch.zeros(2, 0, dtype=torch.long), torch.zeros(2, 3, dtype=torch.long)
    result = generate(padded, torch.zeros_like(padded))
    assert result.shape == (2, 8)
    assert torch.equal(result[:, 3:], generate(empty))


def test_wrong_arguments_get_one_sentence():
    tokens = torch.tensor([[3, MASK]])
    generate, infill = functools.partial(mdm().generate, max_new_tokens=4), mdm().infill
    cases = [
        (generate, {"temprature": 1.0}, "temprature is no option.*did you mean temperature"),
        (generate, {"generation_config": {"order": "best"}}, "order='best'"),
        (
            generate,
            {"attention_mask": torch.ones(1, 3)},
            "attention mask of input_ids has the shape",
        ),
        (generate, {"guidance_ids": tokens}, "no effect at guidance_scale=0"),
        (generate, {"guidance_ids": tokens[:, :1], "guidance_scale": 1.0}, "guidance_ids has the"),
        (generate, {"suffix_ids": torch.tensor([[20]])}, "suffix_ids holds the token 20"),
        (infill, {"max_new_tokens": 3}, "max_new_tokens is an option of generate"),
        (infill, {"prompt_mask": tokens > 0, "guidance_ids": tokens}, "exclude each other"),
        (infill, {"prompt_mask": tokens > 0}, "no effect at guidance_scale=0"),
    ]
    for method, options, message in cases:
        with pytest.raises(ValueError, match=message) as error:
            method(tokens, **options)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="input_ids has 1 dimensions"):
        generate(tokens[0])
    with pytest.raises(ValueError, match=r"dtype torch\.float32"):
        generate(tokens.float())
