"""What the command line and a configuration file can say, and the reading of both. Imports no torch."""

from __future__ import annotations

import contextlib
import difflib
import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from eventkern.train.config import ConfigError, TrainerConfig, did_you_mean, known_keys, read_config, require

try:
    import tyro
    from tyro.conf import Positional, arg
except ModuleNotFoundError as error:
    raise SystemExit(f"eventkern: the command line needs {error.name}: pip install 'eventkern[train]'") from None

CONFIGS = Path(__file__).parents[1] / "configs"
POSITIONAL = ("source", "config", "checkpoint")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which events."""

    store: str = "synthetic"
    """Folder of a store, or flights | synthetic: prepared on first use into a cache folder ($EVENTKERN_CACHE)."""
    window: int | None = None
    """Windows of events that are shuffled together, for stores larger than memory; None: all."""
    prefetch: int = 2
    """Batches gathered ahead of the trainer; 0: none."""
    resident: bool = False
    """Keep the store on the CUDA device and gather there."""

    def __post_init__(self) -> None:
        require(self, "window", self.window is None or self.window >= 1, "at least 1, or None")
        require(self, "prefetch", self.prefetch >= 0, "at least 0")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes of the event transformer."""

    d_model: int = 64
    """Width, a multiple of num_heads."""
    num_heads: int = 8
    """Attention heads."""
    encoder_layers: int = 1
    """Layers of each stream's encoder."""
    decoder_layers: int = 1
    """Layers of the decoder."""
    positions: Literal["learned", "sinusoidal"] = "learned"
    """Kind of position embedding."""
    checkpoint_blocks: bool = False
    """Keep only the inputs of encoder and decoder layers and compute the rest again in the backward: less memory."""


@dataclass(frozen=True, kw_only=True)
class RunConfig(TrainerConfig):
    """Everything a configuration file can say."""

    src_seq_len: int = 20
    """Events of each stream before the anchor."""
    tgt_seq_len: int = 20
    """Events predicted after the anchor."""
    id_category_size: int = 1000
    """Classes of an id category, padding and missing included; rarer values read as missing."""
    dropout: float = 0.0
    """Probability of dropout in the model."""
    folds: int | None = None
    """Folds of the keys (by a hash, so that a key stays in its fold); None: the store's split in time."""
    fold: int | None = None
    """The fold, from 0, whose keys validate over all time, while the other keys train over all time."""
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("src_seq_len", "tgt_seq_len"):
            require(self, key, getattr(self, key) >= 1, "at least 1")
        require(self, "id_category_size", self.id_category_size >= 2, "at least 2: it counts padding and missing")
        require(self, "dropout", 0 <= self.dropout < 1, "in [0, 1)")
        for key in ("d_model", "num_heads", "encoder_layers", "decoder_layers"):
            require(self.model, key, getattr(self.model, key) >= 1, "at least 1")
        require(self, "folds", self.folds is None or self.folds >= 2, "at least 2, or None")
        if self.folds is None:
            require(self, "fold", self.fold is None, "None unless folds is given")
        else:
            is_one = self.fold is not None and 0 <= self.fold < self.folds
            require(self, "fold", is_one, f"in [0, {self.folds}), as folds is {self.folds}")
        heads = self.model.num_heads
        require(self.model, "d_model", self.model.d_model % heads == 0, f"a multiple of num_heads = {heads}")


@dataclass(frozen=True, kw_only=True)
class Prepare:
    """Convert a table of events into a store."""

    source: Positional[Annotated[str, arg(metavar="SOURCE")]]
    """A CSV or Parquet file, a folder of them, or flights | synthetic."""
    out: Path
    """Folder of the store."""
    schema: str | None = None
    """A schema file, else the name of one that ships; flights and synthetic have their own."""
    like: str | None = None
    """A store whose schema and classes are taken, so that a checkpoint of it can be evaluated on the new one."""
    on_error: Literal["raise", "skip"] = "raise"
    """At a row that cannot be read: stop, or leave it out, count it and list it."""
    overwrite: bool = False
    """Replace a store that is already there."""


@dataclass(frozen=True, kw_only=True)
class Train(RunConfig):
    """Train a model; any key of the configuration can be given on the command line."""

    config: Positional[Annotated[str, arg(metavar="CONFIG")]]
    """A .toml or .json file, else the name of one that ships (flights, cpu_baseline, gpu_optimized)."""
    run_dir: Path | None = None
    """Folder of the run; default: runs/<time>-<name of the configuration>."""
    resume: str | None = None
    """auto: the last checkpoint of run_dir, else of the newest run of this configuration, else a fresh start; or the
    path of a checkpoint or of a run folder."""


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Print the loss ledger of a checkpoint, and how good its probabilities are."""

    checkpoint: Positional[Annotated[Path, arg(metavar="CHECKPOINT")]]
    """A checkpoint, or a run folder (its best checkpoint)."""
    store: str | None = None
    """Folder of a store, or flights | synthetic; default: the store it was trained on."""
    batch_size: int = 64
    """Windows in a batch."""
    top_k: tuple[int, ...] = (1, 5, 10)
    """A guess may name so many classes."""
    out: Path | None = None
    """Folder to write evaluation.json and evaluation.png into; default: the tables are printed, and nothing written."""
    quantize: Literal["none", "int8"] = "none"
    """int8: of the model with its weights as 8-bit integers, and what they cost against its own."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: cuda, else mps, else cpu."""

    def __post_init__(self) -> None:
        require(self, "batch_size", self.batch_size >= 1, "at least 1")
        require(self, "top_k", min(self.top_k, default=0) >= 1, "one number or more, each at least 1")


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Generate the next events of sequences, decoded back to values and times."""

    checkpoint: Positional[Annotated[Path, arg(metavar="CHECKPOINT")]]
    """A checkpoint, or a run folder (its best checkpoint)."""
    store: str | None = None
    """Folder of a store, or flights | synthetic; default: the store it was trained on."""
    key: tuple[str, ...] = ()
    """Keys whose next events follow their last ones in the store, one or more; default: all."""
    events: int = 50
    """Events of each key."""
    temperature: float = 1.0
    """Below 1 likely classes become likelier, above 1 rarer ones; 0: the likeliest class always."""
    top_k: int | None = None
    """Classes of a category that can be drawn, the likeliest; None: all."""
    missing: bool = True
    """Whether a value may be missing, as those of a flight that was cancelled; unknown values read missing too."""
    seed: int = 0
    """With a key it decides what is drawn, whatever other keys there are."""
    out: Path | None = None
    """A .csv or .parquet file to write; default: the events are printed."""
    batch_size: int = 64
    """Keys that are generated together."""
    quantize: Literal["none", "int8"] = "none"
    """int8: by the model with its weights as 8-bit integers."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: cuda, else mps, else cpu."""

    def __post_init__(self) -> None:
        for key in ("events", "batch_size"):
            require(self, key, getattr(self, key) >= 1, "at least 1")
        require(self, "temperature", 0 <= self.temperature < float("inf"), "a finite number of at least 0")
        require(self, "top_k", self.top_k is None or self.top_k >= 1, "at least 1, or None")
        if self.out is not None and self.out.suffix not in (".csv", ".parquet"):
            raise ConfigError(f"out is {self.out}, but must be a .csv or .parquet file")
        for key in self.key:
            if self.key.count(key) > 1:
                raise ConfigError(f"key names {key!r} twice; keys must differ")


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write a checkpoint's inference path as a program that torch runs alone (torch.export)."""

    checkpoint: Positional[Annotated[Path, arg(metavar="CHECKPOINT")]]
    """A checkpoint, or a run folder (its best checkpoint)."""
    out: Path
    """The .pt2 file to write."""
    quantize: Literal["none", "int8"] = "none"
    """int8: with the weights as 8-bit integers."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "cpu"
    """Where the program will run; auto: cuda, else mps, else cpu."""

    def __post_init__(self) -> None:
        if self.out.suffix != ".pt2":
            raise ConfigError(f"out is {self.out}, but must be a .pt2 file")


@dataclass(frozen=True, kw_only=True)
class Info:
    """Print versions, devices, which kernel serves which op, and what this machine reaches."""


Command = Prepare | Train | Evaluate | Generate | Export | Info
COMMANDS = {kind.__name__.lower(): kind for kind in (Prepare, Train, Evaluate, Generate, Export, Info)}


def parse(arguments: list[str]) -> Command:
    """Reads the command line; the keys that `train` leaves out come from its configuration file.

    `--log` is short for `--logger`; torchrun would take it for a beginning of its own `--log-dir`.

    Raises:
        ConfigError: an unknown option, a value that does not fit, or a configuration that cannot be read.
    """
    for name in arguments[:1]:
        meant = did_you_mean(name, [*COMMANDS, "--help"])
        if name not in (*COMMANDS, "--help", "-h") and meant:
            raise ConfigError(f"unknown command {name!r}{meant} Expected one of {{{', '.join(COMMANDS)}}}")
    if arguments[:1] != ["train"] or {"-h", "--help"} & set(arguments[1:2]):
        return _parse(Command, arguments)
    if len(arguments) == 1 or arguments[1].startswith("-"):
        raise ConfigError("train takes CONFIG as its first argument: eventkern train CONFIG [--key value ...]")
    arguments = [re.sub(r"^--log(?==|$)", "--logger", argument) for argument in arguments]
    config = load_config(arguments[1])
    defaults = tyro.conf.subcommand("train", default=Train(config=arguments[1], **vars(config)))
    return _parse(Prepare | Annotated[Train, defaults] | Evaluate | Generate | Export | Info, arguments)


def _parse(commands: Any, arguments: list[str]) -> Command:
    told = io.StringIO()
    options: Any = {"prog": "eventkern", "config": (tyro.conf.OmitSubcommandPrefixes,)}
    try:
        with contextlib.redirect_stderr(told):
            command, unknown = tyro.cli(commands, args=arguments, return_unknown_args=True, **options)
    except SystemExit as leave:
        if not leave.code:
            raise
        if arguments[:1] and arguments[0] in COMMANDS:  # that an option is missing comes of its being misspelt
            known = _options(COMMANDS[arguments[0]])
            given = [argument.partition("=")[0].replace("_", "-") for argument in arguments if argument[:2] == "--"]
            unknown = [option for option in given if re.sub(r"(^--|\.)no-", r"\1", option) not in known]
            if unknown and did_you_mean(unknown[0], known):
                raise ConfigError(_unknown(unknown[0], known)) from None
        raise ConfigError(_one_line(told.getvalue())) from None
    if unknown:
        raise ConfigError(_unknown(unknown[0], _options(type(command))))
    return cast(Command, command)


def _options(command: type) -> list[str]:
    """The options of a command."""
    return ["--help", *("--" + key.replace("_", "-") for key in known_keys(command) if key not in POSITIONAL)]


def _unknown(option: str, known: list[str]) -> str:
    closest = difflib.get_close_matches(option, known, n=1)
    mend = f"; the closest known option is {closest[0]}" if closest else ""
    return f"unknown argument {option!r}{mend}"


def _one_line(box: str) -> str:
    """What tyro's box says, without its frame, its title and the help below."""
    parts: list[list[str]] = [[]]
    for line in (line.strip("│ ") for line in box.splitlines()):
        if line.startswith(("╭", "╰")) or set(line) in ({"─"}, {"-"}):  # dashes where the terminal has no frames
            parts.append([])
        elif line:
            parts[-1].append(line)
    message = " ".join(parts[1] if len(parts) > 1 else parts[0])
    return re.sub(r"^Error parsing [A-Z]\w+: ", "", message)


def load_config(name: str | Path) -> RunConfig:
    """Reads a configuration: the path of a file, else the name of one that ships, with or without its extension.

    Raises:
        ConfigError: no such file or name, an unknown key, a wrong type or range; it names the file and the key.
    """
    candidates = [Path(name), *(CONFIGS / f"{name}{suffix}" for suffix in ("", ".toml", ".json"))]
    for path in candidates:
        if path.is_file():
            return read_config(path, RunConfig)
    names = sorted(path.name for path in CONFIGS.iterdir())
    meant = did_you_mean(str(name), [*(Path(known).stem for known in names), *names])
    mend = f"{meant} Else give" if meant else "; give"
    raise ConfigError(f"{name}: no such configuration file{mend} the path of one, or one of: {', '.join(names)}")
