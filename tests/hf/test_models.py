"""Encoders, encoder-decoders, gradient checkpointing, and adapters of peft."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from fast_transformers.feature_maps import Favor
from fast_transformers.hf import (
    FastTransformerConfig,
    FastTransformerForCausalLM,
    FastTransformerForMaskedLM,
    FastTransformerForSeq2SeqLM,
    FastTransformerModel,
    RecurrentState,
)
from tests.hf.test_modeling import every_kind, make, prompts

SIZES = {"vocab_size": 30, "n_positions": 40, "n_layers": 2, "n_heads": 2, "d_model": 32}
SEQ2SEQ = [
    {},
    {"attention": "full", "cross_attention": "full", "encoder_attention": "full"},
    {"feature_map": "favor:n_dims=32", "rotary": True, "decoder_layers": 1},
    {"attention": "conditional-full:causal-linear", "cross_attention": "conditional-full:linear"},
]


def small(cls, **options):
    torch.manual_seed(0)
    model = cls(FastTransformerConfig(**SIZES, **options)).eval()
    if hasattr(model, "head"):
        with torch.no_grad():
            model.head.weight.mul_(4)
    return model


def seq2seq(**options):
    special = {"decoder_start_token_id": 1, "pad_token_id": 0}
    return small(FastTransformerForSeq2SeqLM, is_encoder_decoder=True, **special, **options)


@pytest.mark.parametrize("attention", ["linear", "full"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_encoders_ignore_padding(attention, side):
    width = (3, 0) if side == "left" else (0, 3)
    tokens = torch.nn.functional.pad(prompts(2, 6), width, value=9)
    mask = torch.nn.functional.pad(torch.ones(2, 6), width)
    for cls, name in (
        (FastTransformerModel, "last_hidden_state"),
        (FastTransformerForMaskedLM, "logits"),
    ):
        for rotary in (False, True):
            model = small(cls, attention=attention, causal=False, rotary=rotary)
            out = model(tokens, attention_mask=mask)[name][mask.bool()]
            expected = model(prompts(2, 6))[name].flatten(0, 1)
            torch.testing.assert_close(out, expected)


def test_encoders_see_both_sides_unless_causal():
    for causal, attention in ((False, "linear"), (True, "causal-linear"), (True, "full")):
        model = small(FastTransformerModel, attention=attention, causal=causal)
        changed = prompts()
        changed[:, -1] += 1
        out = [model(tokens).last_hidden_state[:, :-1] for tokens in (prompts(), changed)]
        assert torch.equal(*out) == causal
    with pytest.raises(ValueError, match="causal=False"):
        small(FastTransformerForMaskedLM)


def test_masked_language_model():
    model = small(FastTransformerForMaskedLM, attention="linear", causal=False)
    labels = prompts()
    labels[:, 1:] = -100
    out = model(prompts(), labels=labels)
    expected = cross_entropy(out.logits[:, 0], labels[:, 0])
    torch.testing.assert_close(out.loss, expected)
    halved = model(prompts(), labels=labels, num_items_in_batch=6).loss
    torch.testing.assert_close(halved, expected / 2)
    assert len(model(prompts(), labels=labels, return_dict=False)) == 2


@pytest.mark.parametrize("options", SEQ2SEQ)
@pytest.mark.parametrize("beams", [1, 3])
def test_sequence_to_sequence_generation(options, beams):
    model = seq2seq(**options)
    source, mask = prompts(3, 7), torch.ones(3, 7, dtype=torch.long)
    mask[1, 4:] = mask[2, :3] = 0
    settings = {"max_new_tokens": 12, "do_sample": False, "num_beams": beams}
    cached = model.generate(source, attention_mask=mask, **settings)
    recomputed = model.generate(source, attention_mask=mask, use_cache=False, **settings)
    assert torch.equal(cached, recomputed)
    assert cached.shape == (3, 13)
    alone = model.generate(source[1:2, :4], **settings)
    assert torch.equal(alone, cached[1:2])
    assert not torch.equal(cached, model.generate(source, **settings))


@pytest.mark.parametrize("options", SEQ2SEQ)
def test_sequence_to_sequence_states(options):
    model, source, target = seq2seq(**options), prompts(2, 7), prompts(2, 9)
    whole = model(source, decoder_input_ids=target)
    cache, logits = RecurrentState(), []
    for piece in target.split([4, 1, 4], 1):
        out = model(
            encoder_outputs=(whole.encoder_last_hidden_state,), decoder_input_ids=piece,
            past_key_values=cache,
        )  # fmt: skip
        logits.append(out.logits)
    torch.testing.assert_close(torch.cat(logits, 1), whole.logits, atol=2e-4, rtol=1e-4)
    mask = torch.ones(2, 9)
    mask[0, :2] = 0
    out = model(source, decoder_input_ids=target, decoder_attention_mask=mask).logits
    alone = model(source[:1], decoder_input_ids=target[:1, 2:]).logits
    torch.testing.assert_close(out[:1, 2:], alone)


def test_sequence_to_sequence_loss():
    model, source = seq2seq(), prompts()
    labels = prompts(3, 4)
    labels[0, 2:] = -100
    out = model(source, labels=labels)
    shifted = torch.cat([torch.ones(3, 1, dtype=torch.long), labels[:, :-1]], 1).clamp(min=0)
    logits = model(source, decoder_input_ids=shifted).logits
    assert torch.equal(out.logits, logits)
    torch.testing.assert_close(out.loss, cross_entropy(logits.mT, labels))
    with pytest.raises(ValueError, match="decoder_input_ids must be given"):
        model(source)
    with pytest.raises(ValueError, match="input_ids or encoder_outputs"):
        model(decoder_input_ids=source)
    with pytest.raises(ValueError, match="is_encoder_decoder must be True"):
        small(FastTransformerForSeq2SeqLM)


@pytest.mark.parametrize(
    ("auto", "model"),
    [
        (AutoModel, lambda: small(FastTransformerModel, attention="full", causal=False)),
        (AutoModelForMaskedLM, lambda: small(
            FastTransformerForMaskedLM, attention="linear", causal=False,
            feature_map="favor:n_dims=8")),
        (AutoModelForSeq2SeqLM, lambda: seq2seq(feature_map="favor:n_dims=8")),
    ],
)  # fmt: skip
def test_round_trips(auto, model, tmp_path):
    model = model()
    model.save_pretrained(tmp_path)
    loaded = auto.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    inputs = {"input_ids": prompts()}
    if auto is AutoModelForSeq2SeqLM:
        inputs["decoder_input_ids"] = prompts()
    for mine, theirs in zip(model(**inputs).to_tuple(), loaded(**inputs).to_tuple(), strict=True):
        assert torch.equal(mine, theirs)


def checkpoint(model):
    """In every release of transformers 5."""
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)()


@every_kind
def test_gradient_checkpointing(kind):
    gradients, calls = [], []
    for on in (False, True):
        model = make(**kind, dropout=0.0).train()
        for layer in model.encoder.layers:
            layer.linear1.register_forward_pre_hook(lambda *_: calls.append(1))
        if on:
            checkpoint(model)
        model(prompts(), labels=prompts()).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
        assert len(calls) == (4 if on else 2)  # forward, and again in the backward pass
        calls.clear()
    torch.testing.assert_close(*gradients)
    with torch.no_grad():
        model(prompts())
    assert len(calls) == 2
    model.eval()(prompts()).logits.sum().backward()
    assert len(calls) == 4
    model.train()(prompts(), use_cache=True).logits.sum().backward()
    assert len(calls) == 6


def test_gradient_checkpointing_of_an_encoder_and_a_decoder():
    gradients = []
    for on in (False, True):
        model = seq2seq(dropout=0.0, feature_map="favor:n_dims=8,redraw=100").train()
        if on:
            checkpoint(model)
        model(prompts(), labels=prompts()).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
        assert any(isinstance(m, Favor) for m in model.modules())
    torch.testing.assert_close(*gradients)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs peft")
@every_kind
def test_adapters(kind, tmp_path):
    """LoRA changes what is generated, with the state as without; it is saved and merged."""
    import peft

    model = make(**kind, dropout=0.0)
    settings = {"max_new_tokens": 10, "do_sample": False}
    before = model.generate(prompts(), **settings)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, init_lora_weights=False,
        target_modules=["query_projection", "value_projection", "linear1"],
    )  # fmt: skip
    adapted = peft.get_peft_model(model, config)
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora" in name for name in trained)
    adapted.train()(input_ids=prompts(), labels=prompts()).loss.backward()
    adapted.eval()
    after = adapted.generate(input_ids=prompts(), **settings)
    assert not torch.equal(after, before)
    options = {"input_ids": prompts(), "use_cache": False}
    assert torch.equal(adapted.generate(**options, **settings), after)
    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(make(**kind, dropout=0.0), tmp_path)
    assert torch.equal(again.generate(input_ids=prompts(), **settings), after)
    merged = adapted.merge_and_unload()
    assert isinstance(merged, FastTransformerForCausalLM)
    assert torch.equal(merged.generate(prompts(), **settings), after)
