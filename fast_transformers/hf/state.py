"""What a model remembers while it generates, as ``generate`` of transformers wants it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..state import rows


class RecurrentState:
    """The states of all layers; ``generate`` hands it over as ``past_key_values``.

    For linear attention its size does not depend on the length; for softmax attention it is
    the usual cache of keys and values.

    Attributes:
        layers: state of each layer, None before the first token.
        length: number of tokens seen.
    """

    is_compileable = False
    is_croppable = False

    def __init__(self) -> None:
        self.layers: list[Any] | None = None
        self.length = 0

    def advance(self, layers: list[Any]) -> None:
        """Take the states of the layers after one more token."""
        self.layers = layers
        self.length += 1

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of tokens seen."""
        return self.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the given rows (1-D int64) of the batch, as beam search asks for."""
        self.layers = rows.pick(self.layers, beam_idx)

    @property
    def nbytes(self) -> int:
        """Bytes that the state occupies."""
        return sum(x.nbytes for x in rows.tensors(self.layers))

    def __repr__(self) -> str:
        return f"RecurrentState(length={self.length}, nbytes={self.nbytes})"
