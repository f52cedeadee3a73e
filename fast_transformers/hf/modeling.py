"""A causal language model that trains as a transformer and generates as a recurrent network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.utils.generic import ModelOutput

from ..builders import TransformerEncoderBuilder
from ..feature_maps import RandomFeatureMap
from ..masking import FullMask, TriangularCausalMask
from ..utils import make_mirror
from .configuration import FastTransformerConfig
from .state import RecurrentState


@dataclass
class CausalLMOutput(ModelOutput):
    """What :class:`FastTransformerForCausalLM` returns.

    Attributes:
        loss: () mean over the labels that count, in nats; None without labels.
        logits: (N, L, vocab_size).
        past_key_values: the state after the last token; None for the batch path.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: RecurrentState | None = None


class FastTransformerForCausalLM(PreTrainedModel, GenerationMixin):
    """Token and position embeddings, an encoder with a causal mask, and a linear head.

    Whole sequences go through the encoder. With a state they go, one token at a time, through
    its recurrent twin, which shares every parameter and buffer; ``generate`` does so unless
    ``use_cache=False``.

    >>> model = FastTransformerForCausalLM(FastTransformerConfig(n_layers=2, d_model=32))
    >>> model.generate(torch.tensor([[256]]), max_new_tokens=5, do_sample=False).shape
    torch.Size([1, 6])
    """

    config: FastTransformerConfig
    config_class = FastTransformerConfig
    base_model_prefix = "model"
    _is_stateful = True  # a state cannot be taken back by some tokens

    def __init__(self, config: FastTransformerConfig) -> None:
        super().__init__(config)
        self.tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.positions = (
            None if config.rotary else nn.Embedding(config.n_positions, config.d_model)
        )
        self.dropout = nn.Dropout(config.dropout)
        self.encoder = config.encoder_builder(TransformerEncoderBuilder).get()
        self.head = nn.Linear(config.d_model, config.vocab_size)
        self._twin: list[nn.Module] = []  # in a list, so that it is no submodule
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.tokens

    def set_input_embeddings(self, value: Any) -> None:
        self.tokens = value

    def get_output_embeddings(self) -> nn.Linear:
        return self.head

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        self.head = new_embeddings

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """torch's own initialisation; positions start smaller than tokens."""
        if module is self.positions and isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=0.4)
        elif isinstance(module, RandomFeatureMap):
            seed = torch.randint(2**62, (), device="cpu")  # not in checkpoints, nor is `calls`
            init.zeros_(module.calls)
            init.copy_(module.seed, seed)
            if not getattr(module.omega, "_is_hf_initialized", False):
                module.resample(torch.Generator().manual_seed(int(seed)))
        elif callable(reset := getattr(module, "reset_parameters", None)):
            reset()

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
            attention_mask: (N, L), 1 for tokens and 0 for padding, on either side. Only whole
                sequences may be padded.
            labels: (N, L), compared with the logits of the token before them; -100 is ignored.
            past_key_values: the state that an earlier call returned; ``input_ids`` go on from it.
            use_cache: return the state of the recurrent twin; default: if given one.
            logits_to_keep: of the last so many tokens only; 0 is all.
            kwargs: handed to the loss (``num_items_in_batch``).

        Raises:
            ValueError: for more tokens than there are positions, or padding with a state.
        """
        state = None
        if past_key_values is not None or use_cache:
            state = RecurrentState() if past_key_values is None else past_key_values
            hidden = self._step_through(input_ids, attention_mask, state)
        else:
            hidden = self._encode(input_ids, attention_mask)
        logits = self.head(hidden[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        output = CausalLMOutput(loss=loss, logits=logits, past_key_values=state)
        return output.to_tuple() if return_dict is False else output

    def _encode(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """The batch path: (N, L) to (N, L, d_model)."""
        length = input_ids.shape[1]
        positions = torch.arange(length, device=input_ids.device)
        padding = None
        if attention_mask is not None:
            padding = FullMask(attention_mask.bool())
            positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        x = self._embed(input_ids, positions, length)
        return self.encoder(x, TriangularCausalMask(length, device=x.device), padding)

    def _step_through(
        self, input_ids: Tensor, attention_mask: Tensor | None, state: RecurrentState
    ) -> Tensor:
        """The recurrent path: (N, L) to (N, L, d_model), and ``state`` moves on by L tokens."""
        if attention_mask is not None and not attention_mask.bool().all():
            raise ValueError(
                "sequences of one batch must have one length to be generated with a state; group "
                "them by length, or pass use_cache=False"
            )
        twin = self._recurrent_encoder(mirror=state.length == 0)
        steps = []
        for token in input_ids.unbind(1):
            position = torch.full_like(token, state.length)
            x, layers = twin(self._embed(token, position, state.length + 1), state.layers)
            state.advance(layers)
            steps.append(x)
        return torch.stack(steps, 1)

    def _embed(self, input_ids: Tensor, positions: Tensor, length: int) -> Tensor:
        x = self.tokens(input_ids)
        if self.positions is not None:
            if length > self.config.n_positions:
                raise ValueError(
                    f"the model has {self.config.n_positions} positions, got a sequence of "
                    f"{length} tokens; shorten it, or train with rotary positions"
                )
            x = x + self.positions(positions)
        return self.dropout(x)

    def _recurrent_encoder(self, mirror: bool) -> nn.Module:
        """The recurrent twin of the encoder; ``mirror`` looks for replaced parameters again."""
        if not self._twin:
            # its own weights are never used: no memory for them, no draw from the global generator
            with torch.random.fork_rng(devices=[]), torch.device("meta"):
                self._twin.append(self.config.recurrent_builder().get())
            mirror = True
        (twin,) = self._twin
        if mirror:
            make_mirror(self.encoder, twin)
        return twin.train(self.training)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        if generation_config.use_cache and model_kwargs.get("past_key_values") is None:
            self._recurrent_encoder(mirror=True)  # to say now if there is none
            model_kwargs["past_key_values"] = RecurrentState()
