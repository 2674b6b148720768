"""Text of Arrow columns: bytes and UUIDs read as text, and what is not UTF-8 told by row. (pyarrow loads here.)"""

from __future__ import annotations

from typing import Any

import pyarrow as pa


def readable_text(name: str, array: Any, complaints: dict[int, str], mend: str) -> Any:
    """A column whose text is UTF-8, which Arrow takes on trust; columns of other types as they are.

    Bytes are read as text, and a UUID as its 36 characters, as a CSV file has it.

    Args:
        name: of the column.
        array: a column of any type.
        complaints: by row; a value that is not UTF-8 is added, and reads with replacement characters.
        mend: what would mend such a value.
    """
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if isinstance(array.type, pa.BaseExtensionType):
        if array.type.extension_name == "arrow.uuid":
            return pa.array([value and _uuid_text(value) for value in array.storage.to_pylist()], pa.string())
        array = array.storage
    if _is_bytes(array.type):
        array = array.cast(pa.large_binary()).view(pa.large_string())
    elif not _is_text(array.type):
        return array
    try:
        array.validate(full=True)
        return array
    except pa.ArrowInvalid:
        values = array.cast(pa.large_binary()).to_pylist()
    texts = [None if value is None else value.decode(errors="replace") for value in values]
    for row, (value, text) in enumerate(zip(values, texts, strict=True)):
        if text is not None and text.encode() != value:
            complaints.setdefault(row, f"column {name!r} holds {value[:60]!r}, not UTF-8: {mend}")
    return pa.array(texts, pa.string())


def _is_bytes(dtype: Any) -> bool:
    is_of = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary, pa.types.is_binary_view)
    return any(is_one(dtype) for is_one in is_of)


def _is_text(dtype: Any) -> bool:
    return any(is_one(dtype) for is_one in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view))


def _uuid_text(value: bytes) -> str:
    digits = value.hex()
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"
