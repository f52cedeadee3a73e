"""Encoders: hidden states of whole sequences, and a model that fills in masked tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput

from .base import EncoderModel, token_loss
from .configuration import FastTransformerConfig


class FastTransformerModel(EncoderModel):
    """Token and position embeddings, and an encoder; causal if ``config.causal`` is set.

    >>> import torch
    >>> config = FastTransformerConfig(n_layers=1, d_model=32, attention="linear", causal=False)
    >>> FastTransformerModel(config)(torch.tensor([[1, 2, 3]])).last_hidden_state.shape
    torch.Size([1, 3, 32])
    """

    headed = False

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput | tuple:
        """(N, L) int64 to ``last_hidden_state`` (N, L, d_model).

        Args:
            attention_mask: (N, L), 1 for tokens and 0 for padding, on either side.

        Raises:
            ValueError: for more tokens than there are positions.
        """
        causal = self.config.causal and not self.config.is_encoder_decoder
        hidden: Any = self.encode(input_ids, attention_mask, causal=causal)
        output = BaseModelOutput(last_hidden_state=hidden)
        return output.to_tuple() if return_dict is False else output


class FastTransformerForMaskedLM(EncoderModel):
    """An encoder that sees both sides, and a linear head; ``config.causal`` must not be set.

    Raises:
        ValueError: for a causal configuration.
    """

    def __init__(self, config: FastTransformerConfig) -> None:
        if config.causal:
            raise ValueError(
                "a masked language model sees both sides of a token: pass causal=False and an "
                "attention such as 'linear' or 'full'"
            )
        super().__init__(config)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> MaskedLMOutput | tuple:
        """(N, L) int64 to logits (N, L, vocab_size).

        Args:
            attention_mask: (N, L), 1 for tokens and 0 for padding, on either side.
            labels: (N, L), what stands where the input is masked; -100 is ignored.
            num_items_in_batch: what the loss is divided by, default the labels that count.
        """
        hidden = self.encode(input_ids, attention_mask, causal=False)
        logits: Any = self.head(hidden)
        loss: Any = None
        if labels is not None:
            loss = token_loss(logits, labels, num_items_in_batch)
        output = MaskedLMOutput(loss=loss, logits=logits)
        return output.to_tuple() if return_dict is False else output
