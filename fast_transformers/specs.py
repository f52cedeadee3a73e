"""Feature maps by name, as configurations and command lines write them: ``favor:n_dims=64``."""

from __future__ import annotations

import ast
import difflib
import inspect
from collections.abc import Callable
from typing import Any

from .feature_maps import (
    DPFP,
    T2R,
    Centered,
    Concat,
    CosReweight,
    DenseExponentialFeatures,
    ExponentialFeatureMap,
    Favor,
    FeatureMap,
    GeneralizedRandomFeatures,
    Hedgehog,
    LogNormal,
    Normalized,
    OptimalPositiveFeatures,
    PolynomialFeatureMap,
    PolySketch,
    Projected,
    RandomFourierFeatures,
    ReBased,
    SmoothedRandomFourierFeatures,
    TaylorFeatureMap,
    build_feature_map,
    elu_feature_map,
)
from .feature_maps.base import relu_feature_map

LONGEST_SPEC = 500  # characters
MOST_FEATURES = 2**16


FEATURE_MAPS: dict[str, Callable[..., Any]] = {
    "elu": elu_feature_map,
    "relu": relu_feature_map,
    "favor": Favor,
    "rff": RandomFourierFeatures,
    "smoothed-rff": SmoothedRandomFourierFeatures,
    "generalized": GeneralizedRandomFeatures,
    "oprf": OptimalPositiveFeatures,
    "derf": DenseExponentialFeatures,
    "polysketch": PolySketch,
    "exp": ExponentialFeatureMap,
    "lln": LogNormal,
    "dpfp": DPFP,
    "taylor": TaylorFeatureMap,
    "poly": PolynomialFeatureMap,
    "rebased": ReBased,
    "t2r": T2R,
    "hedgehog": Hedgehog,
    "centered": Centered,
    "projected": Projected,
    "normalized": Normalized,
    "cos": CosReweight,
    "concat": Concat,
}
_LARGEST = {  # of the options by which memory is allocated
    **dict.fromkeys(("n_dims", "dim", "sketch", "degree", "nu"), MOST_FEATURES),
    "heads": 2**10,
}


class FeatureMapFactory:
    """What :func:`parse_feature_map` returns: called with the query dimensions, it makes a map.

    Raises:
        ValueError: when called, if the map refuses the options.
    """

    def __init__(self, spec: str, make: Callable[..., Any], options: dict[str, Any]) -> None:
        self.spec, self._make, self._options = spec, make, options

    def __call__(self, query_dimensions: int) -> Any:
        try:
            made = self._make(query_dimensions, **self._options)
            if isinstance(made, FeatureMap) and made.feature_dims > MOST_FEATURES:
                raise ValueError(f"has {made.feature_dims} features, more than {MOST_FEATURES}")
            return build_feature_map(lambda _: made, query_dimensions)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"feature map {self.spec!r}: {error}") from error

    def __repr__(self) -> str:
        return f"parse_feature_map({self.spec!r})"


def register_feature_map(name: str, make: Callable[..., Any]) -> None:
    """Make a feature map available in specs.

    Args:
        name: letters, digits, "-" and "_"; registering a name again replaces it.
        make: a map class or factory; called with the query dimensions and, as keywords, the
            options of the spec.

    Raises:
        ValueError: for a name that a spec could not hold.
        TypeError: if ``make`` cannot be called.
    """
    if not name.replace("-", "").replace("_", "").isalnum():
        raise ValueError(f"a feature map's name has letters, digits, '-' and '_', got {name!r}")
    if not callable(make):
        raise TypeError(f"feature map {name!r} must be a class or a factory, got {make!r}")
    FEATURE_MAPS[name] = make


def parse_feature_map(spec: str) -> FeatureMapFactory:
    """The factory that ``NAME[:key=value,...]`` stands for.

    Values are numbers, True, False, None, text, and lists of these; text that is one word needs
    no quotes. The maps inside of others are specs, too: ``inner``, and the list ``inners``.

    >>> parse_feature_map("favor:n_dims=128, projection=simplex")(32).feature_dims
    128
    >>> parse_feature_map("centered:inner='derf:n_dims=64', heads=4")(32).feature_dims
    64

    Raises:
        ValueError: for an unknown name or key, or a value that is none of these.
    """
    if not isinstance(spec, str) or len(spec) > LONGEST_SPEC:
        raise ValueError(f"a feature map is NAME[:key=value,...], got {str(spec)[:40]!r}")
    name, _, text = spec.partition(":")
    if name not in FEATURE_MAPS:
        near = difflib.get_close_matches(name, FEATURE_MAPS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(
            f"unknown feature map {name!r}; {hint}available: {', '.join(FEATURE_MAPS)}"
        )
    make = FEATURE_MAPS[name]
    options = _literals(spec, text)
    known = _keywords(make)
    unknown = [key for key in options if known is not None and key not in known]
    if unknown:
        has = f"its options are {', '.join(known or [])}" if known else "it has no options"
        raise ValueError(f"feature map {name!r} has no option {unknown[0]!r}; {has}")
    for key, largest in _LARGEST.items():
        if isinstance(size := options.get(key), int) and size > largest:
            raise ValueError(f"feature map {name!r}: {key} must be at most {largest}, got {size}")
    if isinstance(inner := options.get("inner"), str):
        options["inner"] = parse_feature_map(inner)
    if isinstance(inners := options.get("inners"), list | tuple):
        options["inners"] = [parse_feature_map(inner) for inner in inners]
    return FeatureMapFactory(spec, make, options)


def _literals(spec: str, text: str) -> dict[str, Any]:
    """The keyword arguments in ``text``, of which nothing is ever evaluated."""
    try:
        call = ast.parse(f"_({text})", mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
            raise ValueError("options are key=value")
        options = {_key(keyword): _value(keyword.value) for keyword in call.keywords}
        if len(options) < len(call.keywords):
            raise ValueError("an option is given twice")
        return options
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError(
            f"feature map {spec!r} cannot be read; write NAME:key=value,... with numbers, True, "
            "False, None, words or quoted text as values"
        ) from error


def _key(keyword: ast.keyword) -> str:
    if keyword.arg is None:
        raise ValueError("options are key=value")
    return keyword.arg


def _value(node: ast.expr) -> Any:
    """A literal; a word that is no literal stands for itself, in a list too."""
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(element) for element in node.elts]
    return node.id if isinstance(node, ast.Name) else ast.literal_eval(node)


def _keywords(make: Callable[..., Any]) -> list[str] | None:
    """Names of the options of a map, all but the query dimensions; None if it takes any."""
    parameters = list(inspect.signature(make).parameters.values())
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return None
    return [p.name for p in parameters[1:]]
