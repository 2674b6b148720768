"""The command line: the only room that knows all the others. torch loads inside the commands."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

from eventkern.train.config import ConfigError, TrainerConfig, known_keys, read_config, require, to_mapping
from eventkern.train.failures import OtherRankError, RunFailure
from eventkern.train.termination import Terminated, terminable

try:
    import tyro
    from tyro.conf import Positional, arg
except ModuleNotFoundError as error:
    raise SystemExit(f"eventkern: the command line needs {error.name}: pip install 'eventkern[train]'") from None

if TYPE_CHECKING:
    from eventkern.data import EventStore, Fold
    from eventkern.models import EventTransformerConfig
    from eventkern.train import Ledger
    from eventkern.train.distributed import Ranks

CONFIGS = Path(__file__).parent / "configs"
POSITIONAL = ("source", "config", "checkpoint")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which events."""

    store: str = "synthetic"
    """Folder of a store, or flights | synthetic: prepared on first use into a cache folder ($EVENTKERN_CACHE)."""


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
    """Print the loss ledger of a checkpoint."""

    checkpoint: Positional[Annotated[Path, arg(metavar="CHECKPOINT")]]
    """A checkpoint, or a run folder (its best checkpoint)."""
    store: str | None = None
    """Folder of a store, or flights | synthetic; default: the store it was trained on."""
    batch_size: int = 64
    """Windows in a batch."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: cuda, else mps, else cpu."""

    def __post_init__(self) -> None:
        require(self, "batch_size", self.batch_size >= 1, "at least 1")


@dataclass(frozen=True, kw_only=True)
class Info:
    """Print versions, devices, which kernel serves which op, and what this machine reaches."""


Command = Prepare | Train | Evaluate | Info


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code: 0, 2 for a user's mistake, 1 for a failure, 130 or 143 when stopped."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        command = parse(arguments)
        with terminable():
            match command:
                case Prepare():
                    prepare(command)
                case Train():
                    train(command)
                case Evaluate():
                    evaluate(command)
                case Info():
                    info()
        return 0
    except (ValueError, OSError, FloatingPointError, RuntimeError) as error:
        is_mistake = isinstance(error, (ConfigError, *_user_errors()))
        is_explained = is_mistake or isinstance(error, (OSError, FloatingPointError, RunFailure))
        if not is_explained:
            raise  # of our own making: the traceback is wanted
        rank = f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""
        print(f"eventkern: {rank}{error}{_way_on(error, arguments)}", file=sys.stderr)
        return 2 if is_mistake else 1
    except OtherRankError:
        return 1  # the rank that failed tells why
    except Terminated:
        print("eventkern: terminated", file=sys.stderr)
        return 143
    except KeyboardInterrupt:
        print("eventkern: interrupted", file=sys.stderr)
        return 130


def _user_errors() -> tuple[type[Exception], ...]:
    from eventkern.data import DataError
    from eventkern.train import CheckpointError

    return DataError, CheckpointError, FileNotFoundError


def _way_on(error: Exception, arguments: Sequence[str]) -> str:
    """After a damaged checkpoint: the same command from the newest one that verifies, where there is one."""
    from eventkern.train.checkpoint import DamagedCheckpointError

    if not isinstance(error, DamagedCheckpointError) or error.whole is None or arguments[0] != "train":
        return ""
    kept = [
        argument
        for before, argument in zip(["", *arguments], arguments, strict=False)
        if "--resume" not in (before, argument) and not argument.startswith("--resume=")
    ]
    return f"; to go on from it: {shlex.join(['eventkern', *kept, '--resume', str(error.whole)])}"


def parse(arguments: list[str]) -> Command:
    """Reads the command line; the keys that `train` leaves out come from its configuration file.

    Raises:
        ConfigError: an unknown option, a value that does not fit, or a configuration that cannot be read.
    """
    if arguments[:1] != ["train"] or {"-h", "--help"} & set(arguments[1:2]):
        return _parse(Command, arguments)
    if len(arguments) == 1 or arguments[1].startswith("-"):
        raise ConfigError("train takes CONFIG as its first argument: eventkern train CONFIG [--key value ...]")
    config = load_config(arguments[1])
    defaults = tyro.conf.subcommand("train", default=Train(config=arguments[1], **vars(config)))
    return _parse(Prepare | Annotated[Train, defaults] | Evaluate | Info, arguments)


def _parse(commands: Any, arguments: list[str]) -> Command:
    told = io.StringIO()
    options: Any = {"prog": "eventkern", "config": (tyro.conf.OmitSubcommandPrefixes,)}
    try:
        with contextlib.redirect_stderr(told):
            command, unknown = tyro.cli(commands, args=arguments, return_unknown_args=True, **options)
    except SystemExit as leave:
        if not leave.code:
            raise
        raise ConfigError(_one_line(told.getvalue())) from None
    if unknown:
        known = ["--" + key.replace("_", "-") for key in known_keys(type(command)) if key not in POSITIONAL]
        closest = difflib.get_close_matches(unknown[0], known, n=1)
        mend = f"; the closest known option is {closest[0]}" if closest else ""
        raise ConfigError(f"unknown argument {unknown[0]!r}{mend}")
    return cast(Command, command)


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
    names = ", ".join(sorted(path.name for path in CONFIGS.iterdir()))
    raise ConfigError(f"{name}: no such configuration file; give the path of one, or one of: {names}")


def prepare(command: Prepare) -> None:
    """`eventkern prepare`: prints what it did."""
    import rich

    from eventkern.data.shipped import prepare_source
    from eventkern.train.run_folder import require_folder

    if not command.out.is_file():  # a file there is named by the data room
        require_folder(command.out, "--out")
    options = {"on_error": command.on_error, "overwrite": command.overwrite}
    rich.print(prepare_source(command.source, command.schema, command.out, **options))


def train(command: Train) -> None:
    """`eventkern train`, in a process of its own or in those that torchrun has started."""
    from eventkern.train.distributed import join
    from eventkern.train.failures import explained

    config = RunConfig(**{field.name: getattr(command, field.name) for field in dataclasses.fields(RunConfig)})
    with explained(config, is_alone="RANK" not in os.environ), join(config.device) as ranks:
        train_together(command, config, ranks)


def train_together(command: Train, config: RunConfig, ranks: Ranks) -> None:
    """`eventkern train` among the ranks: the main one finds and locks the run's folder, and alone writes there."""
    from eventkern.data.loader import EventLoader
    from eventkern.data.shipped import TABLES, open_store
    from eventkern.models import EventTransformer
    from eventkern.train import Loaders, Trainer
    from eventkern.train.device import keep_freed_memory, seed_everything, select_precision
    from eventkern.train.environment import record_run
    from eventkern.train.lineage import refuse_other_lineage
    from eventkern.train.run_folder import find_run, locked

    keep_freed_memory()
    found = None
    with contextlib.ExitStack() as stack:
        with ranks.together():
            if ranks.is_main:
                found = find_run(Path(command.config).stem, command.run_dir, command.resume)
                stack.enter_context(locked(found[0]))
                open_store(config.data.store)  # prepared by one, if at all
        run_dir, checkpoint = ranks.gather(found)[0] or (Path(), None)
        with ranks.together():
            store = open_store(config.data.store)
            sizes = model_config(config, store)
            fold = fold_of(config)
            origin = lineage(store, sizes, fold)
            if checkpoint is not None:
                state = load_run(checkpoint)
                refuse_other_lineage(state["metadata"]["lineage"], origin, checkpoint, store.path)
            keys = ("src_seq_len", "tgt_seq_len", "id_category_size", "batch_size")
            options: dict[str, Any] = {
                "device": ranks.device,
                "fold": fold,
                **{key: getattr(config, key) for key in keys},
            }
            share: dict[str, Any] = {"rank": ranks.rank, "world_size": ranks.world_size}
            train_loader = EventLoader(store, "train", seed=config.seed, **share, **options)
            validation_loader = EventLoader(store, "validation", **options)
            seed_everything(config.seed)
            model = EventTransformer(sizes)
            ledger = build_ledger(store, config.id_category_size, fold)
        if config.data.store not in TABLES:  # an absolute path, so that config.toml continues the run from any folder
            config = dataclasses.replace(config, data=DataConfig(store=str(Path(config.data.store).absolute())))
        resumed = ["train", str(run_dir / "config.toml"), "--run-dir", str(run_dir), "--resume", "auto"]
        trainer = Trainer(
            model,
            config,
            Loaders(train_loader, validation_loader),
            run_dir=run_dir,
            ledger=ledger,
            metadata={"model": dataclasses.asdict(sizes), "run": to_mapping(config), "lineage": origin},
            resume_command=shlex.join(["eventkern", *resumed]),
            ranks=ranks,
        )
        if checkpoint is not None:
            trainer.resume(checkpoint, state)
        with ranks.together():
            if ranks.is_main:
                precision = select_precision(config.precision, ranks.device)
                facts: dict[str, Any] = {"precision": precision, "seed": config.seed, "from_step": trainer.step}
                record_run(run_dir, to_mapping(config), **facts)
                where = ranks.device if ranks.is_alone else f"{ranks.world_size} ranks on {ranks.device.type}"
                steps = f"step {trainer.step} of {trainer.total_steps}"
                print(f"run {run_dir}: {store.num_events:,} events, {where}, {steps}", flush=True)
        trainer.fit()


def load_run(path: Path) -> dict[str, Any]:
    """Loads a checkpoint that `eventkern train` wrote, whose metadata tell the model and the run's configuration."""
    from eventkern.train.checkpoint import CheckpointError, load_checkpoint

    state = load_checkpoint(path)
    if not {"model", "run", "lineage"} <= state["metadata"].keys():
        raise CheckpointError(f"{path}: names no model: it is no checkpoint of `eventkern train`; give one that is")
    return state


def model_config(config: RunConfig, store: EventStore) -> EventTransformerConfig:
    """The model that a configuration means on a store."""
    from eventkern.models import EventTransformerConfig

    return EventTransformerConfig(
        category_names=store.schema.category_names,
        category_sizes=store.sizes(config.id_category_size),
        num_streams=len(store.schema.streams),
        src_seq_len=config.src_seq_len,
        tgt_seq_len=config.tgt_seq_len,
        dropout=config.dropout,
        **dataclasses.asdict(config.model),
    )


def fold_of(config: RunConfig) -> Fold | None:
    """The fold that a configuration means; None: the store's split in time."""
    from eventkern.data import Fold

    return None if config.folds is None or config.fold is None else Fold(config.fold, config.folds)


def build_ledger(store: EventStore, id_category_size: int, fold: Fold | None) -> Ledger:
    """The ledger with the baselines of a store, or of a fold of its keys."""
    from eventkern.data.baselines import baselines
    from eventkern.train import Ledger

    table = baselines(store, id_category_size, fold)
    note = fold.note(store.schema.key) if fold else None
    return Ledger(table.names, table.classes, table.marginal, table.first_order, table.floor, note=note)


def lineage(store: EventStore, sizes: EventTransformerConfig, fold: Fold | None) -> dict[str, Any]:
    """What the model's categories and streams mean on a store, and what it trains on, as plain values."""
    from eventkern.train.lineage import digest

    schema = store.schema
    categories = {}
    for category, size, told in zip(schema.categories, sizes.category_sizes, store.info["categories"], strict=True):
        meaning = [category.kind, category.field, category.unit, told["values"][: size - 2], told.get("edges")]
        zone = schema.timezone if category.kind == "time" else None
        categories[category.name] = {"classes": size, "meaning": digest([*meaning, zone])}
    streams = {stream.name: stream.entity or "all" for stream in schema.streams}
    held_out = dataclasses.asdict(fold) if fold else None
    return {"categories": categories, "streams": streams, "key": schema.key, "fold": held_out}


def evaluate(command: Evaluate) -> None:
    """`eventkern evaluate`."""
    from eventkern.data.loader import EventLoader
    from eventkern.data.shipped import open_store
    from eventkern.models import EventTransformer
    from eventkern.train import evaluation
    from eventkern.train.checkpoint import load_weights
    from eventkern.train.config import from_mapping
    from eventkern.train.device import has_precision, select_device, select_precision
    from eventkern.train.lineage import refuse_other_lineage
    from eventkern.train.logging import print_ledger

    is_run = (command.checkpoint / "checkpoints").is_dir()
    path = command.checkpoint / "checkpoints" / "best" if is_run else command.checkpoint
    device = select_device(command.device)
    state = load_run(path)
    config = from_mapping(RunConfig, state["metadata"]["run"])
    store = open_store(command.store or config.data.store)
    sizes = model_config(config, store)
    fold = fold_of(config)
    refuse_other_lineage(state["metadata"]["lineage"], lineage(store, sizes, fold), path, store.path)
    model = EventTransformer(sizes)
    load_weights(model, state["model"], path)
    options = {key: getattr(config, key) for key in ("src_seq_len", "tgt_seq_len", "id_category_size")}
    loader = EventLoader(store, "validation", batch_size=command.batch_size, device=device, fold=fold, **options)
    wanted = config.precision if has_precision(config.precision, device) else "auto"  # trained on another device
    precision = select_precision(wanted, device)
    means = evaluation.evaluate(model.to(device), loader, precision=precision, device=device)
    ledger = build_ledger(store, config.id_category_size, fold)
    ledger.update(state["step"], means["loss"].numpy(), means["top1"].numpy())
    print_ledger(ledger)


def info() -> None:
    """`eventkern info`."""
    import torch

    from eventkern import _C, hardware, ops
    from eventkern.train.environment import environment

    for name, value in environment().items():
        print(f"{name:28}{value}")
    built = "C++ and CUDA" if _C.has_cuda else "C++ without CUDA: rebuild it where nvcc is found"
    print(f"{'eventkern._C':28}{built}")
    kinds = ["cpu", *(["cuda"] if torch.cuda.is_available() else []), *(["mps"] if torch.mps.is_available() else [])]
    print(f"\n{'kernels':28}" + "".join(f"{kind:12}" for kind in kinds))
    data = {"cpu": "C++", "cuda": "CUDA" if _C.has_cuda else "C++ on cpu", "mps": "C++ on cpu"}
    for op, served in {**ops.implementations(), "permutation": data, "window gather": data}.items():
        print(f"{op:28}" + "".join(f"{served[kind]:12}" for kind in kinds))
    print(f"\n{'reach':28}{'copy GB/s':12}{'float32 GFLOP/s':18}bfloat16 GFLOP/s")
    for kind in kinds:
        copy = hardware.copy_bandwidth(kind) / 1e9
        rates = [hardware.gemm_rate(kind, dtype) / 1e9 for dtype in (torch.float32, torch.bfloat16)]
        print(f"{kind:28}{copy:<12,.1f}{rates[0]:<18,.0f}{rates[1]:,.0f}")
