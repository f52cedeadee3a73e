"""What an attention does with a feature map: make it, draw it, hand it to the mathematics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import Features
from ..ops.features import transformed
from .base import FeatureMap, elu_feature_map, takes_device


def build_feature_map(factory: Callable[[int], Any] | None, query_dimensions: int) -> Any:
    """Call a factory and make sure that a feature map comes out; None makes elu(x) + 1.

    Raises:
        TypeError: for a ready map, an element-wise function, or a factory whose result lacks
            the methods of a map. The message shows the fix.
    """
    if factory is None:
        factory = elu_feature_map
    what = "feature_map must be a factory, called with the query dimensions"
    if isinstance(factory, nn.Module):
        name = type(factory).__name__
        raise TypeError(f"{what}, got a ready {name}; pass {name}.factory(...) instead")
    elementwise = (
        "for an element-wise function pass ActivationFunctionFeatureMap.factory(function)"
    )
    if not callable(factory):
        raise TypeError(f"{what}, got {factory!r}; {elementwise}")
    try:
        feature_map = factory(query_dimensions)
    except (TypeError, AttributeError) as error:
        raise TypeError(
            f"{what}, but {factory!r} cannot be called with {query_dimensions}: {error}; "
            f"{elementwise}"
        ) from error
    needed = ("new_feature_map", "forward_queries", "forward_keys")
    missing = [name for name in needed if not callable(getattr(feature_map, name, None))]
    if missing:
        raise TypeError(
            f"{what}, but {factory!r} returned {type(feature_map).__name__} without "
            f"{', '.join(missing)}; derive the map from FeatureMap, or {elementwise}"
        )
    return feature_map


def draw(feature_map: Any, device: torch.device) -> None:
    """Call ``new_feature_map``, whether or not it takes the device.

    A forward pass that runs inside a backward pass is one that :mod:`torch.utils.checkpoint`
    computes again: it must see the features that it saw first, so nothing is drawn. They are
    still there if the map has not been drawn in between, for another forward pass.
    """
    if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
        return
    if takes_device(feature_map):
        feature_map.new_feature_map(device)
    else:
        feature_map.new_feature_map()
    if not getattr(feature_map, "drawn", False):
        feature_map.drawn = True


def with_positions(feature_map: Any, x: Tensor, start: int | Tensor = 0) -> Tensor:
    """x (N, L, H, E) as the map wants it: with positions from ``start`` on, if it uses them."""
    return feature_map.add_positions(x, start) if needs_positions(feature_map) else x


def needs_positions(feature_map: Any) -> bool:
    """Whether a map is ``positional``; see :class:`FeatureMap`."""
    return getattr(feature_map, "positional", False)


def features_of(feature_map: Any) -> Features:
    """A feature map as :mod:`fast_transformers.ops` takes it.

    With gradients enabled the random tensors of the map are copied, so that the backward pass
    recomputes the features of this call even if the map has been redrawn in between.
    """
    exponential = getattr(feature_map, "exponential", False)
    any_input = getattr(feature_map, "any_input", False)
    if exponential:
        queries, keys = feature_map.log_queries, feature_map.log_keys
    else:
        queries, keys = feature_map.forward_queries, feature_map.forward_keys
    formula = feature_map.formula() if isinstance(feature_map, FeatureMap) else None
    features = Features(
        queries, keys, exponential=exponential, any_heads=any_input, formula=formula
    )
    if formula is not None:
        projection = formula.projection
        if projection is None or _trained(projection) or not torch.is_grad_enabled():
            return features
        copy = projection.detach().clone()
        features = features._replace(formula=formula._replace(projection=copy))
        return _with_tensors(features, [(feature_map._buffers, "omega", copy)])
    if not isinstance(feature_map, nn.Module):
        return features
    if isinstance(feature_map, FeatureMap):
        features = features._replace(composition=feature_map.composition())
    if not any_input:
        own = [*feature_map.parameters(), *feature_map.buffers()]
        features = features._replace(
            dtype=next((t.dtype for t in own if t.is_floating_point()), None)
        )
    if not torch.is_grad_enabled():
        return features
    held = [] if torch.compiler.is_compiling() else _held_tensors(feature_map)
    features = _with_tensors(features, held)
    trained = {id(tensor): tensor for _, _, tensor in held if tensor.requires_grad}
    return features._replace(parameters=tuple(trained.values()))


_Held = list[tuple[dict[str, Any], str, Tensor]]  # where a tensor lives, its name, its value


def _held_tensors(module: nn.Module) -> _Held:
    """The tensors of this call: trained ones as they are, random ones copied.

    Trained ones need not be registered: while ``FullyShardedDataParallel`` runs a module they
    are plain attributes, views of one parameter.
    """
    places = [d for m in module.modules() for d in (m._parameters, m._buffers, vars(m))]
    return [
        (place, name, tensor if _trained(tensor) else tensor.detach().clone())
        for place in places
        for name, tensor in place.items()
        if isinstance(tensor, Tensor) and tensor.is_floating_point()
    ]


def _trained(tensor: Tensor) -> bool:
    return tensor.requires_grad or isinstance(tensor, nn.Parameter) or transformed(tensor)


def _with_tensors(features: Features, held: _Held) -> Features:
    if not held or torch.compiler.is_compiling():  # a compiler sees the functions as they are
        return features
    queries, keys = (_WithTensors(method, held) for method in (features.queries, features.keys))
    return features._replace(queries=queries, keys=keys)


class _WithTensors:
    """A method of a module, called with some of the module's tensors put back."""

    def __init__(self, method: Callable[[Tensor], Tensor], held: _Held) -> None:
        self._method, self._held = method, held

    def __call__(self, x: Tensor) -> Tensor:
        before = [(place, name, place.get(name)) for place, name, _ in self._held]
        try:
            for place, name, tensor in self._held:
                place[name] = tensor
            return self._method(x)
        finally:
            for place, name, tensor in before:
                place[name] = tensor
                if tensor is None:  # it has moved to another dictionary
                    del place[name]
