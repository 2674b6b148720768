"""Configuration files: a mutated one is refused in one line that names it, or is one that stays itself."""

import json
from pathlib import Path
from random import Random

import hostile
import schemas

from eventkern.cli.arguments import RunConfig
from eventkern.train.config import ConfigError, from_mapping, read_config, to_mapping

SHIPPED = Path(schemas.SHIPPED).parent / "configs"


def run(random: Random, folder: Path) -> str:
    shipped = random.choice(sorted((*SHIPPED.glob("*.toml"), *SHIPPED.glob("*.json"))))
    file = folder / f"config{shipped.suffix}"
    text = shipped.read_text()
    file.write_bytes(schemas.mutated(random, text) if shipped.suffix == ".toml" else changed_json(random, text))
    config = hostile.outcome(lambda: read_config(file, RunConfig), (ConfigError,))
    if isinstance(config, Exception):
        assert str(config).startswith(f"{file}: "), config
        assert "\n" not in str(config), config
    else:
        assert from_mapping(RunConfig, to_mapping(config)) == config
    return f"configs: {hostile.told(config)}"


def changed_json(random: Random, text: str) -> bytes:
    if random.random() < 0.3:
        return hostile.flipped(random, text.encode())
    lines = text.splitlines()
    keyed = [number for number, line in enumerate(lines) if ": " in line]
    for _ in range(random.choice((1, 1, 2))):
        place = random.choice(keyed)
        depth = random.choice((1, 10, 1_000, 100_000))
        values = (
            json.dumps(hostile.value(random)), "NaN", "-Infinity", "1e999", "9" * 5_000, "1" + "0" * 400,
            "[" * depth + "]" * depth, '{"a":' * depth, "[" * depth,
        )  # fmt: skip
        lines[place] = f"{lines[place].partition(': ')[0]}: {random.choice(values)},"
    return "\n".join(lines).encode()
