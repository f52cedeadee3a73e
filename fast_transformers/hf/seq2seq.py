"""An encoder and a decoder, which generates with a state that holds the memory, too."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.modeling_outputs import Seq2SeqLMOutput

from ..builders import TransformerDecoderBuilder
from ..masking import FullMask, TriangularCausalMask
from ..state import State
from .base import FastTransformerPreTrainedModel, Generates, token_loss
from .configuration import FastTransformerConfig
from .encoders import FastTransformerModel
from .modeling import token_positions
from .state import RecurrentState, check_stateful, real_tokens


class FastTransformerForSeq2SeqLM(Generates, FastTransformerPreTrainedModel, GenerationMixin):
    """An encoder over the source, a decoder with cross attention to it, and a linear head.

    Source and target share their embeddings.

    Raises:
        ValueError: for a configuration without ``is_encoder_decoder=True``.
    """

    def __init__(self, config: FastTransformerConfig) -> None:
        if not config.is_encoder_decoder:
            raise ValueError(
                "is_encoder_decoder must be True for a sequence-to-sequence model, got False"
            )
        super().__init__(config)
        self.source = FastTransformerModel(config)
        self.decoder = config.decoder_builder(TransformerDecoderBuilder).get()
        self.head = nn.Linear(config.d_model, config.vocab_size)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.source.tokens

    def set_input_embeddings(self, value: Any) -> None:
        self.source.tokens = value

    def get_encoder(self, *args: Any, **kwargs: Any) -> FastTransformerModel:
        return self.source

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        labels: Tensor | None = None,
        past_key_values: RecurrentState | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> Seq2SeqLMOutput | tuple:
        """Source (N, S) and target (N, L) to logits (N, L, vocab_size).

        Args:
            input_ids: (N, S); not needed with ``encoder_outputs``.
            attention_mask: (N, S), 1 for tokens of the source and 0 for padding.
            decoder_input_ids: (N, L); default: ``labels`` moved to the right.
            decoder_attention_mask: (N, L), the same for the target.
            encoder_outputs: what the encoder returned for the source.
            labels: (N, L), the next token of each; -100 is ignored.
            past_key_values: the state that an earlier call returned, which moves on.
            use_cache: return the state after the last token; default: if given one.
            num_items_in_batch: what the loss is divided by, default the labels that count.

        Raises:
            ValueError: for more tokens than there are positions, or neither target nor labels.
        """
        if encoder_outputs is None:
            if input_ids is None:
                raise ValueError("input_ids or encoder_outputs must be given, got None for both")
            encoder_outputs = self.source(input_ids, attention_mask)
        memory = encoder_outputs[0]
        if decoder_input_ids is None:
            decoder_input_ids = self._moved(labels)
        cache = past_key_values
        if cache is None and use_cache:
            cache = RecurrentState()
        hidden = self._decode(
            decoder_input_ids, decoder_attention_mask, memory, attention_mask, cache
        )
        logits: Any = self.head(hidden)
        loss: Any = None
        if labels is not None:
            loss = token_loss(logits, labels, num_items_in_batch)
        output = Seq2SeqLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=cache,  # pyright: ignore[reportArgumentType]
            encoder_last_hidden_state=memory,
        )
        return output.to_tuple() if return_dict is False else output

    def _decode(
        self,
        input_ids: Tensor,
        mask: Tensor | None,
        memory: Tensor,
        memory_mask: Tensor | None,
        cache: RecurrentState | None,
    ) -> Tensor:
        length = input_ids.shape[1]
        real = real_tokens(mask, length, "decoder_attention_mask")
        self.source.check_length(length + (0 if cache is None else cache.length))
        masks: dict[str, Any] = {} if real is None else {"x_length_mask": FullMask(real)}
        if memory_mask is not None:
            masks["memory_length_mask"] = FullMask(memory_mask.bool())
        if cache is None:
            x = self.source.embed(input_ids, token_positions(State(), input_ids, real))
            causal = TriangularCausalMask(length, device=x.device)
            return self.checkpointed(self.decoder)(x, memory, causal, **masks)
        check_stateful(self.decoder)
        self.decoder.checkpointing = None  # what is recomputed cannot hand on a state
        if cache.may_step(input_ids, real):
            return cache.step(self._read, input_ids)
        hidden, state = self._read(input_ids, cache.state, real, memory, masks)
        cache.advance(state, length)
        return hidden

    def _read(
        self,
        input_ids: Tensor,
        state: State,
        real: Tensor | None = None,
        memory: Tensor | None = None,
        masks: dict[str, Any] | None = None,
    ) -> tuple[Tensor, State]:
        """(N, L) and a state to (N, L, d_model) and the new state, which knows the memory."""
        x = self.source.embed(input_ids, token_positions(state, input_ids, real))
        return self.decoder(x, memory, **(masks or {}), state=state, return_state=True)

    def _moved(self, labels: Tensor | None) -> Tensor:
        """The target that predicts ``labels``: the start token, then all labels but the last."""
        start = self.config.decoder_start_token_id
        if labels is None or start is None:
            raise ValueError(
                "decoder_input_ids must be given, or labels and a decoder_start_token_id in the "
                "configuration"
            )
        moved = labels.new_full(labels.shape, start)
        moved[:, 1:] = labels[:, :-1]
        return moved.masked_fill(moved == -100, self.config.pad_token_id or 0)

    def generating_stack(self) -> nn.Module:
        return self.decoder
