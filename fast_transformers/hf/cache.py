"""A cache of constant size for models of transformers that attend linearly."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from ..state import State

PREFIX = "fast_transformers:"
OWNER = "fast_transformers_layer"  # attribute of new keys: the layer whose past they follow


class LinearLayer(CacheLayerMixin):
    """The sums over the past of one layer, which the attention itself brings up to date.

    Attributes:
        state: None before the first token.
        length: number of tokens handed over, padding included.
    """

    is_sliding = False

    def __init__(self, state: Any = None, length: int = 0) -> None:
        super().__init__()
        self.state, self.length = state, length
        self.waiting = False  # for the attention to take the last keys

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is allocated before the attention has seen a token."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The new keys and values as they are, marked as following this layer's past."""
        if self.waiting:
            raise RuntimeError(
                "a StateCache needs attention that is handed the keys as the cache returns them, "
                "which this model's is not; leave out past_key_values"
            )
        self.waiting = True
        self.length += key_states.shape[-2]
        setattr(key_states, OWNER, self)
        return key_states, value_states

    def advance(self, state: Any) -> None:
        """Take the state after the keys of the last :meth:`update`."""
        self.state, self.waiting = state, False

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of keys that the attention is handed, and how many came before them."""
        return query_length, self.length

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its older name

    def reset(self) -> None:
        self.state, self.length, self.waiting = None, 0, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.state is not None:
            self.state = self.state.reorder(beam_idx)


class StateCache(Cache):
    """What a causal model with linear attention remembers, in place of all keys and values.

    Its size does not depend on the length, nor does the time of a step. It moves on as the model
    reads; ``state`` is a value, to be kept, joined, saved and gone back to.

        model.generate(ids, past_key_values=StateCache(model))

    Args:
        model: whose every attention is linear, see
            :func:`~.interface.attention_implementation`.
        state: what to go on from; default: nothing.

    Raises:
        ValueError: for a model with another attention, or an encoder and a decoder.
    """

    def __init__(self, model: Any, state: State | None = None) -> None:
        config = model.config.get_text_config(decoder=True)
        found = config._attn_implementation
        if config.is_encoder_decoder or not str(found).startswith(PREFIX):
            raise ValueError(
                "a StateCache is for decoders with linear attention, got a model with "
                f"attn_implementation={found!r}; use attention_implementation(...)"
            )
        layers: list[Any] = [LinearLayer() for _ in range(config.num_hidden_layers)]
        if state is not None:
            if len(state) != len(layers) or not isinstance(state.position, int):
                raise ValueError(
                    f"state must be that of {len(layers)} layers of a StateCache, got {state}"
                )
            layers = [LinearLayer(layer, state.position) for layer in state]
        super().__init__(layers=layers)

    @property
    def state(self) -> State:
        """The states of all layers; its position counts padding, too."""
        layers: list[Any] = self.layers
        return State([layer.state for layer in layers], self.get_seq_length())

    @property
    def nbytes(self) -> int:
        """Bytes that the state occupies, whatever the length."""
        return self.state.nbytes
