"""What is on the disk, and not only on its way there; and what does not fit on it."""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class NoSpaceError(OSError):
    """No room on the disk.

    Attributes:
        wanted_bytes: what would have been written in all, where that is known.
    """

    wanted_bytes: int | None = None


def flush(path: Path) -> None:
    """Waits until a file, or a folder's entries and their renames, would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_all(file: FileIO, values: NDArray[Any]) -> None:
    """Writes an array's bytes to an unbuffered file. (`tofile` tells a full disk without its errno.)"""
    rest = np.ascontiguousarray(values).view(np.uint8).reshape(-1).data
    while rest:
        rest = rest[file.write(rest) :]


@contextmanager
def wanting(wanted_bytes: Callable[[], int]) -> Iterator[None]:
    """Adds to an error for want of space how much was wanted."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_SPACE or isinstance(error, NoSpaceError):
            raise
        told = NoSpaceError(*error.args)
        told.wanted_bytes = wanted_bytes()
        raise told from error


def no_space(error: OSError, what: str, wanted_bytes: int | None, folder: Path, mend: str) -> OSError:
    """The same error in words, once what was written has been removed."""
    free_bytes = shutil.disk_usage(folder).free
    wanted = "" if wanted_bytes is None else f"{wanted_bytes:,} bytes wanted, "
    return OSError(error.errno, f"{what}: {os.strerror(error.errno or 0)}: {wanted}{free_bytes:,} free; {mend}")
