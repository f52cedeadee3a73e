"""One token at a time: jobs whose cost is to be independent of the past."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .jobs import TAIL, make_inputs


class DecodeJob:
    """One token of a recurrent attention, whose state goes from call to call.

    Args:
        step: (N, H, E), (N, H, E), (N, H, M), state or None to (N, H, M), state.
        batch: N.
    """

    def __init__(self, step: Callable[..., tuple[Tensor, Any]], batch: int) -> None:
        self.step = step
        self.inputs = make_inputs(batch, TAIL)
        self.token = self._token(0)
        self.state: Any = None

    def _token(self, i: int) -> list[Tensor]:
        return [x[:, i].contiguous() for x in self.inputs[:3]]

    @torch.no_grad()
    def __call__(self) -> Tensor:
        values, self.state = self.step(*self.token, self.state)
        return values

    @torch.no_grad()
    def results(self) -> dict[str, Tensor]:
        """Values of a short sequence, token by token, in the last head of the last row."""
        state, values = None, []
        for i in range(TAIL):
            value, state = self.step(*self._token(i), state)
            values.append(value[-1, -1])
        return {"values": torch.stack(values)}


class CachedJob:
    """Softmax attention of one query over a cache of keys and values.

    Args:
        attend: (N, H, 1, E), (N, H, S, E), (N, H, S, M) to (N, H, 1, M).
        batch: N.
        cached: S.
    """

    def __init__(self, attend: Callable[..., Tensor], batch: int, cached: int) -> None:
        self.attend = attend
        q, k, v, _ = make_inputs(batch, cached)
        self.qkv = [x.transpose(1, 2).contiguous() for x in (q[:, -1:], k, v)]

    @torch.no_grad()
    def __call__(self) -> Tensor:
        return self.attend(*self.qkv)

    def results(self) -> dict[str, Tensor]:
        """The values in the last head of the last row."""
        return {"values": self()[-1, -1]}
