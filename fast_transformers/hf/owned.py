"""The feature maps that attentions of transformers come to own, saved with their model."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..feature_maps import RandomFeatureMap
from ..feature_maps.adapt import needs_positions
from ..specs import parse_feature_map
from .cache import PREFIX

OWNED = "fast_transformers_map"  # attribute of an attention, and so part of names in state dicts


class OwnedMap(nn.Module):
    """A feature map, and the spec that it was made from; random features are not saved.

    With the map's own tensors, if it has any, goes their number of dimensions, so that
    :func:`load_feature_maps` can make the map again.
    """

    query_dimensions: Tensor

    def __init__(self, spec: str, query_dimensions: int) -> None:
        super().__init__()
        self.spec, self.feature_map = spec, parse_feature_map(spec)(query_dimensions)
        if needs_positions(self.feature_map):
            raise ValueError(
                f"feature map {spec!r} needs positions, which attentions of transformers do not "
                "hand on; use it in a model of this library"
            )
        for part in self.modules():
            if isinstance(part, RandomFeatureMap):
                for name in part.drawn_buffers:
                    part.register_buffer(name, part.get_buffer(name), persistent=False)
        dims = torch.tensor(query_dimensions)
        self.register_buffer("query_dimensions", dims, persistent=bool(self.state_dict()))

    @property
    def learns(self) -> bool:
        """Whether the map has statistics or trained weights."""
        trained = any(p.requires_grad for p in self.parameters())
        return trained or getattr(self.feature_map, "has_statistics", False)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A model that is unpickled in another process finds its attention registered."""
        from .interface import attention_implementation

        super().__setstate__(state)
        attention_implementation(self.spec)


def feature_map_of(module: nn.Module, spec: str, q: Tensor) -> Any:
    """The map that ``module`` owns for this spec; made at the first call."""
    owned = getattr(module, OWNED, None)
    if owned is None or owned.spec != spec:
        owned = _make(module, spec, q.shape[-1], q.device)
        module.add_module(OWNED, owned)
        if owned.learns and not module.training:
            warnings.warn(
                f"{type(module).__name__} runs with {spec!r} as this feature map starts: "
                "hf.load_feature_maps(model, folder) takes what was saved with a model, and "
                "diagnostics.capture(model, examples).calibrate() sets statistics",
                stacklevel=2,
            )
    return owned.feature_map


def _make(module: nn.Module, spec: str, query_dimensions: int, device: torch.device) -> OwnedMap:
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
        torch.manual_seed(getattr(module, "layer_idx", None) or 0)
        owned = OwnedMap(spec, query_dimensions)
    return owned.to(device).train(module.training)


def load_feature_maps(
    model: nn.Module, saved: str | os.PathLike[str] | Mapping[str, Tensor]
) -> list[str]:
    """Give a model's attentions the feature maps that were saved with it.

        model.save_pretrained(folder)
        again = AutoModel.from_pretrained(folder, attn_implementation=name)
        load_feature_maps(again, folder)

    ``save_pretrained`` and ``state_dict`` hold statistics (means, alignments) and weights of maps
    like everything else. But attentions make their maps when they are first called, so a model
    that has not been called has nothing to load them into: ``from_pretrained`` reports them as
    unexpected, ``load_state_dict`` refuses them, and the first call warns. Random features are
    not saved: they are drawn from the number of the layer.

    Args:
        model: of transformers, with the ``attn_implementation`` that it was saved with, whose
            maps may have other numbers of random features.
        saved: the folder of ``save_pretrained`` or of a checkpoint (safetensors), or a state dict.

    Returns:
        The names of the attentions.

    Raises:
        ValueError: if there are no maps in ``saved``, or not those of this model; nothing has
            changed then.
        OSError: for a file that cannot be read.
    """
    tensors = saved if isinstance(saved, Mapping) else _read(Path(saved))
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        owner, found, rest = name.partition(f".{OWNED}.")
        if found:
            parts.setdefault(owner, {})[rest] = tensor
    if not parts:
        where = "the state dict" if isinstance(saved, Mapping) else saved
        raise ValueError(
            f"no feature maps were saved in {where}: maps with statistics or weights of their own "
            "are, once the model has been called"
        )
    found = {name: _module_of(model, name) for name in parts}
    made = {name: _restore(found[name], name, own, model) for name, own in parts.items()}
    for name, owned in made.items():
        found[name].add_module(OWNED, owned)
    return list(made)


def _read(folder: Path) -> dict[str, Tensor]:
    """The tensors of feature maps in the safetensors files of a folder."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder}: no .safetensors file, as save_pretrained writes")
    tensors = {}
    for file in files:
        try:
            with safe_open(file, "pt") as weights:
                names = [name for name in weights.keys() if f".{OWNED}." in name]
                tensors |= {name: weights.get_tensor(name) for name in names}
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged: {error}; save the model again") from error
    return tensors


def _module_of(model: Any, name: str) -> nn.Module:
    """A module by its saved name, which has the prefix of the base model or has it not."""
    prefix = f"{model.base_model_prefix}."
    names = dict(model.named_modules())
    for candidate in (name, name.removeprefix(prefix), prefix + name):
        if candidate in names:
            return names[candidate]
    raise ValueError(
        f"a feature map was saved for {name!r}, which {type(model).__name__} has not; load it "
        "into the model that it was saved with"
    )


def _restore(module: nn.Module, name: str, own: dict[str, Tensor], model: Any) -> OwnedMap:
    """The map of an attention with its saved tensors."""
    chosen = str(getattr(module, "config", model.config)._attn_implementation)
    if not chosen.startswith(PREFIX):
        raise ValueError(
            f"feature maps are for models with linear attention, got attn_implementation="
            f"{chosen!r}; pass what attention_implementation(...) returns to from_pretrained"
        )
    dims = own.get("query_dimensions", torch.tensor(0))
    most = max((size for p in module.parameters() for size in p.shape), default=0)
    if dims.dtype != torch.int64 or dims.numel() != 1 or not 1 <= int(dims) <= most:
        raise ValueError(f"the feature map saved for {name!r} is damaged: no number of dimensions")
    device = next(module.parameters()).device
    owned = _make(module, chosen.removeprefix(PREFIX).replace("?", ":", 1), int(dims), device)
    try:
        owned.load_state_dict(own)
    except RuntimeError as error:
        lines = " ".join(str(error).split())
        raise ValueError(
            f"the feature map saved for {name!r} is not {owned.spec!r}: {lines}; pass the "
            "attn_implementation that the model was saved with"
        ) from error
    return owned
