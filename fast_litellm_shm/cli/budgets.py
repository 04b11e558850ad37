"""What keys of budgets have spent, as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fast_litellm_shm._shared import spending
from fast_litellm_shm._shared.inspection import Inspection
from fast_litellm_shm._shared.spending import SpendingRow
from fast_litellm_shm.cli import render

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

_COLUMNS = ("key", "budget", ">spent", ">reserved", ">limit", ">used", ">resets in", "state")


def cells(row: SpendingRow) -> tuple[str, ...]:
    """The cells of a key."""
    return (
        render.shown_name(row.key, row.raw),
        render.escaped(row.budget),
        render.usd(row.spent),
        render.usd(row.reserved) if row.reserved else "-",
        render.usd(row.limit),
        f"{row.share:.1%}",
        "never" if row.reset_after is None else render.duration(row.reset_after),
        "warned" * row.warned if row.remaining else "used up",
    )


def table(
    inspection: Inspection,
    out: Console,
    most: int | None,
    budget: str | None = None,
    match: str | None = None,
) -> list[RenderableType]:
    """The first ``most`` keys, those first that have used the largest part of their limit; None:
    all. Red: nothing is left. budget, match: as of spending.rows()."""
    from rich.text import Text

    shown = list(spending.rows(inspection.segment, inspection.spending, most, match, budget))
    if not shown:
        return []
    made = render.table(
        f"Budgets ({_counts(inspection, budget)})", _COLUMNS, [*map(cells, shown)], out
    )
    for line, row in zip(made.rows, shown, strict=True):
        line.style = "" if row.remaining else "red"
    return [made, Text()]


def _counts(inspection: Inspection, budget: str | None) -> str:
    of = [each for each in inspection.spending if budget in (None, each.name)]
    said = render.counted(sum(each.keys for each in of), "key")
    for count, what in (
        (sum(each.warned for each in of), "warned"),
        (sum(each.used_up for each in of), "with nothing left"),
    ):
        said += f", {count:,} {what}" if count else ""
    return said
