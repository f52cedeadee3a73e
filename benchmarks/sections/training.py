"""What surrounds attention: the drawing of random maps, and the rest of a model."""

from __future__ import annotations

import torch
from torch import Tensor

from fast_transformers import ops
from fast_transformers.feature_maps import elu_feature_map, features_of

from ..contenders import CONTENDERS, FAVOR, OURS
from ..session import Session
from ..timing import Timed, interleave
from ..worker.jobs import DIM, TAIL
from ..worker.model import LAYERS, LENGTH, make_model, replace_attention
from ..worker.ours import FEATURES
from .attention import checked

REDRAW_LENGTHS = [512, 1024, 2048, 4096]
PARTS = ("whole", "rest", "attention")


def redraw(session: Session) -> None:
    """A new random map for each training step, as a share of the step's attention."""
    ours = next(c for c in CONTENDERS if c.name == OURS[FAVOR])
    if not checked(session, True, [ours]):
        return
    worker = session.worker("ours")
    assert worker is not None
    for threads in session.settings.threads:
        worker.ask("threads", count=threads)
        worker.ask("prepare", name="redraw", task="redraw", options={"features": FEATURES})
        timed = {0: Timed(worker, "redraw", threads)}
        for length in REDRAW_LENGTHS:
            task, options = ours.job(True, 1, length, True)
            worker.ask("prepare", name=str(length), task=task, options=options)
            timed[length] = Timed(worker, str(length), threads)
        for one in timed.values():
            one.plan()
        interleave(timed.values(), session.rounds(0.2))
        cost = timed.pop(0).summary()
        for length, one in timed.items():
            step = one.summary()
            fields = {"length": length, "redraw": cost["seconds"]}
            share = cost["seconds"] / step["seconds"]
            session.log.add("redraw", **fields, share=share, **step)
    session.release()


def model(session: Session) -> None:
    """A model's forward pass against its parts: the same without attention, and attention."""
    worker = session.worker("ours")
    assert worker is not None
    for threads in session.settings.threads:
        worker.ask("threads", count=threads)
        for part in PARTS:
            worker.ask("prepare", name=part, task="model", options={"part": part})
        found = worker.ask("results", name="whole")["values"]
        wrong = _model_is_wrong(found)
        if wrong:
            session.fail("model", wrong)
            return
        timed = {part: Timed(worker, part, threads) for part in PARTS}
        for one in timed.values():
            one.plan()
        interleave(timed.values(), session.rounds(0.2))
        parts = {part: one.summary() for part, one in timed.items()}
        whole, rest, attention = (parts[part]["seconds"] for part in PARTS)
        ratio = whole / (rest + LAYERS * attention)
        session.log.add("model", threads=threads, length=LENGTH, ratio=ratio, parts=parts)
    session.release()


class _Reference(torch.nn.Module):
    """The attention of the model by the reference."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *_: object) -> Tensor:
        features = features_of(elu_feature_map(DIM))
        return ops.causal_linear_attention(q, k, v, features, impl="reference").values


@torch.no_grad()
def _model_is_wrong(found: Tensor) -> list[str]:
    """Compare with the same model in float64, as accurately as in float32 by the reference."""
    results = []
    for dtype in (torch.float64, torch.float32):
        whole, x, mask = make_model()
        whole = replace_attention(whole, _Reference()).to(dtype)
        results.append(whole(x.to(dtype), attn_mask=mask)[0, -TAIL:])
    exact, plain = results
    lost = float((plain.double() - exact).abs().max())
    size = float(exact.abs().max())
    budget = 2 * lost + 32 * torch.finfo(torch.float32).eps * max(size, 1)
    error = float((found.double() - exact).abs().max())
    if error <= budget:
        return []
    return [f"values of the model: error {error:.1e}, allowed {budget:.1e}"]
