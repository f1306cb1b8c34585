"""The exported network against transformers' Qwen models, and its passes over windows."""

from __future__ import annotations

import pytest
import torch
from exported_code import MASK, caching, random_model, sampler_state
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

Window = sampler_state.Window
TOKENS = torch.tensor([[3, 16, 7, 0, 9, 18, 2], [1, 4, 4, 8, 10, 2, 17]])
PADDED = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
MASKED = torch.tensor([[3, MASK, 7, MASK, MASK, 18, MASK], [1, MASK, MASK, 8, MASK, 2, 17]])
EXACT = {"rtol": 1e-10, "atol": 1e-10}


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ((Qwen2Config, Qwen2ForCausalLM), {"qkv_bias": True}),
        ((Qwen3Config, Qwen3ForCausalLM), {"qk_norm": True}),
        ((Qwen3Config, Qwen3ForCausalLM), {"qk_norm": True, "qkv_bias": True}),
    ],
    ids=["biases of qwen2", "norms of qwen3", "both"],
)
def test_biases_and_head_norms_agree_with_transformers(family, options):
    ours = random_model(is_causal=True, **options)
    config = ours.config
    sizes = {
        name: getattr(config, name)
        for name in (
            *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
            *("num_key_value_heads", "head_dim", "intermediate_size", "rms_norm_eps"),
        )
    }
    bias = {"attention_bias": True} if family[0] is Qwen3Config and config.qkv_bias else {}
    theirs = family[1](family[0](**sizes, **bias, rope_theta=10000.0)).double().eval()
    weights = dict(ours.state_dict())
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][:-1]
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert not unexpected
    # Theirs has a bias at the attention's output, too.
    assert all(name.endswith("o_proj.bias") for name in missing)
    for name in missing:
        theirs.get_parameter(name).data.zero_()
    with torch.no_grad():
        expected = theirs(TOKENS).logits
        # Their norms compute in float32.
        torch.testing.assert_close(ours(TOKENS).logits, expected, rtol=0, atol=2e-5)
        for name, parameter in ours.named_parameters():
            if name.endswith(("proj.bias", "q_norm.weight", "k_norm.weight")):
                parameter.data += 1.0
        assert (ours(TOKENS).logits - expected).abs().max() > 0.01


def logits_of(model, tokens, mask=None):
    positions = None if mask is None else caching.count_positions(mask)
    with torch.no_grad():
        return model(tokens, attention_mask=mask, position_ids=positions).logits


# A cap that bends these scores.
SCORED = {
    "qk_norm": "width",
    "attention_soft_cap": 1.5,
    "attention_sink": True,
    "mlp": "relu2",
    "mlp_bias": True,
}


@pytest.mark.parametrize("options", [{"qk_norm": True}, SCORED], ids=["head norms", "scored"])
@pytest.mark.parametrize("mask", [None, PADDED], ids=["full", "padded"])
@pytest.mark.parametrize("stops", [(4, 5, 6, 7), (4, 7)], ids=["one by one", "three at once"])
def test_causal_cache_gives_the_logits_of_one_pass(mask, stops, options):
    model = random_model(is_causal=True, **options)
    expected = logits_of(model, TOKENS, mask)
    denoiser = caching.MdmDenoiser(model, mask)
    start = 0
    for step, stop in enumerate(stops):
        seen = TOKENS.clone()
        seen[:, stop:] = MASK
        needed = torch.zeros_like(TOKENS, dtype=torch.bool)
        needed[:, max(start, 3) : stop] = True
        with torch.no_grad():
            logits = denoiser.logits_at(seen, needed, Window(start, stop, step))
        torch.testing.assert_close(logits, expected[needed], **EXACT)
        start = stop


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tie_word_embeddings": True},
        {"mask_token_id": 4},
        {"padded_vocab_size": 24},
        {"padded_vocab_size": 24, "tie_word_embeddings": True, "mask_token_id": 20},
    ],
)
def test_logits_at_needed_positions_are_those_of_the_whole_pass(options):
    model = random_model(**options)
    tokens = TOKENS.masked_fill(MASKED == MASK, model.config.mask_token_id)
    needed = tokens == model.config.mask_token_id
    rows = []
    model.model.register_forward_hook(lambda *_: rows.append("pass"))
    with torch.no_grad():
        logits = caching.MdmDenoiser(model, PADDED).logits_at(tokens, needed, Window(1, 5, 3))
    assert logits.shape == (int(needed.sum()), 19)
    assert len(rows) == 1
    torch.testing.assert_close(logits, logits_of(model, tokens, PADDED)[needed], **EXACT)
    if model.config.mask_token_id == 4:
        assert (logits[:, 4] == -torch.inf).all()


def frozen_logits(model, before, after, touched, mask):
    """Logits where every position but the touched ones keeps its keys and values of `before`."""
    kept = {}
    layers = [layer.self_attn for layer in model.model.layers]
    projections = [p for layer in layers for p in (layer.k_proj, layer.v_proj)]
    hooks = [
        p.register_forward_hook(lambda module, _, out: kept.update({module: out}))
        for p in projections
    ]
    logits_of(model, before, mask)
    for hook in hooks:
        hook.remove()
    hooks = [
        p.register_forward_hook(
            lambda module, _, out: torch.where(touched[..., None], out, kept[module])
        )
        for p in projections
    ]
    result = logits_of(model, after, mask)
    for hook in hooks:
        hook.remove()
    return result


@pytest.mark.parametrize("mask", [None, PADDED], ids=["full", "padded"])
def test_between_refreshes_other_positions_keep_their_keys_and_values(mask):
    model = random_model(qkv_bias=True)
    needed = MASKED == MASK
    needed[:, 5:] = False
    denoiser = caching.MdmDenoiser(model, mask, use_cache=True)
    before, after = MASKED, MASKED.clone()
    after[0, 4], after[1, 1], after[1, 2] = 6, 11, 12
    still_needed = needed & (after == MASK)
    with torch.no_grad():
        first = denoiser.logits_at(before, needed, Window(1, 5, 0))
        second = denoiser.logits_at(after, still_needed, Window(1, 5, 1))
        third = denoiser.logits_at(after, still_needed, Window(1, 5, 0))
    expected = frozen_logits(model, before, after, needed, mask)[still_needed]
    exact = logits_of(model, after, mask)[still_needed]
    torch.testing.assert_close(first, logits_of(model, before, mask)[needed], **EXACT)
    torch.testing.assert_close(second, expected, **EXACT)
    torch.testing.assert_close(third, exact, **EXACT)
    assert (second - exact).abs().max() > 0.01


def test_cache_refreshed_at_every_step_is_exact():
    model = random_model()
    needed = MASKED == MASK
    denoiser = caching.MdmDenoiser(model, use_cache=True, cache_refresh_steps=2)
    after = MASKED.masked_fill(torch.tensor([[0, 1, 0, 0, 0, 0, 0]] * 2).bool(), 5)
    with torch.no_grad():
        denoiser.logits_at(MASKED, needed, Window(1, 7, 0))
        between = denoiser.logits_at(after, needed, Window(1, 7, 1))
        refreshed = denoiser.logits_at(after, needed, Window(1, 7, 2))
    exact = logits_of(model, after)[needed]
    torch.testing.assert_close(refreshed, exact, **EXACT)
    assert (between - exact).abs().max() > 1e-4


def test_cache_takes_its_memory_once():
    cache, kept = caching.BlockCache(2, 7, is_causal=False), []
    model = random_model()
    for start, stop in ((0, 7), (1, 5)):
        with torch.no_grad():
            model.model(TOKENS[:, start:stop], None, None, cache.open_window(start, stop))
        layers = [cache.get_layer(i, None) for i in range(2)]
        kept.append([tensor for pair in layers for tensor in pair])
    assert [t.data_ptr() for t in kept[0]] == [t.data_ptr() for t in kept[1]]
    assert sum(t.untyped_storage().nbytes() for t in kept[0]) == 2 * 2 * 2 * 2 * 7 * 6 * 8


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"is_causal": True, "qk_norm": True, "qkv_bias": True, "tie_word_embeddings": True},
        SCORED,
        SCORED | {"is_causal": True},
    ],
    ids=["bidirectional", "causal", "with biases, head norms and tied", "scored", "scored causal"],
)
@pytest.mark.parametrize("mask", [None, PADDED], ids=["full", "padded"])
def test_picked_columns_have_the_hidden_states_of_the_whole_pass(options, mask):
    model = random_model(**options).model
    picked = torch.tensor([[6, 3, 4], [0, 2, 5]])
    with torch.no_grad():
        whole = model(TOKENS, mask, None)
        found = model(TOKENS, mask, None, None, picked)
    torch.testing.assert_close(found, whole[torch.arange(2)[:, None], picked], **EXACT)


@pytest.mark.parametrize("picked", [None, torch.tensor([[2, 4, 6]])], ids=["all", "picked"])
def test_a_mask_of_keys_keeps_two_texts_in_one_row_apart(picked):
    model = random_model(is_causal=True, qk_norm=True).model
    # Columns 0 to 2 are common, 3 and 4 are one text's, 5 and 6 the other's.
    branch = torch.tensor([0, 0, 0, 1, 1, 2, 2])
    seen = torch.ones(7, 7).tril().bool() & ((branch == 0) | (branch == branch[:, None]))
    positions = torch.tensor([[0, 1, 2, 3, 4, 3, 4]])
    texts = [[0, 1, 2, 3, 4], [0, 1, 2, 5, 6]]
    with torch.no_grad():
        found = model(TOKENS[:1], seen[None], positions, None, picked)
        alone = [model(TOKENS[:1, columns], None, None) for columns in texts]
    expected = torch.cat([alone[0], alone[1][:, 3:]], dim=1)
    expected = expected if picked is None else expected[:, picked[0]]
    torch.testing.assert_close(found, expected, **EXACT)
