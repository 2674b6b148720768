"""Arguments as plain Python values: what is saved of them loads anywhere. Imports neither torch nor numpy.

numpy's scalars, and arrays and tensors of no dimension, stand for the number they hold; a bool is no integer, and 2.5
none either.
"""

from __future__ import annotations

import types
from dataclasses import fields, is_dataclass
from operator import index
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def item(value: Any) -> Any:
    """The value itself, or what a scalar of numpy, or an array or a tensor of no dimension, holds."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def check_integer(name: str, value: object, smallest: int | None = None, largest: int | None = None) -> int:
    """The value as an int; raises TypeError or ValueError, with the name, unless it is an integer of the range."""
    plain = item(value)
    try:
        if isinstance(plain, bool) or hasattr(plain, "ndim"):  # torch takes a tensor of one element, even a bool
            raise TypeError
        number = index(plain)
    except TypeError:
        raise TypeError(f"{name} is {value!r}; want an integer") from None
    if (smallest is not None and number < smallest) or (largest is not None and number > largest):
        bounds = f"at least {smallest}" if largest is None else f"{smallest} to {largest}"
        raise ValueError(f"{name} is {number}; want {bounds}")
    return number


def check_number(name: str, value: object) -> float:
    """The value as a float; raises TypeError, with the name, unless it is an integer or a float."""
    plain = item(value)
    if isinstance(plain, bool) or not isinstance(plain, int | float):
        raise TypeError(f"{name} is {value!r}; want a number")
    return float(plain)


def check_flag(name: str, value: object) -> bool:
    """The value as a bool; raises TypeError, with the name, unless it is True, False, 1 or 0."""
    plain = item(value)
    if not isinstance(plain, int) or plain not in (0, 1):
        raise TypeError(f"{name} is {value!r}; want True or False")
    return bool(plain)


def check_fields(config: Any) -> None:
    """Makes the fields of a dataclass (frozen or not) plain values of their annotated types.

    Integers, floats, bools, texts, Literals of texts, tuples of one of these, None where the annotation has it, and
    dataclasses of these; fields of other types stay as they are.

    Raises:
        TypeError: a field whose value is of another type; it names the field.
    """
    hints = get_type_hints(type(config))
    for field in fields(config):
        object.__setattr__(config, field.name, _plain(field.name, getattr(config, field.name), hints[field.name]))


def _plain(name: str, value: Any, hint: Any) -> Any:
    origin, options = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType) and type(None) in options:
        rest = [option for option in options if option is not type(None)]
        return value if value is None or len(rest) > 1 else _plain(name, value, rest[0])
    if origin is tuple and len(options) == 2 and options[1] is Ellipsis:
        if isinstance(value, str) or not hasattr(value, "__iter__"):
            raise TypeError(f"{name} is {value!r}; want several values")
        return tuple(_plain(f"{name}[{place}]", each, options[0]) for place, each in enumerate(value))
    if isinstance(hint, type) and is_dataclass(hint) and isinstance(value, hint):
        check_fields(value)
    if hint is int:
        return check_integer(name, value)
    if hint is float:
        return check_number(name, value)
    if hint is bool:
        return check_flag(name, value)
    if hint is str and not isinstance(value, str):
        raise TypeError(f"{name} is {value!r}; want a text")
    return str(value) if (hint is str or origin is Literal) and isinstance(value, str) else value
