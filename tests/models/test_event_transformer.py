"""EventTransformer: what each output depends on, its losses and metrics, its first loss, and torch.compile."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.peers import plain_name
from eventkern.models import EventTransformer, EventTransformerConfig
from eventkern.ops import use_reference

SIZES = (5, 40, 300)
CONFIG = EventTransformerConfig(
    category_names=("kind", "place", "actor"), category_sizes=SIZES, num_streams=3, src_seq_len=7, tgt_seq_len=6,
    d_model=32, num_heads=4, encoder_layers=2, decoder_layers=2,
)  # fmt: skip


@dataclass
class Batch:
    sources: Tensor
    targets: Tensor


def random_batch(config: EventTransformerConfig, generator: torch.Generator, batch_size: int = 4) -> Batch:
    def events(*shape: int) -> Tensor:
        columns = [torch.randint(2, size, shape, generator=generator) for size in config.category_sizes]
        return torch.stack(columns, -1).int()

    return Batch(events(batch_size, config.num_streams, config.src_seq_len), events(batch_size, config.tgt_seq_len + 1))


@pytest.fixture
def model() -> EventTransformer:
    torch.manual_seed(1)
    return EventTransformer(CONFIG)


def spread_out(model: EventTransformer) -> EventTransformer:
    """Weights large enough that every dependence shows."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


@pytest.mark.parametrize("positions", ["learned", "sinusoidal"])
def test_the_first_loss_is_the_sum_of_ln_classes(positions, generator):
    torch.manual_seed(1)
    sizes = (1000,) * 17
    names = tuple(f"c{i}" for i in range(17))
    config = replace(
        CONFIG, category_names=names, category_sizes=sizes, d_model=64, num_heads=8, encoder_layers=3, decoder_layers=5,
        positions=positions,
    )  # fmt: skip
    loss = EventTransformer(config)(random_batch(config, generator)).sum().item()
    assert abs(loss / (17 * math.log(1000)) - 1) < 0.05


def test_a_state_depends_on_earlier_events_alone_and_on_all_of_them(model, generator):
    model, batch = spread_out(model), random_batch(CONFIG, generator)
    with torch.no_grad():
        memory = model.encode(batch.sources)
        states = model.decode(batch.targets[:, :-1], memory)
        for position in range(CONFIG.tgt_seq_len):
            changed = batch.targets[:, :-1].clone()
            changed[:, position] = (changed[:, position] + 1) % 5
            moved = (model.decode(changed, memory) - states).abs().amax((0, 2)) > 1e-6
            assert moved.tolist() == [step >= position for step in range(CONFIG.tgt_seq_len)]


def test_every_source_event_of_every_stream_moves_its_own_vector_alone(model, generator):
    model, batch = spread_out(model), random_batch(CONFIG, generator)
    with torch.no_grad():
        memory = model.encode(batch.sources)
        for stream in range(CONFIG.num_streams):
            for position in range(CONFIG.src_seq_len):
                changed = batch.sources.clone()
                changed[:, stream, position] = (changed[:, stream, position] + 1) % 5
                moved = (model.encode(changed) - memory).abs().amax((0, 2)) > 1e-6
                assert moved.tolist() == [other == stream for other in range(CONFIG.num_streams)]


def plain_encoder(model: EventTransformer, stream: int) -> nn.TransformerEncoder:
    """torch's own encoder with the weights of one stream."""
    config = model.config
    layer = nn.TransformerEncoderLayer(
        config.d_model, config.num_heads, 4 * config.d_model, 0.0, "gelu", batch_first=True, norm_first=True
    )
    norm = nn.LayerNorm(config.d_model)
    encoder = nn.TransformerEncoder(layer, config.encoder_layers, norm=norm, enable_nested_tensor=False)
    own = model.encoders.stream(stream)
    encoder.load_state_dict({plain_name(f".{name}")[1:]: value.detach() for name, value in own.items()}, strict=True)
    return encoder


@pytest.mark.parametrize("encoder_layers", [1, 2])
def test_memory_is_the_last_vector_of_each_stream_encoder_of_torch(encoder_layers, generator):
    config = replace(CONFIG, encoder_layers=encoder_layers)
    model, batch = spread_out(EventTransformer(config)), random_batch(config, generator)
    states = model.source_positions(model.embedding(batch.sources))
    memory = model.encode(batch.sources)
    for stream in range(config.num_streams):
        own = plain_encoder(model, stream)(states[:, stream])[:, -1]
        torch.testing.assert_close(memory[:, stream], own, rtol=1e-4, atol=1e-5)


def test_a_batch_is_encoded_and_decoded_as_its_parts_are(model, generator):
    model, batch = spread_out(model), random_batch(CONFIG, generator)
    parts = model.decode(batch.targets[:, :-1], model.encode(batch.sources))
    torch.testing.assert_close(model.states(batch), parts, rtol=1e-5, atol=1e-5)


def test_a_stream_is_addressed_by_views_of_its_parameters(model):
    for stream in range(CONFIG.num_streams):
        with torch.no_grad():
            for value in model.encoders.stream(stream).values():
                value.fill_(stream)
    for name, parameter in model.encoders.named_parameters():
        members = parameter.detach().view(CONFIG.num_streams, -1)
        assert members.unique(dim=1).flatten().tolist() == [0.0, 1.0, 2.0], name


def test_a_batch_of_another_shape_is_named(model, generator):
    batch = random_batch(CONFIG, generator)
    with pytest.raises(ValueError, match=r"sources has shape \(4, 2, 7, 3\); want .* = \(3, 7, 3\)"):
        model.encode(batch.sources[:, :2])
    with pytest.raises(ValueError, match="7 events to decode; want at most tgt_seq_len = 6"):
        model.decode(batch.targets, model.encode(batch.sources))


def test_sinusoids_are_those_of_the_paper():
    model = EventTransformer(replace(CONFIG, positions="sinusoidal"))
    for position in range(CONFIG.src_seq_len):
        for column in range(CONFIG.d_model):
            angle = position / 10_000 ** (2 * (column // 2) / CONFIG.d_model)
            expected = math.cos(angle) if column % 2 else math.sin(angle)
            assert model.source_positions.table[position, column].item() == pytest.approx(expected, abs=1e-6)


def test_residual_outputs_start_smaller_by_the_number_of_additions(model):
    additions = 2 * CONFIG.encoder_layers + 3 * CONFIG.decoder_layers
    wide, narrow = model.decoder[0].attention.qkv.weight.std(), model.decoder[0].attention.out.weight.std()
    assert (wide / narrow).item() == pytest.approx(additions**0.5, rel=0.1)


def test_padding_is_a_learned_event(model, generator):
    batch = random_batch(CONFIG, generator)
    batch.sources[:, 0, :5] = 0
    model(batch).sum().backward()
    for category, size in enumerate(SIZES):
        first = sum(SIZES[:category])
        assert model.embedding.weight.grad[first].abs().sum() > 0, (category, size)


def test_losses_are_means_over_labels_that_are_not_padding(model, generator):
    model, batch = spread_out(model), random_batch(CONFIG, generator)
    batch.targets[0, 3:] = 0
    batch.targets[2, 1:] = 0
    losses = model(batch)
    states = model.decode(batch.targets[:, :-1], model.encode(batch.sources))
    for head in range(len(SIZES)):
        labels = batch.targets[:, 1:, head].long()
        loss = F.cross_entropy(model.heads.logits(states, head).movedim(-1, 1), labels, reduction="none")
        expected = loss[labels != 0].mean()
        torch.testing.assert_close(losses[head], expected)
    assert losses.dtype == torch.float32


def test_metrics_are_the_losses_and_the_share_of_hits(model, generator):
    model, batch = spread_out(model), random_batch(CONFIG, generator)
    batch.targets[1, 4:] = 0
    metrics = model.metrics(batch)
    torch.testing.assert_close(metrics["loss"], model(batch).detach())
    states = model.decode(batch.targets[:, :-1], model.encode(batch.sources))
    for head in range(len(SIZES)):
        labels = batch.targets[:, 1:, head]
        hits = model.heads.logits(states, head).argmax(-1)[labels != 0] == labels[labels != 0]
        torch.testing.assert_close(metrics["top1"][head], hits.float().mean())
    assert not metrics["loss"].requires_grad


def test_it_learns_a_batch_by_heart(model, generator):
    batch = random_batch(CONFIG, generator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        loss = model(batch).sum()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1
    assert model.metrics(batch)["top1"].tolist() == [1.0, 1.0, 1.0]


def saved_bytes(model: EventTransformer, batch: Batch, forward: Callable[..., Tensor] | None = None) -> int:
    """Bytes that a forward keeps for the backward, beside the weights; views of one storage count once."""
    owned = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in owned:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward(batch.sources, batch.targets) if forward else model(batch)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_compiled_equals_eager_forward_and_backward(is_checkpointed, generator):
    torch.manual_seed(1)
    model = EventTransformer(replace(CONFIG, checkpoint_blocks=is_checkpointed))
    batch = random_batch(CONFIG, generator)
    torch.compiler.reset()
    compiled = torch.compile(lambda sources, targets: model(Batch(sources, targets)), fullgraph=True)
    results = []
    for function in (lambda sources, targets: model(Batch(sources, targets)), compiled):
        model.zero_grad()
        losses = function(batch.sources, batch.targets)
        losses.sum().backward()
        results.append((losses.detach(), model.embedding.weight.grad.clone()))
    for eager, lowered in zip(*results, strict=True):
        torch.testing.assert_close(lowered, eager, rtol=1e-4, atol=1e-5)
    if is_checkpointed:
        assert saved_bytes(model, batch, compiled) < 0.5 * saved_bytes(EventTransformer(CONFIG), batch)


def step_of(config: EventTransformerConfig, batch: Batch, is_checkpointed: bool, dtype: torch.dtype | None = None):
    """Losses, gradients and the generator's state after a training step of a fresh model."""
    torch.manual_seed(1)
    model = spread_out(EventTransformer(replace(config, checkpoint_blocks=is_checkpointed)))
    with torch.autocast("cpu", dtype=dtype) if dtype else nullcontext():
        losses = model(batch)
    losses.sum().backward()
    return [losses.detach(), *(parameter.grad for parameter in model.parameters()), torch.get_rng_state()]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointed_blocks_have_bitwise_the_losses_and_gradients(dropout, dtype, generator):
    config, batch = replace(CONFIG, dropout=dropout), random_batch(CONFIG, generator)
    plain, checkpointed = (step_of(config, batch, each, dtype) for each in (False, True))
    for one, other in zip(plain, checkpointed, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointed_blocks_keep_their_inputs_alone(dropout, generator):
    config = replace(CONFIG, dropout=dropout, src_seq_len=70, tgt_seq_len=60)
    batch = random_batch(config, generator)
    plain, checkpointed = (EventTransformer(replace(config, checkpoint_blocks=each)) for each in (False, True))
    # A layer keeps, in float32 numbers a row: the inputs of 2 norms (2 D) with their mean and deviation, of queries,
    # keys and values (D) and these (3 D), the attended (D) and a log-sum-exp a head, the inputs of the feed-forward's
    # linear layers (D, 4 D) and of GELU (4 D): 16 D, of which checkpointing keeps the layer's input. Stacked norms keep
    # what they scale too (2 D). The last encoder layer keeps of all rows a norm's output and what it scales, keys and
    # values (4 D), and of the last position all but those and the layer's input (13 D). Cross-attention adds a norm's
    # input, the query's input, the query and the attended (4 D); every dropout a mask (D).
    width, heads, masks = config.d_model, config.num_heads, config.d_model if dropout else 0
    encoder = 4 * (17 * width + heads + 4 + 2 * masks)
    last_encoder, last_position = 4 * (4 * width + 2), 4 * (13 * width + heads + 2 + 2 * masks)
    decoder = 4 * (19 * width + 2 * heads + 6 + 3 * masks)
    source_rows, target_rows = 4 * config.num_streams * config.src_seq_len, 4 * config.tgt_seq_len
    keys_and_values = 4 * 2 * width * 4 * config.num_streams  # of the memory
    saving = (config.encoder_layers - 1) * source_rows * encoder
    saving += source_rows * last_encoder + 4 * config.num_streams * last_position
    saving += config.decoder_layers * (target_rows * decoder + keys_and_values)
    whole = saved_bytes(plain, batch)
    assert whole - saved_bytes(checkpointed, batch) == pytest.approx(saving, rel=0.01)
    assert saving > 0.6 * whole
    assert saved_bytes(checkpointed.eval(), batch) == saved_bytes(plain.eval(), batch)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"category_sizes": (5, 40)}, "category_sizes has 2 entries; want 3"),
        ({"num_heads": 5}, "num_heads is 5; want a divisor of d_model = 32"),
        ({"encoder_layers": 0}, "encoder_layers is 0; want at least 1"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"positions": "rotary"}, "positions is 'rotary'"),
    ],
)
def test_a_wrong_size_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **change)


def test_dropout_acts_in_training_alone(generator):
    torch.manual_seed(1)
    model, batch = EventTransformer(replace(CONFIG, dropout=0.5)), random_batch(CONFIG, generator)
    spread_out(model)
    assert not model(batch).equal(model(batch))
    model.eval()
    assert model(batch).equal(model(batch))


def test_twenty_steps_have_the_losses_of_the_reference_ops(generator):
    batches = [random_batch(CONFIG, generator) for _ in range(20)]
    batches[3].targets[1, 3:] = 0
    histories = []
    for route in (nullcontext, use_reference):
        torch.manual_seed(1)
        model = EventTransformer(CONFIG)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        losses = []
        with route():
            for batch in batches:
                loss = model(batch)
                loss.sum().backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.detach())
        histories.append(torch.stack(losses))
    kernels, references = histories
    torch.testing.assert_close(kernels, references, rtol=2e-6, atol=0)
    assert (references[-1].sum() - references[0].sum()).abs() > 0.1


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"encoder_layers": 1, "decoder_layers": 3, "src_seq_len": 11, "tgt_seq_len": 3},
        {"num_streams": 1, "num_heads": 1, "d_model": 40, "positions": "sinusoidal"},
    ],
)
def test_flops_are_those_that_torch_counts(change, generator):
    """Equal to the last one: the reference ops and attention as plain products make every product visible to torch."""
    config = replace(CONFIG, **change)
    model, batch = EventTransformer(config), random_batch(config, generator, batch_size=3)
    with use_reference(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(batch).sum().backward()
    assert model.flops(batch) == counter.get_total_flops() > 0


def test_flops_and_tokens_follow_the_batch(model, generator):
    batch = random_batch(CONFIG, generator)
    short = Batch(batch.sources[:2], batch.targets[:2, :4])
    assert model.tokens(batch) == 4 * (3 * 7 + 6)
    assert model.tokens(short) == 2 * (3 * 7 + 3)
    with use_reference(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(short).sum().backward()
    assert model.flops(short) == counter.get_total_flops() < model.flops(batch)


@pytest.mark.gpu
@pytest.mark.parametrize("src_seq_len", [7, 200])
def test_attention_on_a_gpu_is_flash_attention(src_seq_len, generator):
    config = replace(CONFIG, src_seq_len=src_seq_len)
    model, batch = EventTransformer(config).cuda(), random_batch(config, generator)
    batch = Batch(batch.sources.cuda(), batch.targets.cuda())
    with torch.profiler.profile(acc_events=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            losses = model(batch)
        losses.sum().backward()
    called = {event.key for event in profile.key_averages() if "dot_product" in event.key or "softmax" in event.key}
    inner = {key.removeprefix("aten::_scaled_dot_product_") for key in called if key.startswith("aten::_scaled")}
    assert inner == {"flash_attention", "flash_attention_backward"}
    assert not any("softmax" in key for key in called)
