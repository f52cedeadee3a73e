"""The state of a model, as ``generate`` of transformers wants it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..state import State
from ..stepper import Stepper, why_not_graph


class RecurrentState:
    """A :class:`~fast_transformers.state.State` that ``generate`` hands over and changes.

    Like every ``past_key_values`` of transformers this one moves on when a model reads tokens;
    its ``state`` is a value, to be kept and gone back to:

        kept = cache.state                      # after a prompt, say
        cache = RecurrentState(kept, cache.length)

    For linear attention the size does not depend on the length; for softmax attention it is a
    cache of keys and values with room for more. On a GPU single tokens are steps of a
    :class:`~fast_transformers.stepper.Stepper`, which replays a CUDA graph where it can;
    ``generate(..., past_key_values=RecurrentState(form="compiled"))`` compiles them.

    Args:
        state: to go on from, default one that has seen nothing.
        length: number of tokens handed over for it, padding included.
        form: of single tokens, as :class:`~fast_transformers.stepper.Stepper` takes it.

    Attributes:
        length: number of tokens handed over, padding included.
        stepper: what holds the state while single tokens are read, or None.
    """

    is_compileable = False
    is_croppable = False

    def __init__(self, state: State | None = None, length: int = 0, *, form: str = "auto") -> None:
        self._state = State() if state is None else state
        self.length, self._form = length, form
        self.stepper: Stepper | None = None

    @property
    def state(self) -> State:
        """What the layers remember."""
        return self._state if self.stepper is None else self.stepper.state

    def advance(self, state: State, tokens: int) -> None:
        """Take the state after ``tokens`` more."""
        self._state, self.stepper = state, None
        self.length += tokens

    def may_step(self, tokens: Tensor, mask: Tensor | None) -> bool:
        """Whether tokens (N, L) may be read by :meth:`step`: one each."""
        if tokens.shape[1] != 1 or mask is not None or torch.is_grad_enabled():
            return False
        if self._form == "auto" and why_not_graph(tokens.device) is not None:
            return False
        return self.stepper is not None or self._state.batch_size > 0

    def step(self, function: Callable[..., tuple[Any, State]], tokens: Tensor) -> Any:
        """``function(tokens, state)`` for one token of each sequence (N, 1), without its state."""
        if self.stepper is None:
            self.stepper = Stepper(function, self._state, form=self._form)
            self._state = State()
        self.length += 1
        return self.stepper(tokens)

    @property
    def form(self) -> str:
        """The form in which single tokens are read now, see :class:`Stepper`."""
        return "plain" if self.stepper is None else self.stepper.form

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of tokens handed over, padding included."""
        return self.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the given rows (1-D int64) of the batch, as beam search asks for."""
        if self.stepper is None:
            self._state = self._state.reorder(beam_idx)
        else:
            self.stepper.reorder(beam_idx)

    @property
    def nbytes(self) -> int:
        """Bytes that the state occupies."""
        return self.state.nbytes

    def __repr__(self) -> str:
        return f"RecurrentState(length={self.length}, nbytes={self.nbytes})"


def real_tokens(mask: Tensor | None, length: int, name: str = "attention_mask") -> Tensor | None:
    """Which of the last ``length`` tokens a mask (N, >= length) keeps, as bool; None for all.

    Waits for the device: a batch without padding is cheaper from here on.

    Raises:
        ValueError: for a mask of another shape.
    """
    if mask is None:
        return None
    if mask.ndim != 2 or mask.shape[1] < length:
        raise ValueError(
            f"{name} must have shape (N, {length}), 1 for tokens and 0 for padding, or more "
            f"columns for the tokens before, got {tuple(mask.shape)}"
        )
    kept = mask[:, mask.shape[1] - length :].bool()
    return None if bool(kept.all()) else kept


def check_stateful(stack: Any) -> None:
    """Raise ValueError unless every layer of an encoder or decoder can hand on its state."""
    for layer in stack.layers:
        own = layer.attention if hasattr(layer, "attention") else layer.self_attention
        if not getattr(own.inner_attention, "takes_state", False):
            raise ValueError(
                f"attention {type(own.inner_attention).__name__} cannot generate token by token: "
                "it has no state; pass use_cache=False to recompute the sequence for every token"
            )
