"""What store.json keeps of a store's content, to tell a changed one."""

import hashlib
import json
import zlib
from pathlib import Path
from typing import Any


def sizes_checksum(info: dict[str, Any]) -> str:
    """SHA-256 of what the reading of store.bin depends on."""
    read = {key: info[key] for key in ("format_version", "num_events", "split_row", "sections", "file_bytes", "schema")}
    read["sizes"] = [category["size"] for category in info["categories"]]
    return hashlib.sha256(json.dumps(read, sort_keys=True).encode()).hexdigest()


def info_checksum(info: dict[str, Any]) -> str:
    """SHA-256 of all that store.json says, but for its checksums."""
    told = {key: value for key, value in info.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def file_checksum(file: Path) -> str:
    """CRC-32 of a file, in hexadecimal."""
    checksum = 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            checksum = zlib.crc32(block, checksum)
    return f"crc32:{checksum:08x}"
