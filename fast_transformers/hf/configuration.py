"""The configuration of the models for transformers."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PreTrainedConfig

from ..builders import TransformerDecoderBuilder, TransformerEncoderBuilder
from ..specs import parse_feature_map

LARGEST = {
    "vocab_size": 2**24,
    "n_positions": 2**24,
    "n_layers": 2**10,
    "decoder_layers": 2**10,
    "n_heads": 2**10,
    "d_model": 2**16,
    "feed_forward": 2**18,
}


class FastTransformerConfig(PreTrainedConfig):
    """Everything that the models for transformers are built from; all JSON.

    Args:
        vocab_size: number of tokens.
        n_positions: longest sequence, in tokens; with ``rotary`` only a default for ``generate``.
        n_layers: number of layers.
        n_heads: number of heads H.
        d_model: dimensions of a token; queries, keys and values have ``d_model // n_heads``.
        feed_forward: dimensions inside the feed-forward network, default ``4 * d_model``.
        attention: a name of the attention registry, or a composition of names. In causal language
            models and decoders it must be able to attend causally.
        causal: whether a plain :class:`~.encoders.FastTransformerModel` attends causally.
        is_encoder_decoder: build an encoder and a decoder; the next three are for those alone.
        decoder_layers: number of layers of the decoder, default ``n_layers``.
        encoder_attention: as ``attention``, of the encoder.
        cross_attention: as ``attention``, from the decoder to the encoder's output.
        feature_map: spec of the feature map of the linear attentions, see
            :func:`~fast_transformers.specs.parse_feature_map`.
        softmax_temp: factor of the dot products in softmax attention, default 1/sqrt(E).
        attention_dropout: share of softmax weights that training drops.
        dropout: share of activations that training drops.
        activation: "relu" or "gelu", of the feed-forward network.
        norm_first: normalise the inputs of sublayers instead of their outputs.
        norm_type: "layernorm" or "rmsnorm".
        rotary: rotary positions instead of learned ones.
        task: what the tokens mean, see :mod:`.data`; empty for tokens of your own.

    Raises:
        ValueError: for a value that no model can have.
    """

    model_type = "fast_transformer"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
    }

    vocab_size: int = 257
    n_positions: int = 257
    n_layers: int = 4
    n_heads: int = 4
    d_model: int = 128
    feed_forward: int | None = None
    attention: str = "causal-linear"
    causal: bool = True
    is_encoder_decoder: bool = False
    decoder_layers: int | None = None
    encoder_attention: str = "linear"
    cross_attention: str = "linear"
    decoder_start_token_id: int | None = None
    feature_map: str = "elu"
    softmax_temp: float | None = None
    attention_dropout: float = 0.0
    dropout: float = 0.1
    activation: str = "relu"
    norm_first: bool = False
    norm_type: str = "layernorm"
    rotary: bool = False
    use_cache: bool = True
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    eos_token_id: int | None = None
    task: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self._check_sizes()
        super().__post_init__(**kwargs)
        if self.tie_word_embeddings:
            raise ValueError("tie_word_embeddings=True is not supported; leave it False")
        if self.task is None:
            self.task = {}
        if not isinstance(self.task, dict):
            raise ValueError(f"task must be a dictionary, got {self.task!r}")
        self.encoder_builder(TransformerEncoderBuilder)
        if self.is_encoder_decoder:
            self.decoder_builder(TransformerDecoderBuilder)

    def encoder_builder(self, builder: type[Any]) -> Any:
        """A builder of encoders that has these options.

        Raises:
            ValueError: for an option that the builder refuses.
        """
        attention = self.encoder_attention if self.is_encoder_decoder else self.attention
        return builder.from_kwargs(
            attention_type=attention, n_layers=self.n_layers, **self._options()
        )

    def decoder_builder(self, builder: type[Any]) -> Any:
        """A builder of decoders that has these options; ValueError as above."""
        return builder.from_kwargs(
            self_attention_type=self.attention,
            cross_attention_type=self.cross_attention,
            n_layers=self.decoder_layers or self.n_layers,
            **self._options(),
        )

    def _options(self) -> dict[str, Any]:
        return {
            "feature_map": parse_feature_map(self.feature_map),
            "n_heads": self.n_heads,
            "query_dimensions": self.d_model // self.n_heads,
            "value_dimensions": self.d_model // self.n_heads,
            "feed_forward_dimensions": self.feed_forward,
            "softmax_temp": self.softmax_temp,
            "attention_dropout": self.attention_dropout,
            "dropout": self.dropout,
            "activation": self.activation,
            "norm_first": self.norm_first,
            "norm_type": self.norm_type,
            "rotary": self.rotary,
        }

    def _check_sizes(self) -> None:
        for name, largest in LARGEST.items():
            value = getattr(self, name)
            if name in ("feed_forward", "decoder_layers") and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= largest:
                raise ValueError(
                    f"{name} must be a whole number from 1 to {largest}, got {value!r}"
                )
        if self.d_model % self.n_heads:
            raise ValueError(
                f"d_model must be a multiple of n_heads ({self.n_heads}), got {self.d_model}"
            )
        for name in ("dropout", "attention_dropout"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {value!r}")
        for name in ("attention", "encoder_attention", "cross_attention"):
            if not isinstance(value := getattr(self, name), str):
                raise ValueError(f"{name} must be a name, got {value!r}")
