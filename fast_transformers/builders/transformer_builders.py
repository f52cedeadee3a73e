"""Builders of encoders and decoders, over whole sequences and recurrent."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..attention import AttentionLayer
from ..recurrent.attention import RecurrentAttentionLayer, RecurrentCrossAttentionLayer
from ..recurrent.transformers import (
    RecurrentTransformerDecoder,
    RecurrentTransformerDecoderLayer,
    RecurrentTransformerEncoder,
    RecurrentTransformerEncoderLayer,
)
from ..transformers import (
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)
from .attention_builders import (
    AttentionBuilder,
    BaseAttentionBuilder,
    RecurrentAttentionBuilder,
    RecurrentCrossAttentionBuilder,
)
from .options import AttentionType, CrossOptions
from .transformer_base import BaseTransformerBuilder


class BaseTransformerEncoderBuilder(BaseTransformerBuilder):
    """Builds encoders; the four hooks choose the classes."""

    attention_type = AttentionType("attention", "name or composition of the attention")

    def __init__(self) -> None:
        super().__init__()
        self._attention_builders = {"attention": self._get_attention_builder()}

    def _get_attention_builder(self) -> BaseAttentionBuilder:
        raise NotImplementedError("a builder must define _get_attention_builder")

    def _get_attention_layer_class(self) -> Any:
        raise NotImplementedError("a builder must define _get_attention_layer_class")

    def _get_encoder_class(self) -> Any:
        raise NotImplementedError("a builder must define _get_encoder_class")

    def _get_encoder_layer_class(self) -> Any:
        raise NotImplementedError("a builder must define _get_encoder_layer_class")

    @property
    def attention(self) -> BaseAttentionBuilder:
        """The builder of the attentions; its parameters can be set here, too."""
        return self._attention_builders["attention"]

    def get(self) -> nn.Module:
        """A new encoder, with new weights at every call.

        Raises:
            ValueError: for an option that is required and missing, or invalid.
        """
        self.attention.event_dispatcher = self.event_dispatcher

        def attentions() -> list[nn.Module]:
            attention = self.attention.get(self.attention_type)
            return [self._self_attention_layer(self._get_attention_layer_class(), attention)]

        return self._stack(self._get_encoder_class(), self._get_encoder_layer_class(), attentions)


class TransformerEncoderBuilder(BaseTransformerEncoderBuilder):
    """Builds encoders over whole sequences.

    >>> builder = TransformerEncoderBuilder.from_kwargs(
    ...     attention_type="linear", n_layers=2, n_heads=4, query_dimensions=16
    ... )
    >>> len(builder.get().layers)
    2
    """

    def _get_attention_builder(self) -> BaseAttentionBuilder:
        return AttentionBuilder()

    def _get_attention_layer_class(self) -> Any:
        return AttentionLayer

    def _get_encoder_class(self) -> Any:
        return TransformerEncoder

    def _get_encoder_layer_class(self) -> Any:
        return TransformerEncoderLayer


class RecurrentEncoderBuilder(BaseTransformerEncoderBuilder):
    """Builds encoders that take one token at a time."""

    def _get_attention_builder(self) -> BaseAttentionBuilder:
        return RecurrentAttentionBuilder()

    def _get_attention_layer_class(self) -> Any:
        return RecurrentAttentionLayer

    def _get_encoder_class(self) -> Any:
        return RecurrentTransformerEncoder

    def _get_encoder_layer_class(self) -> Any:
        return RecurrentTransformerEncoderLayer


class BaseTransformerDecoderBuilder(BaseTransformerBuilder, CrossOptions):
    """Builds decoders; the six hooks choose the classes."""

    self_attention_type = AttentionType("self_attention", "attention to the own past")
    cross_attention_type = AttentionType("cross_attention", "attention to the memory")

    def __init__(self) -> None:
        super().__init__()
        self._attention_builders = {
            "self_attention": self._get_self_attention_builder(),
            "cross_attention": self._get_cross_attention_builder(),
        }

    def _get_self_attention_builder(self) -> BaseAttentionBuilder:
        raise NotImplementedError("a builder must define _get_self_attention_builder")

    def _get_cross_attention_builder(self) -> BaseAttentionBuilder:
        raise NotImplementedError("a builder must define _get_cross_attention_builder")

    def _get_self_attention_layer_class(self) -> Any:
        raise NotImplementedError("a builder must define _get_self_attention_layer_class")

    def _get_cross_attention_layer_class(self) -> Any:
        raise NotImplementedError("a builder must define _get_cross_attention_layer_class")

    def _get_decoder_class(self) -> Any:
        raise NotImplementedError("a builder must define _get_decoder_class")

    def _get_decoder_layer_class(self) -> Any:
        raise NotImplementedError("a builder must define _get_decoder_layer_class")

    @property
    def self_attention(self) -> BaseAttentionBuilder:
        """The builder of the self attentions; its parameters can be set here, too."""
        return self._attention_builders["self_attention"]

    @property
    def cross_attention(self) -> BaseAttentionBuilder:
        """The builder of the cross attentions; its parameters can be set here, too."""
        return self._attention_builders["cross_attention"]

    def get(self) -> nn.Module:
        """A new decoder, with new weights at every call.

        Raises:
            ValueError: for an option that is required and missing, or invalid.
        """
        self.self_attention.event_dispatcher = self.event_dispatcher
        self.cross_attention.event_dispatcher = self.event_dispatcher
        if self._values.get("cross_query_dimensions"):
            self.cross_attention.query_dimensions = self.cross_query_dimensions

        def attentions() -> list[nn.Module]:
            attention = self.self_attention.get(self.self_attention_type)
            return [
                self._self_attention_layer(self._get_self_attention_layer_class(), attention),
                self._get_cross_attention_layer_class()(
                    self.cross_attention.get(self.cross_attention_type),
                    self.model_dimensions,
                    self.cross_n_heads,
                    d_keys=self.cross_query_dimensions,
                    d_values=self.cross_value_dimensions,
                    d_model_keys=self.cross_model_dimensions,
                    event_dispatcher=self.event_dispatcher,
                    **self._projection_options(None),
                ),
            ]

        return self._stack(self._get_decoder_class(), self._get_decoder_layer_class(), attentions)


class TransformerDecoderBuilder(BaseTransformerDecoderBuilder):
    """Builds decoders over whole sequences."""

    def _get_self_attention_builder(self) -> BaseAttentionBuilder:
        return AttentionBuilder()

    def _get_cross_attention_builder(self) -> BaseAttentionBuilder:
        return AttentionBuilder()

    def _get_self_attention_layer_class(self) -> Any:
        return AttentionLayer

    def _get_cross_attention_layer_class(self) -> Any:
        return AttentionLayer

    def _get_decoder_class(self) -> Any:
        return TransformerDecoder

    def _get_decoder_layer_class(self) -> Any:
        return TransformerDecoderLayer


class RecurrentDecoderBuilder(BaseTransformerDecoderBuilder):
    """Builds decoders that take one token at a time."""

    def _get_self_attention_builder(self) -> BaseAttentionBuilder:
        return RecurrentAttentionBuilder()

    def _get_cross_attention_builder(self) -> BaseAttentionBuilder:
        return RecurrentCrossAttentionBuilder()

    def _get_self_attention_layer_class(self) -> Any:
        return RecurrentAttentionLayer

    def _get_cross_attention_layer_class(self) -> Any:
        return RecurrentCrossAttentionLayer

    def _get_decoder_class(self) -> Any:
        return RecurrentTransformerDecoder

    def _get_decoder_layer_class(self) -> Any:
        return RecurrentTransformerDecoderLayer
