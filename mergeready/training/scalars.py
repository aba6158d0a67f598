"""What loggers get: flat names and numbers."""

from __future__ import annotations

from mergeready.training.records import MetricsRecord, ProbeRecord, Record, SampledRecord

PREFIX = "mergeready/"


def scalars(record: Record) -> dict[str, float]:
    """The scalars of a record, every name starting with ``mergeready/``.

    A probe gives ``expert`` and, per merge method, ``merged/<method>`` (``surrogate/<method>`` where synthetic
    peers stood in), ``retention/<method>`` and ``scale/<method>``. A measurement gives norms, and cosine and sign
    conflict per peer, with their standard errors where they are estimates; and where weights exist in 16 bits only,
    what their rounding leaves to be seen. Estimates from sampled coordinates have the same names behind ``sampled/``.
    """
    if isinstance(record, ProbeRecord):
        values = _probe(record)
    elif isinstance(record, MetricsRecord):
        values = _metrics(record)
    elif isinstance(record, SampledRecord):
        values = _sampled(record)
    else:
        return {}
    return {PREFIX + name: value for name, value in values.items() if value is not None}


def merged_name(method: str, *, surrogate: bool) -> str:
    """The scalar name of a merged metric, with prefix."""
    return f"{PREFIX}{'surrogate' if surrogate else 'merged'}/{method}"


def _probe(record: ProbeRecord) -> dict[str, float | None]:
    values: dict[str, float | None] = {"expert": record.expert.value}
    kind = "surrogate" if record.surrogate else "merged"
    for method, result in record.merges.items():
        values[f"{kind}/{method}"] = result.merged
        values[f"retention/{method}"] = result.retention
        values[f"scale/{method}"] = result.scale
    values |= {f"alone/{scale}": value for scale, value in record.alone.items()}
    return values


def _metrics(record: MetricsRecord) -> dict[str, float | None]:
    values: dict[str, float | None] = {
        "norm": record.norm,
        "relative_norm": record.relative_norm,
        "growth": record.growth,
        "norm_ratio": record.norm_ratio,
        "resolution": record.resolution,
        "unchanged": record.unchanged,
    }
    values |= {f"norm/{group}": value for group, value in record.groups.items()}
    values |= {f"top_mass/{share}": value for share, value in record.top_mass.items()}
    values |= {f"cosine/{peer}": value for peer, value in record.cosine.items()}
    values |= {f"cosine_error/{peer}": value for peer, value in record.cosine_error.items()}
    values |= {f"sign_conflict_error/{peer}": value for peer, value in record.sign_conflict_error.items()}
    values |= {f"sign_conflict/{peer}": value for peer, value in record.sign_conflict.items()}
    return values


def _sampled(record: SampledRecord) -> dict[str, float | None]:
    values: dict[str, float | None] = {
        "norm": record.norm,
        "norm_error": record.norm_error,
        "growth": record.growth,
    }
    by_peer = {
        "cosine": record.cosine,
        "cosine_error": record.cosine_error,
        "sign_conflict": record.sign_conflict,
        "sign_conflict_error": record.sign_conflict_error,
    }
    values |= {f"{name}/{peer}": value for name, found in by_peer.items() for peer, value in found.items()}
    return {f"sampled/{name}": value for name, value in values.items()}
