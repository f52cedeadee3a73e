"""The torch path on a GPU; skipped where there is none."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from fast_transformers import ops
from fast_transformers.builders import RecurrentEncoderBuilder, TransformerEncoderBuilder
from fast_transformers.feature_maps import Favor, elu_feature_map, features_of
from fast_transformers.masking import LengthMask, TriangularCausalMask
from fast_transformers.utils import make_mirror
from tests.maps import BUILT_IN, CATALOGUE
from tests.support import DTYPES, assert_as_accurate, differentiate, make_qkv

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

MODELS = {**BUILT_IN, **CATALOGUE}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factory", [elu_feature_map, Favor])
@pytest.mark.parametrize("function", [ops.linear_attention, ops.causal_linear_attention])
def test_as_accurate_as_the_reference(function, factory, dtype) -> None:
    feature_map = factory(8)
    inputs = make_qkv(131, dtype=dtype, strided=True)
    reference = partial(function, features=features_of(feature_map), impl="reference")
    exact = differentiate(reference, [x.double() for x in inputs])
    plain = differentiate(reference, inputs)
    on_gpu = partial(function, features=features_of(feature_map.cuda()), impl="chunked")
    actual = [x.cpu() for x in differentiate(on_gpu, [x.cuda() for x in inputs])]
    largest = max(float(x.abs().max()) for x in exact[2:])
    for i, (a, p, e) in enumerate(zip(actual, plain, exact, strict=True)):
        assert_as_accurate(a, p, e, size=largest if i >= 2 else None, log_size=20.0)


@pytest.mark.parametrize(
    ("attention", "name"), [("full", "elu"), *(("causal-linear", name) for name in MODELS)]
)
def test_a_model_and_its_recurrent_twin(attention, name) -> None:
    options = {"attention_type": attention, "n_layers": 2, "n_heads": 2, "query_dimensions": 8}
    options |= {"value_dimensions": 8, "feature_map": MODELS[name]}
    model = TransformerEncoderBuilder.from_kwargs(**options).get().cuda().eval()
    twin = RecurrentEncoderBuilder.from_kwargs(**options).get().cuda().eval()
    make_mirror(model, twin)
    x = torch.randn(3, 12, 16, device="cuda")
    y = model(x, TriangularCausalMask(12), LengthMask(torch.tensor([12, 5, 1])))
    state = None
    for i in range(12):
        out, state = twin(x[:, i], state)
    torch.testing.assert_close(out[0], y[0, -1], rtol=1e-3, atol=1e-3)
    with torch.autocast("cuda", torch.bfloat16):
        model.train()(x, TriangularCausalMask(12, device="cuda")).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
