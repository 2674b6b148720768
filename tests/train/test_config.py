"""Settings are checked by name, and configuration files are read strictly."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from eventkern.train import ConfigError, TrainerConfig
from eventkern.train.config import from_mapping, read_config, to_mapping


@dataclass(frozen=True)
class Inner:
    d_model: int = 64
    kind: str = "a"


@dataclass(frozen=True, kw_only=True)
class Outer(TrainerConfig):
    path: Path = Path("here")
    inner: Inner = Inner()


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("epochs", 0, "at least 1"),
        ("grad_accum", 0, "at least 1"),
        ("batch_size", -1, "at least 1"),
        ("max_steps", 0, "at least 1, or None"),
        ("early_stopping", 0, "at least 1, or None"),
        ("lr", 0.0, "finite and above 0"),
        ("lr", float("nan"), "finite and above 0"),
        ("weight_decay", -0.1, "finite and at least 0"),
        ("clip", float("inf"), "finite and at least 0"),
        ("warmup_steps", -1, "at least 0"),
        ("schedule", "warm", "constant | linear | cosine | cosine_restarts | plateau"),
        ("restart_steps", 5, "None unless schedule is cosine_restarts"),
        ("restart_multiplier", 2, "1 unless schedule is cosine_restarts"),
        ("optimizer", "sgd", "adam | adamw"),
        ("precision", "fp8", "fp32 | tf32 | bf16 | fp16 | auto"),
        ("compile", "yes", "auto | on | reduce-overhead | off"),
        ("sharding", "zero3", "none | fully_shard"),
        ("max_skipped_steps", 0, "at least 1"),
    ],
)
def test_values_out_of_range_are_named(key: str, value: Any, wanted: str) -> None:
    with pytest.raises(ConfigError) as error:
        TrainerConfig(**{key: value})
    assert str(error.value) == f"{key} is {value!r}, but must be {wanted}"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "restart_steps is None, but must be at least 1 for the schedule cosine_restarts"),
        ({"restart_steps": 0}, "restart_steps is 0, but must be at least 1 for the schedule cosine_restarts"),
        ({"restart_steps": 5, "restart_multiplier": 0}, "restart_multiplier is 0, but must be at least 1"),
    ],
)
def test_restarts_need_a_length(keys: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        TrainerConfig(schedule="cosine_restarts", **keys)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("eval_every = 1", "unknown key 'eval_every'; the closest known key is 'evaluate_every'"),
        ("d_model = 8", "unknown key 'd_model'; the closest known key is 'inner.d_model'"),
        ("bathc_size = 8", "unknown key 'bathc_size'; the closest known key is 'batch_size'"),
        ("[inner]\nd_modl = 8", "unknown key 'inner.d_modl'; the closest known key is 'inner.d_model'"),
        ("[inner]\nd_model = 8.5", "inner.d_model is 8.5, but must be of type int"),
        ("inner = 8", "inner is 8, but must be a table of keys"),
        ("epochs = true", "epochs is True, but must be of type int"),
        ("epochs = '3'", "epochs is '3', but must be of type int"),
        ("max_steps = 1.5", "max_steps is 1.5, but must be of type int"),
        ("schedule = 'warm'", "schedule is 'warm', but must be constant | linear | cosine | cosine_restarts | plateau"),
        ("grad_accum = 0", "grad_accum is 0, but must be at least 1"),
        ("epochs = ", "not valid TOML: Invalid value (at end of document)"),
    ],
)
def test_files_are_read_strictly(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        read_config(path, Outer)
    assert str(error.value) == f"{path}: {message}"


def test_json_is_read_as_strictly(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text('{"epochs": 3, "lr": 1, "max_steps": null, "inner": {"d_model": 8}}')
    config = read_config(path, Outer)
    assert (config.epochs, config.lr, config.max_steps, config.inner) == (3, 1.0, None, Inner(d_model=8))
    assert type(config.lr) is float
    for text, message in (("[1]", "holds a list"), ('{"epochs": }', "not valid JSON"), ("\xff", "not valid JSON")):
        path.write_text(text, encoding="latin-1")
        with pytest.raises(ConfigError, match=rf"mine\.json: {message}"):
            read_config(path, Outer)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.toml: no such configuration file"):
        read_config(tmp_path / "gone.toml", Outer)


def test_what_is_written_reads_back_equal(tmp_path: Path) -> None:
    config = Outer(lr=1 / 3, max_steps=None, save_every=7, seed=2**40, path=Path("a b"), inner=Inner(8, 'q"uo\\te\n'))
    path = tmp_path / "config.toml"
    path.write_text(tomli_w.dumps(to_mapping(config)))
    assert read_config(path, Outer) == config
    assert from_mapping(Outer, to_mapping(config)) == config


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("deep.toml", "epochs = " + "[" * 5_000, "deep.toml: not valid TOML: "),
        ("deep.json", '{"epochs": ' + "[" * 100_000, "deep.json: not valid JSON: "),
        ("long.toml", "epochs = " + "9" * 5_000, "long.toml: not valid TOML: Exceeds the limit"),
        ("wide.json", '{"lr": 1' + "0" * 400 + "}", "wide.json: lr is 10+, but must be of type float"),
    ],
)
def test_a_file_beyond_what_a_parser_can_hold_is_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        read_config(tmp_path / name, Outer)
    assert "\n" not in str(caught.value)
