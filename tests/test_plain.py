"""Arguments become plain values, and every public constructor whose state or settings are saved makes them so."""

import io
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
import pytest
import torch

from eventkern.data import Category, Fold, IndexSampler, LengthBucketedSampler, Schema, Stream
from eventkern.models import EventTransformerConfig
from eventkern.plain import check_fields, check_flag, check_integer, check_number
from eventkern.train import TrainerConfig
from eventkern.train.config import to_mapping


@pytest.mark.parametrize(
    "value", [3, np.int64(3), np.uint8(3), np.array(3), torch.tensor(3), torch.tensor(3, dtype=torch.int16)]
)
def test_what_holds_an_integer_is_one(value: Any) -> None:
    assert type(check_integer("count", value)) is int
    assert check_integer("count", value, 1, 3) == 3
    assert type(check_number("share", value)) is float
    with pytest.raises(ValueError, match="count is 3; want 1 to 2"):
        check_integer("count", value, 1, 2)
    with pytest.raises(ValueError, match="count is 3; want at least 4"):
        check_integer("count", value, 4)


@pytest.mark.parametrize(
    "value",
    [
        *(True, np.True_, torch.tensor(True), torch.tensor([True]), np.array([True])),
        *(2.0, 2.5, np.float64(2), torch.tensor(2.5), "3", None, b"3", 3 + 0j),
        *(np.array([3]), torch.tensor([3]), torch.tensor([3, 4]), [3]),
    ],
)
def test_what_is_no_integer_is_named(value: Any) -> None:
    with pytest.raises(TypeError, match=r"count is .*; want an integer"):
        check_integer("count", value)


def test_flags_and_numbers() -> None:
    for true, false in ((True, False), (1, 0), (np.True_, np.False_), (torch.tensor(True), torch.tensor(False))):
        assert check_flag("shuffle", true) is True
        assert check_flag("shuffle", false) is False
    for value in (2, -1, 1.0, 0.5, "True", None, torch.tensor([True])):
        with pytest.raises(TypeError, match=r"shuffle is .*; want True or False"):
            check_flag("shuffle", value)
    for value in (0.5, np.float64(0.5), np.float32(0.5), torch.tensor(0.5)):
        assert check_number("share", value) == 0.5
        assert type(check_number("share", value)) is float
    for value in (True, "0.5", None, np.array([0.5])):
        with pytest.raises(TypeError, match=r"share is .*; want a number"):
            check_number("share", value)


@dataclass(frozen=True)
class Inner:
    depth: int = 1


@dataclass(frozen=True)
class Outer:
    sizes: tuple[int, ...] = ()
    names: tuple[str, ...] = ()
    rate: float = 0.5
    most: int | None = None
    kind: Literal["a", "b"] = "a"
    inner: Inner = Inner()

    def __post_init__(self) -> None:
        check_fields(self)


def test_fields_take_the_types_of_their_annotations() -> None:
    made = Outer(np.array([3, 4]), list(np.array(["x"])), 1, np.int8(7), np.array(["b"])[0], Inner(np.int64(2)))
    assert made == Outer((3, 4), ("x",), 1.0, 7, "b", Inner(2))
    values = [*made.sizes, *made.names, made.rate, made.most, made.kind, made.inner.depth]
    assert [type(value) for value in values] == [int, int, str, float, int, str, int]
    for name, value in {"sizes": [1, 2.5], "names": "x", "rate": "1", "most": True, "inner": Inner(0.5)}.items():
        named = {"sizes": r"sizes\[1\]", "inner": "depth"}.get(name, name)
        with pytest.raises(TypeError, match=f"^{named} is "):
            Outer(**{name: value})


MODEL = {"num_streams": 3, "src_seq_len": 4, "tgt_seq_len": 5, "d_model": 8, "num_heads": 2, "dropout": 0.5}


def schema(bins: int, limit: int, uniform_sizes: bool) -> Schema:
    categories = (
        Category("who", "id"),
        Category("b", "bins", bins=bins),
        Category("e", "elapsed", "", 20, None, "days", limit),
    )
    return Schema("s", "at", "UTC", categories, (Stream("all"),), "who", "2024-01-01", uniform_sizes)


SAVED: list[Callable[[Any, Any], Any]] = [
    lambda i, f: IndexSampler(
        i(40), i(4), seed=i(3), shuffle=f(True), rank=i(1), world_size=i(2), drop_last=f(False), window=i(33)
    ).state_dict(),
    lambda i, f: LengthBucketedSampler(
        [3, 9, 4, 40], i(64), num_shapes=i(2), multiple=i(4), seed=i(2), shuffle=f(True), drop_last=f(True)
    ).state_dict(),
    lambda i, f: to_mapping(
        TrainerConfig(epochs=i(3), max_steps=i(9), lr=i(1), seed=i(5), histograms=f(True), clip=torch.tensor(0.5))
    ),
    lambda i, f: vars(
        EventTransformerConfig(
            ("a", "b"),
            (i(3), i(4)),
            **{k: i(v) if type(v) is int else v for k, v in MODEL.items()},
            checkpoint_blocks=f(True),
        )
    ),
    lambda i, f: vars(Fold(i(1), i(3))),
    lambda i, f: schema(i(4), i(9), f(True)).to_dict(),
]


@pytest.mark.parametrize("saved", SAVED)
@pytest.mark.parametrize("integer", [np.int64, np.int32, torch.tensor])
@pytest.mark.parametrize("flag", [np.bool_, int, torch.tensor])
def test_what_is_saved_of_numpys_and_torchs_scalars_equals_the_plain(saved: Any, integer: Any, flag: Any) -> None:
    if saved is SAVED[-1] and flag is int:
        flag = bool  # a schema is read from files, where 1 is not true
    plain = saved(int, bool)
    file = io.BytesIO()
    torch.save(saved(integer, flag), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert loaded == plain
    assert {key: type(value) for key, value in loaded.items()} == {key: type(value) for key, value in plain.items()}


@pytest.mark.parametrize("key", [field.name for field in fields(TrainerConfig)])
def test_every_setting_of_the_trainer_refuses_another_type_by_name(key: str) -> None:
    with pytest.raises(ValueError, match=f"^{key} is "):
        TrainerConfig(**{key: [1]})


@pytest.mark.parametrize("key", ["num_samples", "batch_size", "seed", "rank", "world_size", "window"])
@pytest.mark.parametrize("value", [True, 2.5, torch.tensor(True)])
def test_a_sampler_refuses_what_is_no_integer_by_name(key: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"^{key} is .*; want an integer"):
        IndexSampler(**{"num_samples": 40, "batch_size": 4, key: value})


def test_states_of_a_sampler_that_was_given_ones_and_zeros_load() -> None:
    sampler = IndexSampler(10, 2, shuffle=1)
    state = sampler.state_dict()
    assert state["shuffle"] is True
    again = IndexSampler(10, 2)
    again.load_state_dict({**state, "shuffle": 0, "seed": np.int64(4)})  # as older versions have saved it
    assert again.state_dict() == {**state, "shuffle": False, "seed": 4}
    assert type(again.seed) is int
