"""Comparisons of many experts: estimated over ranks, summed up, written to files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mergeready.cli.compare_tables import number
from mergeready.errors import OptionError, UnsupportedError, listing

if TYPE_CHECKING:
    from mergeready.experts import Base
    from mergeready.experts.fingerprint import Fingerprint
    from mergeready.metrics.all_pairs import AllPairs
    from mergeready.weights.ranks import Ranks

_EXTREMES = 8
_LONGEST_LIST = 12
_PICTURES = (".png", ".svg", ".pdf")


def find(experts: Sequence[str], wanted: str) -> int:
    """Which of the experts is meant.

    Raises:
        OptionError: If none is.
    """
    if wanted not in experts:
        raise OptionError(
            f"`--partners-of` must be one of the experts as given, {listing(experts)}, not {wanted}."
        )
    return list(experts).index(wanted)


def estimate(base: str, experts: list[str], *, strict: bool) -> AllPairs:
    """All pairs from fingerprints, which are taken of those that are none; ranks share the work."""
    from mergeready.experts import Base
    from mergeready.merging.ranks import open_ranks
    from mergeready.metrics.all_pairs import compare_all

    with open_ranks() as ranks:
        opened = Base.open(base)
        return compare_all(_fingerprints(opened, experts, ranks, strict=strict), base=opened, ranks=ranks)


def _fingerprints(
    opened: Base, experts: list[str], ranks: Ranks, *, strict: bool
) -> list[str | Path | Fingerprint]:
    """Paths of fingerprints as they are, and fingerprints of the others, with the smallest of their budgets."""
    from mergeready.experts import open_expert
    from mergeready.experts.fingerprint import BUDGET, is_fingerprint, open_fingerprint
    from mergeready.metrics.take_fingerprint import take_fingerprint

    others = [index for index, expert in enumerate(experts) if not is_fingerprint(expert)]
    budget = BUDGET
    if others:  # fingerprints of another base are refused before anything is taken
        known = [open_fingerprint(expert, opened) for expert in experts if is_fingerprint(expert)]
        budget = min([BUDGET, *(made.budget for made in known)])
    mine: dict[int, Fingerprint] = {}
    with ranks.together():
        for index in others[ranks.rank :: ranks.size]:
            vector = open_expert(experts[index], opened, strict=strict).vector
            mine[index] = take_fingerprint(
                vector, opened, label=experts[index], budget=budget, subspaces=False
            )
    taken = {index: made for part in ranks.each(mine) for index, made in part.items()}
    return [taken.get(index, expert) for index, expert in enumerate(experts)]


def print_summary(screen: Console, pairs: AllPairs) -> None:
    """Groups of similar experts, and the pairs that oppose each other most."""
    import numpy as np

    from mergeready.metrics.compatible import groups
    from mergeready.metrics.labels import short_labels

    labels = short_labels(pairs.labels)
    table = Table(title=f"{len(labels)} experts in groups of similar ones", title_justify="left")
    for column in ("", "experts", "which"):
        table.add_column(column, justify="left" if column == "which" else "right", overflow="fold")
    found = [members for members in groups(pairs.cosine).members() if len(members) > 1]
    for group, members in enumerate(found[:_LONGEST_LIST], start=1):
        shown = ", ".join(escape(labels[i]) for i in members[:_LONGEST_LIST])
        more = f", and {len(members) - _LONGEST_LIST} more" if len(members) > _LONGEST_LIST else ""
        table.add_row(str(group), str(len(members)), shown + more)
    alone = len(labels) - sum(len(members) for members in found)
    if found:
        screen.print(table)
    alike = "1 expert is" if alone == 1 else f"{alone} experts are"
    screen.print(f"{alike} similar to no other.", highlight=False)
    table = Table(title="Pairs that oppose each other most", title_justify="left")
    for column in ("expert", "expert", "cosine", "sign conflict"):
        table.add_column(column, justify="left" if column == "expert" else "right", overflow="fold")
    rows, columns = np.triu_indices(len(labels), 1)
    values = np.nan_to_num(pairs.sign_conflict[rows, columns], nan=-1.0)
    for place in np.argsort(-values, kind="stable")[:_EXTREMES].tolist():
        i, j = int(rows[place]), int(columns[place])
        table.add_row(
            escape(labels[i]),
            escape(labels[j]),
            number(pairs.cosine[i, j]),
            number(pairs.sign_conflict[i, j]),
        )
    screen.print(table)


def print_partners(screen: Console, pairs: AllPairs, chosen: int, count: int) -> None:
    """Partners for one expert, one after the other."""
    from mergeready.metrics.compatible import most_compatible
    from mergeready.metrics.labels import short_labels

    labels = short_labels(pairs.labels)
    table = Table(title=f"Partners for {escape(labels[chosen])}, in this order", title_justify="left")
    for column in ("expert", "cosine", "sign conflict"):
        table.add_column(column, justify="left" if column == "expert" else "right", overflow="fold")
    for other in most_compatible(pairs.sign_conflict, pairs.cosine, chosen, count):
        cosine, conflict = pairs.cosine[chosen, other], pairs.sign_conflict[chosen, other]
        table.add_row(escape(labels[other]), number(cosine), number(conflict))
    screen.print(table)


def require_writable(outputs: Sequence[Path], count: int) -> None:
    """Raise if a file cannot be written of that many experts.

    Raises:
        OptionError: If one has an unknown ending, or a page is wanted of too many experts.
    """
    from mergeready.metrics.pairs_page import MOST

    known = (".html", ".parquet", *_PICTURES)
    wrong = [str(path) for path in outputs if path.suffix not in known]
    if wrong:
        raise OptionError(f"{listing(wrong)} must end with {', '.join(known)}.")
    if count > MOST and any(path.suffix == ".html" for path in outputs):
        raise OptionError(f"a page shows up to {MOST} experts, not {count}. Write a .parquet table instead.")


def require_tables(outputs: Sequence[Path]) -> None:
    """Raise if a file is no table, the only form of nearest experts.

    Raises:
        UnsupportedError: If one is none.
    """
    wrong = [str(path) for path in outputs if path.suffix != ".parquet"]
    if wrong:
        raise UnsupportedError(f"nearest experts can only be written as .parquet, not {', '.join(wrong)}.")


def write(path: Path, pairs: AllPairs) -> None:
    """Write all pairs as what the file's ending says; see :func:`require_writable`."""
    from mergeready.metrics.compatible import groups
    from mergeready.metrics.heatmap import draw_heatmaps
    from mergeready.metrics.pairs_page import write_pairs_page
    from mergeready.metrics.pairs_table import write_pairs

    if path.suffix == ".html":
        write_pairs_page(path, pairs, groups(pairs.cosine))
    elif path.suffix == ".parquet":
        write_pairs(path, pairs, groups(pairs.cosine).group)
    else:
        draw_heatmaps(pairs.as_lists(), path)


def show_nearest(
    screen: Console, base: str, experts: list[str], count: int, output: Sequence[Path], *, strict: bool
) -> None:
    """The nearest experts of each, printed for a few and written as a table."""
    from mergeready.experts import Base
    from mergeready.metrics.labels import short_labels
    from mergeready.metrics.neighbours import nearest_experts, write_neighbours
    from mergeready.weights.ranks import Ranks

    opened = Base.open(base)
    given = _fingerprints(opened, experts, Ranks.alone(), strict=strict)
    found = nearest_experts(given, min(count, len(experts) - 1), base=opened)
    labels = short_labels(found.labels)
    table = Table(title="Nearest experts", title_justify="left")
    table.add_column("expert", overflow="fold")
    table.add_column("nearest, with cosines", overflow="fold")
    for label, others, cosines in list(zip(labels, found.nearest, found.cosine, strict=True))[:50]:
        shown = ", ".join(f"{escape(labels[j])} {c:.2f}" for j, c in zip(others, cosines, strict=True))
        table.add_row(escape(label), shown)
    screen.print(table)
    screen.print(f"Approximate; standard error of a cosine {found.error:.2g}.", style="dim", highlight=False)
    for path in () if screen.quiet else output:
        write_neighbours(path, found)
        screen.print(f"Wrote {escape(str(path))}", highlight=False, soft_wrap=True)
