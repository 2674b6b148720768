"""What the loss study runs: the notes' two configurations, the factors between them, and the suspects beside them."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.training import CONFIGS

NOTED_CPU, NOTED_GPU = 4.0, 85.9
"""What the notes read: about 4 on the CPU, 85.9 over five epochs on the GPU."""

NOTED_TARGET = 4.0
"""The mean loss that the notes set out to reach on the GPU."""

NOTED_IDS = {"ActorRecordId": 7.8, "LocationRecordId": 7.6}
"""Nats that the notes read for two categories of 1,000 classes, where ln 1000 is 6.91."""


@dataclass(frozen=True)
class Setting:
    """All that a run depends on, besides its seed.

    Args:
        reduction: "mean" over the categories of the mean over the labels; "sum_of_means"; or "sum" over both.
        initialisation: "eventkern", "torch" (the defaults of torch's modules), "torch_without_norm" (and no norm before
            the heads), or "logits_S": eventkern's with first logits of standard deviation S.
        bugs: switches of the notes' code: "backward_in_forward", "mean_of_stacked", "float_returns",
            "transfer_in_forward".
        num_steps: optimizer steps.
        stream: of `benchmarks.studies.loss_gap.streams`.
    """

    reduction: str
    id_category_size: int
    src_seq_len: int
    tgt_seq_len: int
    d_model: int
    num_heads: int
    encoder_layers: int
    decoder_layers: int
    batch_size: int
    grad_accum: int
    lr: float
    num_steps: int
    precision: str = "fp32"
    device: str = "cpu"
    optimizer: str = "adamw"
    clip: float = 1.0
    is_shuffled: bool = True
    initialisation: str = "eventkern"
    bugs: tuple[str, ...] = ()
    stream: str = "workforce"

    def __post_init__(self) -> None:
        choices = {
            "reduction": ("mean", "sum_of_means", "sum"),
            "precision": ("fp32", "tf32", "bf16", "fp16"),
            "optimizer": ("adamw", "adam", "sgd"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; want one of {', '.join(allowed)}")
        for name in ("grad_accum", "num_steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; want at least 1")
        if "float_returns" in self.bugs and "backward_in_forward" not in self.bugs:
            raise ValueError("bugs has float_returns alone; want backward_in_forward, too: a float has no backward")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @property
    def predictions_of_a_step(self) -> int:
        """Events that a step predicts where no label is padding."""
        return self.batch_size * self.grad_accum * self.tgt_seq_len


@dataclass(frozen=True)
class Factor:
    """One difference between the two configurations.

    Args:
        name: as tables show it.
        change: the keys of a `Setting` that it sets, as the GPU's configuration has them.
    """

    name: str
    change: dict[str, Any]


def shipped(config: str, num_steps: int, **others: Any) -> Setting:
    """One of the notes' configurations."""
    values = json.loads((CONFIGS / f"{config}.json").read_text())
    model = values.pop("model")
    del values["epochs"]
    return Setting(**values, **model, num_steps=num_steps, **others)


def cpu_setting(num_steps: int) -> Setting:
    """The run that read 4: a mean, at the larger of the notes' two learning rates."""
    return shipped("cpu_baseline", num_steps, reduction="mean", lr=3e-4)


def gpu_setting(num_steps: int, device: str) -> Setting:
    """The run that read 85.9, on the device given: a sum, in bf16, at the smaller rate."""
    others = {"reduction": "sum_of_means", "precision": "bf16", "lr": 1e-4, "device": device}
    return shipped("gpu_optimized", num_steps, **others)


def factors(device: str) -> list[Factor]:
    """The differences in the order of the ladder; together they lead from `cpu_setting` to `gpu_setting`."""
    goal = gpu_setting(1, device).to_dict()

    def taken(*names: str) -> dict[str, Any]:
        return {name: goal[name] for name in names}

    return [
        Factor("reduction: mean to sum", taken("reduction")),
        Factor("id_category_size 100 to 1000", taken("id_category_size")),
        Factor("sequence lengths 20, 20 to 200, 300", taken("src_seq_len", "tgt_seq_len")),
        Factor(
            "model: d 32, 1+1 layers to d 64, 3+5", taken("d_model", "num_heads", "encoder_layers", "decoder_layers")
        ),
        Factor("precision fp32 to bf16", taken("precision")),
        Factor("batch x accumulation 16 x 1 to 8 x 8", taken("batch_size", "grad_accum")),
        Factor("learning rate 3e-4 to 1e-4", taken("lr")),
        *([Factor(f"device cpu to {device}", taken("device"))] if device != "cpu" else []),
    ]


def ladder(start: Setting, steps: list[Factor]) -> list[Setting]:
    """The settings from `start` on, each with one factor more."""
    settings = [start]
    for step in steps:
        settings.append(replace(settings[-1], **step.change))
    return settings


def suspects(base: Setting) -> dict[str, Setting]:
    """What may have been different besides: `base` with a change, or with some together, by name."""
    plain: dict[str, Any] = {"initialisation": "torch_without_norm"}
    longer = {"num_steps": base.num_steps * 5 // 2}
    changes: dict[str, dict[str, Any]] = {
        "in order, not shuffled": {"is_shuffled": False},
        "initialisation: torch's defaults": {"initialisation": "torch"},
        "initialisation: torch's, no norm before the heads": plain,
        "initialisation: first logits of sd 1.34": {"initialisation": "logits_1.34"},
        "torch's, no norm, in order": {**plain, "is_shuffled": False},
        f"torch's, no norm, {longer['num_steps']} steps": {**plain, **longer},
        "reduction: sum over labels, too": {"reduction": "sum"},
        "reduction: mean": {"reduction": "mean"},
        "optimizer: Adam": {"optimizer": "adam"},
        "optimizer: SGD": {"optimizer": "sgd"},
        "learning rate 3e-4": {"lr": 3e-4},
        "learning rate 3e-3": {"lr": 3e-3},
        "no clipping": {"clip": 0.0},
        "precision: fp32": {"precision": "fp32"},
        "precision: tf32": {"precision": "tf32"},
        "precision: fp16": {"precision": "fp16"},
        "device: cuda": {"device": "cuda"},
        "a stream of 950 actors and sites": {"stream": "many_ids"},
        "950 actors and sites; torch's, no norm": {**plain, "stream": "many_ids"},
        f"950 actors and sites; torch's, no norm, {longer['num_steps']} steps": {
            **plain,
            **longer,
            "stream": "many_ids",
        },
    }
    changes["untrained: SGD, first logits of sd 1.34, 950 actors and sites, categories of natural sizes"] = {
        "optimizer": "sgd",
        "initialisation": "logits_1.34",
        "stream": "natural_sizes",
    }
    return {name: replace(base, **change) for name, change in changes.items() if replace(base, **change) != base}


def bugs(base: Setting) -> dict[str, Setting]:
    """`base`, and with each of the notes' bugs; a float has no backward, so that comes with the backward inside."""
    switches = {
        "none": (),
        "backward inside forward": ("backward_in_forward",),
        "the same, and float returns": ("backward_in_forward", "float_returns"),
        "mean of stacked losses": ("mean_of_stacked",),
        "transfer inside forward": ("transfer_in_forward",),
        "all": ("backward_in_forward", "float_returns", "mean_of_stacked", "transfer_in_forward"),
    }
    return {name: replace(base, bugs=chosen) for name, chosen in switches.items()}


def precisions(base: Setting) -> dict[str, Setting]:
    """`base` in every precision."""
    return {name: replace(base, precision=name) for name in ("fp32", "tf32", "bf16", "fp16")}


@dataclass(frozen=True)
class Sizes:
    """How much a study runs.

    Args:
        num_steps: optimizer steps of the ladder's rungs and of the suspects.
        long_steps: of the runs that compare precisions.
        seeds: how many, of each setting.
    """

    num_steps: int
    long_steps: int
    seeds: int


class Plan:
    """Every setting of a study by where its tables show it.

    Args:
        sizes: how much is run.
        device: that the ladder leads to.

    Attributes:
        factors: the ladder's, in its order.
        forward, backward: settings from the CPU's to the GPU's, in that order and in the other.
        suspects: by base, by name; the base itself is named "as it is".
        bugs, precisions, remedies: by name.
    """

    def __init__(self, sizes: Sizes, device: str) -> None:
        self.sizes = sizes
        self.seeds = range(sizes.seeds)
        small, large = cpu_setting(sizes.num_steps), gpu_setting(sizes.num_steps, device)
        self.factors = factors(device)
        self.forward = ladder(small, self.factors)
        self.backward = ladder(small, self.factors[::-1])
        bases = {"cpu_baseline": small, "gpu_optimized, one micro-batch a step": replace(large, grad_accum=1)}
        self.suspects = {name: {"as it is": base, **suspects(base)} for name, base in bases.items()}
        self.bugs = bugs(replace(small, reduction="sum_of_means", grad_accum=8, device=device))
        self.precisions = precisions(replace(small, num_steps=sizes.long_steps, lr=1e-3, device=device))
        self.remedies = {"learning rate 1e-3": replace(large, lr=1e-3, num_steps=max(2, sizes.num_steps // 2))}

    def settings(self) -> list[Setting]:
        """All of them, those that this machine cannot run too."""
        groups = [*self.suspects.values(), self.bugs, self.precisions, self.remedies]
        return [*self.forward, *self.backward, *(setting for group in groups for setting in group.values())]
