"""The older library, pytorch-fast-transformers, which is imported by this library's name."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from fast_transformers.attention import CausalLinearAttention, LinearAttention
from fast_transformers.feature_maps import Favor, elu_feature_map
from fast_transformers.masking import FullMask, LengthMask
from fast_transformers.recurrent.attention import RecurrentLinearAttention

from .decoding import DecodeJob
from .jobs import DIM, AttentionJob, Job

ABOUT = {
    "torch": torch.__version__,
    "pytorch-fast-transformers": version("pytorch-fast-transformers"),
}


class _Causal:
    """All that the attention asks of its mask; a real one is an L x L matrix."""

    lower_triangular = True


def _attention(kind: Callable[..., Any], omega: Tensor | None) -> Any:
    if omega is None:
        return kind(DIM, elu_feature_map)
    # in evaluation mode, with deterministic_eval, it is never redrawn
    factory = Favor.factory(n_dims=2 * omega.shape[1], deterministic_eval=True)
    attention = kind(DIM, factory).eval()
    attention.feature_map.omega.copy_(omega)
    return attention


def linear(map: str, causal: bool, length: int, omega: Tensor | None = None, **shape: Any) -> Job:
    """Attention with elu + 1, or with Favor if there is an ``omega``."""
    attention = _attention(CausalLinearAttention if causal else LinearAttention, omega)
    mask = _Causal() if causal else FullMask(1)
    lengths = LengthMask(torch.full((shape["batch"],), length), max_len=length)
    lengths.float_matrix  # noqa: B018  it is computed once and kept

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, mask, lengths, lengths)

    return AttentionJob(attend, length=length, **shape)


def decode(map: str, batch: int, omega: Tensor | None = None) -> Job:
    """One token of the recurrent module."""
    return DecodeJob(_attention(RecurrentLinearAttention, omega), batch)


TASKS: dict[str, Callable[..., Job]] = {"linear": linear, "decode": decode}
