"""Projections around an attention: model dimensions in, model dimensions out."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor

from ..events import QKVEvent
from ..state import PositionState
from ..state.parts import add, positions
from .base import ProjectedAttention, key_mask


class AttentionLayer(ProjectedAttention):
    """Project to heads, attend, project back.

    Args: see :class:`~fast_transformers.attention.base.ProjectedAttention`. The inner attention is
    called with queries (N, L, H, E), keys (N, S, H, E), values (N, S, H, M), attn_mask,
    query_lengths and key_lengths, and returns (N, L, H, M).
    """

    def forward(
        self,
        queries: Tensor,
        keys: Tensor | None,
        values: Tensor | None,
        attn_mask: Any,
        query_lengths: Any,
        key_lengths: Any,
        *,
        state: Any = None,
        return_state: bool = False,
    ) -> Any:
        """(N, L, d_model), (N, S, d_model_keys), (N, S, d_model_keys) to (N, L, d_model).

        The three masks go to the inner attention as they are.

        Args:
            state: what an earlier call returned, which the keys follow; or what :meth:`remember`
                returned, with None for keys and values.
            return_state: return the pair of the result and the new state.

        Raises:
            TypeError: if the inner attention takes no state.
        """
        q = self.heads(self.query_projection, queries)
        k = None if keys is None else self.heads(self.key_projection, keys)
        v = None if values is None else self.heads(self.value_projection, values)
        stateful: dict[str, Any] = {}
        if return_state or state is not None:
            self._check_inner()
            stateful = {"state": state, "return_state": True}
        position: Any = None
        if self.rotary is not None and k is not None:
            inner, position = PositionState.of(state)
            if stateful:
                stateful["state"] = inner
            of_q, of_k = key_mask(query_lengths, q), key_mask(key_lengths, k)
            q = self.rotary(q, positions(position, q.shape[1], of_q))
            k = self.rotary(k, positions(position, k.shape[1], of_k))
            position = add(position, k.shape[1], of_k)
        if k is not None and v is not None:
            self.event_dispatcher.dispatch(QKVEvent(self, q, k, v))
        attended = self.inner_attention(q, k, v, attn_mask, query_lengths, key_lengths, **stateful)
        if not stateful:
            return self.out_projection(attended.flatten(2))
        attended, state = attended
        out = self.out_projection(attended.flatten(2))
        if position is not None:
            state = PositionState(state, position)
        return (out, state) if return_state else out

    def remember(self, keys: Tensor, values: Tensor, key_lengths: Any) -> Any:
        """The state of a memory (N, S, d_model_keys), for queries that come later.

        Raises:
            TypeError: if the inner attention cannot make one.
        """
        if not hasattr(self.inner_attention, "remember"):
            self._refuse("remember(keys, values, key_lengths)")
        k = self.heads(self.key_projection, keys)
        v = self.heads(self.value_projection, values)
        return self.inner_attention.remember(k, v, key_lengths)

    def _check_inner(self) -> None:
        if not getattr(self.inner_attention, "takes_state", False):
            self._refuse("takes_state = True, and a forward with state and return_state")

    def _refuse(self, lacks: str) -> NoReturn:
        raise TypeError(
            f"{type(self.inner_attention).__name__} has no state to go on from: it lacks {lacks}, "
            "as fast_transformers.attention.FullAttention has them; call the model without a state"
        )
