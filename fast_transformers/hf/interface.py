"""Linear attention inside the models of transformers, through their ``AttentionInterface``."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

from .. import ops
from ..feature_maps import draw, features_of
from ..specs import FEATURE_MAPS, parse_feature_map
from .cache import OWNER, PREFIX, LinearLayer
from .owned import feature_map_of

try:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function
except ImportError as error:
    raise ImportError(
        f"transformers {transformers.__version__} has no attention interface that "
        f"fast_transformers.hf knows: {error}; install one of 5.4 to 5.23"
    ) from error

MASKS = (causal_mask_function, bidirectional_mask_function)
# what an attention of transformers may be asked for and sums over the keys cannot do
UNKNOWN = ("sliding_window", "softcap", "position_bias", "s_aux", "head_mask")


def attention_implementation(spec: str) -> str:
    """Register linear attention with a feature map; returns its ``attn_implementation``.

        name = attention_implementation("favor:n_dims=256")  # "fast_transformers:favor?n_dims=256"
        model = AutoModel.from_pretrained(folder, attn_implementation=name)

    That name can be used anywhere in this process from then on; names of maps without options
    ("fast_transformers:favor") are registered by importing :mod:`fast_transformers.hf`.

        out_i = sum_j phi(q_i).phi(k_j) v_j / sum_j phi(q_i).phi(k_j)

    "Transformers are RNNs" (Katharopoulos et al. 2020), equations 4 to 12, in place of every
    softmax attention of a model: over all keys or over the past, with padding on either side,
    grouped queries, and caches: those of transformers, which keep all keys and values, or a
    :class:`~.cache.StateCache` of constant size. Maps that
    approximate exp(temp q.k) do so with the model's own temperature. Random features are drawn
    from the number of the layer, so that every process draws alike; a map's own weights become
    part of the attention module at its first call (so call the model once before you make an
    optimizer). Maps that have statistics are calibrated by
    ``diagnostics.capture(model, examples).calibrate()``. Statistics and weights are saved with
    the model, and loaded by :func:`~.owned.load_feature_maps`.

    Args:
        spec: see :func:`~fast_transformers.specs.parse_feature_map`, or such a name.

    Raises:
        ValueError: for a spec that cannot be read.
    """
    spec = spec.removeprefix(PREFIX).replace("?", ":", 1)
    parse_feature_map(spec)
    name = PREFIX + spec.replace(":", "?", 1)

    def attend(module: nn.Module, *tensors: Any, **options: Any) -> tuple[Tensor, None]:
        return attention(spec, module, *tensors, **options), None

    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, padding_mask)
    return name


def register_all() -> None:
    """Make every map available under its name, with its default options."""
    for name in FEATURE_MAPS:
        attention_implementation(name)


def padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """What models hand to :func:`attention`: which keys are real, (N, S) bool; None for all.

    Raises:
        ValueError: for another pattern than all keys or the past.
    """
    if mask_function not in MASKS:
        raise ValueError(
            "linear attention sees all keys or the past, not windows, chunks or packed "
            "sequences, which this model asks for; use attn_implementation='sdpa'"
        )
    past = mask_function is causal_mask_function
    if past and (isinstance(q_offset, Tensor) or q_offset + q_length != kv_offset + kv_length):
        raise ValueError(
            "linear attention goes on from caches that hold the past and nothing else; leave out "
            "cache_implementation='static'"
        )
    if attention_mask is None:
        return None
    mask = attention_mask[:, -kv_length:]
    return None if bool(mask.all()) else mask


def attention(
    spec: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> Tensor:
    """(N, H, L, E), (N, H/R, S, E), (N, H/R, S, M) to (N, L, H, M).

    Args:
        spec: of the feature map.
        module: the attention of the model, which comes to own the map.
        attention_mask: (N, S) bool, True = keep; None keeps all.
        dropout: must be 0: there are no weights to drop.
        scaling: factor of the dot products, default 1/sqrt(E).
        is_causal: whether the last L of the S positions see their past alone; default: what the
            module says.

    Raises:
        ValueError: for what sums over the keys cannot do.
    """
    _check(attention_mask, dropout, options)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    causal = is_causal and not getattr(module, "is_cross_attention", False)
    factor = 1.0 if scaling is None else scaling * q.shape[-1] ** 0.5
    if abs(factor - 1) > 1e-6:  # maps stand for the dot product divided by sqrt(E)
        q, k = q * factor**0.5, k * factor**0.5
    feature_map = feature_map_of(module, spec, q)
    layer = getattr(key, OWNER, None)
    if layer is not None:
        return _go_on(layer, feature_map, q, k, v, attention_mask)
    length, keys = q.shape[1], k.shape[1]
    if keys <= length:  # features must not change under the keys of a cache
        draw(feature_map, q.device)
    phi = features_of(feature_map)
    if not causal or length == 1:
        return ops.linear_attention(q, k, v, phi, key_mask=attention_mask).values
    before, state = keys - length, None
    mask = attention_mask
    if before:
        seen = None if mask is None else mask[:, :before]
        past = q[:, :0], k[:, :before], v[:, :before]
        state = ops.linear_attention(*past, phi, key_mask=seen).state
        k, v, mask = k[:, before:], v[:, before:], None if mask is None else mask[:, before:]
    return ops.causal_linear_attention(q, k, v, phi, key_mask=mask, state=state).values


def _go_on(
    layer: LinearLayer, feature_map: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
) -> Tensor:
    """Tokens that follow the past of a cache's layer, which moves on."""
    if layer.state is None:
        draw(feature_map, q.device)
    phi = features_of(feature_map)
    if q.shape[1] == 1 and mask is None:
        now = ops.linear_attention_step(q[:, 0], k[:, 0], v[:, 0], phi, state=layer.state)
        now = now._replace(values=now.values[:, None])
    else:
        now = ops.causal_linear_attention(q, k, v, phi, key_mask=mask, state=layer.state)
    layer.advance(now.state)
    return now.values


def _check(mask: Tensor | None, dropout: float, options: dict[str, Any]) -> None:
    asked = [name for name in UNKNOWN if options.get(name) is not None]
    if asked:
        raise ValueError(
            f"linear attention cannot serve {asked[0]}, which this model asks for; use "
            "attn_implementation='sdpa'"
        )
    if dropout:
        raise ValueError(
            f"linear attention has no weights to drop, got a dropout of {dropout}; set the "
            "attention dropout of the model's configuration to 0 to train it"
        )
    if mask is not None and (mask.ndim != 2 or mask.dtype != torch.bool):
        raise ValueError(
            "attention_mask must be (N, S), 1 for tokens and 0 for padding, got "
            f"{mask.dtype} of shape {tuple(mask.shape)}; linear attention takes no other mask"
        )
