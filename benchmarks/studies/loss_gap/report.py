"""The loss study in words and tables; every number in them comes from the findings."""

from __future__ import annotations

import math
import statistics

from benchmarks.studies.loss_gap.attribution import Estimate, difference, first_below, parting
from benchmarks.studies.loss_gap.findings import BASE, Findings, Rung
from benchmarks.studies.loss_gap.settings import NOTED_CPU, NOTED_GPU, NOTED_IDS, NOTED_TARGET
from benchmarks.studies.loss_gap.streams import most_marginal
from benchmarks.studies.results import aligned

NUM_CATEGORIES = 17
STILL = 0.02
"""Share of its first loss by which a run that learns nothing falls at most."""


def tables(findings: Findings) -> list[str]:
    """All tables under their headings."""
    parts = ["## The ladder, one factor more at a time", ladder_table([*findings.forward, *findings.beyond])]
    parts += ["## The same factors in the other order", ladder_table(findings.backward)]
    parts += ["## What each factor carries", share_table(findings)]
    for base, rungs in findings.suspects.items():
        parts += [f"## Suspects beside {base}: one change each", suspect_table(findings, rungs)]
    parts += ["## The notes' bugs, on cpu_baseline with the sum and 8 micro-batches a step", bug_table(findings)]
    long = findings.precisions[0].setting
    parts += [
        f"## Precision over {long.num_steps:,} steps of cpu_baseline at 1e-3",
        precision_table(findings.precisions),
    ]
    parts += ["## gpu_optimized under the target", ladder_table(findings.remedies)]
    return parts


def ladder_table(rungs: list[Rung]) -> str:
    """Rungs with the loss in the notes' units and against what is known."""
    head = ("rung", "reads", "nats a category", "of ln(classes)", "above marginal", "above floor", "validation nats")
    lines: list[tuple[str, ...]] = [head]
    for rung in rungs:
        if rung.reason:
            lines.append((rung.name, rung.reason, *[""] * 5))
            continue
        nats, known = rung.nats.mean, rung.reference
        above_floor = "not known" if math.isnan(known.floor) else f"{nats - known.floor:+.2f}"
        relative = (f"{nats / known.guessing:.2f}", f"{nats - known.marginal:+.2f}", above_floor)
        lines.append((rung.name, str(rung.reading), str(rung.nats), *relative, str(rung.validation)))
    return aligned(lines)


def share_table(findings: Findings) -> str:
    """The attribution in both orders."""
    gap = findings.gap.mean
    lines: list[tuple[str, ...]] = [("factor", "in the ladder's order", "in the other order", "mean", "of the gap")]
    for name, (forward, backward) in findings.shares().items():
        mean = (forward.mean + backward.mean) / 2
        lines.append((name, signed(forward), signed(backward), f"{mean:+.2f}", f"{100 * mean / gap:.1f} %"))
    return aligned([*lines, ("all", signed(findings.gap), signed(findings.gap), f"{gap:+.2f}", "100 %")])


def suspect_table(findings: Findings, rungs: list[Rung]) -> str:
    """Suspects, their first and last losses, and the two categories that the notes tell of."""
    ids = [*(f"{name} then" for name in NOTED_IDS), *(f"{name}, validation" for name in NOTED_IDS)]
    head = ("suspect", "first nats", "last nats", "against the base", f"sum nearest {NOTED_GPU}, in tenth", *ids)
    lines: list[tuple[str, ...]] = [head]
    for rung in rungs:
        if rung.reason:
            lines.append((rung.name, rung.reason, *[""] * (3 + len(ids))))
            continue
        tenth, nats = findings.at_noted_sum(rung)
        told = [f"{value:.2f}" for each in (nats, rung.validated) for value in findings.noted_ids(each).values()]
        against = signed(findings.against_base(rung, rungs)) if rung.name != BASE else ""
        lines.append(
            (rung.name, f"{rung.first:.2f}", str(rung.nats), against, f"{math.fsum(nats):.1f}, {tenth}", *told)
        )
    return aligned(lines)


def bug_table(findings: Findings) -> str:
    """What each bug reads, learns and takes."""
    lines: list[tuple[str, ...]] = [
        ("bug", "reads", "validation nats", "norm of the gradients", "ms a step", "of the clean step")
    ]
    clean_s = findings.step_s["none"]
    for rung in findings.bugs:
        if rung.reason:
            lines.append((rung.name, rung.reason, *[""] * 4))
            continue
        norm = statistics.median(value for run in rung.runs for value in run.grad_norms)
        step_s = findings.step_s[rung.name]
        told = (f"{norm:.3g}", f"{1e3 * step_s:.1f}", f"{step_s / clean_s:.2f}")
        lines.append((rung.name, str(rung.reading), str(rung.validation), *told))
    return aligned(lines)


def precision_table(rungs: list[Rung]) -> str:
    """Precisions at the end of a long run."""
    head = ("precision", "last nats", "validation nats", "validation against fp32")
    lines: list[tuple[str, ...]] = [(*head, "norm of the gradients", "skipped steps", "parts from fp32 at step")]
    plain = rungs[0]
    for rung in rungs:
        if rung.reason:
            lines.append((rung.name, rung.reason, *[""] * 5))
            continue
        finite = [value for run in rung.runs for value in run.grad_norms if math.isfinite(value)]
        step = parting_step(rung, plain)
        told = (f"{statistics.median(finite):.3g}", f"{sum(run.skipped for run in rung.runs)}")
        against = "" if rung is plain else signed(validation_difference(rung, plain), 4)
        parts = "" if rung is plain else "never" if step is None else f"{step:,}"
        lines.append((rung.name, str(rung.nats), str(rung.validation), against, *told, parts))
    return aligned(lines)


def validation_difference(rung: Rung, plain: Rung) -> Estimate:
    """How many validation nats a category a rung ends above another."""
    return difference(rung.runs, plain.runs, lambda run: statistics.fmean(run.validation))


def parting_step(rung: Rung, plain: Rung) -> int | None:
    """From which step on the training curves differ."""
    return parting([run.nats for run in rung.runs], [run.nats for run in plain.runs])


def signed(estimate: Estimate, digits: int = 2) -> str:
    """With its sign and interval."""
    interval = "" if math.isnan(estimate.half_width) else f" ± {estimate.half_width:.{digits}f}"
    return f"{estimate.mean:+.{digits}f}{interval}"


def conclusion(findings: Findings) -> list[str]:
    """Paragraphs in plain words."""
    return [
        gap_text(findings),
        *([] if findings.plan.sizes.seeds > 1 else ["With one seed there are no intervals: nothing here is certain."]),
        share_text(findings),
        state_text(findings),
        flat_text(findings),
        worse_than_guessing_text(findings),
        target_text(findings),
        bug_text(findings),
        precision_text(findings),
        unknown_text(findings),
    ]


def gap_text(findings: Findings) -> str:
    """What was reproduced."""
    small, large, sizes = findings.forward[0], findings.forward[-1], findings.plan.sizes
    return (
        f"After {sizes.num_steps} optimizer steps on the workforce stream ({sizes.seeds} seeds, 95 % intervals) the "
        f"configuration of the CPU reads {small.reading} and that of the GPU {large.reading}, in the units that each "
        f"prints: a mean over {NUM_CATEGORIES} categories there, a sum here. In the same unit that is "
        f"{small.nats.mean:.2f} against {large.nats.mean:.2f} nats a category. The notes' {NOTED_GPU} is a mean of "
        f"{NOTED_GPU / NUM_CATEGORIES:.2f}."
    )


def share_text(findings: Findings) -> str:
    """The attribution."""
    gap = findings.gap.mean
    shares = findings.shares()
    by_size = sorted(shares, key=lambda name: -abs(sum(each.mean for each in shares[name])))
    parts = [
        f"{name} {shares[name][0].mean:+.1f} or {shares[name][1].mean:+.1f} "
        f"({100 * shares[name][0].mean / gap:.0f} or {100 * shares[name][1].mean / gap:.0f} %)"
        for name in by_size
    ]
    unclear = [name for name in shares if not any(each.differs_from_zero for each in shares[name])]
    doubt = f" Not told from nothing in either order: {', '.join(unclear)}." if unclear else ""
    return (
        f"Of the {gap:.1f} between them each factor carries, in the order of the ladder or in the other: "
        f"{'; '.join(parts)}. **{by_size[0]}** carries most. The orders differ because a sum multiplies whatever loss "
        f"it meets by {NUM_CATEGORIES}.{doubt}"
    )


def state_text(findings: Findings) -> str:
    """When runs pass the notes' numbers."""
    window = max(1, findings.plan.sizes.num_steps // 20)
    small = first_below(findings.forward[0].curve, NOTED_CPU, window)
    large = first_below([NUM_CATEGORIES * value for value in findings.forward[-1].curve], NOTED_GPU, window)
    return (
        "Both numbers are stations that such runs pass on their way down: the CPU's configuration "
        f"{passed(small, NOTED_CPU)}, the GPU's {passed(large, NOTED_GPU)}. So 4 and 85.9 tell how far each had come, "
        "not how good each can be."
    )


def passed(step: int | None, level: float) -> str:
    return f"does not fall below {level:g} in these steps" if step is None else f"falls below {level:g} at step {step}"


def flat_text(findings: Findings) -> str:
    """What 85.9 over five epochs means."""
    large = findings.forward[-1]
    known, most = large.reference, most_marginal(large.setting.id_category_size)
    still = [
        rung.name for rung in findings.large if not rung.reason and rung.first - rung.nats.mean < STILL * rung.first
    ]
    shown = (
        f"Of the suspects here these stay within {100 * STILL:.0f} % of where they began: {', '.join(still)}."
        if still
        else "None of the suspects here stays where it began."
    )
    return (
        f"A loss that stays at {NOTED_GPU} for five epochs is no floor and no plateau of frequencies. Guessing costs "
        f"{NUM_CATEGORIES * known.guessing:.1f} at {large.setting.id_category_size} classes; the marginal entropies "
        f"add up to {NUM_CATEGORIES * known.marginal:.1f} in this stream, and in any data of that schema to {most:.1f} "
        f"at most, since a flag has two values, a month twelve, a minute sixty. {NOTED_GPU} lies "
        f"{NOTED_GPU - most:.1f} above even that: such a model has not learned how often each class occurs, which the "
        f"biases of the heads alone learn in every run here that learns at all. So for five epochs its updates did not "
        f"arrive, were too small to matter, or undid one another. {shown}"
    )


def worse_than_guessing_text(findings: Findings) -> str:
    """What to make of 7.8 and 7.6 nats at 1,000 classes."""
    large = findings.large
    guessing = large[0].reference.guessing
    noted = ", ".join(f"{name} {value}" for name, value in NOTED_IDS.items())
    base = next(rung for rung in large if rung.name == BASE)
    told, caught = [], []
    for rung in large:
        if rung.reason or not ("initialisation" in rung.name or "order" in rung.name or "actors" in rung.name):
            continue
        _, nats = findings.at_noted_sum(rung)
        trained, validated = findings.noted_ids(nats), findings.noted_ids(rung.validated)
        told.append(
            f"{rung.name}: first loss {rung.first:.2f}; when the sum is {math.fsum(nats):.1f}, {pair_text(trained)}; "
            f"at the end in validation {pair_text(validated)}"
        )
        for ids, where in ((trained, f"in training, at a sum of {math.fsum(nats):.1f}"), (validated, "in validation")):
            if all(value > guessing for value in ids.values()):
                caught.append(f"{rung.name} ({where}: {pair_text(ids)})")
    fp32 = next((rung for rung in large if rung.name == "precision: fp32"), None)
    half = (
        f"bf16 moves the mean by {abs(findings.against_base(fp32, large).mean):.3f} nats"
        if fp32 is not None and not fp32.reason
        else "bf16 was not compared here"
    )
    verdict = (
        f"Both categories are worse than guessing with: **{'; '.join(caught)}**."
        if caught
        else "With none of these are both categories worse than guessing."
    )
    return (
        f"The notes read {noted} nats, where guessing among 1,000 classes costs {guessing:.2f}. A sum cannot lift one "
        f"category above guessing, and {half}. Logits of variance v that know nothing cost ln V + v / 2 on average, so "
        f"7.8 is what logits of standard deviation {math.sqrt(2 * (NOTED_IDS['ActorRecordId'] - guessing)):.2f} cost. "
        f"As it is, the first loss is {base.first:.2f}. {'. '.join(told)}. {verdict}"
    )


def pair_text(ids: dict[str, float]) -> str:
    """The nats of the two categories."""
    return " and ".join(f"{value:.2f}" for value in ids.values())


def target_text(findings: Findings) -> str:
    """The configuration that gets under the notes' target."""
    words = []
    for rung in [*findings.remedies, *(each for each in findings.large if each.name == "learning rate 3e-3")]:
        if rung.reason:
            continue
        step = first_below(rung.curve, NOTED_TARGET, max(1, rung.setting.num_steps // 20))
        events = rung.setting.predictions_of_a_step * (step or rung.setting.num_steps)
        words.append(
            f"with {rung.name} and {rung.setting.grad_accum} micro-batches of {rung.setting.batch_size} a step the "
            f"mean {passed(step, NOTED_TARGET)} ({events:,} predicted events) and is {rung.nats.mean:.2f} at the end"
        )
    return (
        f"The GPU's configuration gets under the notes' target, a mean of {NOTED_TARGET}, by training at a rate that "
        f"suits it, initialised as eventkern does, shuffled: {'; '.join(words)}."
    )


def bug_text(findings: Findings) -> str:
    """What the bugs cost."""
    clean = findings.bugs[0]
    parts = []
    for rung in findings.bugs[1:]:
        if rung.reason:
            parts.append(f"{rung.name}: {rung.reason}")
            continue
        nats = validation_difference(rung, clean)
        times = findings.step_s[rung.name] / findings.step_s[clean.name]
        parts.append(f"{rung.name} {signed(nats, 3)} validation nats, {times:.2f} times the step")
    return (
        f"The bugs of the notes' code, each alone: {'; '.join(parts)}. Adam divides a gradient's scale away, so those "
        f"that rescale the loss change what is learned through the clipping alone, while the mean of the stacked "
        f"losses prints a {NUM_CATEGORIES}th of the sum. A backward inside forward also adds micro-batches up "
        "unweighted, passes the loss scale of fp16 by, and leaves nothing to compile as one graph or to synchronise "
        "once a step. What a transfer in forward and a float returned cost on a GPU, a wait each, a CPU cannot show."
    )


def precision_text(findings: Findings) -> str:
    """Whether precision matters over thousands of steps."""
    plain = findings.precisions[0]
    if plain.reason:
        return f"Precisions were not compared: {plain.reason}."
    words = [f"fp32 ends at {plain.validation} validation nats"]
    for rung in findings.precisions[1:]:
        if rung.reason:
            words.append(f"{rung.name} {rung.reason}")
            continue
        step = parting_step(rung, plain)
        words.append(
            f"{rung.name} {signed(validation_difference(rung, plain), 4)} from it, "
            f"{sum(run.skipped for run in rung.runs)} steps skipped, "
            + ("never apart" if step is None else f"apart from step {step:,} on")
        )
    return f"Over {plain.setting.num_steps:,} steps of cpu_baseline: {'; '.join(words)}."


def unknown_text(findings: Findings) -> str:
    """What cannot be inferred."""
    rates = sorted({rung.setting.lr for rung in (findings.forward[0], findings.forward[-1])})
    return (
        "What cannot be inferred without the notes' data and logs: the entropies of their categories, and so where "
        "their runs stood between marginal and floor; which reduction, rate and initialisation each run had (taken "
        f"here: a mean at {rates[-1]:g} on the CPU, a sum at {rates[0]:g} on the GPU, eventkern's initialisation "
        "unless said); after how many steps the readings were taken; and which of the causes that keep a loss flat was "
        "theirs. That 85.9 is a sum is inferred, too: as a mean it would mean probabilities of 10^-37."
    )
