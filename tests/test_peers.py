"""A peer is worth timing only if it computes the same: losses, gradients and counted operations, side by side."""

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.peers import (
    ATTENTION,
    EVENT_TRANSFORMER,
    MULTI_EMBEDDING,
    MULTI_HEAD_CROSS_ENTROPY,
    PlainEventTransformer,
)
from benchmarks.training import Shapes, TrainingStep, least_operations, random_batch, step_work
from eventkern.models import EventTransformer, EventTransformerConfig
from eventkern.ops import attention, multi_embedding, multi_head_cross_entropy

SHAPES = Shapes(
    EventTransformerConfig(
        category_names=("kind", "actor", "hour"),
        category_sizes=(5, 17, 3),
        num_streams=2,
        src_seq_len=7,
        tgt_seq_len=6,
        d_model=16,
        num_heads=2,
        encoder_layers=2,
        decoder_layers=3,
    ),
    batch_size=3,
)


def models() -> tuple[EventTransformer, PlainEventTransformer]:
    """Both models with the same weights, all far from zero, so that a weight in a wrong place shows."""
    torch.manual_seed(0)
    model = EventTransformer(SHAPES.model)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model, PlainEventTransformer(model)


def test_the_plain_model_has_the_same_losses_and_gradients() -> None:
    model, plain = models()
    batch = random_batch(SHAPES, "cpu")
    batch.targets[0, 4:] = 0
    weights = torch.tensor([1.0, -2.0, 0.5])
    losses, plain_losses = model(batch), plain(batch)
    torch.testing.assert_close(plain_losses, losses, rtol=1e-5, atol=1e-5)
    (losses * weights).sum().backward()
    (plain_losses * weights).sum().backward()

    gradient = model.embedding.weight.grad
    assert gradient is not None
    tables = [table.weight.grad for table in plain.tables]
    torch.testing.assert_close(torch.cat(tables), gradient, rtol=1e-4, atol=1e-5)
    attention = plain.decoder.layers[1].multihead_attn.in_proj_weight.grad
    ours = model.decoder[1].cross_attention
    torch.testing.assert_close(
        attention, torch.cat([ours.query.weight.grad, ours.key_value.weight.grad]), rtol=1e-4, atol=1e-5
    )
    assert sum(p.numel() for p in plain.parameters()) == sum(p.numel() for p in model.parameters())


def test_they_stay_side_by_side_through_training() -> None:
    model, plain = models()
    steps = [TrainingStep(module, torch.float32) for module in (model, plain)]
    for seed in range(20):
        batch = random_batch(SHAPES, "cpu", seed=seed)
        ours, theirs = (step(batch) for step in steps)
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    assert all(parameter.grad is None for parameter in model.parameters()), "gradients would add up over steps"
    untrained, _ = models()
    for trained, initial in zip(model.parameters(), untrained.parameters(), strict=True):
        assert not torch.equal(trained, initial)


def test_the_copy_is_a_copy() -> None:
    model, plain = models()
    before = model(random_batch(SHAPES, "cpu")).detach()
    for parameter in plain.parameters():
        nn.init.zeros_(parameter)
    assert torch.equal(model(random_batch(SHAPES, "cpu")), before)


def test_sinusoidal_positions_are_copied_too() -> None:
    config = EventTransformerConfig(**{**vars(SHAPES.model), "positions": "sinusoidal"})
    model = EventTransformer(config)
    batch = random_batch(SHAPES, "cpu")
    torch.testing.assert_close(PlainEventTransformer(model)(batch), model(batch))


def test_the_plain_model_executes_what_is_counted_and_what_nothing_reads() -> None:
    model, plain = models()
    config, batch = SHAPES.model, random_batch(SHAPES, "cpu")
    width = config.d_model
    # Queries, outputs and feed-forward of all events but the last in the last encoder layer.
    unread_queries = SHAPES.batch_size * config.num_streams * (config.src_seq_len - 1)
    unread = unread_queries * (4 * width**2 + 16 * width**2 + 4 * config.src_seq_len * width)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:
        losses = plain(batch)
    assert forward.get_total_flops() == model.flops(batch) / 3 + unread
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as backward:
        losses.sum().backward()
    assert backward.get_total_flops() == 2 * forward.get_total_flops()


def test_the_least_leaves_out_the_future_of_every_target() -> None:
    model, _ = models()
    config, batch = SHAPES.model, random_batch(SHAPES, "cpu")
    pairs = sum(range(config.tgt_seq_len)) * SHAPES.batch_size * config.decoder_layers
    scores_and_sums = 2 * 2 * config.d_model
    assert model.flops(batch) - least_operations(model, batch) == 3 * pairs * scores_and_sums > 0


def test_a_step_reads_and_writes_weights_and_moments() -> None:
    model, _ = models()
    batch = random_batch(SHAPES, "cpu")
    num_weights = sum(parameter.numel() for parameter in model.parameters())
    num_codes = 3 * (2 * 7 + 7) * 3
    work = step_work(model, batch)
    assert work.bytes == 24 * num_weights + 4 * num_codes
    assert work.events == 18


def test_a_random_batch_has_no_padding_and_stays_in_range() -> None:
    batch = random_batch(SHAPES, "cpu")
    assert batch.sources.shape == (3, 2, 7, 3)
    assert batch.targets.dtype == torch.int32
    for column, size in enumerate(SHAPES.model.category_sizes):
        codes = torch.cat([batch.sources[..., column].flatten(), batch.targets[..., column].flatten()])
        assert codes.min() == 1
        assert codes.max() == size - 1
    assert torch.equal(random_batch(SHAPES, "cpu").targets, batch.targets)
    assert not torch.equal(random_batch(SHAPES, "cpu", seed=1).targets, batch.targets)


@pytest.mark.parametrize(
    ("name", "width", "classes"), [("cpu_baseline.json", 32, 100), ("gpu_optimized.json", 64, 1000)]
)
def test_the_shipped_configurations_give_their_shapes(name: str, width: int, classes: int) -> None:
    shapes = Shapes.load(name)
    assert shapes.model.d_model == width
    assert shapes.model.category_sizes == (classes,) * 17
    assert shapes.model.num_streams == 3
    assert shapes.num_events == shapes.batch_size * shapes.model.tgt_seq_len


@pytest.mark.filterwarnings("ignore:fbgemm:UserWarning")
@pytest.mark.parametrize("peer", [peer for peer in MULTI_EMBEDDING if not peer.is_slow_to_start], ids=lambda p: p.name)
def test_every_peer_of_the_embedding_gives_its_values_and_gradients(peer) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = (3, 50, 7)
    ids = torch.stack([torch.randint(size, (40,), generator=generator) for size in sizes], -1)
    weight = torch.randn(60, 8, generator=generator)
    upstream = torch.randn(40, 8, generator=generator)
    module = peer.build(weight, sizes)
    output = module(module.prepare(ids))
    output.backward(upstream)
    leaf = weight.clone().requires_grad_()
    expected = multi_embedding(ids, leaf, sizes)
    expected.backward(upstream)
    torch.testing.assert_close(output, expected)
    gradient = torch.cat([parameter.grad.flatten() for parameter in module.parameters()])
    torch.testing.assert_close(gradient, leaf.grad.flatten())


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("peer", [peer for peer in ATTENTION if not peer.is_slow_to_start], ids=lambda p: p.name)
def test_every_peer_of_attention_gives_its_output_and_gradients(peer, is_causal) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, 3, 20, 8, generator=generator) for _ in range(4)]
    results = []
    for attend in (peer.build(), attention):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs[:3]]
        output = attend(*leaves, is_causal=is_causal)
        results.append([output.detach(), *torch.autograd.grad(output, leaves, inputs[3])])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "peer", [peer for peer in MULTI_HEAD_CROSS_ENTROPY if not peer.is_slow_to_start], ids=lambda p: p.name
)
def test_every_peer_of_the_cross_entropy_gives_its_losses_and_gradients(peer) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = (3, 50, 7)
    targets = torch.stack([torch.randint(size, (40,), generator=generator) for size in sizes], -1)
    weight = torch.randn(60, 8, generator=generator)
    hidden = torch.randn(40, 8, generator=generator)
    upstream = torch.randn(3, generator=generator)
    results = []
    for module in (peer.build(weight, sizes), None):
        states, packed = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        losses = module(states, targets) if module else multi_head_cross_entropy(states, packed, targets, sizes)
        losses.backward(upstream)
        leaves = module.parameters() if module else [packed]
        results.append([losses.detach(), states.grad, torch.cat([leaf.grad for leaf in leaves])])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_the_compiled_peer_says_that_it_starts_slowly() -> None:
    assert [peer.is_slow_to_start for peer in EVENT_TRANSFORMER] == [False, True]
