"""The torch path on a GPU; skipped where there is none."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from fast_transformers import ops
from fast_transformers.builders import RecurrentEncoderBuilder, TransformerEncoderBuilder
from fast_transformers.feature_maps import Favor, elu_feature_map, features_of
from fast_transformers.masking import LengthMask, TriangularCausalMask
from fast_transformers.state import State
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


def relative_errors(function, feature_map, inputs, impl: str) -> list[float]:
    """Of values, means and gradients, against those in float64."""
    features = features_of(feature_map)
    results = [
        differentiate(partial(function, features=features, impl=name), given)
        for name, given in ((impl, inputs), ("chunked", [x.double() for x in inputs]))
    ]
    return [float((a.double() - e).norm() / e.norm()) for a, e in zip(*results, strict=True)]


@pytest.mark.parametrize(("e", "m"), [(256, 256), (256, 64), (64, 256), (160, 24)])
@pytest.mark.parametrize("factory", [elu_feature_map, Favor.factory(n_dims=256)])
@pytest.mark.parametrize("function", [ops.linear_attention, ops.causal_linear_attention])
def test_heads_of_many_dimensions(function, factory, e, m) -> None:
    """Kernels over many chunks; errors are those of factors rounded to bfloat16."""
    inputs = [x.cuda() for x in make_qkv(1500, H=4, E=e, M=m, dtype=torch.bfloat16)]
    feature_map = factory(e).cuda()
    errors = relative_errors(function, feature_map, inputs, "triton")
    assert max(errors) < 4 * torch.finfo(torch.bfloat16).eps, errors


@pytest.mark.parametrize("function", [ops.linear_attention, ops.causal_linear_attention])
def test_more_than_2_to_the_31_elements(function) -> None:
    """The last sequence of a batch that no 32-bit number can index is as it is alone."""
    n, length, heads, dims = 9, 2**18, 16, 64
    count = n * length * heads * dims
    assert count > 2**31
    torch.cuda.empty_cache()  # what earlier tests took counts as taken
    if torch.cuda.mem_get_info()[0] < 12 * 2 * count:
        pytest.skip("needs more free memory")
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(
            n, length, heads, dims, device="cuda", dtype=torch.bfloat16, generator=generator
        ).requires_grad_()
        for _ in range(3)
    )
    features = features_of(elu_feature_map(dims))
    values, state = function(q, k, v, features, impl="triton")
    values.backward(torch.ones_like(values))
    alone = [x.detach()[-1:].clone().requires_grad_() for x in (q, k, v)]
    expected, last = function(*alone, features, impl="triton")
    expected.backward(torch.ones_like(expected))
    found = [values, state.kv, *(x.grad for x in (q, k, v))]
    for whole, one in zip(found, [expected, last.kv, *(x.grad for x in alone)], strict=True):
        assert whole is not None and one is not None  # noqa: PT018
        difference = (whole.detach()[-1:].float() - one.detach().float()).norm()
        assert difference <= torch.finfo(torch.bfloat16).eps * one.detach().float().norm()


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("attention", ["causal-linear", "full", "conditional-full:causal-linear"])
@torch.inference_mode()
def test_a_state_goes_on_in_every_mode(attention, dtype, tmp_path) -> None:
    """Padded prompts, rows joined and reordered, a file, a chunk, and a step of either form."""
    options = {"attention_type": attention, "n_layers": 2, "n_heads": 2, "rotary": True}
    options |= {"query_dimensions": 32, "value_dimensions": 32, "length_limit": 20}
    options |= {"feature_map": Favor.factory(n_dims=64)}
    builders = (TransformerEncoderBuilder, RecurrentEncoderBuilder)
    model, twin = (b.from_kwargs(**options).get().cuda().to(dtype).eval() for b in builders)
    make_mirror(model, twin)
    x = torch.randn(3, 40, 64, device="cuda", dtype=dtype)
    lengths = torch.tensor([23, 5, 11])
    mask = (torch.arange(23) < lengths[:, None]).cuda()
    prompt = x[:, :23].masked_fill(~mask[..., None], torch.nan)
    _, state = model(prompt, length_mask=mask, return_state=True)
    state = State.join([state.select([2, 0]), state.select([1])])
    state.reorder(torch.tensor([1, 2, 0])).save(tmp_path / "state")
    state = State.load(tmp_path / "state", "cuda")
    assert state.positions.tolist() == lengths.tolist()
    y, state = model(x[:, 23:30], state=state, return_state=True)
    step, state = twin(x[:, 30], state)
    last, _ = model(x[:, 31:32], state=state, return_state=True)
    outputs = torch.cat([y, step[:, None], last], 1)
    tolerance = 1e-3 if dtype == torch.float32 else 0.1
    for i, n in enumerate(lengths.tolist()):
        alone, _ = model(torch.cat([x[i, :n], x[i, 23:32]])[None], return_state=True)
        torch.testing.assert_close(outputs[i], alone[0, n:], rtol=tolerance, atol=tolerance)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
@pytest.mark.parametrize("name", ["elu", "favor"])
@pytest.mark.parametrize("attention", ["linear", "causal-linear"])
def test_training_never_waits_for_the_gpu(attention, name) -> None:
    """Random maps are redrawn on the way; a seed is read from the GPU once, before."""
    model = TransformerEncoderBuilder.from_kwargs(
        attention_type=attention, n_layers=2, n_heads=2, query_dimensions=32,
        value_dimensions=32, feature_map={"elu": elu_feature_map, "favor": Favor}[name],
    ).get()  # fmt: skip
    model = model.cuda().train()
    x = torch.randn(2, 70, 64, device="cuda")
    mask = TriangularCausalMask(70, device="cuda") if attention == "causal-linear" else None

    def step() -> None:
        model(x, attn_mask=mask).square().mean().backward()

    for _ in range(2):  # the second call is the first that redraws
        step()
    before = [buffer.clone() for buffer in model.buffers()]
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert name == "elu" or not all(map(torch.equal, before, model.buffers()))
