"""A report as one HTML page that needs nothing else: no script, font, image or style from outside.

Every text is escaped. Colours follow the reader's choice of light or dark, and each status is said
in words too.
"""

from html import escape
from math import log2

from bridge_conformance import spec_files
from bridge_conformance.card import by_check, cases, multiple, said, sentence, skipped, summary
from bridge_conformance.checks import LEVELS
from bridge_conformance.commands import again
from bridge_conformance.results import EDGES, Failure, Report

STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --soft: #60646c; --line: #e0e3e8; --page: #fbfcfd;
  --card: #ffffff; --pass: #1a7f4b; --pass-bg: #e3f5ea; --fail: #c0282d; --fail-bg: #fde8e8;
  --skip: #8a5b00; --skip-bg: #fdf1d8; --bar: #4a7bd4; --code: #f2f4f7; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --soft: #9aa0a9; --line: #30353d;
  --page: #14171b; --card: #1b1f24; --pass: #5fd394; --pass-bg: #153424; --fail: #ff8d8d;
  --fail-bg: #43191b; --skip: #f0c264; --skip-bg: #3b2d10; --bar: #7ba4ee; --code: #22272e; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0; letter-spacing: -0.01em; }
h2 { font-size: 1.1rem; margin: 2.5rem 0 0.75rem; }
.kicker, .note { color: var(--soft); font-size: 0.87rem; margin: 0 0 0.4rem; }
.note { margin: 0.5rem 0 0; max-width: 44rem; }
.verdict { display: flex; gap: 1rem; align-items: center; margin: 1.25rem 0; padding: 1rem 1.25rem;
  border-radius: 10px; font-weight: 600; }
.verdict b { font-size: 1.5rem; line-height: 1; }
.pass { color: var(--pass); background: var(--pass-bg); }
.fail { color: var(--fail); background: var(--fail-bg); }
.skip { color: var(--skip); background: var(--skip-bg); }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); margin: 0;
  gap: 0.75rem 1.5rem; }
dt { color: var(--soft); font-size: 0.8rem; } dd { margin: 0; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th { text-align: left; font-weight: 600; font-size: 0.87rem; color: var(--soft); }
th, td { padding: 0.4rem 0.75rem 0.4rem 0; border-bottom: 1px solid var(--line); }
td.num { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.matrix td.status { padding: 0.25rem; border: 0; min-width: 7rem; }
.matrix th, .matrix td { border: 0; } .matrix th { text-align: center; padding: 0.25rem; }
.status span { display: block; padding: 0.45rem 0.5rem; border-radius: 7px; text-align: center;
  font-size: 0.87rem; white-space: nowrap; }
.none { color: var(--soft); background: var(--code); }
svg { display: block; width: 100%; height: auto; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: 1rem; }
figure { margin: 0; padding: 0.85rem 1rem; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; }
figcaption { font-weight: 600; font-size: 0.87rem; }
figcaption small { color: var(--soft); font-weight: 400; float: right; }
article { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  border-left: 4px solid var(--fail); padding: 1rem 1.25rem; margin: 0 0 1rem; }
article h3 { margin: 0; font-size: 1rem; } article p { margin: 0.35rem 0; overflow-wrap: anywhere; }
pre { background: var(--code); border-radius: 6px; padding: 0.6rem 0.8rem; margin: 0.5rem 0 0;
  white-space: pre-wrap; overflow-wrap: anywhere;
  font: 0.8rem/1.45 ui-monospace, Menlo, monospace; }
summary { cursor: pointer; color: var(--soft); font-size: 0.87rem; }
"""


def page(report: Report) -> str:
    """The whole page."""
    status = "pass" if report.ok else "fail"
    title = f"Bridge conformance: {report.backend} on {report.device}"
    parts = (
        '<p class="kicker">Bridge conformance report</p>',
        f"<h1>{escape(report.backend)} on {escape(report.device)}</h1>",
        f'<div class="verdict {status}"><b>{_badge(report)}</b>'
        f"<span>{escape(sentence(report))}</span></div>",
        _facts(report),
        "<h2>Levels by dtype</h2>",
        _matrix(report),
        *(f'<p class="note">{escape(line)}</p>' for line in skipped(report)),
        *_failures(report),
        "<h2>How near results come to what is allowed</h2>",
        _plots(report),
        '<p class="note">Each comparison of a run gives one error, in multiples of what the '
        "numerics rule allows (clause 10.2), which is a small multiple of the error that the "
        "reference itself makes in that dtype. The scale is of powers of two, exact results are "
        "on the left, and what must agree bit for bit is not counted.</p>",
        "<h2>Worst error by clause</h2>",
        _clauses(report),
        "<h2>The same run again</h2>",
        f"<pre>{escape(again(report))}</pre>",
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(parts)
        + "\n</main>\n</body>\n</html>\n"
    )


def _badge(report: Report) -> str:
    if report.checks_alone or not report.complete:
        return "✓" if report.ok else "✗"
    return str(report.verdict)


def _facts(report: Report) -> str:
    facts = {
        **report.versions,
        "profile": report.profile,
        "seed": str(report.seed),
        "checks on cases": str(cases(report)),
        "duration": f"{report.seconds:.0f} s",
        "started": report.started,
    }
    rows = (f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts.items())
    return f"<dl>{''.join(rows)}</dl>"


def _matrix(report: Report) -> str:
    head = "".join(f"<th>{escape(dtype)}</th>" for dtype in report.dtypes)
    rows = []
    for level in report.levels:
        cells = []
        for dtype in report.dtypes:
            status, words = summary(report.at(level, dtype))
            cells.append(f'<td class="status"><span class="{status or "none"}">{words}</span></td>')
        rows.append(f"<tr><td><b>L{level}</b> {escape(LEVELS[level])}</td>{''.join(cells)}</tr>")
    return (
        f'<div class="wide"><table class="matrix"><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _clauses(report: Report) -> str:
    rows = []
    for clause, worst in report.worst_by_clause().items():
        status = "pass" if worst <= 1 else "fail"
        title = escape(spec_files.titles().get(clause, ""))
        figure = multiple(worst) if worst else "exact"
        rows.append(
            f'<tr><td><b>{escape(clause)}</b> {title}</td><td class="num">{figure}</td>'
            f'<td style="width:45%">{_bar(worst, status)}</td></tr>'
        )
    return (
        '<table><thead><tr><th>clause</th><th style="text-align:right">of what is allowed</th>'
        f"<th></th></tr></thead><tbody>{''.join(rows)}</tbody></table>"
    )


def _bar(worst: float, status: str) -> str:
    """Linear up to the allowance, which is the mark near the right end."""
    width = min(worst, 1.1) * 180
    colour = "var(--bar)" if status == "pass" else "var(--fail)"
    return (
        '<svg viewBox="0 0 200 8" role="img" aria-label="bar">'
        '<rect x="0" y="2" width="200" height="4" rx="2" fill="var(--code)"/>'
        f'<rect x="0" y="2" width="{width:.1f}" height="4" rx="2" fill="{colour}"/>'
        '<rect x="179.5" y="0" width="1" height="8" fill="var(--soft)"/></svg>'
    )


def _plots(report: Report) -> str:
    largest = max((max(counts, default=0) for counts in report.errors.values()), default=0)
    plots = [
        _plot(dtype, counts, largest) for dtype, counts in report.errors.items() if any(counts)
    ]
    return f'<div class="plots">{"".join(plots)}</div>' if plots else "<p>Nothing compared.</p>"


def _plot(dtype: str, counts: list[int], largest: int) -> str:
    """A histogram over powers of two of the allowance; the last bin is beyond it."""
    step, height, base = 20.0, 70.0, 82.0
    bars, labels = [], []
    for i, n in enumerate(counts):
        tall = height * n / largest if largest else 0
        tall = max(tall, 1.5) if n else 0
        beyond = i == len(counts) - 1
        colour = "var(--fail)" if beyond else "var(--bar)"
        edge = "more" if beyond else f"up to 2^{log2(EDGES[i]):.0f}"
        bars.append(
            f'<rect x="{i * step + 2:.0f}" y="{base - tall:.1f}" width="{step - 4:.0f}" '
            f'height="{tall:.1f}" rx="2" fill="{colour}"><title>{n} {edge}</title></rect>'
        )
    limit = (len(counts) - 1) * step
    for x, text in ((1.5 * step, "1/1024"), (limit - 2 * step, "1/4"), (limit, "1")):
        labels.append(
            f'<text x="{x:.0f}" y="96" font-size="10" text-anchor="middle" '
            f'fill="var(--soft)">{text}</text>'
        )
    return (
        f"<figure><figcaption>{escape(dtype)} <small>{sum(counts)} comparisons</small></figcaption>"
        f'<svg viewBox="0 0 {len(counts) * step:.0f} 100" role="img" '
        f'aria-label="errors in {escape(dtype)}">{"".join(bars)}'
        f'<line x1="0" y1="{base}" x2="{len(counts) * step:.0f}" y2="{base}" '
        'stroke="var(--line)"/>'
        f'<line x1="{limit}" y1="4" x2="{limit}" y2="{base}" stroke="var(--soft)" '
        f'stroke-dasharray="3 3"/>{"".join(labels)}</svg></figure>'
    )


def _failures(report: Report) -> list[str]:
    if not report.failures:
        return []
    blocks = by_check(report.failures)
    return [f"<h2>Failures: {len(blocks)} checks</h2>", *map(_failure, blocks)]


def _failure(found: list[Failure]) -> str:
    first, *others = found
    lines = [first.property, said(first)]
    if others:
        lines.append(f"Also fails in {', '.join(f.dtype for f in others)}.")
    paragraphs = "".join(f"<p>{escape(line)}</p>" for line in lines)
    shrunk = "shrunk case" if first.shrunk else "case (not shrunk)"
    return (
        f"<article><h3>Clause {escape(first.clause)} {escape(first.title)} · "
        f"<code>{escape(first.check)}</code> in {escape(first.dtype)}</h3>{paragraphs}"
        f"<pre>{escape(first.command)}</pre>"
        f"<details><summary>{shrunk}</summary><pre>{escape(first.case)}</pre></details></article>"
    )
