"""What `dst runs` tells on a terminal."""

from __future__ import annotations

import sys
from csv import DictWriter
from pathlib import Path

import typer

from pipeline.terminal import echo_table
from training.runs import by_family, differences, read_runs, records, table


def runs_and_tell(folder: Path, csv: bool) -> bool:
    """Print a table for each family, and what its runs have otherwise than its best one; what cannot be shown, too.

    Args:
        csv: print every score as CSV instead.

    Returns:
        Whether there was a run to show.
    """
    found, broken = read_runs(folder)
    if csv and found:
        rows = records(found)
        writer = DictWriter(sys.stdout, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    else:
        for best, *others in by_family(found):
            echo_table(*table([best, *others]))
            for run in others:
                told = differences(best.recipe, run.recipe) or "the same settings"
                typer.echo(f"{run.name} beside {best.name}: {told}")
    for name, reason in broken.items():
        typer.echo(f"{name} cannot be shown: {reason}", err=True)
    return bool(found)
