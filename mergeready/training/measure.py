from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from mergeready.experts.live import LiveExpert
from mergeready.experts.task_vector import require_finite
from mergeready.metrics.gram import GramAccumulator
from mergeready.metrics.groups import group_of, layer_of
from mergeready.metrics.growth import growth_per_step
from mergeready.metrics.norms import NormAccumulator, norm_ratio
from mergeready.metrics.rounding import RoundingAccumulator
from mergeready.metrics.samples import SampleAccumulator
from mergeready.metrics.sign_conflict import SignConflictAccumulator
from mergeready.metrics.stream import Accumulator, accumulate
from mergeready.metrics.top_mass import TopMassAccumulator
from mergeready.training.history import History
from mergeready.training.peers import OpenPeer, SketchedPeer
from mergeready.training.records import MetricsRecord
from mergeready.training.sketches import estimate_all, sample_counts

TOP_SHARES = (0.01, 0.1)


@torch.no_grad()
def measure(
    live: LiveExpert,
    peers: Sequence[OpenPeer],
    step: int,
    history: History,
    sketched: Sequence[SketchedPeer] = (),
) -> MetricsRecord:
    """Measure the live task vector against base and peers: one pass over the trained parameters.

    Where there are several ranks, each reads its share of the pieces, and the sums are added up, some kilobytes: every
    rank gets the same record.

    Args:
        live: The model in training.
        peers: The open peers.
        step: The training step, for the record.
        history: Where the last norm is read from, for the growth.
        sketched: Peers known by fingerprint; figures against them are estimates, with errors.

    Raises:
        NonFiniteError: If the model holds NaN or infinite values.
    """
    names = list(live.vector)
    norms = NormAccumulator(names, 1)
    top = TopMassAccumulator()
    gram = GramAccumulator(1 + len(peers), first_row_only=True)
    signs = SignConflictAccumulator(1 + len(peers), first_row_only=True)
    rounded = live.vector.rounded()
    rounding = RoundingAccumulator(rounded)
    samples = SampleAccumulator(live.vector.infos, sample_counts(peer.fingerprint for peer in sketched))
    accumulators: list[Accumulator] = [norms, top]
    accumulators += [rounding] if rounded else []
    accumulators += [gram, signs] if peers else []
    accumulators += [samples] if sketched else []
    with live.readable(), live.ranks.together():
        accumulate([live.vector, *peers], live.base.source, accumulators, pieces=live.pieces())
    live.ranks.add([accumulator.sums for accumulator in accumulators if accumulator is not top])
    if live.ranks.size > 1:
        top.add_up(live.ranks.add, TOP_SHARES)
    require_finite("the model in training", norms.squared(0))
    norm = norms.norm(0)
    last = next((record for record in reversed(history.metrics) if record.step < step), None)
    labels = [peer.label for peer in peers]
    all_norms = torch.tensor([norm, *(peer.norm for peer in peers)], dtype=torch.float64)
    norms_of_all = [*all_norms.tolist(), *(peer.fingerprint.norm for peer in sketched)]
    estimates = estimate_all(norms.norms(0), samples.samples(), sketched)
    return MetricsRecord(
        step=step,
        norm=norm,
        relative_norm=_finite(norms.relative_norm(0)),
        growth=growth_per_step(step, norm, last.step, last.norm) if last else growth_per_step(step, norm),
        groups=norms.by(group_of, 0),
        layers={int(layer): value for layer, value in norms.by(_layer_key, 0).items()},
        top_mass={f"{share:g}": _finite(top.share(share)) for share in TOP_SHARES},
        cosine=(_by_peer(labels, gram.cosines(all_norms)[0, 1:]) if peers else {})
        | {label: _finite(cosine.value) for label, (cosine, _) in estimates.items()},
        sign_conflict=(_by_peer(labels, signs.pairwise()[0, 1:]) if peers else {})
        | {label: _finite(conflict.value) for label, (_, conflict) in estimates.items()},
        cosine_error={label: _finite(cosine.error) for label, (cosine, _) in estimates.items()},
        sign_conflict_error={label: _finite(conflict.error) for label, (_, conflict) in estimates.items()},
        norm_ratio=_finite(norm_ratio(norms_of_all)) if peers or sketched else None,
        resolution=_finite(rounding.resolution()) if rounded else None,
        unchanged=_finite(rounding.unchanged()) if rounded else None,
    )


def _layer_key(name: str) -> str | None:
    layer = layer_of(name)
    return None if layer is None else str(layer)


def _by_peer(labels: Sequence[str], values: torch.Tensor) -> dict[str, float | None]:
    return {label: _finite(value) for label, value in zip(labels, values.tolist(), strict=True)}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
