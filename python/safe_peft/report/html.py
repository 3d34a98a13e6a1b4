"""The HTML page of a report: one self-contained file that follows the reader's light or dark setting."""

from __future__ import annotations

import base64
import json
from html import escape
from typing import TYPE_CHECKING

from ..planning.figure import draw_plans, png_of
from ..planning.plan import parts_cells
from .figure import draw
from .records import mebibytes
from .tables import adapter_cells, comparison, verdict

if TYPE_CHECKING:
    from .report import FreezeReport

PICTURE = "Heat map of every adapter's importance over time, the threshold, and the bytes one step retains"
PLANS = "Bars of the bytes that one step retains by what keeps them and by block, stock PEFT and ours"
STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --soft: #5c5c5c; --line: #d4d4d4; --back: #ffffff; --card: #f6f6f6; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --soft: #a8a8a8; --line: #444444; --back: #161616; --card: #222222; }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--back); max-width: 62rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.soft { color: var(--soft); } .scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.9rem; }
th, td { padding: 0.25rem 0.8rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { background: var(--card); } .words { text-align: left; }
img { max-width: 100%; background: #ffffff; border-radius: 6px; }
pre { background: var(--card); padding: 0.8rem; border-radius: 6px; overflow-x: auto; }
"""


def render(report: FreezeReport, png: bytes | None = None) -> str:
    """Return a report as one self-contained HTML page, with its figure if that is drawn already."""
    name = escape(report.model)
    frozen, total = len(report.freezings), len(report.adapters)
    counts = f"{frozen} of {total} adapters frozen in {report.total_steps:,} optimizer steps"
    parts = [f"<h1>{name}</h1>", f'<p class="soft">{counts}</p>']
    if report.runs:
        text = escape(verdict(report.runs))
        parts += ["<h2>Measured runs</h2>", _table(comparison(report.runs), words=1), f"<p>{text}</p>"]
    parts += ["<h2>Importance, threshold and retained bytes</h2>", _image(png or png_of(draw(report)), PICTURE)]
    parts += ["<h2>Freezing</h2>", _freezings(report), "<h2>Adapters</h2>", _table(adapter_cells(report), words=2)]
    if report.retained:
        sizes = [["from step", "MiB", "bytes"]]
        sizes += [[str(step), f"{mebibytes(size):,.2f}", f"{size:,}"] for step, size in report.retained]
        parts += ["<h2>Retained for backward by one step</h2>", _table(sizes, words=0)]
    if report.plans:
        batch = escape(f"Planned without values for {report.plans[0][1].batch}.")
        parts += ["<h2>Where each byte of a step goes</h2>", f'<p class="soft">{batch}</p>']
        parts += [_table(parts_cells(report.plans), words=1), _image(png_of(draw_plans(report.plans)), PLANS)]
    parts += ["<h2>Configuration</h2>", f"<pre>{escape(json.dumps(report.config, indent=1))}</pre>"]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{name}</title>'
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n'
    )


def _image(png: bytes, alt: str) -> str:
    data = base64.b64encode(png).decode("ascii")
    return f'<img alt="{alt}" src="data:image/png;base64,{data}">'


def _freezings(report: FreezeReport) -> str:
    """List the freeze events, one row per step."""
    labels = {row.name: f"{row.layer} {row.label}" if row.layer >= 0 else row.label for row in report.rows()}
    rows = [["after step", "threshold", "adapters"]]
    for step in sorted({freezing.step for freezing in report.freezings}):
        group = [freezing for freezing in report.freezings if freezing.step == step]
        threshold = f"{group[0].threshold:.2e}" if group[0].threshold is not None else ""
        rows.append([str(step), threshold, ", ".join(labels[freezing.name] for freezing in group)])
    return _table(rows, words=0, last=True) if report.freezings else "<p>Nothing was frozen.</p>"


def _table(rows: list[list[str]], words: int, last: bool = False) -> str:
    """Return an HTML table. The first `words` columns, and the last one if `last`, contain words and not numbers."""

    def line(cells: list[str], tag: str) -> str:
        marks = [' class="words"' if i < words else "" for i in range(len(cells))]
        if last:
            marks[-1] = ' class="words" style="white-space: normal"'
        return "".join(f"<{tag}{mark}>{escape(cell)}</{tag}>" for mark, cell in zip(marks, cells, strict=True))

    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows[1:])
    return f'<div class="scroll"><table><tr>{line(rows[0], "th")}</tr>{body}</table></div>'
