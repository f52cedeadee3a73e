"""The interface of a feature map, and the maps that apply one function to each element."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import Composition, Formula
from ..ops.elementwise import elu_plus_one, formula_of
from .fitting import fit_weights


class _Factory:
    """What :meth:`FeatureMap.factory` returns; unlike a closure it can be pickled."""

    def __init__(self, cls: type[FeatureMap], args: tuple, kwargs: dict[str, Any]) -> None:
        self._cls, self._args, self._kwargs = cls, args, kwargs

    def __call__(self, query_dims: int) -> FeatureMap:
        return self._cls(query_dims, *self._args, **self._kwargs)

    def __repr__(self) -> str:
        options = [repr(a) for a in self._args] + [f"{k}={v!r}" for k, v in self._kwargs.items()]
        return f"{self._cls.__name__}.factory({', '.join(options)})"


_FORMULAS = ("forward", "forward_queries", "forward_keys", "log_queries", "log_keys", "project")


class FeatureMap(nn.Module):
    """phi: R^E -> R^F, applied to the last dimension of queries and of keys.

    A symmetric map defines ``forward``; an asymmetric one ``forward_queries`` and
    ``forward_keys``. They see chunks of the sequence, (N, C, H, E), or one token of it, and must
    treat each token by itself. All randomness belongs in ``new_feature_map``, and every trained
    tensor must be a registered parameter: features are recomputed in the backward pass.

    A map whose features are exponentials, phi = exp(.), sets ``exponential = True`` and defines
    ``log_queries`` and ``log_keys`` as well. Attention then works with the logarithms and is
    exact for inputs of any norm.

    Attributes:
        query_dimensions: E. The older name ``query_dims`` holds the same.
        exponential: whether ``log_queries`` and ``log_keys`` are to be used.
        any_input: whether the methods accept any floating dtype and any leading dimensions, and
            compute in float32 at least. They may then be given some of the heads only.
        drawn: whether the map can be used before ``new_feature_map`` has been called.
        random: whether ``new_feature_map`` draws anything.
        positive: whether no weight phi(q).phi(k) is ever below 0, so that denominators cannot
            cross it.
        causal_safe: whether features of a token depend on nothing but that token and what the
            map has learned, drawn, or was calibrated with; all maps here are.
        heads: number of heads that the map tells apart, for inputs (..., H, E) of any floating
            dtype; None if it treats all alike.
        positional: whether the map must be told positions, see :meth:`add_positions`.
        estimates: "softmax" for a map that stands for exp(softmax_temp x.y), and has that
            ``softmax_temp``; "gaussian" for exp(-softmax_temp |x - y|^2 / 2); else "".
        fitted_buffers: names of the statistics that ``calibrate(..., fit_steps=...)`` moves.
    """

    exponential = False
    any_input = False
    drawn = False
    random = False
    positive = False
    causal_safe = True
    heads: int | None = None
    positional = False
    estimates = ""
    fitted_buffers: tuple[str, ...] = ()
    _takes_device = True

    def __init__(self, query_dimensions: int) -> None:
        super().__init__()
        self.query_dimensions = self.query_dims = query_dimensions
        # what draws nothing is; a first call that noted it would make models compile twice
        self.drawn = self.drawn or type(self).new_feature_map is FeatureMap.new_feature_map

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = vars(cls)
        cls._takes_device = _has_parameter(cls.new_feature_map)
        redefined = any(f"forward{part}" in own for part in ("", "_queries", "_keys"))
        if redefined and not any(n in own for n in ("log_queries", "log_keys", "exponential")):
            cls.exponential = False  # the inherited logarithms are those of other features
        if any(name in own for name in _FORMULAS):  # what is inherited is of other features
            for name in ("formula", "composition"):
                if name not in own:
                    setattr(cls, name, getattr(FeatureMap, name))

    def new_feature_map(self, device: torch.device | None = None) -> None:
        """Draw new random parameters, if the map has any.

        Attention calls this once before it encodes a batch; all encodings up to the next call
        must be compatible with each other.

        Args:
            device: the device of the queries. A map may leave this parameter out.
        """

    def forward_queries(self, x: Tensor) -> Tensor:
        """phi of queries: (..., E) to (..., F)."""
        return self(x)

    def forward_keys(self, x: Tensor) -> Tensor:
        """phi of keys: (..., E) to (..., F)."""
        return self(x)

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError(
            f"{type(self).__name__} must define forward, or forward_queries and forward_keys"
        )

    def log_queries(self, x: Tensor) -> Tensor:
        """log phi of queries, up to a constant per query; needed if ``exponential``."""
        raise NotImplementedError(f"{type(self).__name__} is exponential: define log_queries")

    def log_keys(self, x: Tensor) -> Tensor:
        """log phi of keys; needed if ``exponential``."""
        raise NotImplementedError(f"{type(self).__name__} is exponential: define log_keys")

    def query_offset(self, x: Tensor) -> Tensor | float:
        """The constant per query, (..., 1), that ``log_queries`` leaves out; in attention it
        cancels."""
        return 0.0

    def kernel(self, x: Tensor, y: Tensor) -> Tensor:
        """What phi(x).phi(y) is, exactly or on average: (..., E), (..., E) to (...)."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it approximates")

    def relative_variance(self, x: Tensor, y: Tensor) -> Tensor:
        """Var[phi(x).phi(y)] / kernel(x, y)^2 over draws: (..., E), (..., E) to (...).

        In closed form, for independent directions (``projection="iid"``); the other projections
        are chosen because theirs is smaller. Deterministic maps have none.
        """
        if self.random:
            raise NotImplementedError(f"the variance of {type(self).__name__} is not known")
        return torch.zeros_like(self.kernel(x, y))

    def calibrate(self, queries: Tensor, keys: Tensor, fit_steps: int = 0) -> None:
        """Set what the map knows of its inputs from examples; most maps need nothing.

        Statistics change here and nowhere else: features never depend on the other tokens of a
        call. They are buffers, and so part of the state dict. A map of your own that has some
        sets them in ``_calibrate``, which takes the queries and keys.

        Args:
            queries: (..., H, E) of any number of tokens, as attention sees them.
            keys: (..., H, E), the same.
            fit_steps: steps of gradient descent that then move statistics (means, alignments,
                factors) and trained weights until the weights of attention are those of softmax;
                see :func:`~fast_transformers.feature_maps.fitting.fit_weights`. Queries and keys
                are (N, length, H, E) for this, and every query sees all keys of its sequence;
                with a mask call :func:`fast_transformers.diagnostics.fit` instead.

        Raises:
            ValueError: for ``fit_steps`` below 0, or with examples of another form.
        """
        self._calibrate(queries, keys)
        if fit_steps:
            if queries.ndim != 4 or keys.ndim != 4:
                raise ValueError(
                    "fit_steps needs examples (N, length, H, E), got queries "
                    f"{tuple(queries.shape)} and keys {tuple(keys.shape)}"
                )
            training = self.training
            temp = getattr(self, "softmax_temp", None) if self.estimates == "softmax" else None
            fit_weights(self, queries, keys, softmax_temp=temp, steps=fit_steps)
            self.train(training)

    def _calibrate(self, queries: Tensor, keys: Tensor) -> None:
        """Set the statistics; see :meth:`calibrate`."""

    @property
    def has_statistics(self) -> bool:
        """Whether :meth:`calibrate` changes the map, even without ``fit_steps``."""
        return type(self)._calibrate is not FeatureMap._calibrate

    def moved(self, changes: dict[str, Tensor]) -> dict[str, Tensor]:
        """``fitted_buffers`` after a change of each, which starts at 0, by name; differentiable.

        May return other buffers that follow from them.
        """
        return {name: self.get_buffer(name) + change for name, change in changes.items()}

    def add_positions(self, x: Tensor, start: int | Tensor = 0) -> Tensor:
        """What a positional map needs of positions, behind the dimensions of x (N, L, H, E).

        Attention calls this for maps that are ``positional``; ``start`` is the position of the
        first token, or (N, L) positions of all.
        """
        raise NotImplementedError(f"{type(self).__name__} takes no positions")

    @property
    def trainable(self) -> bool:
        """Whether the map has weights that are trained."""
        return any(p.requires_grad for p in self.parameters())

    def formula(self) -> Formula | None:
        """The map by the name under which the operators know it; None if they do not.

        They evaluate and differentiate such a map themselves, faster than through its methods.
        """
        return None

    def composition(self) -> Composition | None:
        """The map as one with a formula, of linear maps of the queries and of the keys, say; None
        if it is not made like that. Kernels then compute the map inside."""
        return None

    @property
    def feature_dims(self) -> int:
        """F, the number of features that come out."""
        first = next(iter([*self.parameters(), *self.buffers()]), torch.empty(0))
        x = torch.zeros(1, 1, 1, self.query_dimensions, dtype=first.dtype, device=first.device)
        return self.forward_queries(x).shape[-1]

    @classmethod
    def factory(cls, *args: Any, **kwargs: Any) -> Callable[[int], FeatureMap]:
        """A function of the query dimensions that makes this map with the given arguments.

        >>> from fast_transformers.feature_maps import Favor
        >>> Favor.factory(n_dims=128)(32).feature_dims
        128
        """
        return _Factory(cls, args, kwargs)


def widen(x: Tensor) -> Tensor:
    """x in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _has_parameter(method: Callable[..., None]) -> bool:
    parameters = list(inspect.signature(method).parameters.values())[1:]
    return any(p.kind is not inspect.Parameter.KEYWORD_ONLY for p in parameters)


def takes_device(feature_map: Any) -> bool:
    """Whether ``new_feature_map`` has a parameter for the device."""
    known = getattr(feature_map, "_takes_device", None)  # of classes known when they were defined
    return _has_parameter(type(feature_map).new_feature_map) if known is None else known


class ActivationFunctionFeatureMap(FeatureMap):
    """phi(x) = activation_function(x), element by element.

    The kernel is exact: sum_i f(x_i) f(y_i). Non-negative functions keep the denominator of the
    attention positive; that of Katharopoulos et al. 2020 is :func:`elu_feature_map`.

    Args:
        query_dimensions: E, which is also the number of features.
        activation_function: (..., E) to (..., E). A module here may hold trained weights.

    >>> attention_map = ActivationFunctionFeatureMap.factory(torch.relu)(4)
    >>> attention_map(torch.tensor([-1.0, 0.0, 2.0, 3.0]))
    tensor([0., 0., 2., 3.])
    """

    any_input = True
    drawn = True

    def __init__(
        self, query_dimensions: int, activation_function: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__(query_dimensions)
        self.activation_function = activation_function
        self.positive = self.formula() is not None  # of the others nothing is known

    @property
    def feature_dims(self) -> int:
        return self.query_dimensions

    def forward(self, x: Tensor) -> Tensor:
        return self.activation_function(x)

    def formula(self) -> Formula | None:
        return formula_of(self.activation_function)

    def kernel(self, x: Tensor, y: Tensor) -> Tensor:
        return (self(x) * self(y)).sum(-1)


def elu_feature_map(query_dims: int) -> ActivationFunctionFeatureMap:
    """phi(x) = elu(x) + 1, the default map; "Transformers are RNNs" (2020), equation 7."""
    return ActivationFunctionFeatureMap(query_dims, elu_plus_one)


def relu_feature_map(query_dims: int) -> ActivationFunctionFeatureMap:
    """phi(x) = relu(x): equation 5 of "Rethinking Attention with Performers" (2021) without the
    projection."""
    return ActivationFunctionFeatureMap(query_dims, torch.relu)
