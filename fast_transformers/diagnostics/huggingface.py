"""The attentions of models of Hugging Face transformers: what they are given, and other ones.

Both go through the library's registry of attention functions, which every model that follows its
``AttentionInterface`` asks; see https://huggingface.co/docs/transformers/attention_interface.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .sample import Sample, make_sample

NAME = "fast_transformers_diagnostics"
OURS, OWNED = "fast_transformers:", "fast_transformers_map"  # of hf.attention_implementation
Attend = Callable[[str, Sample], Tensor]  # name of the layer, its input: values (N, L, H, M)


def capture_layers(
    model: Any, arguments: tuple[Any, ...], call: dict[str, Any]
) -> tuple[dict[str, Sample], dict[str, Any]]:
    """What each attention is given while a model runs once, by the names of the modules, and the
    feature maps of those that have one.

    Every attention is softmax while the model runs: a model whose attentions have maps is to do
    with them what it does without.
    """
    layers: dict[str, Sample] = {}

    def keep(name: str, sample: Sample) -> Tensor:
        layers[name] = sample
        return softmax_attention(name, sample)

    with torch.no_grad():
        if model.config._attn_implementation.startswith(OURS):
            with warnings.catch_warnings():  # that maps know nothing yet: they will be calibrated
                warnings.filterwarnings("ignore", ".* as this feature map starts: ")
                model(*arguments, **call)  # attentions make their maps when they are first called
        with attending(model, keep):
            model(*arguments, **call)
    owned = {name: getattr(m, OWNED, None) for name, m in model.named_modules() if name in layers}
    return layers, {name: o.feature_map for name, o in owned.items() if o is not None}


@contextmanager
def attending(model: Any, attend: Attend) -> Iterator[None]:
    """Within, every attention of the model is computed by ``attend``.

    Args:
        model: of Hugging Face transformers, following its ``AttentionInterface``.
        attend: called with the name of the attention's module and its
            :class:`~fast_transformers.diagnostics.Sample`, mask and temperature included; returns
            (N, L, H, M).

    Raises:
        ValueError: for a model whose attention cannot be set.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    names = {m: name for name, m in model.named_modules()}

    def function(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
    ) -> tuple[Tensor, None]:
        sample = _sample_of(module, query, key, value, mask, options.get("scaling"))
        out = attend(names.get(module, type(module).__name__), sample)
        return out.to(query.dtype), None

    before = model.config._attn_implementation
    AttentionInterface.register(NAME, function)
    AttentionMaskInterface.register(NAME, eager_mask)
    try:
        if not model._can_set_attn_implementation():
            raise ValueError(
                f"{type(model).__name__} does not follow the AttentionInterface of transformers; "
                "call attention_report(maps, q, k) on its queries and keys"
            )
        model.set_attn_implementation(NAME)
        yield
    finally:
        model.set_attn_implementation(before)
        AttentionInterface._global_mapping.pop(NAME, None)
        AttentionMaskInterface._global_mapping.pop(NAME, None)


def softmax_attention(name: str, sample: Sample) -> Tensor:
    """The attention that the model has; an :data:`Attend`."""
    assert sample.v is not None
    out = nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (sample.q, sample.k, sample.v)),
        attn_mask=sample.keep,
        scale=sample.temperature,
    )
    return out.transpose(1, 2)


def _sample_of(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: Any
) -> Sample:
    """The input of an attention of transformers, (N, H, length, dim), with an additive mask.

    Another temperature than 1/sqrt(E), which maps are made for, becomes part of queries and keys.
    """
    factor = 1.0 if scaling is None else (scaling * query.shape[-1] ** 0.5) ** 0.5
    given = query * factor, key * factor, value
    sample = make_sample(*(x.transpose(1, 2) for x in given))
    if mask is None:
        return sample
    smallest = torch.finfo(query.dtype).min / 2 if mask.is_floating_point() else 0
    keep = mask > smallest if mask.is_floating_point() else mask.bool()
    if mask.is_floating_point() and bool((mask[keep.expand_as(mask)] != 0).any()):
        raise ValueError(
            f"{type(module).__name__} adds a bias to its logits, which these reports do not know"
        )
    return sample._replace(keep=keep[..., : key.shape[2]])
