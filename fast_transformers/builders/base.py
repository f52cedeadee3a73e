"""What all builders share: construction from keyword arguments, dictionaries, namespaces."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

B = TypeVar("B", bound="BaseBuilder")


class BaseBuilder:
    """Set options as attributes, then call ``get()`` as often as needed."""

    @classmethod
    def from_kwargs(cls: type[B], **kwargs: Any) -> B:
        """A builder with these options; ``strict=False`` skips those it does not know.

        Raises:
            ValueError: for an unknown option (if strict) or an invalid value.
        """
        strict = kwargs.pop("strict", True)
        return cls.from_dictionary(kwargs, strict=strict)

    @classmethod
    def from_dictionary(cls: type[B], dictionary: Mapping[str, Any], strict: bool = True) -> B:
        """A builder with the options of a dictionary; errors as :meth:`from_kwargs`."""
        builder = cls()
        for name, value in dictionary.items():
            try:
                setattr(builder, name, value)
            except AttributeError as error:
                if strict:
                    raise ValueError(f"The builder has no parameter {name!r}: {error}") from None
        return builder

    @classmethod
    def from_namespace(cls: type[B], args: argparse.Namespace, strict: bool = False) -> B:
        """A builder with the options in a parsed command line; unknown ones are skipped."""
        return cls.from_dictionary(vars(args), strict=strict)


def unknown_option(builder: BaseBuilder, name: str, known: Iterable[str]) -> AttributeError:
    """The error for an option that does not exist, with the nearest that does."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"its options are {', '.join(known)}"
    return AttributeError(f"{type(builder).__name__} has no option {name!r}; {hint}")


def show(builder: BaseBuilder, options: Mapping[str, Any]) -> str:
    """``Builder.from_kwargs(...)`` with an option a line."""
    lines = "".join(f"    {name}={value!r},\n" for name, value in options.items())
    return f"{type(builder).__name__}.from_kwargs(\n{lines})"
