"""The events that modules dispatch. Their tensors are not detached."""

from __future__ import annotations

from torch import Tensor
from torch.nn import Module


class Event:
    """Something happened in `source`, the module that dispatches the event."""

    def __init__(self, source: Module) -> None:
        self.source = source


class AttentionEvent(Event):
    """An attention matrix was computed; dispatched by the softmax attentions.

    Args:
        source: the attention.
        attention_matrix: the weights after dropout: (N, H, L, S) from full attention, and with
            a recurrent one (N, H, S so far) from self and (N, S, H) from cross attention.
    """

    def __init__(self, source: Module, attention_matrix: Tensor) -> None:
        super().__init__(source)
        self.attention_matrix = attention_matrix


class QKVEvent(Event):
    """Queries, keys and values were projected; dispatched by `AttentionLayer`.

    Args:
        source: the attention layer.
        queries: (N, L, H, E).
        keys: (N, S, H, E).
        values: (N, S, H, M).
    """

    def __init__(self, source: Module, queries: Tensor, keys: Tensor, values: Tensor) -> None:
        super().__init__(source)
        self.queries = queries
        self.keys = keys
        self.values = values


class IntermediateOutput(Event):
    """A layer of a stack is done; dispatched by the encoders and decoders after every layer.

    Args:
        source: the encoder or decoder.
        x: the output of the layer, (N, L, D), or (N, D) in a recurrent model.
    """

    def __init__(self, source: Module, x: Tensor) -> None:
        super().__init__(source)
        self.x = x
