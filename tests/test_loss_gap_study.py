"""benchmarks/studies/loss_gap: what is run, that it is exact, and that the text says what the figures say."""

import json
import math
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.studies.loss_gap import __main__ as study
from benchmarks.studies.loss_gap import report, settings, streams, training
from benchmarks.studies.loss_gap import runs as playing
from benchmarks.studies.loss_gap.attribution import Estimate, contributions, difference, first_below, parting
from benchmarks.studies.loss_gap.findings import BASE, Findings, Reference, Rung
from benchmarks.studies.loss_gap.runs import Runs
from benchmarks.studies.loss_gap.settings import Plan, Setting, Sizes
from benchmarks.studies.loss_gap.training import Run, Stepper, build_model, missing, train
from benchmarks.training import endless
from eventkern.data import EventStore
from eventkern.data.synthetic import WorkforceProcess

SMALL = WorkforceProcess(num_actors=3, num_locations=2, num_residents=6, start="2024-11-01", num_days=24)
MODEL = {"d_model": 8, "num_heads": 2, "encoder_layers": 1, "decoder_layers": 1}
SIZES = {"src_seq_len": 4, "tgt_seq_len": 5, "epochs": 1, "grad_accum": 1}


@pytest.fixture
def one_thread() -> Iterator[None]:
    with playing.threads_for_now(1):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("streams")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The study on streams of three employees and models of width 8."""
    monkeypatch.setattr(
        streams, "STREAMS", {"workforce": SMALL, **dict.fromkeys(("many_ids", "natural_sizes"), replace(SMALL, seed=1))}
    )
    configs = tmp_path / "configs"
    configs.mkdir()
    cpu = {**SIZES, "id_category_size": 20, "batch_size": 4, "model": MODEL}
    gpu = {**SIZES, "id_category_size": 64, "batch_size": 2, "grad_accum": 2, "tgt_seq_len": 7}
    gpu["model"] = {**MODEL, "decoder_layers": 2}
    for name, values in (("cpu_baseline", cpu), ("gpu_optimized", gpu)):
        (configs / f"{name}.json").write_text(json.dumps(values))
    monkeypatch.setattr(settings, "CONFIGS", configs)


@pytest.fixture
def store(folder: Path) -> EventStore:
    return streams.open_stream("workforce", folder)


def test_a_ladder_leads_from_one_configuration_to_the_other_in_either_order() -> None:
    plan = Plan(Sizes(num_steps=3, long_steps=4, seeds=2), "cpu")
    assert plan.forward[0] == plan.backward[0] == settings.cpu_setting(3)
    assert plan.forward[-1] == plan.backward[-1] == settings.gpu_setting(3, "cpu")
    for rungs, factors in ((plan.forward, plan.factors), (plan.backward, plan.factors[::-1])):
        for before, after, factor in zip(rungs, rungs[1:], factors, strict=False):
            changed = {key for key, value in after.to_dict().items() if before.to_dict()[key] != value}
            assert changed
            assert changed <= set(factor.change)


def test_on_a_gpu_the_ladder_ends_there() -> None:
    plan = Plan(Sizes(num_steps=3, long_steps=4, seeds=1), "cuda")
    assert plan.forward[-2].device == "cpu"
    assert plan.forward[-1] == settings.gpu_setting(3, "cuda")
    assert plan.factors[-1].name == "device cpu to cuda"


def test_a_rung_gives_the_same_numbers_again_and_others_with_another_seed(store: EventStore, one_thread: None) -> None:
    setting = settings.gpu_setting(4, "cpu")
    first, again, other = (train(store, setting, seed).to_dict() for seed in (0, 0, 1))
    del first["step_s"], again["step_s"]
    assert first == again
    assert first["nats"] != other["nats"]


@pytest.mark.parametrize("reduction", ["mean", "sum_of_means", "sum"])
def test_readings_are_what_the_reduction_makes_of_the_same_losses(store: EventStore, reduction: str) -> None:
    run = train(store, replace(settings.cpu_setting(1), reduction=reduction, grad_accum=2), 0)
    batches = endless(training.make_loader(store, run.setting, "train", 0))
    labels = sum(int(next(batches).num_targets) for _ in range(2))
    factor = {"mean": 1, "sum_of_means": 17, "sum": 17 * labels}[reduction]
    assert run.readings[0] == pytest.approx(factor * run.nats[0], rel=1e-6)


def test_micro_batches_make_one_step(store: EventStore) -> None:
    base = settings.cpu_setting(1)
    whole, halves = (replace(base, batch_size=4 // parts, grad_accum=parts, clip=0.0) for parts in (1, 2))
    steppers = [Stepper(store, setting, 0) for setting in (whole, halves)]
    told = [stepper.step() for stepper in steppers]
    torch.testing.assert_close(told[0][1], told[1][1], rtol=1e-6, atol=0)
    assert told[0][2] == pytest.approx(told[1][2], rel=1e-5)


@pytest.mark.parametrize("spread", [0.1, 1.34, 3.0])
def test_first_losses_are_those_of_logits_of_the_spread(store: EventStore, spread: float) -> None:
    setting = replace(settings.gpu_setting(1, "cpu"), initialisation=f"logits_{spread}", d_model=256, precision="fp32")
    run = train(store, setting, 0)
    expected = math.log(64) + spread**2 / 2
    # Of 63 wrong logits the mean of exp is short of its expectation where the spread is wide.
    assert statistics.fmean(run.first) == pytest.approx(expected, abs=0.05 + 0.1 * spread**2)


def test_torch_initialisation_is_that_of_its_modules(store: EventStore) -> None:
    model = build_model(store, replace(settings.gpu_setting(1, "cpu"), initialisation="torch", d_model=64), 0)
    linear = model.decoder[0].feed_forward[0]
    reference = torch.nn.Linear(64, 256)
    for ours, theirs in ((linear.weight, reference.weight), (model.heads.weight, reference.weight)):
        assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.05)
        assert ours.abs().max() <= 64**-0.5
    assert model.embedding.weight.std().item() == pytest.approx(1.0, rel=0.05)


def test_a_backward_inside_forward_adds_micro_batches_up_unweighted(store: EventStore) -> None:
    clean = replace(settings.cpu_setting(1), grad_accum=4, clip=0.0)
    plain, inside = (Stepper(store, setting, 0) for setting in (clean, replace(clean, bugs=("backward_in_forward",))))
    (reading, _, norm), (inside_reading, _, inside_norm) = plain.step(), inside.step()
    assert inside_reading == pytest.approx(reading, rel=1e-6)
    assert inside_norm == pytest.approx(4 * norm, rel=0.02)  # but for windows that have fewer labels


def test_the_mean_of_stacked_losses_reads_and_weighs_a_seventeenth(store: EventStore) -> None:
    clean = replace(settings.cpu_setting(1), reduction="sum_of_means", clip=0.0)
    plain, stacked = (Stepper(store, setting, 0) for setting in (clean, replace(clean, bugs=("mean_of_stacked",))))
    (reading, _, norm), (stacked_reading, _, stacked_norm) = plain.step(), stacked.step()
    assert stacked_reading == pytest.approx(reading / 17, rel=1e-5)
    assert stacked_norm == pytest.approx(norm / 17, rel=1e-4)


def test_a_float_is_what_forward_returns(store: EventStore) -> None:
    setting = replace(settings.cpu_setting(1), bugs=("backward_in_forward", "float_returns"))
    noted = training.NotesModel(build_model(store, setting, 0), setting)
    losses = noted(next(iter(training.make_loader(store, setting, "train"))))
    assert all(isinstance(loss, float) for loss in losses)
    with pytest.raises(ValueError, match="a float has no backward"):
        replace(setting, bugs=("float_returns",))


def test_what_the_machine_lacks_is_not_run(store: EventStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    on_gpu = settings.gpu_setting(1, "cuda")
    assert missing(on_gpu) == "not run: torch sees no CUDA device"
    assert missing(replace(on_gpu, device="cpu", precision="tf32")) == "not run: cpu has no tf32"
    assert missing(settings.cpu_setting(1)) is None
    with pytest.raises(ValueError, match="torch sees no CUDA device"):
        train(store, on_gpu, 0)
    with pytest.raises(ValueError, match="precision is 'fp8'; want one of fp32, tf32, bf16, fp16"):
        replace(on_gpu, precision="fp8")


def test_runs_are_kept_and_played_once(tmp_path: Path, folder: Path, store: EventStore) -> None:
    setting = settings.cpu_setting(2)
    runs = Runs(tmp_path / "work" / "runs.jsonl", threads=1)
    assert runs.wanted([setting, setting], range(2)) == [(setting, 0), (setting, 1)]
    runs.add(train(store, setting, 0))
    text = runs.path.read_text()
    runs.path.write_text(text + text[:50])  # as a crash in the middle of a line leaves it
    again = Runs(runs.path, threads=1)
    assert again.wanted([setting], range(2)) == [(setting, 1)]
    assert again.of(setting, [0])[0].to_dict() == runs.of(setting, [0])[0].to_dict()
    assert runs.path.read_text() == text
    assert Runs(runs.path, threads=2).wanted([setting], range(2)) == [(setting, 0), (setting, 1)]


def run_of(seed: int, *readings: float) -> Run:
    return Run(settings.cpu_setting(len(readings)), seed, readings=list(readings))


def test_contributions_add_up_to_the_gap_and_are_paired_by_seed() -> None:
    rungs = [[run_of(0, 1.0), run_of(1, 3.0)], [run_of(0, 2.0), run_of(1, 4.0)], [run_of(0, 9.0), run_of(1, 10.0)]]
    parts = contributions(rungs, lambda run: run.reading)
    assert [part.mean for part in parts] == [1.0, 6.5]
    assert parts[0].half_width == 0.0  # both seeds rose by one
    assert difference(rungs[2], rungs[0], lambda run: run.reading).mean == sum(part.mean for part in parts)
    with pytest.raises(ValueError, match=r"after has seeds \[0\]; want \[0, 1\]"):
        difference(rungs[0][:1], rungs[0], lambda run: run.reading)


def test_an_interval_is_student_s() -> None:
    estimate = Estimate.of([1.0, 2.0, 3.0])
    assert estimate.mean == 2.0
    assert estimate.half_width == pytest.approx(4.303 / math.sqrt(3), rel=1e-3)
    assert not estimate.differs_from_zero
    assert Estimate.of([5.0, 5.1, 4.9]).differs_from_zero
    assert not Estimate.of([5.0]).differs_from_zero


def test_where_curves_pass_a_level_and_part() -> None:
    assert first_below([5.0, 3.0, 5.0, 3.0, 3.0], 4.0, window=2) == 5
    assert first_below([5.0, 5.0], 4.0, window=1) is None
    flat = [[0.01 * seed + 0.001 * (step % 3) for step in range(100)] for seed in range(3)]
    late = [
        [value + (step >= 50) * (1.0 + 0.01 * seed) for step, value in enumerate(curve)]
        for seed, curve in enumerate(flat)
    ]
    assert parting(late, flat) == 50
    assert parting(flat, flat) is None
    early = [[value + (step < 50) for step, value in enumerate(curve)] for curve in flat]
    assert parting(early, flat) is None  # apart at first, and not for good


def test_marginal_entropies_are_bounded_by_the_calendar() -> None:
    fields = {"year": 2, "month": 2, "day": 2, "weekday": 2, "hour": 2, "minute": 1}
    calendar = sum(count * math.log(streams.CALENDAR[field] + 1) for field, count in fields.items())
    assert streams.most_marginal(1000) == pytest.approx(5 * math.log(999) + math.log(3) + calendar)


def test_the_whole_study_ends_with_its_files_and_goes_on_where_it_was(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(study, "TIMED_ROUNDS", 2)
    sizes = ["--steps", "3", "--long-steps", "4", "--seeds", "2", "--jobs", "1"]
    arguments = [*sizes, "--out", str(tmp_path / "results"), "--work-dir", str(folder)]
    played: list[Setting] = []

    def interrupted(store: EventStore, setting: Setting, seed: int) -> Run:
        if len(played) == 5:
            raise KeyboardInterrupt
        played.append(setting)
        return train(store, setting, seed)

    monkeypatch.setattr(playing, "train", interrupted)
    assert study.main(arguments) == 130
    assert "the same command goes on" in " ".join(capsys.readouterr().out.split())
    monkeypatch.setattr(playing, "train", train)
    assert study.main(arguments) == 0
    printed = capsys.readouterr().out
    total = len(Runs(folder / "none", 1).wanted(Plan(Sizes(3, 4, 2), "cpu").settings(), range(2)))
    assert f"{total - 5} runs to play" in printed

    (record_path,) = (tmp_path / "results").glob("loss_gap_*.json")
    record = json.loads(record_path.read_text())
    text = record_path.with_suffix(".md").read_text()
    *forward, on_gpu = record["forward"]
    assert on_gpu["not_run"] == "not run: torch sees no CUDA device"
    shares = record["shares"]
    assert record["gap"]["mean"] == pytest.approx(forward[-1]["reading"]["mean"] - forward[0]["reading"]["mean"])
    for name, pair in shares.items():
        for order, rungs in zip(pair, (forward, record["backward"]), strict=True):
            place = next(number for number, rung in enumerate(rungs) if rung["name"] == name)
            rise = rungs[place]["reading"]["mean"] - rungs[place - 1]["reading"]["mean"]
            assert order["mean"] == pytest.approx(rise, abs=1e-9)
    for order in range(2):
        assert sum(pair[order]["mean"] for pair in shares.values()) == pytest.approx(record["gap"]["mean"])
    assert shares["reduction: mean to sum"][0]["mean"] == pytest.approx(16 * forward[0]["reading"]["mean"], rel=0.05)
    assert f"{forward[-1]['reading']['mean']:.3f}" in text or f"{forward[-1]['reading']['mean']:.1f}" in text
    cuda = next(each for each in record["suspects"]["cpu_baseline"] if each["name"] == "device: cuda")
    assert cuda["not_run"] == "not run: torch sees no CUDA device"
    assert "seeds" not in cuda
    assert text.count("not run: torch sees no CUDA device") >= 2
    for name in ("waterfall", "curves", "precision"):
        picture = record_path.with_name(f"{record_path.stem}-{name}.png")
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert f"]({picture.name})" in text


def stood(name: str, first: float, last: float, *ids: tuple[float, float]) -> Rung:
    """Runs of three seeds beside the GPU's configuration, 17 alike but for the two that the notes tell of."""
    setting = replace(settings.gpu_setting(10, "cpu"), id_category_size=1000)
    runs = []
    for seed, (actor, location) in enumerate(ids):
        nats = [last] * 17
        nats[1], nats[3] = actor, location
        steps = [first, *[last] * 9]
        runs.append(Run(setting, seed, readings=steps, nats=steps, tenths=[nats] * 10, validation=nats))
    return Rung(name, setting, runs, Reference(math.log(1000), 2.3, 0.6, 0.14))


def test_the_text_blames_what_stands_out_beyond_its_interval_alone(folder: Path) -> None:
    findings = object.__new__(Findings)
    findings.category_names = streams.open_stream("workforce", folder).schema.category_names
    base = stood(BASE, 6.91, 5.8, *[(6.0, 5.7)] * 3)
    clear = stood("initialisation: clear", 9.9, 5.0, (8.0, 7.5), (8.1, 7.6), (8.2, 7.7))
    doubtful = stood("in order, doubtful", 9.9, 5.0, (9.8, 7.6), (9.9, 6.8), (9.9, 7.2))
    still = stood("optimizer: still", 6.92, 6.87, *[(6.9, 6.9)] * 3)
    findings.suspects = {"large": [base, clear, doubtful, still]}
    text = report.worse_than_guessing_text(findings)
    blamed = text.rpartition("beyond their intervals, with: **")[2]
    assert "initialisation: clear (in validation)" in blamed
    assert "doubtful" not in blamed
    assert "doubtful" in text
    findings.suspects = {"large": [base, doubtful, still]}
    assert "With none of these" in report.worse_than_guessing_text(findings)
    findings.forward = [base]
    told = report.flat_text(findings)
    assert "optimizer: still: 117.6 to 116.9" in told
    assert "doubtful" not in told.partition("Of the suspects")[2]
    findings.suspects = {"large": [base, doubtful]}
    assert "None of the suspects here stays where it began." in report.flat_text(findings)


def test_stations_are_claimed_where_both_were_passed() -> None:
    findings = object.__new__(Findings)
    findings.plan = Plan(Sizes(10, 10, 3), "cpu")
    low, high = stood("small", 4.6, 3.4, *[(3.0, 3.0)] * 3), stood("large", 6.9, 5.7, *[(5.0, 5.0)] * 3)
    findings.forward = [low, high]
    assert report.state_text(findings) == (
        "On the way down the CPU's configuration falls below 4 at step 2, the GPU's does not fall below 85.9 in these "
        "steps."
    )
    findings.forward = [low, stood("large", 6.9, 4.9, *[(5.0, 5.0)] * 3)]
    assert "So 4 and 85.9 are stations" in report.state_text(findings)


@pytest.mark.parametrize(
    ("arguments", "words"), [(["--steps", "1"], "--steps is 1; want at least 2"), (["--seeds", "0"], "--seeds is 0")]
)
def test_bad_options_are_refused(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        study.parse(arguments)
    assert words in capsys.readouterr().err
