"""Load the weights of other transformers: rename, split and drop the entries of a state dict.

state_dict = PytorchMapper().map(torch_encoder.state_dict())
state_dict = HugginfaceBertEncoderMapper().map(bert.encoder.state_dict())
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor


class MappingRule:
    """What becomes of the entries of a state dict whose keys it matches."""

    def matches(self, key: str) -> bool:
        """Whether the rule is about `key`."""
        raise NotImplementedError(f"{type(self).__name__} must define matches")

    def apply(self, key: str, value: Tensor) -> list[tuple[str, Tensor]]:
        """The entries that replace (key, value): none, one or several."""
        raise NotImplementedError(f"{type(self).__name__} must define apply")


class IdentityRule(MappingRule):
    """Keeps every entry."""

    def matches(self, key: str) -> bool:
        return True

    def apply(self, key: str, value: Tensor) -> list[tuple[str, Tensor]]:
        return [(key, value)]


class NotRule(MappingRule):
    """Keeps the entries that `rule` does not match."""

    def __init__(self, rule: MappingRule) -> None:
        self.rule = rule

    def matches(self, key: str) -> bool:
        return not self.rule.matches(key)

    def apply(self, key: str, value: Tensor) -> list[tuple[str, Tensor]]:
        return [(key, value)]


class OrRule(MappingRule):
    """Applies the first of `rules` that matches."""

    def __init__(self, *rules: MappingRule) -> None:
        self.rules = rules

    def matches(self, key: str) -> bool:
        return any(rule.matches(key) for rule in self.rules)

    def apply(self, key: str, value: Tensor) -> list[tuple[str, Tensor]]:
        return _apply_first(self.rules, key, value)


class RegexRule(MappingRule):
    """Renames the keys in which `search` is found, by `re.sub(search, replace, key)`."""

    def __init__(self, search: str | re.Pattern[str], replace: str) -> None:
        self.search = re.compile(search)
        self.replace = replace

    def matches(self, key: str) -> bool:
        return self.search.search(key) is not None

    def apply(self, key: str, value: Tensor) -> list[tuple[str, Tensor]]:
        return [(self.search.sub(self.replace, key), value)]


class PytorchAttentionWeightsRule(MappingRule):
    """Splits `self_attn.in_proj_{weight,bias}` into query, key and value projections."""

    _in_proj = re.compile(r"self_attn\.in_proj_(weight|bias)")

    def matches(self, key: str) -> bool:
        return self._in_proj.search(key) is not None

    def apply(self, key: str, value: Tensor) -> list[tuple[str, Tensor]]:
        thirds = value.unflatten(0, (3, -1)).unbind(0)
        return [
            (self._in_proj.sub(rf"attention.{name}_projection.\1", key), third)
            for name, third in zip(("query", "key", "value"), thirds, strict=True)
        ]


class SimpleMapper:
    """Applies to each entry of a state dict the first rule that matches, else drops it.

    Args:
        rules: the rules in order, default none.
        add_identity: end with a rule that keeps every other entry, default True.
    """

    def __init__(self, rules: Iterable[MappingRule] = (), add_identity: bool = True) -> None:
        self.rules = [*rules, *([IdentityRule()] if add_identity else [])]

    def map(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A new state dict; `state_dict` is left as it is, and tensors are not copied."""
        mapped: dict[str, Tensor] = {}
        for key, value in state_dict.items():
            mapped.update(_apply_first(self.rules, key, value))
        return mapped

    @classmethod
    def load_file(
        cls,
        filepath: str | os.PathLike[str] | Any,
        model_root: str | None = None,
        map_location: Any = None,
        **other_args: Any,
    ) -> dict[str, Tensor]:
        """Read a file and map the state dict in it.

        Args:
            filepath: a file written by `torch.save`, or one called `*.safetensors`.
            model_root: the key of the state dict in the file; default: the file holds just that.
            map_location: where the tensors go, as in `torch.load`; for safetensors a device.
            other_args: passed on to `torch.load`. `weights_only` is True unless given.

        Raises:
            KeyError: the file has no `model_root`.
            ImportError: the file needs the package safetensors.
            TypeError: an argument has no meaning for safetensors.
        """
        state: Any
        if isinstance(filepath, (str, os.PathLike)) and str(filepath).endswith(".safetensors"):
            state = _load_safetensors(filepath, map_location, other_args)
        else:
            if not other_args.setdefault("weights_only", True):
                warnings.warn(
                    f"weights_only=False: {filepath} can run any code while it is read; use it "
                    "only with files that you trust",
                    stacklevel=2,
                )
            state = torch.load(filepath, map_location=map_location, **other_args)
        if model_root is not None:
            if model_root not in state:
                raise KeyError(
                    f"model_root must be a key of the file, got {model_root!r}; it has "
                    f"{_some_of(state)}"
                )
            state = state[model_root]
        return cls().map(state)


class PytorchMapper(SimpleMapper):
    """From `torch.nn.TransformerEncoder` to `TransformerEncoder`."""

    def __init__(self) -> None:
        rules = [
            PytorchAttentionWeightsRule(),
            RegexRule(
                r"layers\.(\d+)\.self_attn\.([a-z]+)_proj(ection)?\.",
                r"layers.\1.attention.\2_projection.",
            ),
            NotRule(RegexRule(r"\.softmax_temp$", "")),
        ]
        super().__init__(rules, add_identity=False)


class HugginfaceBertEncoderMapper(SimpleMapper):
    """From the `encoder` of a Hugging Face BERT to `TransformerEncoder`.

    Build that one with `activation="gelu"` and `final_normalization=False`.
    """

    RULES: ClassVar[tuple[MappingRule, ...]] = tuple(
        RegexRule(rf"\blayer\.(\d+)\.{theirs}\.", rf"layers.\1.{ours}.")
        for theirs, ours in (
            (r"attention\.self\.(query|key|value)", r"attention.\2_projection"),
            (r"attention\.output\.dense", "attention.out_projection"),
            (r"attention\.output\.LayerNorm", "norm1"),
            (r"intermediate\.dense", "linear1"),
            (r"output\.dense", "linear2"),
            (r"output\.LayerNorm", "norm2"),
        )
    )

    def __init__(self) -> None:
        super().__init__(self.RULES)


class LongformerMapper(SimpleMapper):
    """From the `encoder` of a Hugging Face Longformer; its `*_global` projections are dropped."""

    def __init__(self) -> None:
        no_global = NotRule(RegexRule(r"\.(query|key|value)_global\.", ""))
        super().__init__([*HugginfaceBertEncoderMapper.RULES, no_global], add_identity=False)


def _apply_first(
    rules: Iterable[MappingRule], key: str, value: Tensor
) -> list[tuple[str, Tensor]]:
    """What the first rule that matches makes of (key, value); nothing if none does."""
    for rule in rules:
        if rule.matches(key):
            return rule.apply(key, value)
    return []


def _load_safetensors(
    filepath: str | os.PathLike[str], map_location: Any, other_args: Mapping[str, Any]
) -> dict[str, Tensor]:
    if other_args:
        raise TypeError(
            f"{', '.join(other_args)}: arguments of torch.load, which does not read {filepath}; "
            "leave them out"
        )
    if not isinstance(map_location, (str, int, torch.device, type(None))):
        raise TypeError(
            f"map_location must be a device for {filepath}, got {map_location!r}; pass one, or "
            "leave it out for the cpu"
        )
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError(
            f"reading {filepath} needs the package safetensors: pip install safetensors"
        ) from error
    return load_file(filepath, device="cpu" if map_location is None else str(map_location))


def _some_of(keys: Iterable[object], most: int = 10) -> str:
    names = [repr(key) for key in keys]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
