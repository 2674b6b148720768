"""What each process of a test under ranks runs: `python ranks.py PLAYS FOLDER DEVICE`, in torchrun's environment.

Not a test itself: tests/train/test_distributed.py starts it and judges what it leaves in FOLDER.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
from conftest import PlainModel, TinyBatch, TinyLoader, TinyModel

from eventkern.train import Loaders, Trainer, TrainerConfig
from eventkern.train.distributed import Ranks, join
from eventkern.train.failures import OtherRankError, RunFailure

KEYS: dict[str, Any] = {"epochs": 2, "lr": 0.01, "schedule": "cosine", "device": "cpu", "log_every": 1, "clip": 0.5}


def start(world_size: int, command: Sequence[str], **options: Any) -> list[subprocess.Popen[str]]:
    """The processes of a run, as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    sizes = {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    common = {**sizes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    environments = [{**os.environ, **common, "RANK": str(r), "LOCAL_RANK": str(r)} for r in range(world_size)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
    return [subprocess.Popen([sys.executable, *command], env=each, **options) for each in environments]


def trainer(ranks: Ranks, run_dir: Path, model: Any = None, *, batch_size: int = 3, **keys: Any) -> Trainer:
    config = TrainerConfig(**{**KEYS, "batch_size": batch_size, **keys})
    device = str(ranks.device)
    train = TinyLoader(batch_size, device=device, rank=ranks.rank, world_size=ranks.world_size)
    # 5 batches for 2 ranks or 3: the last round is short
    loaders = Loaders(train, TinyLoader(2, num_samples=9, seed=1, device=device))
    return Trainer(TinyModel() if model is None else model, config, loaders, run_dir=run_dir, ranks=ranks)


def equal(ranks: Ranks, folder: Path) -> None:
    """Runs that equal those of one rank on batches twice as large."""
    for sharding in ("none", "fully_shard"):
        for grad_accum in (1, 2):
            model = TinyModel()
            if not ranks.is_main:
                torch.nn.init.zeros_(model.hidden.weight)  # the main rank's weights are everyone's
            trainer(ranks, folder / f"{sharding}-{grad_accum}", model, sharding=sharding, grad_accum=grad_accum).fit()


def synchronised(ranks: Ranks, folder: Path) -> None:
    """Whether each forward is to be followed by an exchange of gradients: two warm-up passes, then steps of 3, 1."""
    seen: list[bool] = []
    model = TinyModel(before_forward=lambda _: seen.append(made._parallel._forward.require_backward_grad_sync))
    made = trainer(ranks, folder, model, grad_accum=3, epochs=1)
    made.fit()
    assert seen == [True, True, False, False, True, True], seen


def half(ranks: Ranks, folder: Path) -> None:
    """fp16, replicated and sharded: a loss scale that comes down by the same steps."""
    weights = []
    for sharding in ("none", "fully_shard"):
        model = TinyModel()
        made = trainer(ranks, folder / sharding, model, sharding=sharding, precision="fp16")
        made._optimizer_step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
        made.fit()
        scale = made._optimizer_step.scaler.get_scale()
        assert ranks.gather(scale) == [scale] * ranks.world_size
        weights.append((scale, made._parallel.whole(model.state_dict())))
    if ranks.is_main:
        assert weights[0][0] == weights[1][0] < 2.0**20
        for name, weight in weights[0][1].items():
            torch.testing.assert_close(weights[1][1][name], weight, rtol=0, atol=1e-4, msg=name)


def resumed(ranks: Ranks, folder: Path, **keys: Any) -> None:
    """A run, and one that a signal to the last rank stopped and that went on, with dropout."""
    keys = {"batch_size": 2, "grad_accum": 2, **keys}
    trainer(ranks, folder / "whole", TinyModel(dropout=0.3), **keys).fit()
    stop_at = 4 if ranks.rank == ranks.world_size - 1 else None
    model = TinyModel(dropout=0.3, before_forward=lambda call: call == stop_at and signal.raise_signal(signal.SIGTERM))
    result = trainer(ranks, folder / "parts", model, **keys).fit()
    assert result.interrupted
    torch.rand(3)
    again = trainer(ranks, folder / "parts", TinyModel(dropout=0.3), **keys)
    again.resume(folder / "parts/checkpoints/last")
    assert again.step == result.step
    assert not again.fit().interrupted
    drawn = ranks.gather(torch.rand(1).item())
    assert len(set(drawn)) == ranks.world_size, drawn  # dropout differs


def sharded_resume(ranks: Ranks, folder: Path) -> None:
    resumed(ranks, folder, sharding="fully_shard")


class Spoiled(TinyModel):
    """Losses that are not finite at some calls; at all where `calls` is None."""

    def __init__(self, calls: set[int] | None) -> None:
        super().__init__()
        self.calls = calls

    def forward(self, batch: TinyBatch) -> torch.Tensor:
        losses = super().forward(batch)
        is_spoiled = self.calls is None or self.num_calls in self.calls
        return losses * torch.tensor([1.0, torch.nan if is_spoiled else 1.0])


def spoiled(ranks: Ranks, folder: Path) -> None:
    """Losses of rank 1 that are not finite: the first two calls are the warm-up's."""
    calls: set[int] = {1, 4, 5} if ranks.rank == 1 else set()
    model = Spoiled(calls)
    trainer(ranks, folder / "some", model).fit()
    weights = ranks.gather([parameter.tolist() for parameter in model.parameters()])
    assert weights[0] == weights[1]
    model = Spoiled(None if ranks.rank == 1 else set())
    try:
        trainer(ranks, folder / "all", model, max_skipped_steps=3).fit()
    except (FloatingPointError, OtherRankError) as error:
        (folder / f"rank-{ranks.rank}.txt").write_text(f"{type(error).__name__}: {error}")


class Branching(TinyModel):
    """A branch that only some calls take; the optimizer's norms and moments must not notice who called."""

    def __init__(self, takes: Callable[[int], bool]) -> None:
        super().__init__()
        self.branch = torch.nn.Linear(6, 6)
        torch.nn.init.constant_(self.branch.weight, 0.25)
        torch.nn.init.zeros_(self.branch.bias)
        self.takes = takes

    def logits(self, batch: TinyBatch) -> list[torch.Tensor]:
        hidden = torch.tanh(self.hidden(batch.inputs))
        if self.training and self.takes(self.num_calls):
            hidden = hidden + self.branch(hidden)
        return [head(hidden).float() for head in self.heads]


def takes(step: int, share: int) -> bool:
    """Whether the share of a step's batches takes the branch: one rank's, the other's, nobody's, both."""
    return share in ({0}, {1}, set(), {0, 1})[step]


BRANCHES: dict[str, Callable[[int, int], bool]] = {
    # by the number of a call, of which the first two are the warm-up's, and the rank
    "free": lambda call, rank: call > 2 and takes(call - 3, rank),
    "first": lambda call, rank: call > 3,  # used for the first time
    "last": lambda call, rank: call <= 3,  # used no longer
}


def branches(ranks: Ranks, folder: Path) -> None:
    """A branch of some batches, with the setting for it and without."""
    for name, when in BRANCHES.items():
        model = Branching(lambda call, when=when: when(call, ranks.rank))  # type: ignore[misc]
        keys = {"find_unused_parameters": name == "free", "max_steps": 3, "schedule": "constant"}
        try:
            trainer(ranks, folder / name, model, **keys).fit()
        except RunFailure as error:
            (folder / f"{name}-{ranks.rank}.txt").write_text(str(error))


def taken_up(ranks: Ranks, folder: Path) -> None:
    """A run that one process began."""
    again = trainer(ranks, folder, schedule="constant")
    again.resume(folder / "one.pt")
    again.fit()


def handed_on(ranks: Ranks, folder: Path) -> None:
    """A run that one process is to go on with."""
    trainer(ranks, folder, schedule="constant", max_steps=5).fit()


def on_gpu(ranks: Ranks, folder: Path) -> None:
    """One rank on CUDA, over nccl: every precision, replicated and sharded, compiled."""
    for sharding in ("none", "fully_shard"):
        for precision in ("fp32", "tf32", "bf16", "fp16"):
            keys = {"device": "cuda", "sharding": sharding, "precision": precision, "compile": "on"}
            run_dir = folder / f"{sharding}-{precision}"
            trainer(ranks, run_dir, PlainModel(), **keys).fit()
            again = trainer(ranks, run_dir, PlainModel(), **keys, epochs=3)
            again.resume(run_dir / "checkpoints/last")
            again.fit()


def phases(ranks: Ranks, folder: Path) -> None:
    """Phases of which some ranks fail."""
    told = []
    for failing in ((), (1,), (0, 1)):
        try:
            with ranks.together():
                if ranks.rank in failing:
                    raise ValueError(f"rank {ranks.rank} has no data")
            told.append("went on")
        except (ValueError, OtherRankError) as error:
            told.append(f"{type(error).__name__}: {error}")
    (folder / f"rank-{ranks.rank}.txt").write_text("\n".join(told))


PLAYS: dict[str, Callable[[Ranks, Path], None]] = {
    play.__name__: play
    for play in (
        equal,
        synchronised,
        half,
        resumed,
        sharded_resume,
        spoiled,
        branches,
        taken_up,
        handed_on,
        on_gpu,
        phases,
    )
}


def main() -> None:
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", message="`torch.jit.script", category=DeprecationWarning)  # inductor's own use
    # of a Linear on three dimensions, as the heads of TinyModel are, whose result nobody changes in place
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    torch.set_num_threads(1)
    with join(sys.argv[3]) as ranks:
        for play in sys.argv[1].split(","):
            folder = Path(sys.argv[2]) / play
            folder.mkdir(exist_ok=True)
            PLAYS[play](ranks, folder)


if __name__ == "__main__":
    main()
