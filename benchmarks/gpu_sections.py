"""What is measured on a GPU: whole sequences, one token, whole models."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fast_transformers import ops
from fast_transformers.builders import TransformerEncoderBuilder
from fast_transformers.feature_maps import Favor, elu_feature_map, features_of
from fast_transformers.masking import TriangularCausalMask
from fast_transformers.ops import fused_step

from .contenders import ELU, FAVOR
from .gpu_contenders import (
    CONTENDERS,
    DIM,
    HEADS,
    LIMIT,
    Contender,
    both_passes,
    disagreements,
    least_bytes,
    least_flops,
    make_inputs,
    make_map,
    relative_error,
)
from .gpu_measure import captured, extra_peak, measure
from .log import Log, first_line
from .worker.ours import FEATURES, SEED

TOKENS = 2**16  # of a batch
BATCH, STEPS, BETWEEN = 64, 8, 2**28  # of decoding; bytes of states before one is used again
LAYERS, MODEL_BATCH, MODEL_LENGTH = 12, 2, 8192


@dataclass
class Session:
    """Settings, ceilings and results of a run.

    Attributes:
        log: where results go.
        lengths: of the sequences.
        seconds: to measure each number for.
        ceilings: what the device can do at best.
        contenders: names of those whose attention is measured.
        failures: what was wrong, a line each.
        answers: what was wrong with a contender, by name and whether it was causal.
    """

    log: Log
    lengths: list[int]
    seconds: float
    ceilings: dict[str, float]
    contenders: list[str]
    failures: list[str] = field(default_factory=list)
    answers: dict[tuple[str, bool], list[str]] = field(default_factory=dict)

    def fail(self, section: str, wrong: list[str], **case: Any) -> None:
        """Note a wrong answer."""
        self.failures += wrong
        self.log.add(section, **case, wrong=wrong)

    def wrong(self, contender: Contender, causal: bool) -> list[str]:
        """What is wrong with a contender, which then has no speed; checked once."""
        key = contender.name, causal
        if key not in self.answers:
            say(f"check {contender.name}, {'causal' if causal else 'full'}")
            try:
                self.answers[key] = disagreements(contender, causal)
            except Exception as error:
                self.answers[key] = [f"{contender.name}, {first_line(error)}"]
        return self.answers[key]

    def fractions(self, seconds: float, size: int, flops: int | None = None) -> dict[str, float]:
        """Of the rate of a copy, and of the rate of a matrix product."""
        found = {"of copy": size / seconds / self.ceilings["copy"]}
        if flops is not None:
            found["of product"] = flops / seconds / self.ceilings["product"]
        return found


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def attention(session: Session) -> None:
    """Both forms of all contenders at every length."""
    for contender in CONTENDERS:
        for causal in contender.forms if contender.name in session.contenders else ():
            section = "causal" if causal else "full"
            case = {"contender": contender.name, "map": contender.map}
            if not contender.installed:
                session.log.add(section, **case, skipped=f"{contender.needs} is not installed")
                continue
            wrong = session.wrong(contender, causal)
            if wrong:
                session.fail(section, wrong, **case)
                continue
            for length in session.lengths:
                say(f"{section}, {contender.name}, {length:,} tokens")
                try:
                    _length(session, section, contender, causal, length)
                except Exception as error:
                    line = f"{contender.name}, {section}, {length:,} tokens: {first_line(error)}"
                    session.fail(section, [line], **case)


def _length(
    session: Session, section: str, contender: Contender, causal: bool, length: int
) -> None:
    """Forward, forward and backward, and the memory of both."""
    case: dict[str, Any] = {"contender": contender.name, "map": contender.map, "length": length}
    attend = contender.make(causal)
    *leaves, gradient = make_inputs(max(TOKENS // length, 1), length)
    tokens = leaves[0].shape[0] * length

    @torch.no_grad()
    def forward() -> Tensor:
        return attend(*leaves)

    def both() -> list[Tensor]:
        return both_passes(attend, leaves, gradient)

    for name, call in (("forward", forward), ("forward+backward", both)):
        backward = call is both
        try:
            if backward:
                leaves = [x.requires_grad_() for x in leaves]
            found = measure(call, session.seconds)
            if backward:
                found["bytes"] = extra_peak(call)
        except torch.cuda.OutOfMemoryError:
            found: dict[str, Any] = {"skipped": "out of memory"}
            torch.cuda.empty_cache()
        if "seconds" in found and contender.name.startswith("ours"):
            assert contender.map is not None
            flops = least_flops(contender.map, causal, tokens, backward)
            size = least_bytes(tokens, backward)
            found |= session.fractions(found["seconds"], size, flops)
        session.log.add(section, **case, **{"pass": name}, **found)


@contextmanager
def _torch_operations() -> Iterator[None]:
    """Steps as ordinary operations instead of one kernel."""
    before, fused_step.DEVICES = fused_step.DEVICES, ()
    try:
        yield
    finally:
        fused_step.DEVICES = before


def decode(session: Session) -> None:
    """One token of a batch in a CUDA graph, in place; as in a model, states take turns."""
    for map in (ELU, FAVOR):
        _decode(session, f"ours, {map}", map)
        with _torch_operations():
            _decode(session, f"torch operations, {map}", map)


def _decode(session: Session, name: str, map: str) -> None:
    say(f"decode, {name}")
    case = {"contender": name, "map": map, "batch": BATCH}
    features = features_of(make_map(map))
    q, k, v, _ = make_inputs(BATCH, STEPS)
    exact = features_of(make_map(map).double())
    expected = ops.causal_linear_attention(
        q.double(), k.double(), v.double(), exact, impl="chunked"
    ).values
    state, found = None, []
    for i in range(STEPS):
        values, state = ops.linear_attention_step(
            q[:, i], k[:, i], v[:, i], features, state=state, inplace=True
        )
        found.append(values)
    assert state is not None
    error = relative_error(torch.stack(found, 1), expected)
    if not error <= LIMIT:
        wrong = f"values of {name}, decode: relative error {error:.1e}, allowed {LIMIT:.1e}"
        session.fail("decode", [wrong], **case)
        return
    count = max(1, BETWEEN // state.nbytes)
    states = [state.map(Tensor.clone) for _ in range(count)]

    def steps() -> None:
        for each in states:
            ops.linear_attention_step(
                q[:, 0], k[:, 0], v[:, 0], features, state=each, inplace=True
            )

    found = measure(captured(steps), session.seconds)
    for key in ("seconds", "low", "high"):
        found[key] /= count
    size = 2 * state.nbytes + 4 * q[:, 0].nbytes
    session.log.add("decode", **case, **found, **session.fractions(found["seconds"], size))


MODELS = {
    f"ours, {ELU}": {"attention_type": "causal-linear", "feature_map": elu_feature_map},
    f"ours, {FAVOR}": {
        "attention_type": "causal-linear",
        "feature_map": Favor.factory(n_dims=FEATURES, generator=SEED),
    },
    "SDPA": {"attention_type": "full"},
}


def model(session: Session) -> None:
    """A training step of a compiled transformer: tokens per second and memory."""
    contenders = {contender.name: contender for contender in CONTENDERS}
    for name, options in MODELS.items():
        case = {"contender": name, "layers": LAYERS, "length": MODEL_LENGTH, "batch": MODEL_BATCH}
        wrong = session.wrong(contenders[name], True)
        if wrong:
            session.fail("model", wrong, **case)
            continue
        say(f"model, {name}")
        try:
            session.log.add("model", **case, **_train(options, 4 * session.seconds))
        except torch.cuda.OutOfMemoryError:
            session.log.add("model", **case, skipped="out of memory")
        except Exception as error:
            session.fail("model", [f"{name}, model: {first_line(error)}"], **case)
        torch.cuda.empty_cache()


def _train(options: dict[str, Any], seconds: float) -> dict[str, Any]:
    torch.compiler.reset()
    step = training_step(options)
    found = measure(step, seconds)
    found["bytes"] = extra_peak(step)
    found["tokens per second"] = MODEL_BATCH * MODEL_LENGTH / found["seconds"]
    return found


def training_step(options: dict[str, Any]) -> Callable[[], Tensor]:
    """Forward, backward and AdamW in bfloat16; without dropout, which SDPA would pay for."""
    torch.manual_seed(SEED)
    net = TransformerEncoderBuilder.from_kwargs(
        n_layers=LAYERS,
        n_heads=HEADS,
        query_dimensions=DIM,
        value_dimensions=DIM,
        feed_forward_dimensions=4 * HEADS * DIM,
        dropout=0.0,
        attention_dropout=0.0,
        **options,
    ).get()
    net = net.to("cuda", torch.bfloat16).train()
    x = torch.randn(MODEL_BATCH, MODEL_LENGTH, HEADS * DIM, device="cuda", dtype=torch.bfloat16)
    mask = TriangularCausalMask(MODEL_LENGTH, device="cuda")
    optimiser = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)
    compiled = torch.compile(net)

    def step() -> Tensor:
        loss = compiled(x, attn_mask=mask).float().square().mean()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        return loss

    loss = float(step().detach())
    if not loss < float("inf"):
        raise ArithmeticError(f"the loss is {loss}")
    return step
