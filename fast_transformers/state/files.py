"""States in safetensors files: tensors, and JSON that says where each belongs."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..ops import LinearState
from .cache import KeysValues
from .parts import ConditionalState, CrossConditionalState, CrossLinearState, Memory, PositionState

FORMAT = "fast_transformers.State 1"
MOST_PARTS = 2**16
UNREADABLE = (KeyError, TypeError, ValueError, AttributeError, RecursionError)
KINDS: dict[str, tuple[type, Callable[..., Any], tuple[str, ...]]] = {
    kind.__name__: (kind, kind, fields)
    for kind, fields in (
        (LinearState, ("kv", "z", "shift")),
        (CrossLinearState, ("kv", "z", "shift")),
        (Memory, ("keys", "values", "mask")),
        (PositionState, PositionState._fields),
        (ConditionalState, ConditionalState._fields),
        (CrossConditionalState, CrossConditionalState._fields),
    )
}


def _keys_values(keys: Tensor, values: Tensor, lengths: Tensor | None) -> KeysValues:
    return KeysValues(keys, values, lengths=lengths)


KINDS["KeysValues"] = (KeysValues, _keys_values, ("keys", "values", "lengths"))


def save(parts: dict[str, Any], path: str | PathLike[str]) -> None:
    """Write named parts of a state; see :meth:`.state.State.save`."""
    tensors: dict[str, Tensor] = {}
    structure = {name: _encode(part, name, tensors) for name, part in parts.items()}
    metadata = {"format": FORMAT, "structure": json.dumps(structure)}
    _safetensors("torch").save_file(tensors, path, metadata=metadata)


def load(path: str | PathLike[str], device: torch.device | str) -> dict[str, Any]:
    """Read what :func:`save` wrote; see :meth:`.state.State.load`."""
    safetensors = _safetensors()
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file; State.save writes one")
    try:
        with safetensors.safe_open(path, framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"its format is {metadata.get('format')!r}, not {FORMAT!r}")
            names = set(file.keys())
            reader = _Reader(file.get_tensor, names)
            structure = json.loads(metadata["structure"])
            if not isinstance(structure, dict) or set(structure) != {"layers", "position"}:
                raise ValueError("it does not name layers and position")
            layers = reader.read(structure["layers"])
            if not isinstance(layers, list):
                raise ValueError("its layers are no list")
            parts = {"layers": layers, "position": reader.count(structure["position"])}
            if names:
                raise ValueError(f"nothing refers to its tensor {min(names)!r}")
            return parts
    except (safetensors.SafetensorError, *UNREADABLE) as error:
        raise ValueError(f"{path} is not the file of a state: {error}") from error


def _safetensors(submodule: str = "") -> Any:
    try:
        return import_module(f"safetensors.{submodule}" if submodule else "safetensors")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "files of states need the package safetensors; pip install fast-transformers[hf]"
        ) from error


def _encode(part: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """``part`` as JSON, with the names of its tensors, which are added to ``tensors``."""
    if part is None or isinstance(part, int):
        return part
    if isinstance(part, Tensor):
        tensors[name] = part.detach().contiguous().clone()
        return name
    for kind, (cls, _, fields) in KINDS.items():
        if type(part) is cls:
            values = [*part, part.lengths] if isinstance(part, KeysValues) else None
            values = values or [getattr(part, field) for field in fields]
            encoded = {
                field: _encode(value, f"{name}.{field}", tensors)
                for field, value in zip(fields, values, strict=True)
            }
            return {"kind": kind, **encoded}
    if isinstance(part, list | tuple):
        return [_encode(x, f"{name}.{i}", tensors) for i, x in enumerate(part)]
    raise ValueError(f"{name} is a {type(part).__name__}, which no file of a state can hold")


class _Reader:
    """Turns JSON back into a state, and believes nothing of it."""

    def __init__(self, get: Callable[[str], Tensor], names: set[str]) -> None:
        self._get, self._names = get, names
        self._left = MOST_PARTS
        self._rows: int | None = None

    def read(self, part: Any) -> Any:
        """None, a list, a tensor, or one of :data:`KINDS`."""
        self._left -= 1
        if self._left < 0:
            raise ValueError("it has too many parts")
        if part is None:
            return None
        if isinstance(part, list):
            return [self.read(x) for x in part]
        if isinstance(part, str):
            return self.tensor(part)
        _, make, fields = KINDS[part["kind"]]
        if set(part) != {"kind", *fields}:
            raise ValueError(f"a {part['kind']} has {', '.join(fields)}")
        counts = ("position", "length")
        values = {f: (self.count if f in counts else self.read)(part[f]) for f in fields}
        _check(part["kind"], values)
        return make(**values)

    def count(self, value: Any) -> int | Tensor:
        """A number of tokens, or a tensor of such numbers."""
        if isinstance(value, str):
            value = self.tensor(value)
            if value.dtype != torch.int64 or value.ndim > 1 or bool((value < 0).any()):
                raise ValueError("its numbers of tokens are not whole numbers from 0 on")
        elif type(value) is not int or not 0 <= value < 2**63:
            raise ValueError("its number of tokens is not a whole number from 0 on")
        return value

    def tensor(self, name: str) -> Tensor:
        """A tensor, each of which belongs to one place."""
        self._names.remove(name)
        tensor = self._get(name)
        if tensor.ndim:
            if self._rows not in (None, len(tensor)):
                raise ValueError(
                    f"{name!r} is for {len(tensor)} sequences, others for {self._rows}"
                )
            self._rows = len(tensor)
        return tensor


def _check(kind: str, values: dict[str, Any]) -> None:
    """ValueError unless tensors have the shapes and dtypes of their kind."""
    if kind in ("LinearState", "CrossLinearState"):
        kv, z, shift = values.values()
        sums = kv.dtype in (torch.float32, torch.float64)
        fits = sums and kv.ndim == 4 and z.shape == kv.shape[:3] and z.dtype == kv.dtype
        fits = fits and (shift is None or (shift.shape == z.shape and shift.dtype == z.dtype))
    elif kind in ("KeysValues", "Memory"):
        keys, more, extra = values.values()
        fits = keys.ndim == more.ndim == 4 and keys.shape[:3] == more.shape[:3]
        fits = fits and keys.is_floating_point() and keys.dtype == more.dtype
        if extra is not None and kind == "Memory":
            fits = fits and extra.shape == keys.shape[:2] and extra.dtype == torch.bool
        elif extra is not None:
            fits = fits and extra.shape == keys.shape[:1] and extra.dtype == torch.int64
            fits = fits and bool(((extra >= 0) & (extra <= keys.shape[2])).all())
    else:
        parts = [value for name, value in values.items() if name not in ("position", "length")]
        fits = all(x is None or not isinstance(x, Tensor) for x in parts)
        fits = fits and isinstance(values.get("full"), KeysValues | None)
        fits = fits and isinstance(values.get("memory"), Memory | None)
    if not fits:
        raise ValueError(f"the tensors of a {kind} do not fit each other")
