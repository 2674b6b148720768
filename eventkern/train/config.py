"""The trainer's settings, and the reading of configuration files. Imports no torch, so that `--help` is quick."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import sys
import tomllib
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from eventkern.plain import check_fields

Config = TypeVar("Config")


class ConfigError(ValueError):
    """A user's mistake in the configuration: one line that names the key, the value seen and the value wanted."""


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """How to train: steps, the optimizer, evaluation and the log. The keys of models and data are not the trainer's.

    Raises:
        ConfigError: a value of another type or out of its range.
    """

    epochs: int = 20
    """Passes over the training anchors."""
    batch_size: int = 32
    """Windows in a micro-batch, of each rank."""
    grad_accum: int = 1
    """Micro-batches in an optimizer step, weighted so that they equal one large batch."""
    max_steps: int | None = None
    """Optimizer steps after which training ends, even inside an epoch; None: epochs alone decide."""
    optimizer: Literal["adam", "adamw"] = "adamw"
    """adamw decouples weight decay from the gradient, adam adds it to the gradient."""
    lr: float = 1e-3
    """Highest learning rate."""
    weight_decay: float = 0.0
    """Weight decay, of matrices only (biases, norms and vectors are spared)."""
    schedule: Literal["constant", "linear", "cosine", "cosine_restarts", "plateau"] = "plateau"
    """Learning rate after the warm-up: constant; linear or cosine decay to 0 at the last step; cosine_restarts: cosine
    decay over and over; or plateau: halved when more than 3 evaluations in a row bring no lower validation loss."""
    warmup_steps: int = 0
    """Optimizer steps over which the learning rate climbs from 0 to lr; a run of fewer steps ends on the climb."""
    restart_steps: int | None = None
    """Optimizer steps of the first decay of cosine_restarts, which needs it."""
    restart_multiplier: int = 1
    """How many times as long as the one before it each further decay of cosine_restarts is."""
    clip: float = 1.0
    """Largest norm of all gradients together; 0: no clipping."""
    precision: Literal["fp32", "tf32", "bf16", "fp16", "auto"] = "auto"
    """Weights are float32 always. tf32: CUDA's matrix products of float32 with fewer bits; bf16 and fp16: autocast,
    fp16 with a loss scale; auto: bf16 on a CUDA device that has it, else fp32."""
    compile: Literal["auto", "on", "reduce-overhead", "off"] = "auto"
    """torch.compile of the model, with reduce-overhead as CUDA graphs; auto: on for CUDA, off elsewhere."""
    sharding: Literal["none", "fully_shard"] = "none"
    """Under torchrun: every rank holds the whole model (DistributedDataParallel), or a share of it (fully_shard)."""
    find_unused_parameters: bool = False
    """Under torchrun, with sharding none: a parameter may take part in some batches or on some ranks only, which costs
    a walk through the graph of each step; else every step must give gradients to the same ones."""
    max_skipped_steps: int = 10
    """Steps in a row that may be skipped because a loss or a gradient is not finite; so many end the run."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: cuda, else mps, else cpu."""
    seed: int = 0
    """Seed of the weights, of dropout and of the order of the training data."""
    evaluate_every: int | None = None
    """Optimizer steps between evaluations; None: at the end of each epoch. A run also ends with one."""
    early_stopping: int | None = None
    """Evaluations in a row without a lower validation loss after which training ends; None: epochs and max_steps do."""
    save_every: int | None = None
    """Optimizer steps between checkpoints beside those that every evaluation writes; None: only those."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept, beside the best; 2 leave one to go on from where the last is damaged."""
    log_every: int = 50
    """Optimizer steps between logged steps; evaluated and saved steps are logged too."""
    logger: Literal["none", "wandb"] = "none"
    """Where the numbers go beside the run folder: wandb is Weights & Biases ($WANDB_MODE=offline needs no account)."""
    histograms: bool = False
    """Histograms of weights and gradients at every evaluation; gradients then stay in memory until the next step."""

    def __post_init__(self) -> None:
        try:
            check_fields(self)
        except TypeError as error:
            raise ConfigError(str(error)) from None
        for key in ("epochs", "batch_size", "grad_accum", "log_every", "keep_checkpoints", "max_skipped_steps"):
            require(self, key, getattr(self, key) >= 1, "at least 1")
        for key in ("max_steps", "evaluate_every", "early_stopping", "save_every"):
            value = getattr(self, key)
            require(self, key, value is None or value >= 1, "at least 1, or None")
        if self.schedule == "cosine_restarts":
            is_length = self.restart_steps is not None and self.restart_steps >= 1
            require(self, "restart_steps", is_length, "at least 1 for the schedule cosine_restarts")
            require(self, "restart_multiplier", self.restart_multiplier >= 1, "at least 1")
        else:
            require(self, "restart_steps", self.restart_steps is None, "None unless schedule is cosine_restarts")
            require(self, "restart_multiplier", self.restart_multiplier == 1, "1 unless schedule is cosine_restarts")
        require(self, "warmup_steps", self.warmup_steps >= 0, "at least 0")
        require(self, "seed", 0 <= self.seed < 2**63, "at least 0 and below 2^63")
        for key in ("weight_decay", "clip"):
            value = getattr(self, key)
            require(self, key, math.isfinite(value) and value >= 0, "finite and at least 0")
        require(self, "lr", math.isfinite(self.lr) and self.lr > 0, "finite and above 0")
        for key, hint in get_type_hints(TrainerConfig).items():
            if get_origin(hint) is Literal:
                require(self, key, getattr(self, key) in get_args(hint), " | ".join(get_args(hint)))


def require(config: object, key: str, holds: bool, wanted: str) -> None:
    """Raises a ConfigError that names key, the value seen and the value wanted, unless `holds`."""
    if not holds:
        raise ConfigError(f"{key} is {getattr(config, key)!r}, but must be {wanted}")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A question that names the closest of the known names; nothing where none is close."""
    closest = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {closest[0]}?" if closest else ""


def read_config(path: Path, config_class: type[Config]) -> Config:
    """Reads a dataclass from a .toml or .json file; keys that the file leaves out keep their defaults.

    Raises:
        FileNotFoundError: no such file.
        ConfigError: a file that does not parse, an unknown key (with the closest known one), a wrong type or range.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such configuration file")
    try:
        text = path.read_text(encoding="utf-8-sig")
        values = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # of json, tomllib and the UTF-8 decoder; nested too deep
        raise ConfigError(f"{path}: not valid {'JSON' if path.suffix == '.json' else 'TOML'}: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: holds a {type(values).__name__}, but must hold keys and values")
    try:
        return from_mapping(config_class, values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def from_mapping(config_class: type[Config], values: Mapping[str, Any], prefix: str = "") -> Config:
    """Builds a (nested) dataclass from plain values, with types checked."""
    hints = get_type_hints(config_class)
    arguments = {}
    for key, value in values.items():
        if key not in hints:
            (closest,) = difflib.get_close_matches(prefix + key, known_keys(config_class, prefix), n=1, cutoff=0.0)
            raise ConfigError(f"unknown key {prefix + key!r}; the closest known key is {closest!r}")
        arguments[key] = _convert(value, hints[key], prefix + key)
    return config_class(**arguments)


def known_keys(config_class: type, prefix: str = "") -> list[str]:
    """The keys of a dataclass and, with their table's name, of those inside it."""
    keys = []
    for key, hint in get_type_hints(config_class).items():
        keys += known_keys(hint, f"{prefix}{key}.") if _is_table(hint) else [prefix + key]
    return keys


def _is_table(hint: Any) -> bool:
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


def _convert(value: Any, hint: Any, key: str) -> Any:
    if _is_table(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{key} is {value!r}, but must be a table of keys")
        return from_mapping(hint, value, key + ".")
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise ConfigError(f"{key} is {value!r}, but must be {' | '.join(map(str, get_args(hint)))}")
        return value
    if get_origin(hint) in (Union, types.UnionType):
        if value is None:
            return None
        (hint,) = (option for option in get_args(hint) if option is not type(None))
    if hint is float and type(value) is int and abs(value) <= sys.float_info.max:
        return float(value)
    if hint is Path and type(value) is str:
        return Path(value)
    if type(value) is not hint:  # type(), since a bool is an int to isinstance
        raise ConfigError(f"{key} is {value!r}, but must be of type {hint.__name__}")
    return value


def to_mapping(config: Any) -> dict[str, Any]:
    """The dataclass as plain values, without the keys that are None (TOML has no null)."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            values[field.name] = to_mapping(value)
        elif value is not None:
            values[field.name] = str(value) if isinstance(value, Path) else value
    return values
