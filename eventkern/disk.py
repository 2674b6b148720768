"""What is on the disk, and not only on its way there."""

import os
from pathlib import Path


def flush(path: Path) -> None:
    """Waits until a file, or a folder's entries and their renames, would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
