"""Queries, keys and values of a model as it runs, and every report on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..attention.attention_layer import AttentionLayer
from ..events import QKVEvent
from .attention_report import AttentionReport, join_reports, report_of
from .kernel_report import KernelReport, kernel_report
from .sample import MapsLike, Sample, halves, make_sample, named
from .scale import ScaleReport, scale_of
from .suggest import Suggestion, suggest_of


class Capture(NamedTuple):
    """What :func:`capture` returns.

    Attributes:
        layers: the input of each attention by the name of its module, in the order of their
            first call; the values are :class:`~fast_transformers.diagnostics.Sample`.
        own: the feature maps that the model itself has, by the same names; a softmax attention
            has none.
    """

    layers: dict[str, Sample]
    own: dict[str, Any]

    def only(self, *names: str) -> Capture:
        """Some of the layers; KeyError for a name that is not there."""
        own = {name: self.own[name] for name in names if name in self.own}
        return Capture({name: self.layers[name] for name in names}, own)

    def calibrate(self) -> list[str]:
        """Calibrate the model's own maps, in place, on what their attentions were given.

        Every token counts, padding too: capture sequences without.

        Returns:
            The names of the layers whose maps have statistics; the others stay as they are.
        """
        found = [name for name, own in self.own.items() if getattr(own, "has_statistics", False)]
        for name in found:
            self.own[name].calibrate(self.layers[name].q, self.layers[name].k)
        return found

    def scale(self) -> dict[str, ScaleReport]:
        """A :func:`~fast_transformers.diagnostics.scale_report` of every layer."""
        return {name: scale_of(sample) for name, sample in self.layers.items()}

    def attention(
        self,
        feature_maps: MapsLike | None = None,
        *,
        calibration: Capture | None = None,
        draws: int = 4,
        seed: int = 0,
        tick: Callable[[], object] = lambda: None,
        first: Callable[[str, str, int, Any], object] = lambda *_: None,
    ) -> dict[str, AttentionReport]:
        """An :func:`~fast_transformers.diagnostics.attention_report` of every layer.

        Args:
            feature_maps: what to try; None is the model's own maps, as they are.
            calibration: of the same model on other inputs, for maps that have statistics; None
                takes this one, which flatters them.
            draws, seed: see ``attention_report``.
            tick: called after every map of every head, for a progress bar.
            first: called with the layer, the name of the map, the head, and the first draw.

        Raises:
            ValueError: if there are no maps to report on.
        """
        examples = self.layers if calibration is None else calibration.layers
        reports = {}
        for index, (name, sample) in enumerate(self.layers.items()):
            maps = {} if feature_maps is None else named(feature_maps)
            options: dict[str, Any] = {"draws": draws, "seed": seed + 1000 * index}
            if feature_maps is None:
                if name not in self.own:
                    raise ValueError(f"{name} is softmax attention; pass feature_maps to try")
                maps, options["draws"] = {type(self.own[name]).__name__: self.own[name]}, 1
            options["first"] = partial(first, name)
            reports[name] = report_of(maps, sample, examples[name], tick=tick, **options)
        return reports

    def kernel(self, feature_maps: MapsLike, **options: Any) -> dict[str, KernelReport]:
        """A :func:`~fast_transformers.diagnostics.kernel_report` of every layer, all heads
        together, with its ``options``."""
        return {
            name: kernel_report(feature_maps, s.q, s.k, softmax_temp=s.softmax_temp, **options)
            for name, s in self.layers.items()
        }

    def suggest(
        self, error: float = 0.3, *, calibration: Capture | None = None, **options: Any
    ) -> dict[str, Suggestion]:
        """What :func:`~fast_transformers.diagnostics.suggest` says of every layer.

        Args:
            error: of the weights, see there.
            calibration: of the same model on other inputs, for maps that have statistics; None
                takes the second half of the sequences, and measures on the first.
            options: ``most``, ``draws`` and ``seed``.
        """
        pairs = {
            name: halves(sample) if calibration is None else (sample, calibration.layers[name])
            for name, sample in self.layers.items()
        }
        return {name: suggest_of(*pair, error, **options) for name, pair in pairs.items()}

    def overall(self, *args: Any, **kwargs: Any) -> AttentionReport:
        """:meth:`attention` of all heads of all layers in one report."""
        return join_reports(list(self.attention(*args, **kwargs).values()))


def capture(model: nn.Module, inputs: Any, **kwargs: Any) -> Capture:
    """Run a model once and keep what its attentions were given.

    Models of this library tell by their events (:class:`~fast_transformers.events.QKVEvent`),
    those of Hugging Face transformers through its interface for attentions; nothing about the
    model stays changed.

    Args:
        model: put into evaluation mode for the call.
        inputs: the argument of the model, or a dictionary of arguments by name.
        kwargs: further arguments by name.

    Raises:
        TypeError: for a model of neither kind.
        ValueError: if no attention was called.

    >>> from fast_transformers.builders import TransformerEncoderBuilder
    >>> model = TransformerEncoderBuilder.from_kwargs(n_layers=2, n_heads=4).get()
    >>> found = capture(model, torch.randn(1, 50, 256))
    >>> list(found.layers)
    ['layers.0.attention', 'layers.1.attention']
    """
    if isinstance(inputs, Mapping):  # such as a tokenizer returns
        call = {str(key): value for key, value in inputs.items()} | kwargs
        arguments: tuple[Any, ...] = ()
    else:
        call, arguments = kwargs, (inputs,)
    own = any(isinstance(m, AttentionLayer) for m in model.modules())
    if not own and not hasattr(model, "set_attn_implementation"):
        raise TypeError(
            f"model must be made of this library's AttentionLayer or be a model of Hugging Face "
            f"transformers, got {type(model).__name__}; for others call attention_report(maps, q, "
            "k) on their queries and keys"
        )
    training = model.training
    model.eval()
    try:
        if own:
            layers, maps = _by_events(model, arguments, call)
        else:
            from .huggingface import capture_layers

            layers, maps = capture_layers(model, arguments, call)
    finally:
        model.train(training)
    if not layers:
        raise ValueError("the model ran without calling an attention; nothing to report on")
    return Capture(layers, maps)


@torch.no_grad()
def _by_events(
    model: nn.Module, arguments: tuple[Any, ...], call: dict[str, Any]
) -> tuple[dict[str, Sample], dict[str, Any]]:
    names = {m: name for name, m in model.named_modules() if isinstance(m, AttentionLayer)}
    layers: dict[str, Sample] = {}
    maps: dict[str, Any] = {}
    masks: dict[nn.Module, tuple[Any, Any]] = {}

    def remember(module: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        order = ("queries", "keys", "values", "attn_mask", "query_lengths", "key_lengths")
        bound = dict(zip(order, args, strict=False)) | given
        masks[module] = bound.get("attn_mask"), bound.get("key_lengths")

    def listen(event: QKVEvent) -> None:
        if event.source not in names:
            return
        name = names[event.source]  # pyright: ignore[reportArgumentType]
        layers[name] = _sample_of(event, *masks.get(event.source, (None, None)))
        inner = getattr(event.source, "inner_attention", None)
        if (own := getattr(inner, "feature_map", None)) is not None:
            maps[name] = own

    hooks = [m.register_forward_pre_hook(remember, with_kwargs=True) for m in names]
    dispatchers = {id(m.event_dispatcher): m.event_dispatcher for m in names}
    try:
        for dispatcher in dispatchers.values():
            dispatcher.listen(QKVEvent, listen)
        model(*arguments, **call)
    finally:
        for dispatcher in dispatchers.values():
            dispatcher.remove(listen)
        for hook in hooks:
            hook.remove()
    return layers, maps


def _sample_of(event: QKVEvent, attn_mask: Any, key_lengths: Any) -> Sample:
    inner: Any = event.source.inner_attention
    q, k, v = (_known(x) for x in (event.queries, event.keys, event.values))
    temp = getattr(inner, "softmax_temp", None)
    if temp is None:
        temp = getattr(getattr(inner, "feature_map", None), "softmax_temp", None)
    return make_sample(q, k, v, attn_mask=attn_mask, key_lengths=key_lengths, softmax_temp=temp)


def _known(x: Tensor) -> Tensor:
    return x.detach().clone()
