"""The extension's step of a decoder: against the modules' own, in every company, and where modules must serve."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from eventkern.models import EventTransformer, EventTransformerConfig
from eventkern.models.decoder_step import PackedLayers, can_pack, padded_length
from eventkern.models.generation import CachedDecoder
from eventkern.nn import quantize_int8
from eventkern.ops import use_reference
from eventkern.ops.attention import reference

CONFIG = EventTransformerConfig(
    category_names=("kind", "place"), category_sizes=(5, 40), num_streams=3, src_seq_len=4, tgt_seq_len=18,
    d_model=32, num_heads=4, encoder_layers=1, decoder_layers=2, dropout=0.5,
)  # fmt: skip


def large_model(**changes: int) -> EventTransformer:
    """Weights large enough that every dependence shows."""
    torch.manual_seed(3)
    model = EventTransformer(replace(CONFIG, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def events(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.stack([torch.randint(1, size, shape, generator=generator) for size in CONFIG.category_sizes], -1).int()


def steps_of_modules(model: EventTransformer, states_TBD: Tensor, memory_BKD: Tensor) -> Tensor:
    """Every position by `DecoderLayer.step` alone, in the states' dtype."""
    memories = [layer.cross_attention.keys_and_values(memory_BKD) for layer in model.decoder]
    length, batch_size, width = states_TBD.shape
    shape = (batch_size, 2, model.config.num_heads, length, width // model.config.num_heads)
    caches = states_TBD.new_full((len(memories), *shape), torch.nan)
    outputs = []
    for position, states_BD in enumerate(states_TBD):
        for layer, cache, memory in zip(model.decoder, caches, memories, strict=True):
            states_BD = layer.step(states_BD, cache, position, memory)
        outputs.append(states_BD)
    return torch.stack(outputs)


def steps_of_extension(
    model: EventTransformer, states_TBD: Tensor, memory_BKD: Tensor, sequences: slice = slice(None)
) -> Tensor:
    """The same of some sequences by the extension, over a cache that holds NaN wherever nothing was written."""
    layers = list(model.decoder)
    memories = [layer.cross_attention.keys_and_values(memory_BKD) for layer in layers]  # torch's bits, of all at once
    packed = PackedLayers(layers, [(key[sequences], value[sequences]) for key, value in memories])
    states_TBD = states_TBD[:, sequences]
    length, batch_size, width = states_TBD.shape
    num_heads = model.config.num_heads
    shape = (len(layers), batch_size, 2, num_heads, padded_length(length), width // num_heads)
    caches, outputs_TBD = states_TBD.new_full(shape, torch.nan), states_TBD.contiguous().clone()
    for position, states_BD in enumerate(outputs_TBD):
        packed.step(states_BD, caches, position)
    return outputs_TBD


@torch.no_grad()
@pytest.mark.parametrize(
    ("width", "num_heads", "batch_size", "num_streams", "length"),
    [(16, 4, 1, 1, 3), (32, 1, 3, 3, 17), (48, 6, 4, 16, 16), (64, 8, 5, 17, 33), (64, 4, 9, 2, 18), (80, 5, 2, 3, 1)],
)
def test_the_extension_steps_as_the_modules_do(
    width, num_heads, batch_size, num_streams, length, generator, assert_accurate
):
    model = large_model(d_model=width, num_heads=num_heads, num_streams=num_streams, tgt_seq_len=length)
    states_TBD = torch.randn(length, batch_size, width, generator=generator)
    memory_BKD = torch.randn(batch_size, num_streams, width, generator=generator)
    actual = steps_of_extension(model, states_TBD, memory_BKD)
    own = steps_of_modules(model, states_TBD, memory_BKD)
    truth = steps_of_modules(model.double(), states_TBD.double(), memory_BKD.double())
    for position in range(length):
        assert_accurate(actual[position], own[position], truth[position])


@torch.no_grad()
def test_a_sequence_has_the_same_bits_in_any_batch_and_for_any_number_of_threads(generator):
    model = large_model()
    states_TBD = torch.randn(18, 7, 32, generator=generator)
    memory_BKD = torch.randn(7, 3, 32, generator=generator)
    together = steps_of_extension(model, states_TBD, memory_BKD)
    num_threads = torch.get_num_threads()
    try:
        for torch_threads in (2, 3):
            torch.set_num_threads(torch_threads)
            assert torch.equal(steps_of_extension(model, states_TBD, memory_BKD), together)
    finally:
        torch.set_num_threads(num_threads)
    for sequences in (slice(5, 6), slice(1, 6)):
        assert torch.equal(steps_of_extension(model, states_TBD, memory_BKD, sequences), together[:, sequences])


@torch.no_grad()
@pytest.mark.parametrize(
    ("changes", "cast", "tolerance"),
    [
        ({}, nullcontext, 1e-4),
        ({"d_model": 24}, nullcontext, 1e-4),
        ({"num_heads": 2, "d_model": 48}, nullcontext, 1e-4),
        ({}, lambda: torch.autocast("cpu", torch.bfloat16), 0.1),
    ],
)
def test_a_decoder_with_no_step_of_the_extension_takes_the_modules(changes, cast, tolerance, generator):
    """A width of 24, a head dim of 24, and autocast; the plain decoder beside them, which has one."""
    model = large_model(**changes)
    window, sources = events(generator, 4, 18), events(generator, 4, 3, 4)
    decoder = CachedDecoder(model, 4)
    with cast():
        memory = model.encode(sources)
        decoder.begin(memory)
        assert (decoder._packed is not None) == (not changes and cast is nullcontext)
        cached = torch.stack([decoder.step(window[:, position]) for position in range(18)], 1)
        whole = model.decode(window, memory)
    torch.testing.assert_close(cached, whole, rtol=tolerance, atol=tolerance)


def is_packed(model) -> bool:
    return can_pack([*model.decoder], model.config)


@torch.no_grad()
def test_other_dtypes_are_not_packed():
    assert is_packed(large_model())
    assert not is_packed(large_model().double())
    assert not is_packed(large_model().to(torch.bfloat16))


@torch.no_grad()
def test_the_reference_reaches_a_cached_step(generator, monkeypatch):
    """In the middle of a window too: 2 layers with two attentions each go on over the extension's cache."""
    calls = []
    own = reference.attention
    monkeypatch.setattr(reference, "attention", lambda *arguments: calls.append(1) or own(*arguments))
    model = large_model()
    window, memory = events(generator, 4, 18), model.encode(events(generator, 4, 3, 4))
    whole = model.decode(window, memory)
    decoder = CachedDecoder(model, 4)
    decoder.begin(memory)
    for position in range(18):
        with use_reference() if position % 3 == 1 else nullcontext():
            state = decoder.step(window[:, position])
        torch.testing.assert_close(state, whole[:, position], rtol=1e-4, atol=1e-4)
        assert len(calls) == 4 * len([p for p in range(position + 1) if p % 3 == 1])


@torch.no_grad()
def test_a_window_begins_with_the_weights_of_its_time(generator):
    """Changed ones, and int8 rows, of which every window makes the weights."""
    model = large_model()
    window, sources = events(generator, 4, 18), events(generator, 4, 3, 4)
    decoder = CachedDecoder(model, 4)
    decoder.begin(model.encode(sources))
    before = decoder.step(window[:, 0])
    for change in (lambda: model.decoder[1].attention.out.weight.mul_(-1), lambda: quantize_int8(model)):
        change()
        memory = model.encode(sources)
        decoder.begin(memory)
        after = decoder.step(window[:, 0])
        torch.testing.assert_close(after, model.decode(window[:, :1], memory)[:, 0], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(before, after, rtol=1e-3, atol=1e-3)
        before = after


class Adapted(torch.nn.Module):
    """A layer and a correction of low rank beside it."""

    def __init__(self, inner: torch.nn.Module, generator: torch.Generator) -> None:
        super().__init__()
        self.inner = inner
        width, outputs = inner.weight.shape[-1], inner.weight.shape[0]
        self.down = torch.nn.Parameter(torch.randn(width, 2, generator=generator))
        self.up = torch.nn.Parameter(torch.randn(2, outputs, generator=generator))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.inner(inputs) + inputs @ self.down @ self.up


PLACES = [name for name, part in large_model().decoder[1].named_modules() if list(part.parameters(recurse=False))]


@torch.no_grad()
@pytest.mark.parametrize("place", PLACES)
def test_an_adapter_anywhere_in_a_layer_runs_as_a_module(place, generator):
    model = large_model()
    model.decoder[1].set_submodule(place, Adapted(model.decoder[1].get_submodule(place), generator))
    assert not is_packed(model)
    window, memory = events(generator, 4, 18), model.encode(events(generator, 4, 3, 4))
    decoder = CachedDecoder(model, 4)
    decoder.begin(memory)
    cached = torch.stack([decoder.step(window[:, position]) for position in range(18)], 1)
    torch.testing.assert_close(cached, model.decode(window, memory), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.feed_forward.register_module("0", torch.nn.Linear(32, 96)),  # another width
        lambda layer: layer.feed_forward.register_module("0", torch.nn.Linear(32, 128, bias=False)),
        lambda layer: layer.feed_forward.register_module("1", torch.nn.ReLU()),
        lambda layer: layer.feed_forward.register_module("1", torch.nn.GELU("tanh")),
        lambda layer: layer.feed_forward.append(torch.nn.Dropout(0.5)),
        lambda layer: setattr(layer.attention.qkv, "forward", torch.nn.Linear(32, 96).forward),
        lambda layer: layer.attention.register_forward_hook(lambda module, inputs, output: None),
        lambda layer: setattr(layer.feed_forward_norm, "eps", 0.1),
    ],
)
def test_what_is_not_as_the_model_makes_it_is_left_to_the_modules(change):
    model = large_model()
    assert is_packed(model)
    change(model.decoder[1])
    assert not is_packed(model)


@torch.no_grad()
def test_parametrised_weights_are_read_as_modules_read_them():
    model = large_model()
    quantize_int8(model)
    assert is_packed(model)


def test_windows_of_another_dtype_have_caches_of_their_own(generator):
    model = large_model()
    sources = events(generator, 2, CONFIG.num_streams, CONFIG.src_seq_len)
    first = events(generator, 2)
    decoder = CachedDecoder(model, 2)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        decoder.begin(model.encode(sources))
        decoder.step(first)
    fresh = CachedDecoder(model, 2)
    for each in (decoder, fresh):
        with torch.no_grad():
            each.begin(model.encode(sources))
    assert torch.equal(decoder.step(first), fresh.step(first))
    assert decoder._caches.dtype == torch.float32


def test_other_numbers_of_sequences_are_refused(generator):
    model = large_model()
    decoder = CachedDecoder(model, 3)
    with torch.no_grad():
        memory = model.encode(events(generator, 2, CONFIG.num_streams, CONFIG.src_seq_len))
    with pytest.raises(ValueError, match="memory has 2 sequences; want 3, the batch_size"):
        decoder.begin(memory)
    decoder.begin(torch.cat([memory, memory[:1]]))
    with pytest.raises(ValueError, match="events has 2 sequences; want 3, the batch_size"):
        decoder.step(events(generator, 2))
