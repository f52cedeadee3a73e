"""What all models of this package for transformers share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init

from ..builders import TransformerEncoderBuilder
from ..feature_maps import RandomFeatureMap
from ..masking import FullMask, TriangularCausalMask
from .configuration import FastTransformerConfig
from .state import RecurrentState, check_stateful


class FastTransformerPreTrainedModel(PreTrainedModel):
    """Configuration, initialisation and gradient checkpointing."""

    config: FastTransformerConfig
    config_class = FastTransformerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    gradient_checkpointing = False

    def get_output_embeddings(self) -> Any:
        return getattr(self, "head", None)

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        self.head = new_embeddings

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """torch's own initialisation; positions start smaller than tokens."""
        if isinstance(module, nn.Embedding) and module is getattr(self, "positions", None):
            init.normal_(module.weight, std=0.4)
        elif isinstance(module, RandomFeatureMap):
            seed = int(torch.randint(2**62, (), device="cpu"))  # not in checkpoints
            module.reseed(seed)
            if not getattr(module.omega, "_is_hf_initialized", False):
                module.resample(torch.Generator().manual_seed(seed))
        elif callable(reset := getattr(module, "reset_parameters", None)):
            tensors = [*module.parameters(), *module.buffers()]
            loaded = [x for x in tensors if getattr(x, "_is_hf_initialized", False)]
            if len(loaded) == len(tensors) > 0:
                return
            kept = [x.clone() for x in loaded]
            reset()
            for x, before in zip(loaded, kept, strict=True):
                x.copy_(before)

    def _initialize_weights(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, module: nn.Module, *args: Any
    ) -> None:
        """Ask :meth:`_init_weights` of every module: releases differ in which they leave out."""
        super()._initialize_weights(module)

    def checkpointed(self, stack: Any) -> Any:
        """The encoder or decoder, told whether to recompute activations in the backward pass."""
        on = self.gradient_checkpointing and self.training
        stack.checkpointing = self._gradient_checkpointing_func if on else None
        return stack


class EncoderModel(FastTransformerPreTrainedModel):
    """Token and position embeddings, an encoder, and a linear head if ``headed``."""

    headed = True

    def __init__(self, config: FastTransformerConfig) -> None:
        super().__init__(config)
        self.tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.positions = (
            None if config.rotary else nn.Embedding(config.n_positions, config.d_model)
        )
        self.dropout = nn.Dropout(config.dropout)
        self.encoder = config.encoder_builder(TransformerEncoderBuilder).get()
        if self.headed:
            self.head = nn.Linear(config.d_model, config.vocab_size)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.tokens

    def set_input_embeddings(self, value: Any) -> None:
        self.tokens = value

    def check_length(self, longest: int) -> None:
        """Raise ValueError if a sequence of so many tokens has more than there are positions."""
        if self.positions is not None and longest > self.config.n_positions:
            raise ValueError(
                f"the model has {self.config.n_positions} positions, got a sequence of "
                f"{longest} tokens; shorten it, or train with rotary positions"
            )

    def embed(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """(N, L) tokens at (N, L), (L,) or () positions to (N, L, d_model)."""
        x = self.tokens(input_ids)
        if self.positions is not None:
            x = x + self.positions(positions)
        return self.dropout(x)

    def encode(self, input_ids: Tensor, attention_mask: Tensor | None, *, causal: bool) -> Tensor:
        """Whole sequences (N, L) to (N, L, d_model), with gradient checkpointing if enabled."""
        length, padding = input_ids.shape[1], None
        positions = torch.arange(length, device=input_ids.device)
        if attention_mask is not None:
            padding = FullMask(attention_mask.bool())
            positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        self.check_length(length)
        x = self.embed(input_ids, positions)
        mask = TriangularCausalMask(length, device=x.device) if causal else None
        return self.checkpointed(self.encoder)(x, mask, padding)


class Generates(GenerationMixin):
    """Generation with a state, which cannot be taken back by some tokens.

    Models name GenerationMixin among their bases, too: that is what transformers looks for.
    """

    _is_stateful = True

    def generating_stack(self) -> nn.Module:
        """The encoder or decoder whose state it is."""
        raise NotImplementedError("a model that generates must define generating_stack")

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        if generation_config.use_cache and model_kwargs.get("past_key_values") is None:
            check_stateful(self.generating_stack())
            model_kwargs["past_key_values"] = RecurrentState()


def token_loss(logits: Tensor, labels: Tensor, count: Tensor | int | None = None) -> Any:
    """Mean nats of the labels (N, L), of which -100 is ignored, over them or over ``count``."""
    reduction = "mean" if count is None else "sum"
    loss = cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction=reduction)
    return loss if count is None else loss / count
