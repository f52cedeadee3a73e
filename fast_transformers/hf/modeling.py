"""A causal language model that trains as a transformer and generates as a recurrent network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.utils.generic import ModelOutput

from ..state import State
from ..state.parts import positions
from .base import EncoderModel, Generates
from .state import RecurrentState, check_stateful, real_tokens


@dataclass
class CausalLMOutput(ModelOutput):
    """What :class:`FastTransformerForCausalLM` returns.

    Attributes:
        loss: () mean over the labels that count, in nats; None without labels.
        logits: (N, L, vocab_size).
        past_key_values: the state after the last token; None if none was asked for.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: RecurrentState | None = None


class FastTransformerForCausalLM(Generates, EncoderModel, GenerationMixin):
    """Token and position embeddings, an encoder with a causal mask, and a linear head.

    Any number of tokens can go on from a state: a prompt is read in parallel, in chunks if
    wanted, and then continued token by token. ``generate`` does so unless ``use_cache=False``.

    >>> from fast_transformers.hf import FastTransformerConfig
    >>> model = FastTransformerForCausalLM(FastTransformerConfig(n_layers=2, d_model=32))
    >>> model.generate(torch.tensor([[256]]), max_new_tokens=5, do_sample=False).shape
    torch.Size([1, 6])
    """

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: RecurrentState | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutput | tuple:
        """(N, L) int64 to logits (N, L, vocab_size).

        Args:
            attention_mask: (N, L), 1 for tokens and 0 for padding, on either side; with a state,
                columns for earlier tokens may stand before those.
            labels: (N, L), compared with the logits of the token before them; -100 is ignored.
            past_key_values: the state that an earlier call returned; ``input_ids`` go on from it,
                and it moves on.
            use_cache: return the state after the last token; default: if given one. There is
                no gradient checkpointing then.
            logits_to_keep: of the last so many tokens only; 0 is all.
            kwargs: handed to the loss (``num_items_in_batch``).

        Raises:
            ValueError: for more tokens than there are positions.
        """
        cache = past_key_values
        if cache is None and use_cache:
            cache = RecurrentState()
        if cache is None:
            hidden = self.encode(input_ids, attention_mask, causal=True)
        else:
            hidden = self._go_on(input_ids, attention_mask, cache)
        logits = self.head(hidden[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        output = CausalLMOutput(loss=loss, logits=logits, past_key_values=cache)
        return output.to_tuple() if return_dict is False else output

    def _go_on(
        self, input_ids: Tensor, attention_mask: Tensor | None, cache: RecurrentState
    ) -> Tensor:
        """(N, L) to (N, L, d_model), and ``cache`` moves on by L tokens."""
        check_stateful(self.encoder)
        length = input_ids.shape[1]
        mask = real_tokens(attention_mask, length)
        self.check_length(cache.length + length)
        self.encoder.checkpointing = None  # what is recomputed cannot hand on a state
        if cache.may_step(input_ids, mask):
            return cache.step(self._read, input_ids)
        hidden, state = self._read(input_ids, cache.state, mask)
        cache.advance(state, length)
        return hidden

    def _read(
        self, input_ids: Tensor, state: State, mask: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """(N, L) and a state to (N, L, d_model) and the new state."""
        x = self.embed(input_ids, token_positions(state, input_ids, mask))
        return self.encoder(x, length_mask=mask, state=state, return_state=True)

    def generating_stack(self) -> nn.Module:
        return self.encoder


def token_positions(state: State, input_ids: Tensor, mask: Tensor | None) -> Tensor:
    """(N, L), (L,) or () positions of tokens that follow a state; padding does not count."""
    length = input_ids.shape[1]
    at = positions(state.position, length, mask)
    if isinstance(at, int):
        return torch.arange(at, at + length, device=input_ids.device)
    return at
