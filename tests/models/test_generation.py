"""Generation: the cache against the whole prefix, what is drawn and how often, and a cycle that goes on re-anchored."""

from contextlib import nullcontext
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from eventkern.models import EventTransformer, EventTransformerConfig, generate
from eventkern.models.generation import CachedDecoder, ClassSampler
from eventkern.ops import use_reference

SIZES = (5, 40, 40, 300)
CONFIG = EventTransformerConfig(
    category_names=("kind", "place", "other", "actor"), category_sizes=SIZES, num_streams=2, src_seq_len=6,
    tgt_seq_len=5, d_model=32, num_heads=4, encoder_layers=2, decoder_layers=3, dropout=0.5,
)  # fmt: skip


@dataclass
class Past:
    """Every stream holds the sequence's own events."""

    known_BLC: Tensor
    num_streams: int = 2
    src_seq_len: int = 6

    @property
    def anchors(self) -> Tensor:
        return self.known_BLC[:, -1]

    def sources(self, generated_BNC: Tensor) -> Tensor:
        before_BLC = torch.cat([self.known_BLC, generated_BNC], 1)[:, :-1]
        padded_BSC = F.pad(before_BLC, (0, 0, self.src_seq_len, 0))[:, -self.src_seq_len :]
        return padded_BSC[:, None].expand(-1, self.num_streams, -1, -1)


def events(generator: torch.Generator, *shape: int, sizes: tuple[int, ...] = SIZES) -> Tensor:
    return torch.stack([torch.randint(1, size, shape, generator=generator) for size in sizes], -1).int()


@pytest.fixture
def model() -> EventTransformer:
    """Weights large enough that every dependence shows."""
    torch.manual_seed(2)
    model = EventTransformer(CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


@pytest.fixture
def past(generator: torch.Generator) -> Past:
    return Past(events(generator, 3, 8))


def test_cached_logits_are_those_of_the_whole_prefix(model, generator, assert_accurate):
    """In the first window and in one whose cache held another; each position judged by a float64 truth."""
    model.eval()
    exact = EventTransformer(CONFIG).double().eval()
    exact.load_state_dict(model.state_dict())
    tables = [exact.embedding.table(category) for category in range(len(SIZES))]  # the op has no float64
    exact.embedding.forward = lambda ids: sum(F.embedding(ids[..., c], table) for c, table in enumerate(tables))
    decoder = CachedDecoder(model, 3)
    with torch.no_grad():
        for _ in range(2):
            sources, window = events(generator, 3, 2, 6), events(generator, 3, 5)
            decoder.begin(model.encode(sources))
            cached = torch.stack([decoder.step(window[:, position]) for position in range(5)], 1)
            whole = model.decode(window, model.encode(sources))
            truth = exact.decode(window, exact.encode(sources))
            for position in range(5):
                states = cached[:, position], whole[:, position], truth[:, position]
                weights = (model.heads.weight, model.heads.weight, exact.heads.weight)
                assert_accurate(*(F.linear(state, weight) for state, weight in zip(states, weights, strict=True)))


def test_a_window_has_its_events_and_no_more(model, generator):
    decoder = CachedDecoder(model, 3)
    with pytest.raises(ValueError, match="event 0 of a window; begin one, of at most 5"):
        decoder.step(events(generator, 3))
    decoder.begin(model.encode(events(generator, 3, 2, 6)))
    for _ in range(5):
        decoder.step(events(generator, 3))
    with pytest.raises(ValueError, match="event 5 of a window; begin one, of at most 5"):
        decoder.step(events(generator, 3))


def test_greedy_events_are_those_of_the_plain_model(model, past):
    """Recomputed without a cache, re-anchored after every 5: three windows, the last cut short."""
    made = generate(model, past, 12, temperature=0)
    model.eval()
    all_events, num_known = torch.cat([past.known_BLC, made], 1), past.known_BLC.shape[1]
    with torch.no_grad():
        for step in range(12):
            anchor = step - step % 5
            memory = model.encode(past.sources(made[:, :anchor]))
            window = all_events[:, num_known - 1 + anchor : num_known + step]
            state = model.decode(window, memory)[:, -1]
            best = [model.heads.logits(state, head)[:, 1:].argmax(-1) + 1 for head in range(len(SIZES))]
            assert torch.equal(made[:, step], torch.stack(best, -1).int()), step


def test_top_k_of_one_is_greedy(model, past):
    greedy = generate(model, past, 12, temperature=0)
    assert torch.equal(generate(model, past, 12, top_k=1, temperature=2.0, seeds=[5, 6, 7]), greedy)


def test_the_same_seed_draws_the_same_events_in_any_company(model, past):
    together = generate(model, past, 12, seeds=[5, 6, 5])
    assert torch.equal(generate(model, past, 12, seeds=[5, 6, 5]), together)
    for number, seed in enumerate((5, 6, 5)):
        alone = generate(model, Past(past.known_BLC[number : number + 1]), 12, seeds=[seed])
        assert torch.equal(alone[0], together[number])
    assert torch.equal(generate(model, past, 7, seeds=[5, 6, 5]), together[:, :7])
    assert not torch.equal(generate(model, past, 12, seeds=[8, 6, 5])[0], together[0])
    same = Past(past.known_BLC[:1].expand(2, -1, -1))
    one, other = generate(model, same, 12, seeds=[1, 2])
    assert not torch.equal(one, other)


def test_greedy_events_are_the_same_alone_and_together(model, past):
    together = generate(model, past, 12, temperature=0)
    for number in range(3):
        alone = generate(model, Past(past.known_BLC[number : number + 1]), 12, temperature=0)
        assert torch.equal(alone[0], together[number])


def test_columns_that_are_given_keep_the_anchors_class(model, past):
    made = generate(model, past, 12, seeds=[1, 2, 3], given=[3])
    assert (made[..., 3] == past.anchors[:, None, 3]).all()
    assert len(made[0, :, 1].unique()) > 1
    free = generate(model, past, 12, seeds=[1, 2, 3])
    assert not torch.equal(made[:, 1:, :3], free[:, 1:, :3])  # what is given is what the next event sees


def test_dropout_is_off_and_the_mode_comes_back(model, past):
    for mode in (True, False):
        model.train(mode)
        made = generate(model, past, 6, temperature=0)
        assert model.training == mode
        assert torch.equal(made, generate(model, past, 6, temperature=0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_events": 0}, "num_events is 0; want at least 1"),
        ({"temperature": -0.5}, r"temperature is -0.5; want a finite number of at least 0"),
        ({"temperature": float("nan")}, r"temperature is nan; want a finite number"),
        ({"top_k": 0}, "top_k is 0; want at least 1, or None"),
        ({"seeds": [1]}, "seeds has 1 entries; want 3, one a sequence"),
        ({"seeds": None}, "seeds has 0 entries; want 3"),
    ],
)
def test_a_wrong_argument_is_named(model, past, options, message):
    with pytest.raises(ValueError, match=message):
        generate(model, past, **{"num_events": 2, "seeds": [1, 2, 3], **options})


@pytest.mark.parametrize("top_k", [None, 3])
def test_weights_that_are_broken_are_told_and_the_mode_comes_back(model, past, top_k):
    model.train()
    with torch.no_grad():
        model.heads.weight[20:] = torch.nan
    with pytest.raises(FloatingPointError, match="the logits of 9 events are not all finite"):
        generate(model, past, 9, top_k=top_k, seeds=[1, 2, 3])
    assert model.training


@pytest.mark.parametrize("served_by", [nullcontext, use_reference])
@pytest.mark.parametrize("top_k", [None, 5])
def test_no_logit_draws_a_class_beyond_its_head(top_k, served_by, generator):
    """A head whose logits are NaN comes after a larger one, whose classes must not be left for it."""
    logits = torch.randn(50, 1010, generator=generator)
    logits[:, 1000:] = torch.nan
    with served_by():
        drawn = ClassSampler((1000, 10), 1.0, top_k)(logits, torch.rand(50, 2, generator=generator))
    assert ((drawn >= 1) & (drawn < torch.tensor([1000, 10]))).all()


@pytest.mark.parametrize("top_k", [None, 5])
@pytest.mark.parametrize("temperature", [1e-45, 1e-39, 1e-31, 1e-29, 1e-20])
def test_the_coldest_draws_are_greedy(temperature, top_k, generator):
    logits, uniforms = torch.randn(50, 1000, generator=generator) * 30, torch.rand(50, 1, generator=generator)
    drawn = ClassSampler((1000,), temperature, top_k)(logits, uniforms)
    assert drawn.equal(ClassSampler((1000,), 0.0)(logits, None))


def test_a_head_with_no_class_but_padding_is_refused():
    with pytest.raises(ValueError, match="head_sizes holds 1; want at least 2: class 0 is padding"):
        ClassSampler((5, 1))


DRAWS = 20_000


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, None), (0.5, None), (1.7, 4), (0.7, 50)])
@pytest.mark.parametrize("allow_missing", [True, False])
@pytest.mark.parametrize("served_by", [nullcontext, use_reference])
def test_classes_are_drawn_as_often_as_the_softmax_says(generator, temperature, top_k, allow_missing, served_by):
    """Pearson's chi-squared of each head within 5 standard deviations of its expectation, the degrees of freedom."""
    sizes = (9, 9, 2, 30, 9)
    logits = torch.randn(sum(sizes), generator=generator)
    sampler = ClassSampler(sizes, temperature, top_k, allow_missing)
    with served_by():
        drawn = sampler(logits.expand(DRAWS, -1), torch.rand(DRAWS, len(sizes), generator=generator))
    assert drawn.dtype == torch.int32
    for head, own in enumerate(logits.double().split(sizes)):
        scaled = own / temperature
        scaled[0] = -torch.inf
        if not allow_missing and len(own) > 2:
            scaled[1] = -torch.inf
        if top_k is not None:
            scaled[scaled < scaled.topk(min(top_k, len(own))).values[-1]] = -torch.inf
        expected = DRAWS * scaled.softmax(-1)
        counts = drawn[:, head].bincount(minlength=len(own)).double()
        possible = expected > 0
        assert counts[~possible].sum() == 0
        degrees = int(possible.sum()) - 1
        statistic = ((counts - expected)[possible] ** 2 / expected[possible]).sum().item()
        assert statistic <= degrees + 5 * (2 * degrees) ** 0.5 + 1e-9, head


def test_heads_are_drawn_apart(generator):
    """Two heads of one distribution agree as often as two independent draws do."""
    logits = torch.randn(6, generator=generator).repeat(2)
    drawn = ClassSampler((6, 6))(logits.expand(DRAWS, -1), torch.rand(DRAWS, 2, generator=generator))
    p = logits[1:6].softmax(-1)
    agree = (p * p).sum().item()
    observed = (drawn[:, 0] == drawn[:, 1]).double().mean().item()
    assert abs(observed - agree) < 5 * (agree * (1 - agree) / DRAWS) ** 0.5


@pytest.mark.parametrize("top_k", [None, 3])
def test_the_ends_of_the_unit_interval_draw_a_class(top_k):
    """Padding has by far the largest logit, and no number in [0, 1) draws it or what lies beyond the last class."""
    logits = torch.tensor([[50.0, -2.0, 1.0, 0.5, -1.0]])
    for uniform in (0.0, 1 - 2**-24):
        for allow_missing, least in ((True, 1), (False, 2)):
            (drawn,) = ClassSampler((5,), 1.0, top_k, allow_missing)(logits, torch.tensor([[uniform]]))
            assert least <= drawn.item() <= 4
    assert ClassSampler((5,), 0.0)(logits, None).item() == 2


def test_missing_is_drawn_where_there_is_nothing_else():
    assert ClassSampler((2,), allow_missing=False)(torch.tensor([[9.0, 0.0]]), torch.tensor([[0.5]])).item() == 1


def test_a_cycle_known_by_heart_goes_on_through_re_anchors():
    """What follows depends on the event before the anchor, so that a window must begin with sources of its own."""
    torch.manual_seed(0)
    one, other = torch.tensor([2, 2, 3, 3]), torch.tensor([2, 3, 4, 5, 6])
    cycle = torch.stack([one.repeat(15), other.repeat(12)], -1).int()  # 60 events, each pair of places its own
    config = replace(
        CONFIG, category_names=("one", "other"), category_sizes=(4, 7), encoder_layers=1, decoder_layers=1, dropout=0.0
    )
    model = EventTransformer(config)
    starts = torch.arange(6, 26)
    windows = torch.stack([cycle[start : start + 6] for start in starts])
    sources = torch.stack([cycle[start - 6 : start] for start in starts])[:, None].expand(-1, 2, -1, -1)

    @dataclass
    class Batch:
        sources: Tensor
        targets: Tensor

    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        losses = model(Batch(sources, windows))
        losses.sum().backward()
        optimizer.step()
    assert losses.max() < 0.05
    past = Past(torch.stack([cycle[start - 6 : start + 1] for start in (6, 11, 17)]))
    for options in ({"temperature": 0.0}, {"temperature": 0.3, "top_k": 2, "seeds": [1, 2, 3]}):
        made = generate(model, past, 18, **options)
        assert torch.equal(made, torch.stack([cycle[start + 1 : start + 19] for start in (6, 11, 17)]))


@pytest.mark.parametrize("top_k", [1, 2, 20, 90, 300, 5000])
def test_the_extension_draws_what_torchs_own_operations_draw(generator, top_k):
    """Heads of every size, those with few classes and with more than k, and any number of rows."""
    sizes = (2, 3, 17, 127, 128, 129, 1000, 1000, 4097)
    for num_rows in (0, 1, 7):
        logits = torch.randn(num_rows, sum(sizes), generator=generator)
        uniforms = torch.rand(num_rows, len(sizes), generator=generator)
        for allow_missing in (True, False):
            for temperature in (0.0, 0.8):
                sampler = ClassSampler(sizes, temperature, top_k, allow_missing)
                with use_reference():
                    expected = sampler(logits, uniforms)
                assert torch.equal(sampler(logits, uniforms), expected)
                wide = torch.randn(num_rows, 2 * sum(sizes), generator=generator)
                wide[:, ::2] = logits
                assert torch.equal(sampler(wide[:, ::2], uniforms.T.contiguous().T), expected)


def test_equal_logits_are_drawn_alike_and_nan_draws_some_class(generator):
    uniforms = torch.rand(DRAWS, 1, generator=generator)
    for size in (21, 1001):
        drawn = ClassSampler((size,), 1.0, 20)(torch.zeros(DRAWS, size), uniforms).flatten()
        counts = drawn.bincount(minlength=size)
        assert counts[1:21].sum() == DRAWS  # of equal ones the first 20
        assert ((counts[1:21] - DRAWS / 20).abs() < 5 * (DRAWS / 20) ** 0.5).all()
        broken = ClassSampler((size,), 1.0, 20)(torch.full((7, size), torch.nan), uniforms[:7])
        assert ((broken >= 1) & (broken < size)).all()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_and_numbers_of_another_shape_are_refused(temperature):
    sampler = ClassSampler((5, 40), temperature, top_k=3)
    with pytest.raises(ValueError, match=r"logits has shape \(1, 7\); want \(B, 45\)"):
        sampler(torch.zeros(1, 7), None)
    with pytest.raises(ValueError, match=r"uniforms has shape \(2, 1\) .*; want \(2, 2\) and torch.float32"):
        sampler(torch.zeros(2, 45), torch.zeros(2, 1))
    with pytest.raises(ValueError, match=r"uniforms has shape \(2, 2\) and dtype torch.float64"):
        sampler(torch.zeros(2, 45), torch.zeros(2, 2, dtype=torch.float64))


def test_one_event_of_broken_logits_is_told_though_later_ones_are_whole(model, past):
    with torch.no_grad():
        model.target_positions.table[1] = torch.nan
    length = model.config.tgt_seq_len
    with pytest.raises(FloatingPointError, match="not all finite"):
        generate(model, past, length + 1, temperature=0)
