"""Files that are whole or as they were before, whatever happens while they are written."""

from __future__ import annotations

import os
from pathlib import Path

from eventkern.train.checkpoint import flush_folder


def write_file(path: Path, content: str | bytes) -> None:
    """Writes `content` (text as UTF-8) to a temporary file, flushes it to the disk, and renames it to `path`.

    Raises:
        OSError: no space, no permission; `path` is what it was, and no temporary file is left.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)
