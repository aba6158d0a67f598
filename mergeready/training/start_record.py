from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mergeready.errors import HistoryError
from mergeready.experts.live import LiveExpert
from mergeready.training.peers import OpenPeer, SketchedPeer
from mergeready.training.probe import Probe, Prober
from mergeready.training.records import Record, ResumeRecord, StartRecord
from mergeready.training.techniques.technique_set import TechniqueSet


def start_record(
    step: int,
    live: LiveExpert,
    peers: Sequence[OpenPeer],
    sketched: Sequence[SketchedPeer],
    probe: Probe | None,
    prober: Prober | None,
    techniques: TechniqueSet,
) -> StartRecord:
    """What a run starts with, to be compared with what it is resumed with."""
    return StartRecord(
        step=step,
        base=live.base.identity.fingerprint,
        peers={peer.label: peer.norm for peer in peers}
        | {peer.label: peer.fingerprint.norm for peer in sketched},
        fingerprints=[peer.label for peer in sketched],
        unmerged=list(live.extra),
        techniques=[technique.describe() for technique in techniques.techniques],
        **({} if probe is None or prober is None else _of_probe(probe, prober, surrogate=not peers)),
    )


def records_of_start(start: StartRecord, earlier: StartRecord | None) -> list[Record]:
    """What a history gets when its run starts or is resumed: nothing where all is as before.

    Raises:
        HistoryError: If the base is another one.
    """
    if earlier is None:
        return [start]
    changed = [key for key in vars(start) if key != "step" and getattr(start, key) != getattr(earlier, key)]
    if "base" in changed:
        raise HistoryError("the run was started from another base than the one given now.")
    return [ResumeRecord(step=start.step, changed=changed), start] if changed else []


def _of_probe(probe: Probe, prober: Prober, *, surrogate: bool) -> dict[str, Any]:
    return {
        "surrogate": surrogate,
        "metric": prober.metric,
        "greater_is_better": probe.is_greater_better(prober.metric),
        "methods": [{"label": label, **method.describe()} for label, method in probe.methods.items()],
        "references": {
            task: {kind: score.value for kind, score in scores.items()}
            for task, scores in prober.references.items()
        },
    }
