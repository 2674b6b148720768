"""Sections are page-aligned, and codes as narrow as they can be."""

import pytest

from eventkern.data.sections import code_dtype, lay_out


def test_sections_are_page_aligned_and_apart() -> None:
    sections, end = lay_out(
        [("a", "uint8", (3, 3)), ("b", "int64", (0,)), ("c", "int32", (1025,)), ("d", "uint8", (1,))]
    )
    assert [section.offset for section in sections] == [0, 4096, 4096, 12288]
    assert end == 12289


@pytest.mark.parametrize(
    ("largest", "dtype"),
    [(256, "uint8"), (257, "uint16"), (1 << 16, "uint16"), ((1 << 16) + 1, "int32"), (2, "uint8")],
)
def test_code_dtype_is_the_narrowest_that_holds_all(largest: int, dtype: str) -> None:
    assert code_dtype((2, largest, 5)) == dtype
