"""What other programs expect of a model and of its tokenizer, in the idioms of transformers."""

from __future__ import annotations

import pytest
import torch
from exported_code import modeling, random_model
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    pipeline,
)

from megatron_mdm.inference.tasks.harness import HarnessModel

TOKENS = torch.tensor([[3, 16, 7, 0, 9, 18, 2], [1, 4, 4, 8, 10, 2, 17]])
PADDED = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
EXACT = {"rtol": 1e-10, "atol": 1e-10}
KINDS = pytest.mark.parametrize(
    "options", [{}, {"is_causal": True, "qk_norm": True}, {"tie_word_embeddings": True}], ids=str
)


def causal_model(**options):
    """The same weights as `random_model`, as a causal language model."""
    masked = random_model(is_causal=True, **options)
    model = modeling.MdmForCausalLM(masked.config).double().eval()
    model.load_state_dict(masked.state_dict())
    return model


def causal_and_masked(export, tiny):
    folder, _, _ = export(tiny(is_causal=True, num_query_groups=2))
    load = {"trust_remote_code": True}
    causal = AutoModelForCausalLM.from_pretrained(folder, **load).eval()
    masked = AutoModelForMaskedLM.from_pretrained(folder, **load).eval()
    return folder, causal, masked


@KINDS
@pytest.mark.parametrize("mask", [None, PADDED], ids=["full", "padded"])
def test_attention_weights_are_those_that_the_kernels_use(options, mask):
    model = random_model(**options)
    attention = model.model.layers[0].self_attn
    seen = {}
    attention.v_proj.register_forward_hook(lambda *parts: seen.update(value=parts[2]))
    attention.o_proj.register_forward_hook(lambda *parts: seen.update(mixed=parts[1][0]))
    with torch.no_grad():
        found = model(TOKENS, attention_mask=mask, output_attentions=True)
        plain = model(TOKENS, attention_mask=mask)
    assert torch.equal(found.logits, plain.logits)
    assert [tuple(one.shape) for one in found.attentions] == [(2, 4, 7, 7)] * 2
    torch.testing.assert_close(found.attentions[1].sum(-1), torch.ones(2, 4, 7).double())
    values = seen["value"].unflatten(-1, (2, 6)).transpose(1, 2).repeat_interleave(2, dim=1)
    mixed = (found.attentions[0] @ values).transpose(1, 2).flatten(2)
    torch.testing.assert_close(mixed, seen["mixed"], **EXACT)


@KINDS
def test_hidden_states_lead_from_the_embeddings_to_the_logits(options):
    model = random_model(**options)
    with torch.no_grad():
        found = model(TOKENS, output_hidden_states=True)
        assert torch.equal(found.hidden_states[0], model.model.embed_tokens(TOKENS))
        assert torch.equal(model.output_logits(found.hidden_states[-1]), found.logits)
        assert len(found.hidden_states) == 3
        model.config.output_hidden_states = True
        assert torch.equal(model(TOKENS).hidden_states[1], found.hidden_states[1])
        as_tuple = model(TOKENS, labels=TOKENS, return_dict=False)
    assert len(as_tuple) == 3
    assert torch.equal(as_tuple[1], found.logits)


def test_embeddings_may_take_the_place_of_tokens():
    for model in (random_model(), causal_model()):
        embeddings = model.get_input_embeddings()(TOKENS)
        with torch.no_grad():
            found = model(inputs_embeds=embeddings, attention_mask=PADDED).logits
            assert torch.equal(found, model(TOKENS, attention_mask=PADDED).logits)
        for inputs in ({}, {"input_ids": TOKENS, "inputs_embeds": embeddings}):
            with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
                model(**inputs)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("make", [random_model, causal_model])
def test_gradient_checkpointing_gives_equal_gradients(make, use_reentrant):
    model = make().train()
    model(TOKENS, labels=TOKENS).loss.backward()
    expected = {name: one.grad.clone() for name, one in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    passes = []
    model.model.layers[0].register_forward_pre_hook(lambda *_: passes.append(1))
    model(TOKENS, labels=TOKENS).loss.backward()
    assert len(passes) == 2
    for name, one in model.named_parameters():
        torch.testing.assert_close(one.grad, expected[name], **EXACT)
    model.gradient_checkpointing_disable()
    model(TOKENS)
    assert len(passes) == 3


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"tie_word_embeddings": True},
        {"padded_vocab_size": 24},
        {"padded_vocab_size": 24, "mask_token_id": 24},
        {"padded_vocab_size": 24, "mask_token_id": 24, "tie_word_embeddings": True},
        {"padded_vocab_size": 24, "mask_token_id": 4},
    ],
    ids=str,
)
@pytest.mark.parametrize("added", [0, 2])
def test_a_resized_vocabulary_keeps_the_mask_and_the_logits(options, added):
    model = random_model(**options)
    mask = model.config.mask_token_id
    num_rows = max(19, mask + 1) + added
    tokens = TOKENS.clone()
    tokens[0, 2] = mask
    with torch.no_grad():
        before, mask_row = model(tokens).logits, model.model.embed_tokens.weight[mask].clone()
        model.resize_token_embeddings(num_rows)
        after = model(tokens).logits
    assert after.shape == (2, 7, num_rows)
    torch.testing.assert_close(after[..., :19], before, **EXACT)
    # Neither the mask nor the ids before it that no token has are predicted; new tokens are.
    allowed = torch.ones(num_rows, dtype=torch.bool)
    allowed[19:mask], allowed[mask] = False, False
    assert torch.equal(after > -torch.inf, allowed.expand_as(after))
    assert torch.equal(model.model.embed_tokens.weight[mask], mask_row)
    assert (model.config.mask_token_id, model.config.vocab_size) == (mask, num_rows)
    with torch.no_grad():
        model.resize_token_embeddings(num_rows + 3)
        again = model(tokens).logits
    torch.testing.assert_close(again[..., :num_rows], after, **EXACT)
    with pytest.raises(ValueError, match=f"={mask} leaves no row for the mask token {mask}"):
        model.resize_token_embeddings(mask)


def test_a_resized_model_is_saved_and_loaded_with_its_tokenizer(tiny, export, tmp_path):
    folder, _, _ = export(tiny(tie_embeddings=True))
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True).eval()
    assert len(tokenizer) == len(model.get_input_embeddings().weight) == tokenizer.mask_token_id + 1
    assert tokenizer.add_tokens(["new"]) == 1
    assert tokenizer.convert_tokens_to_ids("new") == 20
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path / "again")
    tokenizer.save_pretrained(tmp_path / "again")
    again = AutoModelForMaskedLM.from_pretrained(tmp_path / "again", trust_remote_code=True).eval()
    kept = AutoTokenizer.from_pretrained(tmp_path / "again", trust_remote_code=True)
    tokens = kept("new <|mask|> w5", return_tensors="pt").input_ids
    assert tokens.tolist() == [[20, 19, 5]]
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    assert again.generate(tokens, max_new_tokens=4).max() <= 20


def test_the_fill_mask_pipeline_gives_the_models_probabilities(tiny, export):
    folder, _, _ = export(tiny())
    found = pipeline("fill-mask", model=str(folder), trust_remote_code=True)("w3 <|mask|> w5")
    model = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True)
    best = model(torch.tensor([[3, 19, 5]])).logits[0, 1].softmax(-1).topk(5)
    assert [one["token"] for one in found] == best.indices.tolist()
    torch.testing.assert_close(torch.tensor([one["score"] for one in found]), best.values)


def test_the_usual_collator_makes_batches_that_the_model_learns_from(tiny, export):
    folder, _, _ = export(tiny())
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True)
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.5, seed=0)
    batch = collator([tokenizer("w3 w4 w5 w6 w7 w8"), tokenizer("w9 w10")])
    assert (batch["input_ids"] == 19).any()
    learned = batch["labels"] != -100
    assert not learned[batch["attention_mask"] == 0].any()
    expected = F.cross_entropy(model(**batch).logits[learned], batch["labels"][learned])
    torch.testing.assert_close(model(**batch).loss, expected)


def test_an_autoregressive_export_is_a_causal_language_model(tiny, export):
    _, causal, masked = causal_and_masked(export, tiny)
    tokens = torch.tensor([[3, 16, 7, 0, 9], [1, 4, 4, 8, 10]])
    with torch.no_grad():
        found, expected = causal(tokens, labels=tokens), masked(tokens).logits
    assert torch.equal(found.logits, expected)
    loss = F.cross_entropy(expected[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(found.loss, loss)
    assert torch.equal(causal(tokens, logits_to_keep=2).logits, expected[:, -2:])
    with pytest.raises(ValueError, match="AutoModelForMaskedLM"):
        modeling.MdmForCausalLM(random_model().config)


def test_a_masked_diffusion_export_is_no_causal_language_model(tiny, export):
    with pytest.raises(ValueError, match="AutoModelFor"):
        AutoModelForCausalLM.from_pretrained(export(tiny())[0], trust_remote_code=True)


@pytest.mark.parametrize("use_cache", [True, False])
def test_transformers_own_generation_is_the_greedy_one(tiny, export, use_cache):
    _, causal, masked = causal_and_masked(export, tiny)
    prompts = torch.tensor([[0, 0, 7, 16, 9], [1, 4, 4, 8, 10]])
    real = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    options = {"do_sample": False, "use_cache": use_cache, "pad_token_id": 0}
    found = causal.generate(prompts, attention_mask=real, max_new_tokens=6, **options)
    expected = masked.generate(prompts, attention_mask=real, max_new_tokens=6, temperature=0.0)
    assert torch.equal(found[:, 5:], expected[:, 5:])


def test_a_cache_of_transformers_gives_the_logits_of_one_pass():
    model = causal_model()
    with torch.no_grad():
        whole = model(TOKENS, attention_mask=PADDED).logits
        first = model(TOKENS[:, :4], attention_mask=PADDED[:, :4], use_cache=True)
        cache = first.to_tuple()[1]
        rest = model(TOKENS[:, 4:], attention_mask=PADDED, past_key_values=cache).logits
    found = torch.cat([first.logits, rest], dim=1)
    torch.testing.assert_close(found[PADDED == 1], whole[PADDED == 1], **EXACT)


def test_the_harness_own_model_scores_an_autoregressive_export_as_ours_does(tiny, export):
    folder, _, masked = causal_and_masked(export, tiny)
    theirs = HFLM(pretrained=str(folder), trust_remote_code=True, device="cpu", batch_size=2)
    pairs = [("w3 w4", " w5 w6 w7"), ("w8", " w9"), ("w2 w3 w4 w5", " w10 w11")]
    requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
    found = theirs.loglikelihood(requests, disable_tqdm=True)
    expected = HarnessModel(pretrained=str(folder)).loglikelihood(requests)
    for pair, (theirs_nats, is_greedy), ours in zip(pairs, found, expected, strict=True):
        assert (theirs_nats, is_greedy) == (pytest.approx(ours[0], abs=1e-4), ours[1])
        tokens = [int(word[1:]) for word in "".join(pair).split()]
        start = len(pair[0].split())
        log_probs = masked(torch.tensor([tokens])).logits[0].log_softmax(-1)
        exact = sum(log_probs[i - 1, tokens[i]].item() for i in range(start, len(tokens)))
        assert theirs_nats == pytest.approx(exact, abs=1e-4)


@pytest.mark.parametrize(
    ("make", "task"),
    [
        (random_model, None),
        (random_model, TaskType.FEATURE_EXTRACTION),
        (random_model, TaskType.TOKEN_CLS),
        (causal_model, TaskType.CAUSAL_LM),
    ],
)
def test_peft_adapts_the_models(make, task, tmp_path):
    model = make()
    with torch.no_grad():
        before = model(TOKENS).logits
    config = LoraConfig(task_type=task, r=2, target_modules=["q_proj", "v_proj"])
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        assert torch.equal(adapted(input_ids=TOKENS).logits, before)
    adapted.gradient_checkpointing_enable()
    adapted.enable_input_require_grads()
    adapted.train()
    logits = adapted(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS)).logits
    F.cross_entropy(logits.flatten(0, 1), TOKENS.flatten()).backward()
    learned = [one for one in adapted.parameters() if one.requires_grad]
    assert all(one.grad is not None for one in learned)
    with torch.no_grad():
        for one in learned:
            one += 0.1
        found = adapted.eval()(input_ids=TOKENS).logits
    assert (found - before).abs().max() > 1e-3
    adapted.save_pretrained(tmp_path, save_embedding_layers=False)
    again = PeftModel.from_pretrained(make(), tmp_path).double().eval()
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=TOKENS).logits, found, rtol=1e-5, atol=1e-5)


def test_an_adapter_of_the_output_layer_counts():
    model = random_model(padded_vocab_size=24, mask_token_id=24)
    with torch.no_grad():
        before = model(TOKENS).logits
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head"])).double()
        for name, one in adapted.named_parameters():
            if "lora" in name:
                one.fill_(0.1)
        found = adapted(input_ids=TOKENS).logits
        hidden = model(TOKENS, output_hidden_states=True).hidden_states[-1]
    scale = 8 / 2
    change = (hidden.sum(-1) * 0.1 * 2 * 0.1 * scale)[..., None].expand_as(before)
    torch.testing.assert_close(found - before, change, **EXACT)
