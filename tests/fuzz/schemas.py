"""Schema files: a mutated one is refused in one line that names it, or is a schema that serves a table."""

import datetime
import json
from pathlib import Path
from random import Random

import hostile

from eventkern.data.prepare import prepare
from eventkern.data.schema import SHIPPED, DataError, Schema
from eventkern.data.store import EventStore

VISITS = """name = "visits"
timestamp = "at"
timezone = "UTC"
key = "who"
split = 2024-01-01T12:00:00
uniform_sizes = false
streams = [{ name = "mine", entity = "who" }, { name = "all", entity = "all" }]

[[categories]]
name = "who"
kind = "id"

[[categories]]
name = "paid"
kind = "flag"
column = "paid"

[[categories]]
name = "price"
kind = "bins"
bins = 4

[[categories]]
name = "hour"
kind = "time"
column = "at"
field = "hour"

[[categories]]
name = "pause"
kind = "elapsed"
unit = "minutes"
limit = 3
"""
TABLE = "at,who,paid,price\n" + "".join(
    f"2024-01-01T{hour:02}:{7 * hour % 60:02}:00,k{hour % 3},{hour % 2},{hour}.5\n" for hour in range(24)
)


def run(random: Random, folder: Path) -> str:
    file = folder / "schema.toml"
    is_small = random.random() < 0.7
    text = VISITS if is_small else random.choice(sorted(SHIPPED.glob("*.toml"))).read_text()
    file.write_bytes(mutated(random, text))
    schema = hostile.outcome(lambda: Schema.load(file), (DataError,))
    if isinstance(schema, Exception):
        assert str(schema).startswith(f"{file}: "), schema
        assert "\n" not in str(schema), schema
        return f"schemas: {hostile.told(schema)}"
    assert Schema.from_dict(schema.to_dict()) == schema
    assert Schema.from_dict(json.loads(json.dumps(schema.to_dict()))) == schema
    assert isinstance(schema.split_ns, int)
    if not is_small or random.random() < 0.7:
        return "schemas: right"
    table, out = folder / "table.csv", folder / "store"
    table.write_text(TABLE)
    prepared = hostile.outcome(lambda: prepare(table, schema, out, overwrite=True), (DataError,))
    if isinstance(prepared, Exception):
        assert "\n" not in str(prepared), prepared
        return f"schemas: prepare {hostile.told(prepared)}"
    assert EventStore.open(out, verify=True).schema == schema
    return "schemas: prepare right"


def mutated(random: Random, text: str) -> bytes:
    for _ in range(random.choice((1, 1, 2, 3))):
        lines = text.splitlines()
        place = random.randrange(len(lines)) if lines else 0
        kind = random.randrange(8)
        if kind == 0 and lines:
            del lines[place]
        elif kind == 1 and lines:
            lines.insert(random.randrange(len(lines)), lines[place])
        elif kind == 2 and lines:
            other = random.randrange(len(lines))
            lines[place], lines[other] = lines[other], lines[place]
        elif kind in (3, 4, 5):
            keyed = [number for number, line in enumerate(lines) if "=" in line]
            if keyed:
                place = random.choice(keyed)
                lines[place] = f"{lines[place].partition('=')[0]}= {written(random)}"
        elif kind == 6:
            lines.insert(place, random.choice(("x = 1", "a.b = 1", '"" = 1', "bins = 1", "[x]", "[[streams]]", "x")))
        else:
            return hostile.flipped(random, text.encode())
        text = "\n".join(lines) + "\n"
    content = text.encode()
    if random.random() < 0.1:
        content = random.choice((b"\xef\xbb\xbf", b"\xff\xfe", b"\0", b"")) + content
    return content if random.random() < 0.8 else hostile.flipped(random, content)


def written(random: Random) -> str:
    """A value of TOML."""
    moment = datetime.datetime(random.choice((1, 2024, 9999)), random.randint(1, 12), 1, random.randrange(24))
    depth = random.choice((1, 10, 1_000, 100_000))
    kinds = (
        lambda: str(hostile.integer(random)),
        lambda: random.choice(("0.0", "-0.0", "1e400", "nan", "inf", "-inf", "1e-5", "5.0")),
        lambda: json.dumps(random.choice([text for text in hostile.TEXTS if text != "\ud800"])),
        lambda: random.choice(("true", "false", "[]", "{}", "[[]]", "{ a = 1 }", "''", '"""\n"""', "", "[1, 'x']")),
        lambda: random.choice((moment.isoformat(), moment.date().isoformat(), moment.time().isoformat())),
        lambda: moment.isoformat() + random.choice(("Z", "+14:00", "-23:59")),
        lambda: json.dumps(random.choice(("who", "id", "bins", "time", "elapsed", "flag", "year", "days", "all"))),
        lambda: json.dumps(random.choice(("America", "America/", "Europe/Berlin", "../UTC", "UTC\0", "x" * 300, "."))),
        lambda: json.dumps(f"{random.choice((1, 1677, 2262, 9999)):04}-12-31T23:59:59+00:00"),
        lambda: "9" * random.choice((19, 20, 4_301, 10_000)),
        lambda: "[" * depth + "]" * depth,
        lambda: "{ a = " * depth + "1" + "}" * depth,
        lambda: "[" * depth,
    )
    return random.choice(kinds)()
