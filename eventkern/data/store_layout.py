"""What store.json must say so that store.bin can be read by address, and its classes be told."""

from typing import Any

from eventkern.data.schema import FIRST_CLASS, Schema
from eventkern.data.sections import PAGE_BYTES

MOST_CLASSES = (1 << 31) - 1
"""Codes have 32 bits."""
CODE_DTYPES = ("uint8", "uint16", "int32")


def layout_fault(info: dict[str, Any], schema: Schema) -> str | None:
    """What is wrong with the sections, or with the numbers that their shapes come from; None: they fit one another.

    Whether they lie within the file is not asked here.
    """
    num_events = info["num_events"]
    for key, largest in (("num_events", (1 << 48)), ("file_bytes", 1 << 62), ("split_row", num_events)):
        if not _is_integer(info[key], 0, largest):
            return f"{key} is {info[key]!r}; want an integer from 0 to {largest}"
    if len(info["categories"]) != len(schema.categories):
        return f"categories has {len(info['categories'])} entries where the schema has {len(schema.categories)}"
    for category, told in zip(schema.categories, info["categories"], strict=True):
        if not _is_integer(told["size"], FIRST_CLASS, MOST_CLASSES):
            return f"category {category.name!r} has the size {told['size']!r}; want an integer of at least 2"
    wanted: dict[str, tuple[tuple[str, ...], tuple[int | None, ...]]] = {
        "codes": (CODE_DTYPES, (num_events, len(schema.categories))),
        "timestamps": (("int64",), (num_events,)),
    }
    for entity in schema.entities:
        wanted[f"entity_of_row:{entity}"] = (("int32",), (num_events,))
        wanted[f"offsets:{entity}"] = (("int64",), (None,))
        wanted[f"rows:{entity}"] = (("int64",), (None,))
    names = [section["name"] for section in info["sections"]]
    if sorted(map(repr, names)) != sorted(map(repr, wanted)):
        return f"sections are {names}; want {list(wanted)}"
    for section in info["sections"]:
        dtypes, shape = wanted[section["name"]]
        place = f"section {section['name']!r}"
        if section["dtype"] not in dtypes:
            return f"{place} has the dtype {section['dtype']!r}; want {' or '.join(dtypes)}"
        if len(section["shape"]) != len(shape) or not all(
            _is_integer(size, 0, 1 << 48) and (wanted_size is None or size == wanted_size)
            for size, wanted_size in zip(section["shape"], shape, strict=True)
        ):
            told = ", ".join("any" if size is None else str(size) for size in shape)
            return f"{place} has the shape {section['shape']!r}; want ({told})"
        if not _is_integer(section["offset"], 0, 1 << 62) or section["offset"] % PAGE_BYTES:
            return f"{place} has the offset {section['offset']!r}; want a multiple of {PAGE_BYTES} of at least 0"
    return None


def classes_fault(info: dict[str, Any]) -> str | None:
    """What is wrong with the words for classes, or with the known floors; None: each class has one."""
    for told in info["categories"]:
        values = told["values"]
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            return f"category {told['name']!r} has values that are no list of texts"
        if len(values) != told["size"] - FIRST_CLASS:
            return f"category {told['name']!r} has {told['size']} classes and {len(values)} values; want 2 fewer"
    floors = info.get("floor") or {}
    num_categories = len(info["categories"])
    for size, floor in floors.items():
        if len(floor) != num_categories or not all(isinstance(nats, int | float) for nats in floor):
            return f"floor {size!r} is {floor!r}; want {num_categories} numbers"
    return None


def _is_integer(value: object, smallest: int, largest: int) -> bool:
    return type(value) is int and smallest <= value <= largest
