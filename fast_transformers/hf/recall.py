"""Sequences of multi-query associative recall: pairs of a key and a value, then every key again.

    k3 v7 k1 v2 k9 v4 | k1 v2 k9 v4 k3 v7

Arora et al. 2023, "Zoology" (arXiv:2312.04927), section 4: what a model of linear attention finds
hardest, as all pairs have to fit into its state. Here the queries follow the pairs without gaps.
"""

from __future__ import annotations

import torch
from torch import Tensor

KEYS, VALUES = 32, 32  # tokens 0 to 31 are keys, 32 to 63 values


def most_pairs(length: int) -> int:
    """How many pairs fit into a sequence of ``length`` tokens, which has each of them twice.

    Raises:
        ValueError: for a length without room for a pair, or with more pairs than keys.
    """
    if not 4 <= length <= 4 * KEYS:
        raise ValueError(
            f"associative recall needs a length from 4 to {4 * KEYS} tokens, four for each pair, "
            f"got {length}"
        )
    return length // 4


def draw_recalls(n: int, pairs: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens (n, 4 pairs), and where an answer is to be given (n, 4 pairs) bool.

    Keys differ within a sequence; values are drawn independently.
    """
    keys = torch.rand(n, KEYS, generator=generator).argsort(1)[:, :pairs]
    values = KEYS + torch.randint(0, VALUES, (n, pairs), generator=generator)
    order = torch.rand(n, pairs, generator=generator).argsort(1)
    both = torch.stack([keys, values], 2)  # (n, pairs, 2)
    again = both.gather(1, order[..., None].expand(-1, -1, 2))
    tokens = torch.cat([both, again], 1).flatten(1)
    place = torch.arange(4 * pairs).expand(n, -1)
    return tokens, (place >= 2 * pairs) & (place % 2 == 1)
