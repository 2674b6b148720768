"""What each command does. torch loads inside."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eventkern.cli.arguments import Prepare, RunConfig, Train
from eventkern.train.config import ConfigError, to_mapping

if TYPE_CHECKING:
    import torch

    from eventkern.data import EventStore, Fold
    from eventkern.models import EventTransformer, EventTransformerConfig
    from eventkern.train import Ledger
    from eventkern.train.distributed import Ranks


def prepare(command: Prepare) -> None:
    """`eventkern prepare`: prints what it did."""
    import rich

    from eventkern.data.shipped import open_store, prepare_source
    from eventkern.train.run_folder import require_folder

    if not command.out.is_file():  # a file there is named by the data room
        require_folder(command.out, "--out")
    options: dict[str, Any] = {"on_error": command.on_error, "overwrite": command.overwrite}
    options["like"] = open_store(command.like) if command.like else None
    rich.print(prepare_source(command.source, command.schema, command.out, **options))


def train(command: Train) -> None:
    """`eventkern train`, in a process of its own or in those that torchrun has started."""
    from eventkern.data.shipped import cache_folder
    from eventkern.train.distributed import join
    from eventkern.train.failures import explained, smaller_step

    # torch's own place for what it compiled lies under /tmp, which not every machine keeps.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "compiled"))
    config = RunConfig(**{field.name: getattr(command, field.name) for field in dataclasses.fields(RunConfig)})
    with explained(smaller_step(config), is_alone="RANK" not in os.environ), join(config.device) as ranks:
        train_together(command, config, ranks)


def train_together(command: Train, config: RunConfig, ranks: Ranks) -> None:
    """`eventkern train` among the ranks: the main one finds and locks the run's folder, and alone writes there."""
    from eventkern.data.loader import EventLoader
    from eventkern.data.shipped import TABLES, open_store
    from eventkern.models import EventTransformer
    from eventkern.train import Loaders, Trainer
    from eventkern.train.device import compiles, keep_freed_memory, seed_everything, select_precision
    from eventkern.train.environment import record_run
    from eventkern.train.lineage import refuse_other_lineage
    from eventkern.train.run_folder import found_and_locked

    keep_freed_memory()
    found = None
    with contextlib.ExitStack() as stack:
        with ranks.together():
            if ranks.is_main:
                name = Path(command.config).stem
                found = stack.enter_context(found_and_locked(name, command.run_dir, command.resume))
                open_store(config.data.store)  # prepared by one, if at all
        run_dir, checkpoint = ranks.gather(found)[0] or (Path(), None)
        with ranks.together():
            if config.data.resident and ranks.device.type != "cuda":
                raise ConfigError(f"data.resident is True, but must be False on device {ranks.device}")
            store = open_store(config.data.store)
            sizes = model_config(config, store)
            fold = fold_of(config)
            origin = lineage(store, sizes, fold)
            if checkpoint is not None:
                state = load_run(checkpoint)
                refuse_other_lineage(state["metadata"]["lineage"], origin, checkpoint, store.path)
            keys = ("src_seq_len", "tgt_seq_len", "id_category_size", "batch_size")
            options: dict[str, Any] = {key: getattr(config, key) for key in keys}
            options |= {"device": ranks.device, "fold": fold}
            options |= {key: getattr(config.data, key) for key in ("prefetch", "resident")}
            share: dict[str, Any] = {"rank": ranks.rank, "world_size": ranks.world_size, "window": config.data.window}
            share["pad_last"] = compiles(config.compile, ranks.device)
            train_loader = EventLoader(store, "train", seed=config.seed, **share, **options)
            validation_loader = EventLoader(store, "validation", **options)
            seed_everything(config.seed)
            model = EventTransformer(sizes)
            ledger = build_ledger(store, config.id_category_size, fold)
        if config.data.store not in TABLES:  # an absolute path, so that config.toml continues the run from any folder
            absolute = dataclasses.replace(config.data, store=str(Path(config.data.store).absolute()))
            config = dataclasses.replace(config, data=absolute)
        resumed = ["train", str(run_dir / "config.toml"), "--run-dir", str(run_dir), "--resume", "auto"]
        trainer = Trainer(
            model,
            config,
            Loaders(train_loader, validation_loader),
            run_dir=run_dir,
            ledger=ledger,
            metadata={"model": dataclasses.asdict(sizes), "run": to_mapping(config), "lineage": origin},
            resume_command=command_line(resumed),
            ranks=ranks,
        )
        if checkpoint is not None:
            trainer.resume(checkpoint, state)
            del state  # else the loaded weights would stay in memory as long as the run
        with ranks.together():
            if ranks.is_main:
                precision = select_precision(config.precision, ranks.device)
                facts: dict[str, Any] = {"precision": precision, "seed": config.seed, "from_step": trainer.step}
                record_run(run_dir, to_mapping(config), **facts)
                where = ranks.device if ranks.is_alone else f"{ranks.world_size} ranks on {ranks.device.type}"
                steps = f"step {trainer.step} of {trainer.total_steps}"
                print(f"run {run_dir}: {store.num_events:,} events, {where}, {steps}", flush=True)
        trainer.fit()


def command_line(arguments: Sequence[str]) -> str:
    """The command of these arguments, in as many processes as this one has beside it."""
    world_size = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
    if world_size == 1:
        return shlex.join(["eventkern", *arguments])
    of_node = int(os.environ["LOCAL_WORLD_SIZE"])
    nodes = [] if of_node == world_size else ["--nnodes", str(world_size // of_node)]
    return shlex.join(["torchrun", *nodes, "--nproc-per-node", str(of_node), "-m", "eventkern", *arguments])


def checkpoint_of(path: Path) -> Path:
    """The checkpoint that a path means: of a run folder its best."""
    return path / "checkpoints" / "best" if (path / "checkpoints").is_dir() else path


def load_run(path: Path) -> dict[str, Any]:
    """Loads a checkpoint that `eventkern train` wrote, whose metadata tell the model and the run's configuration."""
    from eventkern.train.checkpoint import CheckpointError, load_checkpoint

    state = load_checkpoint(path)
    if not {"model", "run", "lineage"} <= state["metadata"].keys():
        raise CheckpointError(f"{path}: names no model: it is no checkpoint of `eventkern train`; give one that is")
    return state


def load_model(path: Path, state: dict[str, Any], sizes: EventTransformerConfig) -> EventTransformer:
    """The model of these sizes with the weights of what `load_run(path)` gave, on the CPU."""
    from eventkern.models import EventTransformer
    from eventkern.train.checkpoint import load_weights

    model = EventTransformer(sizes)
    load_weights(model, state["model"], path)
    return model


def quantize(model: EventTransformer, wanted: str, path: Path) -> None:
    """Makes the weights of a checkpoint's model 8-bit integers, where --quantize is int8.

    Raises:
        CheckpointError: a weight that is not finite.
    """
    from eventkern.nn import quantize_int8
    from eventkern.train.checkpoint import CheckpointError

    if wanted != "int8":
        return
    try:
        quantize_int8(model)
    except ValueError as error:
        raise CheckpointError(f"{path}: --quantize int8: {error}") from error


def require_parent(out: Path) -> None:
    """Raises a ConfigError where the folder that a file is to be written into is not there."""
    if not out.parent.is_dir():
        raise ConfigError(f"--out {out}: there is no folder {out.parent}; make it first")


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


def build_ledger(
    store: EventStore, id_category_size: int, fold: Fold | None, counted_on: EventStore | None = None
) -> Ledger:
    """The ledger with the baselines of a store, or of a fold of its keys, counted on another store or on itself."""
    from eventkern.data.baselines import baselines
    from eventkern.train import Ledger

    table = baselines(store, id_category_size, fold, counted_on)
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


@dataclasses.dataclass(frozen=True)
class OpenedRun:
    """A checkpoint of `eventkern train` on a store that means what it was trained on."""

    path: Path
    step: int
    config: RunConfig
    store: EventStore
    model: EventTransformer
    fold: Fold | None
    device: torch.device
    precision: str


def open_run(checkpoint: Path, store_name: str | None, device_name: str) -> OpenedRun:
    """Loads the model of a checkpoint, or of a run folder's best, for a store: by default that of its training.

    Raises:
        CheckpointError: no checkpoint there, or a store whose categories, streams or key mean something else.
        DataError: no such store.
    """
    from eventkern.data.shipped import open_store
    from eventkern.train.config import from_mapping
    from eventkern.train.device import has_precision, select_device, select_precision
    from eventkern.train.lineage import refuse_other_lineage

    path = checkpoint_of(checkpoint)
    device = select_device(device_name)
    state = load_run(path)
    config = from_mapping(RunConfig, state["metadata"]["run"])
    store = open_store(store_name or config.data.store)
    sizes = model_config(config, store)
    fold = fold_of(config)
    refuse_other_lineage(state["metadata"]["lineage"], lineage(store, sizes, fold), path, store.path)
    model = load_model(path, state, sizes)
    wanted = config.precision if has_precision(config.precision, device) else "auto"  # trained on another device
    precision = select_precision(wanted, device)
    return OpenedRun(path, state["step"], config, store, model.to(device), fold, device, precision)


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
