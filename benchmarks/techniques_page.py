"""What ways of training do to a merge: the part of docs/results.md that comes from the studies of techniques.

Sentences are made from the cells by rule: a change is called one where its 95 % interval excludes 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks import penalty_cost
from benchmarks.study_words import COUNTS, MODELS, Study, rate
from mergeready.study.cells import EXPERT
from mergeready.study.results import Results, Sample
from mergeready.study.tables import markdown, merge_labels, plain, shown, signed

PLAIN, PLATEAU = "cosine", "plateau"
RECOMMENDED = "kronecker_filter"
"""What mergeready recommends where peers share factors, with settings that are its defaults."""
LEADING = "task_arithmetic"
VALIDATED, JOINT = "best_validation", "best merge"
WANTED_GAIN, WANTED_OVER_PLATEAU, ALLOWED_LOSS, ALLOWED_TIME = 0.05, 0.02, 0.01, 1.05
"""What a technique would have to reach to be a default: points of accuracy, and times the plain run."""


@dataclass(frozen=True)
class Place:
    """One way to get a merge: how to train, when to stop, how to merge."""

    arm: str
    stop: str
    method: str

    def at(self, results: Results) -> str:
        """The checkpoint that the stop means; the step of the best merge is chosen on validation examples."""
        if self.stop == "end":
            return str(results.steps(self.arm)[-1])
        return str(results.best_step(self.arm, self.method)) if self.stop == JOINT else self.stop

    def sample(self, results: Results) -> Sample | None:
        """Test values."""
        return results.sample(self.arm, self.at(results), self.method)

    def minus(self, other: Place, results: Results) -> Sample | None:
        """The difference to another, over common seeds."""
        ours, theirs = ((place.arm, place.at(results), place.method) for place in (self, other))
        return results.difference(ours, theirs)

    def __str__(self) -> str:
        return f"{self.arm}, {self.stop.replace('_', ' ')}, {self.method}"


STOPS = ("end", VALIDATED, JOINT)


def section(screening: Study, seeds: Study, eight: Study, images: Study) -> str:
    """The text.

    Args:
        screening: The study of all arms with one seed.
        seeds: The study of the best ones with several.
        eight: The study of those that help, among more experts.
        images: The screening on images.
    """
    found, shared, suite = screening.results, screening.settings.arms[PLAIN], screening.suite
    if not found.contents:
        return "## Techniques\n\nNot measured yet."
    about = f"""## Techniques: a screening

Every technique alone on {COUNTS[screening.tasks]} text tasks ({MODELS[suite["backbone"]]}, {suite["train"]} training examples a task,
{max(screening.settings.steps)} steps of batch {shared.batch_size}, cosine from {rate(shared.learning_rate)} unless the arm says otherwise), one seed; the merge's scale is searched
anew for every arm on {suite["validation"]} validation examples a task. Brackets are 95 % bootstrap intervals over {suite["test"]} test examples a task and
say nothing of seeds. `{PLAIN}` is plain training to the end, `{PLATEAU}` lowers the rate on plateau and stops. Time is CPU time of a run against `{PLAIN}`'s,
on a shared machine. What each arm sets is in `benchmarks/studies/{screening.settings.name}.yaml`.

{screening_table(found)}

{screening_text(found)}"""
    parts = [about]
    if seeds.results.contents:
        parts.append(_over_seeds(seeds.results))
    if eight.results.contents:
        parts.append(_among_more(eight, seeds))
    if images.results.contents:
        parts.append(_on_images(images))
    if eight.results.contents:
        parts.append(_closing([seeds, eight]))
    return "\n\n".join(parts)


def _over_seeds(found: Results) -> str:
    return f"""## The best of them, over seeds

{COUNTS[len(found.labels("seed"))].capitalize()} seeds, {COUNTS[len(merge_labels(found))]} merge methods, three moments to stop: the end; each expert's own best checkpoint on
validation ("best validation"); and the step at which the merge itself is best on validation, the same for all experts ("best merge", what stopping by probes
comes to on this grid). Brackets are 95 % t intervals over seeds.

![Arms side by side](study/techniques_seeds-arms.png)

{seeds_table(found)}

Against `{PLAIN}` at its end, with the same merge method:

{change_table(found)}

{seeds_text(found)}"""


def _on_images(study: Study) -> str:
    shared, suite = study.settings.arms[PLAIN], study.suite
    return f"""## Techniques on images

{COUNTS[study.tasks].capitalize()} image tasks ({", ".join(study.settings.tasks or ())}), {MODELS[suite["backbone"]]}, {suite["train"]} training images a task,
{max(study.settings.steps)} steps of batch {shared.batch_size} from {rate(shared.learning_rate)}; one seed, intervals over test images as above. Heads are frozen and were fitted on
{suite["head"]} images of a task only: the base answers {_base(study.results)} right. Techniques that look at linear layers are left out, as this network trains convolutions only.

{screening_table(study.results)}

{screening_text(study.results)}{_learned(study.results)}"""


def _learned(results: Results) -> str:
    """A caution where an arm changes what experts learn, and merges may follow that."""
    end = {arm: Place(arm, "end", EXPERT) for arm in results.labels("arm") if arm != PLAIN}
    changes = {arm: place.minus(Place(PLAIN, "end", EXPERT), results) for arm, place in end.items()}
    better = [arm for arm, change in changes.items() if change is not None and _sign(change) > 0]
    if not better:
        return ""
    return f"\n- These runs are short: experts of {_names(better)} learn more than `{PLAIN}`'s, and merges may gain by that alone."


def _base(results: Results) -> str:
    base = results.base(PLAIN, results.steps(PLAIN)[-1])
    return "" if base is None else plain(base)


def _among_more(study: Study, fewer: Study) -> str:
    found = study.results
    more = [task for task in study.settings.tasks or () if task not in (fewer.settings.tasks or ())]
    return f"""## The same among {COUNTS[study.tasks]} experts

With {_and(more)} added, {COUNTS[study.tasks]} experts are merged in place of {COUNTS[fewer.tasks]}, all at the end of training; all else as above. Kronecker penalties:
{_kronecker(study, "kronecker_penalty")}. Kronecker filter: {_kronecker(study, "kronecker_filter")}; these were chosen on
the first seed, which is among those averaged here, so that its gains may be somewhat too good.

![Arms side by side](study/{study.settings.name}-arms.png)

{seeds_table(found, STOPS[:1])}

Against `{PLAIN}` at its end, with the same merge method:

{change_table(found)}

{seeds_text(found)}
- The time of a penalty hardly grows with the batch, and batches are small here. {penalty_cost.sentence(every=8)}
- {penalty_cost.filter_sentence(every=16)} Times in the table are of steps alone, and runs of all arms took turns (`benchmarks/study_times.py`).
- Merged with {LEADING}, the gain over `{PLAIN}` among {COUNTS[fewer.tasks]} and among {COUNTS[study.tasks]}: {_gains(fewer.results, found)}."""


def _kronecker(study: Study, technique: str) -> str:
    """What arms with a technique of Kronecker factors set."""
    given = {
        arm: chosen[technique]
        for arm, settings in study.settings.arms.items()
        for chosen in settings.techniques
        if isinstance(chosen, dict) and chosen.get(technique)
    }
    return "; ".join(f"`{arm}` λ = {o['strength']:g}, every {o['every']} steps" for arm, o in given.items())


def _gains(fewer: Results, more: Results) -> str:
    """What arms that both studies have gain."""
    both = [arm for arm in (PLATEAU, *_techniques(more)) if arm in fewer.labels("arm")]
    texts = []
    for arm in both:
        few, many = (Place(arm, "end", LEADING).minus(Place(PLAIN, "end", LEADING), r) for r in (fewer, more))
        texts.append(f"`{arm}` {signed(few)} and {signed(many)}")
    return "; ".join(texts)


def _closing(studies: Sequence[Study]) -> str:
    """What follows for defaults."""
    lines = []
    for results in (study.results for study in studies):
        methods = merge_labels(results)
        plain_best = max(methods, key=lambda method: _validation(Place(PLAIN, "end", method), results))
        best = max(_techniques(results), key=lambda arm: _validation(Place(arm, "end", LEADING), results))
        lines.append(
            f"{plain(Place(PLAIN, 'end', plain_best).sample(results))} by {plain_best} without a technique, against "
            f"{plain(Place(best, 'end', LEADING).sample(results))} by {LEADING} with `{best}`"
        )
    reaching = [arm for s in studies for arm in _techniques(s.results) if not _missed(arm, s.results)]
    if other := [arm for arm in reaching if arm != RECOMMENDED]:
        raise RuntimeError(f"{_names(other)} reaches every goal of a default: it has to become one.")
    return f"""{_verdict(studies)}; the merge method matters as much ({"; ".join(lines)}), and recipes
for whole text encoders follow that. `mergeready/recommendations.yaml` says which technique to take where merges are by task arithmetic."""


def _verdict(studies: Sequence[Study]) -> str:
    """Where what is recommended reaches the goals of a default, and what it misses elsewhere."""
    missed = {
        study.tasks: _missed(RECOMMENDED, study.results)
        for study in studies
        if RECOMMENDED in study.results.labels("arm")
    }
    reached = [f"among {COUNTS[count]} experts" for count, goals in missed.items() if not goals]
    if not reached:
        return f"Where merges are by {LEADING}, no technique reaches every goal, so mergeready's defaults use none"
    elsewhere = "".join(
        f"; among {COUNTS[count]} it misses {_and(goals)}" for count, goals in missed.items() if goals
    )
    return f"""Where merges are by {LEADING}, `{RECOMMENDED}` reaches every goal {_and(reached)}, with the settings that are its defaults{elsewhere}.
No run has it unasked, as it needs files from peers"""


def screening_table(results: Results) -> str:
    """Arms by what they change of the first method's merges, best first."""
    methods = merge_labels(results)
    arms = sorted(results.labels("arm"), key=lambda arm: -_value(Place(arm, "end", methods[0]), results))
    lines = []
    for arm in arms:
        row = [f"`{arm}`", f"{_time(results, arm):.2f}"]
        for method in (EXPERT, *methods):
            place, plain_one = Place(arm, "end", method), Place(PLAIN, "end", method)
            change = "" if arm == PLAIN else f" ({signed(place.minus(plain_one, results))})"
            row.append(plain(place.sample(results)) + change)
        lines.append(row)
    return markdown(
        ["arm", "time", f"experts at the end (− {PLAIN})", *(f"{m} (− {PLAIN})" for m in methods)], lines
    )


def screening_text(results: Results) -> str:
    """Which arms differ from plain training, as one sentence a method."""
    lines = []
    for method in merge_labels(results):
        changes = {
            arm: Place(arm, "end", method).minus(Place(PLAIN, "end", method), results)
            for arm in results.labels("arm")
            if arm != PLAIN
        }
        better = [arm for arm, change in changes.items() if change is not None and _sign(change) > 0]
        worse = [arm for arm, change in changes.items() if change is not None and _sign(change) < 0]
        lines.append(
            f"- Merged with **{method}**: {_names(better)} raise{'s' if len(better) < 2 else ''} accuracy, {_names(worse)} "
            f"lower{'s' if len(worse) < 2 else ''} it, and {len(changes) - len(better) - len(worse)} of {len(changes)} arms "
            "cannot be told from plain training."
        )
    return "\n".join(lines)


def seeds_table(results: Results, stops: Sequence[str] = STOPS) -> str:
    """Arms and stops against methods; accuracy, and the share of the experts' gain that is kept."""
    methods, lines = merge_labels(results), []
    for arm in results.labels("arm"):
        for stop in stops:
            expert = Place(arm, "end" if stop == JOINT else stop, EXPERT).sample(results)
            row = [f"`{arm}`", stop.replace("_", " "), "" if stop == JOINT else shown(expert)]
            for method in methods:
                place = Place(arm, stop, method)
                row.append(shown(place.sample(results)) + _kept(place, results))
            lines.append(row)
    return markdown(["arm", "stop", "experts", *(f"{m} (share kept)" for m in methods)], lines)


def change_table(results: Results) -> str:
    """What each arm changes at the end."""
    lines = [
        [
            f"`{arm}`",
            f"{_time(results, arm):.2f}",
            *(
                signed(Place(arm, "end", m).minus(Place(PLAIN, "end", m), results))
                for m in (EXPERT, *merge_labels(results))
            ),
        ]
        for arm in results.labels("arm")
        if arm != PLAIN
    ]
    return markdown(["arm", "time", "experts", *merge_labels(results)], lines)


def seeds_text(results: Results) -> str:
    """The three questions that a default has to answer."""
    methods = merge_labels(results)
    lines = []
    for arm in _techniques(results):
        changes = _changes(arm, results)
        if changes is None:
            continue
        gain, over, loss = changes
        missed = _missed(arm, results)
        lines.append(
            f"- `{arm}`, merged with {LEADING}: {signed(gain)} against `{PLAIN}`, {signed(over)} against `{PLATEAU}`, experts {signed(loss)}, "
            f"{_time(results, arm):.2f} × the time. "
            + (f"It misses {_and(missed)}." if missed else "It reaches every goal.")
        )
    stops = [stop for stop in STOPS if stop != VALIDATED or results.sample(PLAIN, VALIDATED, EXPERT)]
    places = [Place(a, s, m) for a in results.labels("arm") for s in stops for m in methods]
    best = max(places, key=lambda place: _validation(place, results))
    rival = max((Place(PLAIN, "end", m) for m in methods), key=lambda place: _validation(place, results))
    difference = best.minus(rival, results)
    lines.append(
        f"- The best combination by validation is **{best}**: {shown(best.sample(results))}. Plain training to the end under its own best merge method, "
        f"{rival.method}, gives {shown(rival.sample(results))}; the difference is {signed(difference)}"
        + (
            ""
            if best == rival or difference is None
            else f", which is {'told from 0' if _sign(difference) else 'not told from 0'}"
        )
        + "."
    )
    hindsight = max((Place(PLAIN, "end", m) for m in methods), key=lambda place: _value(place, results))
    if hindsight != rival:
        lines.append(
            f"- Had validation chosen {hindsight.method} for plain training, which is its best on test examples, that difference would be "
            f"{signed(best.minus(hindsight, results))}: no more than a lead."
        )
    if rival.method != LEADING:
        method_gain = Place(PLAIN, "end", hindsight.method).minus(Place(PLAIN, "end", LEADING), results)
        lines.append(
            f"- For comparison, changing nothing but the merge method, from {LEADING} to {hindsight.method}, is {signed(method_gain)}."
        )
    return "\n".join(lines)


def _changes(arm: str, results: Results) -> tuple[Sample, Sample, Sample] | None:
    """At the end, by the leading method: over plain training, over the plateau schedule; and of the experts."""
    gain = Place(arm, "end", LEADING).minus(Place(PLAIN, "end", LEADING), results)
    over = Place(arm, "end", LEADING).minus(Place(PLATEAU, "end", LEADING), results)
    loss = Place(arm, "end", EXPERT).minus(Place(PLAIN, "end", EXPERT), results)
    return None if gain is None or over is None or loss is None else (gain, over, loss)


def _missed(arm: str, results: Results) -> list[str]:
    """Which goals of a default an arm misses."""
    changes = _changes(arm, results)
    if changes is None:
        return ["everything, as it was not run to the end"]
    gain, over, loss = changes
    goals = (
        (f"{WANTED_GAIN:.2f} over `{PLAIN}`", gain.value >= WANTED_GAIN and _sign(gain) > 0),
        (
            f"{WANTED_OVER_PLATEAU:.2f} over `{PLATEAU}`",
            over.value >= WANTED_OVER_PLATEAU and _sign(over) > 0,
        ),
        (f"an expert that loses at most {ALLOWED_LOSS:.2f}", loss.value >= -ALLOWED_LOSS),
        (f"at most {ALLOWED_TIME - 1:.0%} more time", _time(results, arm) <= ALLOWED_TIME),
    )
    return [what for what, reached in goals if not reached]


def _techniques(results: Results) -> list[str]:
    return [arm for arm in results.labels("arm") if arm not in (PLAIN, PLATEAU)]


def _validation(place: Place, results: Results) -> float:
    value = results.validation(place.arm, place.at(results), place.method)
    return -np.inf if value is None else results.sign * value


def _value(place: Place, results: Results) -> float:
    sample = place.sample(results)
    return -np.inf if sample is None else sample.value


def _kept(place: Place, results: Results) -> str:
    """Share of its own experts' gain over the base that a merge keeps."""
    merged, at = place.sample(results), place.at(results)
    expert, base = results.sample(place.arm, at, EXPERT), results.base(place.arm, at)
    if merged is None or expert is None or base is None or expert.value <= base.value:
        return ""
    return f" ({(merged.value - base.value) / (expert.value - base.value):.0%})"


def _time(results: Results, arm: str) -> float:
    """CPU time of a run as it was meant to be, against plain training's."""
    ours, theirs = results.training_seconds(arm), results.training_seconds(PLAIN)
    return float("nan") if ours is None or theirs is None else ours / theirs


def _sign(sample: Sample) -> int:
    """1 or −1 where the interval excludes 0, over seeds where there are several, else over examples."""
    estimate = sample.estimate()
    if estimate.low is None or estimate.high is None:
        return 0
    return int(estimate.low > 0) - int(estimate.high < 0)


def _names(arms: Sequence[str]) -> str:
    return _and([f"`{arm}`" for arm in arms]) if arms else "no arm"


def _and(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
