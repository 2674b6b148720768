import errno
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eventkern.disk import NoSpaceError, no_space, wanting, write_all


class Slow(io.FileIO):
    """A file that takes at most 5 bytes at a time, as the system may when a disk is nearly full."""

    def write(self, data: Any) -> int:
        return super().write(memoryview(data)[:5])


@pytest.mark.parametrize(
    "values",
    [np.arange(7, dtype=np.int64), np.arange(12, dtype=np.int16).reshape(3, 4).T, np.ones(3, bool), np.empty((0, 3))],
    ids=["int64", "strided", "bool", "empty"],
)
def test_a_write_that_is_cut_short_goes_on(tmp_path: Path, values: np.ndarray[Any, Any]) -> None:
    with Slow(tmp_path / "values", "w") as file:
        write_all(file, values)
    assert (tmp_path / "values").read_bytes() == values.tobytes()


def test_only_want_of_space_is_told_with_what_was_wanted(tmp_path: Path) -> None:
    for number in (errno.ENOSPC, errno.EDQUOT):
        with pytest.raises(NoSpaceError) as caught, wanting(lambda: 2**40), wanting(lambda: 7000):
            raise OSError(number, "full")
        assert caught.value.wanted_bytes == 7000
        told = no_space(caught.value, "a.bin", caught.value.wanted_bytes, tmp_path, "make room")
        assert told.errno == number
        assert str(told).startswith(f"[Errno {number}] a.bin: ")
        assert ": 7,000 bytes wanted, " in str(told)
        assert str(told).endswith(" free; make room")
    with pytest.raises(PermissionError) as other, wanting(lambda: 7000):
        raise PermissionError(errno.EACCES, "no")
    assert not isinstance(other.value, NoSpaceError)
