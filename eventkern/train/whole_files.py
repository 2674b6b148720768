"""Files that are written whole, or not at all."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from eventkern.disk import NO_SPACE, flush, no_space


def write_whole(writers: Mapping[Path, Callable[[IO[bytes]], object]]) -> None:
    """Writes files of one folder: each to a temporary file that is flushed to the disk, and only then are all renamed.

    A crash between two renames leaves the later files as they were; any error before leaves all of them so.

    Args:
        writers: what writes each file, given it open for writing and reading. Where there is no space they are called
            once more, with a file that cannot be read and only counts, since the sizes belong into the message.

    Raises:
        OSError: no space (with the bytes wanted and free), no permission; no temporary file stays behind.
    """
    temporaries = {path: path.with_name(f".{path.name}.tmp") for path in writers}
    try:
        for path, temporary in temporaries.items():
            with temporary.open("w+b") as file:
                writers[path](file)
                file.flush()
                os.fsync(file.fileno())
        for path, temporary in temporaries.items():
            temporary.replace(path)
    except BaseException as error:
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in NO_SPACE:
            raise _no_space(error, writers) from error
        raise
    for folder in {path.parent for path in writers}:
        flush(folder)


def write_file(path: Path, content: str | bytes) -> None:
    """Writes a file, text as UTF-8, whole or not at all; raises as `write_whole`."""
    encoded = content.encode() if isinstance(content, str) else content
    write_whole({path: lambda file: file.write(encoded)})


def remove_leftovers(folder: Path) -> None:
    """Removes the temporary files of a process that was killed while it wrote."""
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink()


class _Counter(io.RawIOBase):
    """A file that keeps nothing but the number of bytes written to it."""

    num_bytes = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.num_bytes += memoryview(data).nbytes
        return memoryview(data).nbytes


def num_bytes(writers: Iterable[Callable[[IO[bytes]], object]]) -> int:
    """The bytes that writers write, each given a file that cannot be read and only counts."""
    counter: Any = _Counter()
    for write in writers:
        write(counter)
    return int(counter.num_bytes)


def _no_space(error: OSError, writers: Mapping[Path, Callable[[IO[bytes]], object]]) -> OSError:
    """The same error, with what would mend it."""
    names = " and ".join(map(str, writers))
    folder = next(iter(writers)).parent
    return no_space(error, names, num_bytes(writers.values()), folder, "earlier files are as they were")
