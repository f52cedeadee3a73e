"""Layers and stacks against their formulas, and users' subclasses of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from fast_transformers.attention import AttentionLayer, FullAttention
from fast_transformers.events import EventDispatcher, IntermediateOutput
from fast_transformers.masking import BaseMask, FullMask, LengthMask, TriangularCausalMask
from fast_transformers.recurrent.transformers import (
    RecurrentTransformerDecoder,
    RecurrentTransformerDecoderLayer,
    RecurrentTransformerEncoder,
    RecurrentTransformerEncoderLayer,
)
from fast_transformers.transformers import (
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)
from fast_transformers.utils import make_mirror

N, L, S, D = 2, 5, 7, 8


class Spy(nn.Module):
    """An attention layer that adds keys to queries, and records what it was called with."""

    def __init__(self):
        super().__init__()
        self.calls = []
        self.project = nn.Linear(D, D)

    def forward(self, queries, keys, values, attn_mask, query_lengths, key_lengths):
        self.calls.append((attn_mask, query_lengths, key_lengths))
        return self.project(queries) + keys.mean(1, keepdim=True)


class RecurrentSpy(Spy):
    def forward(self, query, key, value, *rest, state=None):
        self.calls.append(rest or (state,))
        key = key if key.ndim == 2 else key.mean(1)
        return self.project(query) + key, "state"


@pytest.fixture
def x():
    return torch.randn(N, L, D)


@pytest.fixture
def memory():
    return torch.randn(N, S, D)


def norm(layer, i, x, kind):
    weight = layer.get_parameter(f"norm{i}.weight")
    if kind == "rmsnorm":
        return (
            x * torch.rsqrt(x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps) * weight
        )
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
    return (x - mean) / (variance + 1e-5).sqrt() * weight + layer.get_parameter(f"norm{i}.bias")


def sublayers(layer, x, functions, first, kind):
    """The residual connections, written out."""
    for i, function in enumerate(functions, 1):
        if first:
            x = x + function(norm(layer, i, x, kind))
        else:
            x = norm(layer, i, x + function(x), kind)
    return x


def randomise(layer):
    for parameter in layer.parameters():  # norms start as identities
        nn.init.normal_(parameter, std=0.5)
    return layer.eval()


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu", "tanh", torch.sigmoid])
def test_encoder_layer(activation, first, kind, x):
    options = {"norm_first": first, "norm_type": kind}
    layer = randomise(TransformerEncoderLayer(Spy(), D, 12, 0.5, activation, **options))
    act = getattr(F, activation) if isinstance(activation, str) else activation

    def attend(x):
        return layer.attention(x, x, x, None, None, None)

    def feed_forward(x):
        return layer.linear2(act(layer.linear1(x)))

    expected = sublayers(layer, x, [attend, feed_forward], first, kind)
    assert_close(layer(x), expected)
    recurrent = randomise(
        RecurrentTransformerEncoderLayer(RecurrentSpy(), D, 12, 0.5, activation, **options)
    )
    make_mirror(layer, recurrent)
    out, state = recurrent(x[:, 0])
    assert_close(out, sublayers(layer, x[:, :1], [attend, feed_forward], first, kind)[:, 0])
    assert state == "state"


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("first", [False, True])
def test_decoder_layer(first, kind, x, memory):
    options = {"norm_first": first, "norm_type": kind}
    layer = randomise(TransformerDecoderLayer(Spy(), Spy(), D, 12, 0.5, "gelu", **options))
    functions = [
        lambda x: layer.self_attention(x, x, x, None, None, None),
        lambda x: layer.cross_attention(x, memory, memory, None, None, None),
        lambda x: layer.linear2(F.gelu(layer.linear1(x))),
    ]
    assert_close(layer(x, memory), sublayers(layer, x, functions, first, kind))
    recurrent = RecurrentTransformerDecoderLayer(
        RecurrentSpy(), RecurrentSpy(), D, 12, 0.5, "gelu", **options
    ).eval()
    make_mirror(layer, recurrent)
    out, state = recurrent(x[:, 0], memory)
    assert_close(out, sublayers(layer, x[:, :1], functions, first, kind)[:, 0])
    assert state == ["state", "state"]


def test_order_of_submodules():
    assert [n for n, _ in TransformerEncoderLayer(Spy(), D).named_children()] == [
        "attention", "linear1", "linear2", "norm1", "norm2", "dropout"
    ]  # fmt: skip
    assert [n for n, _ in TransformerDecoderLayer(Spy(), Spy(), D).named_children()] == [
        "self_attention", "cross_attention", "linear1", "linear2", "norm1", "norm2", "norm3",
        "dropout",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "make",
    [
        lambda *args: TransformerEncoderLayer(Spy(), *args),
        lambda *args: RecurrentTransformerEncoderLayer(Spy(), *args),
        lambda *args: TransformerDecoderLayer(Spy(), Spy(), *args),
        lambda *args: RecurrentTransformerDecoderLayer(Spy(), Spy(), *args),
    ],
)
def test_arguments_of_layers(make):
    layer = make(D)
    assert layer.linear1.out_features == make(D, 0).linear1.out_features == 4 * D
    assert layer.dropout.p == 0.1
    assert layer.activation is F.relu
    assert layer.event_dispatcher is EventDispatcher.get()
    assert isinstance(layer.norm1, nn.LayerNorm)
    assert layer.norm1.eps == 1e-5
    layer = make(D, 12, 0.3, "gelu", "elsewhere")  # no n_heads: the code's order, not the docs'
    assert layer.linear1.out_features == 12
    assert layer.dropout.p == 0.3
    assert layer.activation is F.gelu
    assert layer.event_dispatcher is EventDispatcher.get("elsewhere")
    for activation in ("rellu", "math", 3):
        with pytest.raises(ValueError, match=r"must be a function, or the name of one.*'relu'"):
            make(D, 12, 0.3, activation)


def test_an_unknown_norm():
    with pytest.raises(ValueError, match="norm_type must be one of layernorm, rmsnorm"):
        TransformerEncoderLayer(Spy(), D, norm_type="batchnorm")


def test_dropout_is_applied(x):
    layer = TransformerEncoderLayer(Spy(), D, dropout=0.5)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_where_dropout_is_applied(x, memory):
    """After each attention, inside the feed-forward network, and after it."""
    for layer, inputs, width in (
        (TransformerEncoderLayer(Spy(), D, 12), (x,), [D, 12, D]),
        (TransformerDecoderLayer(Spy(), Spy(), D, 12), (x, memory), [D, D, 12, D]),
    ):
        seen = []
        layer.dropout.register_forward_hook(lambda _, args, out, to=seen: to.append(out.shape[-1]))
        layer(*inputs)
        assert seen == width


@pytest.mark.parametrize("stacked", [False, True])
def test_masks_of_an_encoder(stacked, x):
    spy = Spy()
    module = TransformerEncoderLayer(spy, D)
    module = TransformerEncoder([module]) if stacked else module
    module(x)
    mask, queries, keys = spy.calls.pop()
    assert isinstance(mask, FullMask)
    assert mask.shape == (L, L)
    assert mask.all_ones
    assert isinstance(queries, LengthMask)
    assert queries is keys
    assert queries.lengths.tolist() == [L] * N
    causal, lengths = TriangularCausalMask(L), LengthMask(torch.tensor([L, 2]))
    for args, kwargs in (
        ((causal, lengths), {}), ((), {"attn_mask": causal, "length_mask": lengths}),
    ):  # fmt: skip
        module(x, *args, **kwargs)
        assert spy.calls.pop() == (causal, lengths, lengths)
    module(x, causal.bool_matrix, lengths.at_width(L))
    assert all(isinstance(mask, BaseMask) for mask in spy.calls.pop())
    with pytest.raises(TypeError, match=r"attn_mask must be a mask.*bool"):
        module(x, torch.zeros(L, L))
    with pytest.raises(TypeError, match="length_mask must be a mask"):
        module(x, None, torch.tensor([L, 2]))


@pytest.mark.parametrize("stacked", [False, True])
def test_masks_of_a_decoder(stacked, x, memory):
    own, cross = Spy(), Spy()
    module = TransformerDecoderLayer(own, cross, D)
    module = TransformerDecoder([module]) if stacked else module
    module(x, memory)
    mask, queries, keys = own.calls.pop()
    assert mask.shape == (L, L)
    assert queries.lengths.tolist() == keys.lengths.tolist() == [L] * N
    mask, queries, keys = cross.calls.pop()
    assert mask.shape == (L, S)
    assert mask.all_ones
    assert queries.lengths.tolist() == [L] * N
    assert keys.lengths.tolist() == [S] * N
    masks = {
        "x_mask": TriangularCausalMask(L),
        "x_length_mask": LengthMask(torch.tensor([L, 2])),
        "memory_mask": FullMask(L, S),
        "memory_length_mask": LengthMask(torch.tensor([S, 3])),
    }
    a, b, c, d = masks.values()
    for args, kwargs in (((a, b, c, d), {}), ((), masks)):
        module(x, memory, *args, **kwargs)
        assert own.calls.pop() == (a, b, b)
        assert cross.calls.pop() == (c, b, d)
    for name in masks:
        with pytest.raises(TypeError, match=f"^{name} must be a mask"):
            module(x, memory, **{name: torch.zeros(L)})


def test_masks_of_a_recurrent_decoder(x, memory):
    cross = RecurrentSpy()
    layer = RecurrentTransformerDecoderLayer(RecurrentSpy(), cross, D)
    lengths = LengthMask(torch.tensor([S, 3]))
    for module in (layer, RecurrentTransformerDecoder([layer])):
        module(x[:, 0], memory)
        assert cross.calls.pop()[0].lengths.tolist() == [S] * N
        module(x[:, 0], memory, lengths)
        assert cross.calls.pop()[0] is lengths


@pytest.mark.parametrize("final", [None, nn.LayerNorm(D, elementwise_affine=False)])
@pytest.mark.parametrize("decoder", [False, True])
@pytest.mark.parametrize("recurrent", [False, True])
def test_stacks(recurrent, decoder, final, x, memory):
    spy = RecurrentSpy if recurrent else Spy
    stack, layer = {
        (False, False): (TransformerEncoder, TransformerEncoderLayer),
        (False, True): (TransformerDecoder, TransformerDecoderLayer),
        (True, False): (RecurrentTransformerEncoder, RecurrentTransformerEncoderLayer),
        (True, True): (RecurrentTransformerDecoder, RecurrentTransformerDecoderLayer),
    }[recurrent, decoder]
    attentions = 2 if decoder else 1
    layers = [layer(*(spy() for _ in range(attentions)), D).eval() for _ in range(2)]
    model = stack(layers, final, "elsewhere")
    events = []
    EventDispatcher.get("elsewhere").listen(IntermediateOutput, events.append)
    x = x[:, 0] if recurrent else x
    rest = (memory,) if decoder else ()
    out, expected = model(x, *rest), x
    EventDispatcher.get("elsewhere").clear()
    out = out[0] if recurrent else out
    assert len(events) == 2
    for event, module in zip(events, layers, strict=True):
        expected = module(expected, *rest)
        expected = expected[0] if recurrent else expected
        assert event.source is model
        assert_close(event.x, expected)
    assert model.norm is final
    assert_close(out, expected if final is None else final(expected))


def test_attention_layers_take_positional_masks(x):
    layer = TransformerEncoderLayer(AttentionLayer(FullAttention(), D, 2), D).eval()
    assert layer(x).shape == (N, L, D)
