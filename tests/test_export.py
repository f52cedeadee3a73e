"""Exported programs and ONNX models give what eager code gives, at any length, on their own."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import textwrap
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_leaves, tree_map, tree_structure, tree_unflatten
from torch.utils._sympy.numbers import int_oo

from fast_transformers import ops
from fast_transformers.builders import (
    RecurrentEncoderBuilder,
    TransformerDecoderBuilder,
    TransformerEncoderBuilder,
)
from fast_transformers.feature_maps import (
    Concat,
    Favor,
    OptimalPositiveFeatures,
    RandomFourierFeatures,
    features_of,
    with_positions,
)
from fast_transformers.masking import LengthMask, TriangularCausalMask
from fast_transformers.recurrent._utils import PositionState
from fast_transformers.specs import FEATURE_MAPS
from tests import support
from tests.models import SMALL
from tests.support import assert_as_accurate, differentiate, make_qkv

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
# torch.onnx copies the tree of a program's inputs, which this torch deprecated
pytestmark = pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)`:FutureWarning")


N, L = {0: Dim.DYNAMIC}, {1: Dim.DYNAMIC}
NL = {**N, **L}
LENGTHS = [1, 17, 64, 200]  # chunks have 16 or 64 tokens
FEATURES = {
    "positive": support.positive_features(),
    "exponential": support.exponential_features(),
}
FUNCTIONS = {"full": ops.linear_attention, "causal": ops.causal_linear_attention}
MAPS = {
    **FEATURE_MAPS,
    "rff": RandomFourierFeatures.factory(n_dims=64),
    "concat": Concat.factory([Favor, OptimalPositiveFeatures]),
}


def own_operators(program: ExportedProgram) -> list[str]:
    """The operators of this library in a program, in the bodies of its loops too."""
    modules = [m for m in program.graph_module.modules() if hasattr(m, "graph")]
    names = [str(node.target) for module in modules for node in module.graph.nodes]
    return [name for name in names if "fast_transformers" in name]


def export(model: nn.Module, inputs: Any, shapes: Any, **options: Any) -> ExportedProgram:
    program = torch.export.export(model.eval(), inputs, dynamic_shapes=shapes, **options)
    assert own_operators(program) == []
    assert all(r.lower <= 2 and r.upper == int_oo for r in program.range_constraints.values())
    return program


def in_onnxruntime(program: ExportedProgram, **options: Any) -> Any:
    """A function of the program's inputs, in any nesting, to its outputs as a flat list."""
    model = torch.onnx.export(program, dynamo=True, verbose=False, **options).model_proto
    assert {opset.domain for opset in model.opset_import} == {""}
    one_thread = onnxruntime.SessionOptions()
    one_thread.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), one_thread)
    names = [x.name for x in session.get_inputs()]

    def run(*inputs: Any) -> list[Tensor]:
        feeds = {n: x.numpy() for n, x in zip(names, tree_leaves(inputs), strict=True)}
        return [torch.from_numpy(x) for x in session.run(None, feeds)]

    return run


def assert_close(actual: Any, expected: Any) -> None:
    """Of models, whose numbers are of size 1 after the norms: some tens of roundings each."""
    torch.testing.assert_close(tree_leaves(actual), tree_leaves(expected), rtol=1e-5, atol=1e-5)


def comparable(results: Any) -> list[Tensor]:
    """Values and states; sums that have a shift as means and logarithms, as the shift is free."""
    found = []
    for values, state in results:
        kv, z, shift = state.kv, state.z, state.shift
        found += [values, *((kv, z) if shift is None else (kv / z[..., None], z.log2() + shift))]
    return found


@pytest.mark.parametrize(
    ("queries", "keys"), [(1, 1), (1, 65), (65, 1), (16, 17), (17, 16), (64, 67), (131, 131)]
)
@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("kind", FUNCTIONS)
def test_the_form_matches_the_reference(kind, features, queries, keys) -> None:
    """Values, state and gradients, two query heads to a key head, with masks and a state."""
    first, then = make_qkv(9, H=4), make_qkv(queries, keys, H=4, strided=True, seed=1)
    mask = torch.rand(2, keys, generator=torch.Generator().manual_seed(2)) > 0.3
    mask[0, : keys // 2] = False

    def run(impl: str, dtype: torch.dtype) -> list[Tensor]:
        q, k, v = (x.to(dtype) for x in first)
        function = partial(FUNCTIONS[kind], features=FEATURES[features], impl=impl)
        state = function(q, k[:, :, :2], v[:, :, :2]).state
        q, k, v = (x.to(dtype) for x in then)
        k[~mask] = v[~mask] = torch.nan
        function = partial(function, key_mask=mask, state=state)
        return differentiate(function, [q, k[:, :, :2], v[:, :, :2]])

    exact, plain = run("reference", torch.float64), run("reference", torch.float32)
    largest = max(float(x.abs().max()) for x in exact[2:])
    for i, (a, p, e) in enumerate(zip(run("exported", torch.float32), plain, exact, strict=True)):
        assert_as_accurate(a, p, e, size=largest if i >= 2 else None)


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_exponentials_at_any_norm(kind) -> None:
    """Of logarithms that differ by hundreds from one token to the next, in either direction."""
    q, k, v = make_qkv(40, std=10.0)
    k[0] *= torch.linspace(0, 2, 40)[:, None, None]
    run = partial(FUNCTIONS[kind], features=FEATURES["exponential"])
    exact = run(q.double(), k.double(), v.double(), impl="reference")
    largest = float(exact.state.shift.abs().max())
    results = run(q, k, v, impl="exported"), run(q, k, v, impl="reference"), exact
    for a, p, e in zip(*(comparable([r]) for r in results), strict=True):
        assert_as_accurate(a, p, e, log_size=largest)


class Functions(nn.Module):
    """All three functions, with masks, a state, and two query heads to a key head."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.feature_map = MAPS[name](8)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, state: ops.LinearState
    ) -> list[ops.Attended]:
        options = {"features": features_of(self.feature_map), "state": state}
        return [
            ops.causal_linear_attention(q, k, v, key_mask=mask, **options),
            ops.linear_attention(q, k, v, key_mask=mask, **options),
            ops.linear_attention_step(q[:, 0], k[:, 0], v[:, 0], **options),
        ]

    def inputs(self, length: int, std: float) -> tuple[Any, ...]:
        """A state of 20 tokens, and ``length`` more, of which the first is masked."""
        q, k, v = make_qkv(length + 20, H=4, std=std)
        past, k, v = [x[:, :20, :2] for x in (k, v)], k[:, 20:, :2], v[:, 20:, :2]
        state = ops.linear_attention(q[:, :20], *past, features_of(self.feature_map)).state
        mask = torch.rand(2, length, generator=torch.Generator().manual_seed(2)) > 0.3
        mask[:, 0] = False
        return q[:, 20:], k, v, mask, state


def check(model: Any, inputs: tuple[Any, ...], forms: list[Any], log_size: float = 0.0) -> None:
    """Each form is as accurate as eager code, measured against float64."""
    results = model(*inputs)
    tree = tree_structure(results)
    exact = model.double()(*tree_map(lambda x: x if x.dtype == torch.bool else x.double(), inputs))
    model.float()
    for form in forms:
        actual = comparable(tree_unflatten(tree_leaves(form(*inputs)), tree))
        for a, p, e in zip(actual, comparable(results), comparable(exact), strict=True):
            assert_as_accurate(a, p, e, log_size=log_size)


@pytest.mark.parametrize("name", ["elu", "favor"])
@torch.no_grad()
def test_functions(name: str) -> None:
    """Lengths of one token, below, of and above a chunk, and norms that exp would overflow at."""
    model = Functions(name).eval()
    example = model.inputs(40, 1.0)
    program = export(model, example, (*[L] * 4, [{}] * len(tree_leaves(example[4]))))
    forms = [program.module(), in_onnxruntime(program, optimize=False)]
    for length in LENGTHS:
        for std in (1.0, 10.0):
            inputs = model.inputs(length, std)
            logarithms = float(inputs[4].shift.abs().max()) if name == "favor" else 0.0
            check(model, inputs, forms, logarithms)


class Maps(nn.Module):
    """A sequence with each of the other maps, which steps evaluate through the same functions."""

    def __init__(self) -> None:
        super().__init__()
        others = [name for name in MAPS if name not in ("elu", "favor")]
        self.feature_maps = nn.ModuleList(MAPS[name](8) for name in others)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> list[ops.Attended]:
        return [
            ops.causal_linear_attention(
                with_positions(phi, q), with_positions(phi, k), v, features_of(phi)
            )
            for phi in self.feature_maps
        ]


@torch.no_grad()
def test_other_maps() -> None:
    model = Maps().eval()
    program = export(model, tuple(make_qkv(40)), (L, L, L))
    forms = [program.module(), in_onnxruntime(program, optimize=False)]
    for length in LENGTHS:  # Fourier features of close tokens: the denominator is positive
        check(model, tuple(make_qkv(length, std=0.5)), forms)


class Causal(nn.Module):
    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        causal = TriangularCausalMask(x.shape[1])
        return self.encoder(x, causal, LengthMask(lengths, max_len=x.shape[1]))


def options(**others: Any) -> dict[str, Any]:
    causal = {"attention_type": "causal-linear", "feature_map": Favor.factory(n_dims=16)}
    return {**SMALL, **causal, "n_layers": 1, **others}


@pytest.mark.parametrize("strict", [False, True])
def test_encoder(strict: bool, tmp_path: Path) -> None:
    """In a process of its own: after hundreds of other tests the program was seen to refuse
    batches of 2, a condition that nothing in a fresh process leads to."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        pool.submit(check_encoder, strict, tmp_path).result(timeout=240)


def check_encoder(strict: bool, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    model = Causal(TransformerEncoderBuilder.from_kwargs(**options()).get()).eval()
    example = torch.randn(3, 40, 10), torch.tensor([40, 3, 7])
    program = export(model, example, (NL, N), strict=strict)
    forms = [program.module()]
    if not strict:
        forms.append(in_onnxruntime(program))
        check_alone(program, example, tmp_path)
    for length in LENGTHS:
        inputs = torch.randn(2, length, 10), torch.tensor([length, (length + 1) // 2])
        for form in forms:
            assert_close(form(*inputs), model(*inputs))


def check_alone(program: ExportedProgram, inputs: tuple[Tensor, ...], folder: Path) -> None:
    """A saved program is all that a process needs which does not know this library."""
    torch.export.save(program, folder / "program.pt2")
    torch.save((inputs, program.module()(*inputs)), folder / "expected.pt")
    code = """
        import sys, torch
        inputs, expected = torch.load("expected.pt")
        torch.testing.assert_close(torch.export.load("program.pt2").module()(*inputs), expected)
        assert "fast_transformers" not in sys.modules
    """
    command = [sys.executable, "-I", "-c", textwrap.dedent(code)]
    subprocess.run(command, cwd=folder, check=True)


@torch.no_grad()
def test_decoder() -> None:
    """Attention to all positions and to a memory of another length, without any mask given."""
    kinds = {"self_attention_type": "linear", "cross_attention_type": "linear"}
    model = TransformerDecoderBuilder.from_kwargs(**SMALL, **kinds).get()
    program = export(model, (torch.randn(3, 40, 10), torch.randn(3, 30, 10)), (NL, NL))
    for length, memory in ((1, 70), (70, 1), (30, 30)):
        inputs = torch.randn(2, length, 10), torch.randn(2, memory, 10)
        assert_close(program.module()(*inputs), model(*inputs))


@torch.no_grad()
def test_recurrent_encoder() -> None:
    """Steps whose state, with the position that rotary embeddings need, goes in and comes out."""
    model = RecurrentEncoderBuilder.from_kwargs(**options(rotary=True)).get().eval()
    (state,) = model(torch.randn(3, 10))[1]
    state = [state._replace(position=torch.tensor(state.position))]
    shapes = {"x": N, "state": [PositionState([N, N, N], {})]}
    program = export(model, (torch.randn(3, 10), state), shapes)
    tree = tree_structure(state)
    for form in (program.module(), in_onnxruntime(program)):
        mine = theirs = [state[0]._replace(attention=state[0].attention.map(lambda x: x[:2]))]
        for _ in range(5):
            x = 10 * torch.randn(2, 10)
            y, mine = model(x, mine)
            z, *leaves = tree_leaves(form(x, theirs))
            theirs = tree_unflatten(leaves, tree)
            assert_close(z, y)
        assert int(theirs[0].position) == 6
        assert isinstance(theirs[0].attention, ops.LinearState)


def test_what_cannot_be_exported_says_so() -> None:
    model = Causal(TransformerEncoderBuilder.from_kwargs(**options()).get())
    with pytest.raises(RuntimeError, match=r"Favor draws.*call model\.eval\(\) first"):
        torch.export.export(model, (torch.randn(3, 40, 10), torch.tensor([40, 3, 7])))


def test_a_form_that_is_asked_for_is_the_one_exported() -> None:
    model = nn.Module()
    model.forward = partial(ops.causal_linear_attention, impl="chunked")
    program = torch.export.export(model, tuple(make_qkv(40)), strict=False)
    assert own_operators(program) == ["fast_transformers.causal.default"]
