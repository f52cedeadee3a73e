import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from fast_transformers.feature_maps import RandomFeatureMap
from fast_transformers.hf import FastTransformerConfig, FastTransformerForCausalLM, RecurrentState

KINDS = [
    {"attention": "causal-linear", "feature_map": "elu"},
    {"attention": "causal-linear", "feature_map": "favor:n_dims=32"},
    {"attention": "causal-linear", "feature_map": "elu", "rotary": True, "norm_first": True},
    {"attention": "causal-linear", "feature_map": "centered:inner='derf:heads=2',heads=2"},
    {"attention": "causal-linear", "feature_map": "cos:inner='projected:dim=4'"},
    {
        "attention": "causal-linear",
        "feature_map": "concat:inners=['hedgehog','rebased','polysketch:degree=8','t2r:heads=2']",
    },
    {"attention": "full"},
    {"attention": "full", "rotary": True, "norm_type": "rmsnorm"},
    {"attention": "conditional-full:causal-linear"},
]
IDS = [", ".join(map(str, kind.values())) for kind in KINDS]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=IDS)


def make(**options):
    torch.manual_seed(0)
    sizes = {"vocab_size": 30, "n_positions": 40, "n_layers": 2, "n_heads": 2, "d_model": 32}
    model = FastTransformerForCausalLM(FastTransformerConfig(**sizes, **options)).eval()
    with torch.no_grad():
        model.head.weight.mul_(4)  # so that the likeliest token is clear
    return model


def prompts(rows=3, length=5):
    return torch.randint(30, (rows, length), generator=torch.Generator().manual_seed(1))


@every_kind
def test_state_gives_what_the_whole_sequence_gives(kind):
    model, tokens = make(**kind), prompts(2, 12)
    whole = model(tokens)
    assert whole.past_key_values is None
    first = model(tokens[:, :7], use_cache=True)
    second = model(tokens[:, 7:], past_key_values=first.past_key_values)
    stepped = torch.cat([first.logits, second.logits], 1)
    torch.testing.assert_close(stepped, whole.logits, atol=2e-4, rtol=1e-4)
    assert second.past_key_values.get_seq_length() == 12


@every_kind
@pytest.mark.parametrize("beams", [1, 3])
def test_cached_generation_is_recomputed_generation(kind, beams):
    model, options = make(**kind), {"max_new_tokens": 15, "do_sample": False, "num_beams": beams}
    cached = model.generate(prompts(), **options)
    assert torch.equal(cached, model.generate(prompts(), use_cache=False, **options))
    assert cached.shape == (3, 20)


def test_beams_are_not_greedy():
    model = make()
    options = {"max_new_tokens": 15, "do_sample": False}
    greedy, beams = (model.generate(prompts(), num_beams=b, **options) for b in (1, 3))
    assert not torch.equal(greedy, beams)  # else the test above proves nothing


def test_sampling_follows_the_seed():
    model, drawn = make(), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        options = {"do_sample": True, "temperature": 0.9, "top_p": 0.95}
        drawn.append(model.generate(prompts(), max_new_tokens=10, **options))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@every_kind
def test_round_trip(kind, tmp_path):
    model = make(**kind)
    model.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), FastTransformerConfig)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, FastTransformerForCausalLM)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(loaded(prompts()).logits, model(prompts()).logits)
    for module in loaded.modules():
        if isinstance(module, RandomFeatureMap):
            assert int(module.calls) == 0
            assert 0 <= int(module.seed) < 2**62


def test_loaded_random_maps_redraw_each_with_a_seed_of_its_own(tmp_path):
    make(feature_map="favor:n_dims=8,redraw=1").save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).train()
    maps = [m for m in loaded.modules() if isinstance(m, RandomFeatureMap)]
    before = [m.omega.clone() for m in maps]
    for _ in range(2):
        loaded(prompts())
    assert all(not torch.equal(m.omega, omega) for m, omega in zip(maps, before, strict=True))
    assert not torch.equal(maps[0].omega, maps[1].omega)


def test_projections_of_queries_and_keys_start_alike_and_part_when_loaded(tmp_path):
    """Every release of transformers asks for the first weights, and leaves loaded ones alone."""
    model = make(feature_map="projected:dim=4")
    layers = model.encoder.layers
    linears = [layer.attention.inner_attention.feature_map.linear for layer in layers]
    for linear in linears:
        assert torch.equal(linear.queries.weight, linear.keys.weight)
        linear.keys.weight.data.add_(1)
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    lost = "encoder.layers.0.attention.inner_attention.feature_map.linear.queries.weight"
    weights = load_file(path)
    save_file({name: x for name, x in weights.items() if name != lost}, path, {"format": "pt"})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert [name for name, x in weights.items() if not torch.equal(x, loaded[name])] == [lost]


def test_generation_follows_replaced_and_changed_parameters():
    model, other = make(), make(dropout=0.0)
    model.generate(prompts(), max_new_tokens=2)
    for parameter in other.parameters():
        parameter.data.mul_(1.1)
    model.load_state_dict(other.state_dict(), assign=True)
    options = {"max_new_tokens": 10, "do_sample": False}
    expected = other.generate(prompts(), use_cache=False, **options)
    assert torch.equal(model.generate(prompts(), **options), expected)
    copied = copy.deepcopy(model)
    assert torch.equal(copied.generate(prompts(), **options), expected)


def test_loss_is_shifted_and_ignores():
    model, tokens = make(), prompts()
    labels = tokens.clone()
    labels[:, 3] = -100
    out = model(tokens, labels=labels)
    expected = torch.nn.functional.cross_entropy(
        out.logits[:, [0, 1, 3]].flatten(0, 1), tokens[:, [1, 2, 4]].flatten()
    )
    torch.testing.assert_close(out.loss, expected)
    loss, logits = model(tokens, labels=labels, return_dict=False)
    assert torch.equal(loss, out.loss)
    assert torch.equal(logits, out.logits)
    kept = model(tokens, logits_to_keep=2).logits
    torch.testing.assert_close(kept, out.logits[:, -2:])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["causal-linear", "full"])
def test_padding_changes_nothing(attention, side):
    model, tokens = make(attention=attention), prompts(1, 6)
    width = (2, 0) if side == "left" else (0, 2)
    padded = torch.nn.functional.pad(tokens, width, value=7)
    mask = torch.nn.functional.pad(torch.ones_like(tokens), width)
    real = mask[0].bool()
    out = model(padded, attention_mask=mask).logits[:, real]
    torch.testing.assert_close(out, model(tokens).logits)


def test_linear_state_does_not_grow():
    model, sizes = make(), []
    state = RecurrentState()
    for token in prompts(2, 9).split(1, 1):
        model(token, past_key_values=state)
        sizes.append(state.nbytes)
    assert len(set(sizes)) == 1


def test_clear_errors():
    model = make()
    with pytest.raises(ValueError, match="has 40 positions"):
        model(prompts(1, 41))
    with pytest.raises(ValueError, match="has 40 positions"):
        model(prompts(1, 41), use_cache=True)
    for mask in (torch.ones(1, 3), torch.ones(1, 1, 5, 5)):
        with pytest.raises(ValueError, match=r"attention_mask must have shape \(N, 5\)"):
            model(prompts(1), attention_mask=mask, use_cache=True)


def test_attention_without_a_state(monkeypatch):
    from fast_transformers.attention import CausalLinearAttention
    from fast_transformers.attention_registry import AttentionRegistry, Int

    class Lonely(torch.nn.Module):
        def __init__(self, query_dimensions):
            super().__init__()
            self.inner = CausalLinearAttention(query_dimensions)

        def forward(self, *args):
            return self.inner(*args)

    monkeypatch.setattr(AttentionRegistry, "_attentions", dict(AttentionRegistry._attentions))
    AttentionRegistry.register("lonely", Lonely, [("query_dimensions", Int)])
    model = make(attention="lonely")
    with pytest.raises(ValueError, match=r"Lonely cannot generate.*use_cache=False"):
        model.generate(prompts(), max_new_tokens=3)
    assert model.generate(prompts(), max_new_tokens=3, use_cache=False).shape == (3, 8)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"n_layers": 0}, "n_layers must be"),
        ({"n_layers": 10**9}, "n_layers must be"),
        ({"vocab_size": "many"}, "vocab_size must be"),
        ({"d_model": True}, "d_model must be"),
        ({"d_model": 30, "n_heads": 4}, "multiple of n_heads"),
        ({"dropout": 1.5}, "dropout must be"),
        ({"attention": "causal-liner"}, "did you mean 'causal-linear'"),
        ({"attention": "reformer"}, "not in this version"),
        ({"attention": 3}, "attention must be"),
        ({"is_encoder_decoder": True, "cross_attention": "lin"}, "cross_attention_type='lin'"),
        ({"is_encoder_decoder": True, "decoder_layers": 0}, "decoder_layers must be"),
        ({"feature_map": "favr"}, "did you mean 'favor'"),
        ({"norm_type": "batchnorm"}, "norm_type"),
        ({"activation": "swish"}, "activation"),
        ({"softmax_temp": "hot"}, "softmax_temp"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"task": [1]}, "task must be"),
    ],
)
def test_bad_configurations(options, text):
    with pytest.raises(ValueError, match=r"must|not|Invalid|did you|expected") as error:
        FastTransformerConfig(**options)
    assert text in str(error.value)


def test_configuration_is_json(tmp_path):
    config = FastTransformerConfig(feature_map="favor:n_dims=8", task={"kind": "bytes"})
    config.save_pretrained(tmp_path)
    again = FastTransformerConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert again.hidden_size == again.d_model
