"""performer-pytorch, which has Favor alone, on transposed views."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from performer_pytorch import FastAttention  # pyright: ignore[reportMissingImports]
from torch import Tensor

from .jobs import DIM, AttentionJob, Job

ABOUT = {"torch": torch.__version__, "performer-pytorch": version("performer-pytorch")}


def linear(map: str, causal: bool, omega: Tensor, **shape: Any) -> Job:
    """Attention with the features exp(+-w_i.x), those of the other contenders."""
    attention = FastAttention(DIM, nb_features=2 * omega.shape[1], causal=causal).eval()
    attention.projection_matrix.copy_(torch.cat([omega, -omega], 1).T)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    return AttentionJob(attend, **shape)


TASKS: dict[str, Callable[..., Job]] = {"linear": linear}
