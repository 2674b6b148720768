"""Stores of the tables that eventkern makes itself, prepared once into a cache folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from eventkern.data import DataError, Schema, flights, shipped


@pytest.fixture
def few_flights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every 100th flight, so that preparing is quick."""
    whole = flights._read_package()
    monkeypatch.setattr(flights, "_read_package", lambda: whole.take(list(range(0, whole.num_rows, 100))))


@pytest.mark.usefixtures("few_flights")
def test_flights_are_prepared_on_first_use_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EVENTKERN_CACHE", str(tmp_path / "cache"))
    store = shipped.open_store("flights")
    (folder,) = (tmp_path / "cache").iterdir()  # no table, no temporary folder is left
    assert folder == store.path
    assert folder.name.startswith("flights-format1-")
    assert store.num_events == 3368
    assert store.schema.name == "flights"
    assert store.info["source"] == "flights"
    assert capsys.readouterr().out == f"preparing flights in {folder}, once\n"
    assert shipped.open_store("flights").num_events == 3368
    assert shipped.open_store(folder).num_events == 3368
    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("few_flights")
def test_another_schema_is_another_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVENTKERN_CACHE", str(tmp_path / "cache"))
    first = shipped.open_store("flights").path
    schema = (Path(shipped.__file__).parents[1] / "schemas/flights.toml").read_text()
    (tmp_path / "flights.toml").write_text(schema.replace("2013-11-01", "2013-10-01"))
    monkeypatch.setitem(shipped.TABLES, "flights", str(tmp_path / "flights.toml"))
    assert shipped.open_store("flights").path != first


@pytest.mark.usefixtures("few_flights")
def test_a_failure_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    schema = replace(Schema.load("flights"), split="2030-01-01")
    with pytest.raises(DataError, match="every event lies before the split"):
        shipped.prepare_source("flights", schema, tmp_path / "new" / "deep" / "store")
    assert list(tmp_path.iterdir()) == []


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("EVENTKERN_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert shipped.cache_folder() == Path("/home/someone/.cache/eventkern")
    monkeypatch.setenv("XDG_CACHE_HOME", "/scratch")
    assert shipped.cache_folder() == Path("/scratch/eventkern")
    monkeypatch.setenv("EVENTKERN_CACHE", "/mine")
    assert shipped.cache_folder() == Path("/mine")


def test_a_table_of_ones_own_needs_a_schema(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"visits\.csv: has no schema of its own; give one: --schema FILE"):
        shipped.prepare_source("visits.csv", None, tmp_path / "store")
