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

NOTHING = 0.005
"""Share of the gap that is called nothing."""


def tables(findings: Findings) -> list[str]:
    """All tables under their headings."""
    parts = ["## The ladder, one factor more at a time", ladder_table([*findings.forward, *findings.beyond])]
    parts += ["## The same factors in the other order", ladder_table(findings.backward)]
    parts += ["## What each factor carries", share_table(findings)]
    for base, rungs in findings.suspects.items():
        parts += [f"## Suspects beside {base}", suspect_table(findings, rungs)]
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
    head = ("rung", "reads", "nats a category", "validation nats", "of ln(classes)", "above marginal", "above floor")
    lines: list[tuple[str, ...]] = [head]
    for rung in rungs:
        if rung.reason:
            lines.append((rung.name, rung.reason, *[""] * 5))
            continue
        validation, known = rung.validation.mean, rung.reference
        above_floor = "not known" if math.isnan(known.floor) else f"{validation - known.floor:+.2f}"
        relative = (f"{validation / known.guessing:.2f}", f"{validation - known.marginal:+.2f}", above_floor)
        lines.append((rung.name, str(rung.reading), str(rung.nats), str(rung.validation), *relative))
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
        is_comparable = rung.name != BASE and rung.setting.num_steps == rungs[0].setting.num_steps
        against = signed(findings.against_base(rung, rungs)) if is_comparable else ""
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
    shares = [
        100 * sizes.num_steps * rung.setting.batch_size * rung.setting.grad_accum / findings.num_windows
        for rung in (small, large)
    ]
    return (
        f"After {sizes.num_steps} optimizer steps on the workforce stream ({sizes.seeds} seeds of initialisation and "
        f"order, 95 % intervals) the configuration of the CPU reads {small.reading} and that of the GPU "
        f"{large.reading}, in the units that each prints: a mean over {NUM_CATEGORIES} categories there, a sum here. "
        f"In the same unit that is {small.nats.mean:.2f} against {large.nats.mean:.2f} nats a category. The notes' "
        f"{NOTED_GPU} is a mean of {NOTED_GPU / NUM_CATEGORIES:.2f}. The steps are {shares[0]:.2g} % of an epoch with "
        f"the one and {shares[1]:.2g} % with the other, where the notes tell of whole epochs."
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
    nothing = [name for name in shares if all(abs(each.mean) < NOTHING * abs(gap) for each in shares[name])]
    doubt = f" Next to nothing in either order (below {100 * NOTHING:g} %): {', '.join(nothing)}." if nothing else ""
    return (
        f"Of the {gap:.1f} between them each factor carries, in the order of the ladder or in the other: "
        f"{'; '.join(parts)}. **{by_size[0]}** carries most. What a factor adds depends on those before it, and a sum "
        f"multiplies it by {NUM_CATEGORIES}, hence the difference between the orders.{doubt}"
    )


def state_text(findings: Findings) -> str:
    """When runs pass the notes' numbers."""
    window = max(1, findings.plan.sizes.num_steps // 20)
    small = first_below(findings.forward[0].curve, NOTED_CPU, window)
    large = first_below([NUM_CATEGORIES * value for value in findings.forward[-1].curve], NOTED_GPU, window)
    told = f"On the way down the CPU's configuration {passed(small, NOTED_CPU)}, the GPU's {passed(large, NOTED_GPU)}."
    if small is None or large is None:
        return told
    return f"{told} So 4 and 85.9 are stations that such runs pass, and tell how far each had come."


def passed(step: int | None, level: float) -> str:
    return f"does not fall below {level:g} in these steps" if step is None else f"falls below {level:g} at step {step}"


def flat_text(findings: Findings) -> str:
    """What 85.9 over five epochs means."""
    large = findings.forward[-1]
    known, most = large.reference, most_marginal(large.setting.id_category_size)
    still = [
        f"{rung.name}: {NUM_CATEGORIES * rung.first:.1f} to {NUM_CATEGORIES * rung.nats.mean:.1f}"
        for rung in findings.large
        if not rung.reason and rung.first - rung.nats.mean < STILL * rung.first
    ]
    shown = (
        f"Of the suspects here these move by less than {100 * STILL:.0f} % in their steps: {'; '.join(still)}."
        if still
        else "None of the suspects here stays where it began."
    )
    spread = math.sqrt(max(0.0, 2 * (NOTED_GPU - most) / NUM_CATEGORIES))
    return (
        f"A loss that stays at {NOTED_GPU} for five epochs is no plateau of frequencies. The marginal entropies add up "
        f"to {NUM_CATEGORIES * known.marginal:.1f} in this stream, and in any data of that schema to {most:.1f} at "
        f"most, since a flag has two values, a month twelve, a minute sixty. {NOTED_GPU} lies {NOTED_GPU - most:.1f} "
        "above even that, so such a model knows less than how often each class occurs. If every category had "
        f"{large.setting.id_category_size} classes, as taken here, guessing would cost "
        f"{NUM_CATEGORIES * known.guessing:.1f}, and a run whose updates do not arrive would stay there or above. If "
        f"categories have their natural numbers of classes, guessing costs about {most:.1f}, and a model that never "
        f"learned reads {NOTED_GPU} where its logits have a standard deviation of {spread:.2f}: a hypothesis that the "
        f"next paragraph meets again. {shown}"
    )


def worse_than_guessing_text(findings: Findings) -> str:
    """What to make of 7.8 and 7.6 nats at 1,000 classes."""
    large = findings.large
    base = large[0]
    guessing = math.log(base.setting.id_category_size)
    noted = ", ".join(f"{name} {value}" for name, value in NOTED_IDS.items())
    told, caught = [], []
    for rung in large:
        words = ("initialisation", "order", "actors", "norm")
        if rung.reason or not any(word in rung.name for word in words):
            continue
        tenth, nats = findings.at_noted_sum(rung)
        trained, validated = findings.noted_estimates(rung, tenth), findings.noted_estimates(rung, None)
        places = ((trained, f"in training, at a sum of {math.fsum(nats):.1f}"), (validated, "in validation"))
        told.append(
            f"{rung.name}: first loss {rung.first:.2f}, "
            + ", ".join(f"{where} {pair_text(ids)}" for ids, where in places)
        )
        caught += [
            f"{rung.name} ({where})"
            for ids, where in places
            if all(each.mean - each.half_width > guessing for each in ids.values())
        ]
    fp32 = next((rung for rung in large if rung.name == "precision: fp32"), None)
    half = (
        f"autocast to bf16 moves the mean by {abs(findings.against_base(fp32, large).mean):.4f} nats here"
        if fp32 is not None and not fp32.reason
        else "bf16 was not compared here"
    )
    verdict = (
        f"Both categories are worse than guessing, beyond their intervals, with: **{'; '.join(caught)}**."
        if caught
        else "With none of these are both categories worse than guessing beyond their intervals."
    )
    return (
        f"The notes read {noted} nats, where guessing among {base.setting.id_category_size:,} classes costs "
        f"{guessing:.2f}. A sum cannot lift one category above guessing, and {half}. Logits of variance v that know "
        f"nothing cost ln V + v / 2 on average, so 7.8 is what logits of standard deviation "
        f"{math.sqrt(2 * (NOTED_IDS['ActorRecordId'] - guessing)):.2f} cost. {'. '.join(told)}. {verdict}"
    )


def pair_text(ids: dict[str, Estimate]) -> str:
    """The nats of the two categories."""
    return " and ".join(
        f"{each.mean:.2f}" + ("" if math.isnan(each.half_width) else f" ± {each.half_width:.2f}")
        for each in ids.values()
    )


def target_text(findings: Findings) -> str:
    """The configuration that gets under the notes' target."""
    words = []
    for rung in [*findings.remedies, *(each for each in findings.large if each.name == "learning rate 3e-3")]:
        if rung.reason:
            continue
        step = first_below(rung.curve, NOTED_TARGET, max(1, rung.setting.num_steps // 20))
        events = rung.setting.predictions_of_a_step * (step or rung.setting.num_steps)
        words.append(
            f"with {rung.name}, {rung.setting.grad_accum} x {rung.setting.batch_size} windows a step, the mean "
            f"{passed(step, NOTED_TARGET)} ({events:,} predicted events) and is {rung.nats.mean:.2f} at the end"
        )
    marginal = findings.forward[-1].reference.marginal
    return (
        f"The notes' target for the GPU's configuration is a mean of {NOTED_TARGET}: {'; '.join(words)}. On this "
        f"stream that is no high aim: counting frequencies gives {marginal:.2f}."
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
        f"The bugs of the notes' code: {'; '.join(parts)}. Adam divides a gradient's scale away, so those "
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
    words = [f"fp32 ends at {plain.validation} validation nats a category"]
    for rung in findings.precisions[1:]:
        if rung.reason:
            words.append(f"{rung.name} {rung.reason}")
            continue
        step = parting_step(rung, plain)
        words.append(
            f"{rung.name} {signed(validation_difference(rung, plain), 4)} from it, "
            f"{sum(run.skipped for run in rung.runs)} steps skipped, "
            + ("not told apart by these seeds" if step is None else f"apart from step {step:,} on")
        )
    return (
        f"Over {plain.setting.num_steps:,} steps of cpu_baseline at {plain.setting.lr:g}, autocast over float32 "
        f"weights: {'; '.join(words)}."
    )


def unknown_text(findings: Findings) -> str:
    """What cannot be inferred."""
    rates = sorted({rung.setting.lr for rung in (findings.forward[0], findings.forward[-1])})
    return (
        "What cannot be inferred without the notes' data and logs: the entropies of their categories, and so where "
        "their runs stood between marginal and floor; which reduction, rate and initialisation each run had (taken "
        f"here: a mean at {rates[-1]:g} on the CPU, a sum at {rates[0]:g} on the GPU, eventkern's initialisation "
        "unless said); whether all categories had id_category_size classes, as taken here, or their natural numbers; "
        "whether the weights themselves were bf16, where small updates round away, which was not tried; after how "
        "many steps the readings were taken; and which of the causes that keep a loss flat was theirs. That 85.9 is a "
        "sum is inferred, too: as a mean it would mean probabilities of 10^-37."
    )
