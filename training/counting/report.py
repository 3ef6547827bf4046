"""A page to read a counter's evaluation by: scores, counts, the worst pictures. One file, no network, no scripts."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from schemas.files import write_text
from training.counting.evaluate import TABLE, Scored, named_rows, said

MOST_PICTURED = 24
"""Images that are shown, the worst first."""

EXPLAINED = {
    "count MAE": "Mean error of the count, when it counts by itself.",
    "count RMSE": "Root of the mean squared error of the count.",
    "exact": "Share of the images whose count is right.",
    "next point": "With true marks, median distance from where it looks for the next object to where that is, as a "
    "share of the image's side.",
    "done too early": "With true marks, share of the times it believes to be done while objects are left.",
    "marks F1": "Its own marks, paired one to one with objects within a twentieth of the side: F1.",
}
"""What each column of `training.counting.evaluate.TABLE` means."""

_STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; }
th, td { padding: .3rem .8rem; text-align: right; border-bottom: 1px solid #8886; }
th:first-child, td:first-child { text-align: left; }
figure { margin: 0; }
figcaption { font-size: .9rem; }
img { max-width: 100%; height: auto; }
.worst { display: grid; grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr)); gap: 1.5rem; }
"""


def worst_first(scored: Sequence[Scored]) -> list[Scored]:
    """Images by how far off the count is; those alike by how far off the next object was looked for."""

    def badness(each: Scored) -> tuple[int, float, str]:
        away = float(each.guided.errors.mean()) if len(each.guided.errors) else 0.0
        return -abs(each.predicted - each.count), -away, each.image.session_id

    return sorted(scored, key=badness)


def write_page(
    path: Path,
    metrics: dict[str, Any],
    scored: Sequence[Scored],
    counts: bytes,
    picture_of: Callable[[Scored], bytes | None],
) -> None:
    """Write the page. Equal input, equal bytes.

    Args:
        counts: PNG of predicted against true counts.
        picture_of: JPEG of an image with true points and marks, None where the image cannot be read.
    """
    about = metrics["about"]
    title = f"Counting: {about['images']} {about['split']} images of {about['objects']} objects"
    told = (
        f"Run {about['run']}, checkpoint {about['checkpoint']}, marks {about['marks']}, seed {about['seed']}."
    )
    rows = [_row("td", [name, *map(said, values)]) for name, values in named_rows(metrics)]
    by_count = metrics["count"]["by_count"]
    buckets = [_row("td", [name, str(each["images"]), said(each["mae"])]) for name, each in by_count.items()]
    figures = [_figure(each, picture_of(each)) for each in worst_first(scored)[:MOST_PICTURED]]
    explained = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in EXPLAINED.items())
    write_text(
        path,
        f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
<h1>{escape(title)}</h1>
<p>{escape(told)}</p>
<table>{_row("th", ["", *TABLE])}{"".join(rows)}</table>
<dl>{explained}</dl>
<h2>By the number of objects</h2>
<table>{_row("th", ["objects", "images", "count MAE"])}{"".join(buckets)}</table>
<h2>Predicted against true counts</h2>
<img alt="A dot an image; on the line, the count is right." width="600" src="{_data("png", counts)}">
<h2>The worst {len(figures)}</h2>
<p>A ring is a true point, a green disc a mark it made, with its number.</p>
<div class="worst">{"".join(figures)}</div>
</html>
""",
    )


def _figure(each: Scored, jpeg: bytes | None) -> str:
    words = f"{each.image.session_id}, {each.image.goal}: {each.predicted} counted, {each.count} there"
    if jpeg is None:
        return f"<figure><figcaption>{escape(words)} (the picture cannot be read)</figcaption></figure>"
    image = f'<img alt="{escape(words)}" loading="lazy" src="{_data("jpeg", jpeg)}">'
    return f"<figure>{image}<figcaption>{escape(words)}</figcaption></figure>"


def _row(cell: str, values: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{cell}>{escape(value)}</{cell}>" for value in values) + "</tr>"


def _data(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"
