"""A trace as one HTML page that needs nothing else: no script, font, image or style from outside.

Every text is escaped, and made harmless first. What the pointer rests on says its row, step, token
and figure. It looks as the reports of `bridge conformance` do, light or dark as the reader likes.
"""

from collections.abc import Iterator
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from bridge.tracing.trace import Trace
from bridge_cli.text import harmless
from bridge_cli.trace_colours import Scale, is_bright, scale_of
from bridge_cli.trace_svg import bars, css, curves, heat, legend, rows_map, word
from bridge_cli.trace_view import remarks

if TYPE_CHECKING:
    from bridge.contract import Sampling

STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --soft: #60646c; --line: #e0e3e8; --page: #fbfcfd;
  --card: #ffffff; --bar: #4a7bd4; --other: #c2571a; --code: #f2f4f7; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --soft: #9aa0a9; --line: #30353d;
  --page: #14171b; --card: #1b1f24; --bar: #7ba4ee; --other: #f0a070; --code: #22272e; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0; letter-spacing: -0.01em; }
h2 { font-size: 1.1rem; margin: 2.5rem 0 0.75rem; }
.kicker, .note { color: var(--soft); font-size: 0.87rem; margin: 0 0 0.4rem; }
.note { margin: 0.5rem 0 0; max-width: 44rem; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); margin: 0;
  gap: 0.75rem 1.5rem; }
dt { color: var(--soft); font-size: 0.8rem; } dd { margin: 0; overflow-wrap: anywhere; }
.wide { overflow-x: auto; padding-bottom: 0.3rem; }
svg { display: block; height: auto; }
pre { background: var(--code); border-radius: 6px; padding: 0.6rem 0.8rem; margin: 1rem 0 1.25rem;
  white-space: pre-wrap; overflow-wrap: anywhere; max-height: 16rem; overflow-y: auto;
  font: 0.8rem/1.45 ui-monospace, Menlo, monospace; }
table { border-collapse: separate; border-spacing: 1px; }
th { position: sticky; left: 0; background: var(--page); color: var(--soft); font-weight: 400;
  font-size: 0.8rem; text-align: right; padding: 0 0.5rem 0 0; white-space: nowrap; }
thead th { text-align: center; padding: 0; position: static; }
td { font: 0.8rem/1.3 ui-monospace, Menlo, monospace; text-align: center; padding: 0.15rem 0.35rem;
  min-width: 1.6rem; white-space: pre; border-radius: 3px; }
.maps { display: grid; grid-template-columns: repeat(auto-fill, minmax(16rem, 1fr));
  margin-top: 0.75rem; gap: 1rem; }
figure { margin: 0; padding: 0.85rem 1rem; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; }
figcaption { font-weight: 600; font-size: 0.87rem; margin-bottom: 0.5rem; }
figcaption small { color: var(--soft); font-weight: 400; float: right; }
.key { display: inline-block; width: 1.1rem; height: 0.2rem; vertical-align: middle; }
"""


def page(trace: Trace, checkpoint: str, sampling: "Sampling", layer: int | None = None) -> str:
    """The whole page. `layer`: whose attention colours the tokens; None is the mean over layers."""
    rows = f"{trace.width} row{'s' * (trace.width > 1)}"
    parts = (
        '<p class="kicker">Bridge trace</p>',
        f"<h1>What {rows} read of each other</h1>",
        f"<pre>{escape(harmless(trace.prompt))}</pre>",
        _facts(trace, checkpoint, sampling),
        *(f'<p class="note">{escape(line)}</p>' for line in remarks(trace)),
        "<h2>Answers</h2>",
        *_answers(trace, layer),
        *(_attention(trace) if trace.attention is not None else ()),
        "<h2>Norm ratio by layer</h2>",
        bars([f"layer {number}" for number in trace.layers], trace.norm_ratios),
        _note(
            "The norm of what a block adds over that of what it reads, mean over all active cells, "
            "the prompt's too (clause 3.9)."
        ),
        "<h2>Entropy by step</h2>",
        _entropy(trace),
        *(_agreement(trace) if trace.width > 1 else ()),
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Bridge trace: {rows}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(parts)
        + "\n</main>\n</body>\n</html>\n"
    )


def _facts(trace: Trace, checkpoint: str, sampling: "Sampling") -> str:
    filters = {"top-k": sampling.top_k, "top-p": sampling.top_p, "min-p": sampling.min_p}
    facts = {
        "checkpoint": harmless(checkpoint),
        "blocks": f"{trace.kind}, {len(trace.layers)} layers"
        + (f" of {trace.heads} heads" if trace.heads else ""),
        "width": str(trace.width),
        "steps": str(trace.steps),
        "temperature": f"{sampling.temperature:g}",
        **{name: f"{value:g}" for name, value in filters.items() if value is not None},
        "seed": str(sampling.seed),
    }
    rows = (f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts.items())
    return f"<dl>{''.join(rows)}</dl>"


def _answers(trace: Trace, layer: int | None) -> Iterator[str]:
    """Every token, coloured by the attention that its row gets when it is drawn."""
    heard = trace.heard(layer).T if trace.attention is not None else trace.entropy
    scale = scale_of(heard)
    numbers = "".join(f"<th>{t}</th>" for t in range(trace.steps))
    lines = []
    for row, words in enumerate(trace.words):
        cells = (_token(trace, row, t, float(heard[row, t]), scale) for t in range(len(words)))
        lines.append(f"<tr><th>row {row}</th>{''.join(cells)}</tr>")
    yield (
        f'<div class="wide"><table><thead><tr><th></th>{numbers}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )
    yield legend(scale)
    if trace.attention is None:
        return (yield _note("Coloured by the entropy of what each token was drawn from, in nats."))
    which = "mean over layers" if layer is None else f"layer {layer}"
    yield _note(
        "Coloured by the attention that a row gets from the others at the step at which the token "
        f"is drawn: the mean over the rows that look, {which}."
    )


def _token(trace: Trace, row: int, step: int, value: float, scale: Scale) -> str:
    said = escape(harmless(trace.words[row][step]))
    title = f"row {row}, step {step}: {said}"
    if trace.attention is not None:
        title += "" if np.isnan(value) else f"\nattention from the others {value:.3f}"
    title += f"\nentropy {trace.entropy[row, step]:.3f} nats"
    look = ""
    if not np.isnan(value):
        ink = "#000" if is_bright(scale.colour(value)) else "#fff"
        look = f' style="background:{css(scale, value)};color:{ink}"'
    return f'<td{look} title="{title}">{word(trace.words[row][step])}</td>'


def _attention(trace: Trace) -> Iterator[str]:
    shares, even = trace.to_others(), trace.even()
    means = np.nanmean(shares, axis=2)
    scale = scale_of(means)
    words = [[escape(harmless(said)) for said in row] for row in trace.words]

    def title(y: int, t: int) -> str:
        lines = [f"layer {trace.layers[y]}, step {t}: {means[y, t]:.3f} to others"]
        lines[0] += f" (even {even[t]:.3f})"
        lines += [
            f"row {row} {words[row][t]} {share:.3f}"
            for row, share in enumerate(shares[y, t])
            if not np.isnan(share)
        ]
        return "\n".join(lines)

    yield "<h2>Attention to other rows, by layer and step</h2>"
    names = [f"layer {number}" for number in trace.layers]
    yield f'<div class="wide">{heat(names, means, scale, title)}</div>'
    yield legend(scale)
    yield _note(
        "The share of each row's attention that goes to others than itself, mean over rows and "
        "heads. A row that looks at all n alike gives (n - 1) / n to others. At step 0, the last "
        "token of the prompt, rows are still the same, and so look at all alike."
    )
    yield "<h2>Who looks at whom</h2>"
    maps = {"mean over layers": trace.looks()}
    maps |= {f"layer {number}": trace.looks(number) for number in trace.layers}
    scale = scale_of(np.stack(list(maps.values())))
    yield legend(scale)
    yield f'<div class="maps">{"".join(_map(name, m, scale) for name, m in maps.items())}</div>'
    yield _note(
        "The weight that each row (down) gives to each (across), in percent: mean over heads and "
        "over the steps at which the one that looks is there."
    )


def _map(name: str, looks: np.ndarray, scale: Scale) -> str:
    def title(row: int, other: int) -> str:
        return f"{name}: row {row} looks at row {other}: {looks[row, other]:.3f}"

    return f"<figure><figcaption>{name}</figcaption>{rows_map(looks, scale, title)}</figure>"


def _entropy(trace: Trace) -> str:
    mean = trace.mean_entropy()
    lines = [(row, "var(--bar)", 0.2) for row in trace.entropy] + [(mean, "var(--bar)", 1.0)]
    titles = [f"step {t}: mean entropy {value:.3f} nats" for t, value in enumerate(mean)]
    drawn = curves(lines, float(np.nanmax(trace.entropy)), titles)
    return f'<div class="wide">{drawn}</div>' + _note("Each row, and their mean, in nats.")


def _agreement(trace: Trace) -> Iterator[str]:
    agreement = trace.agreement()
    titles = [
        f"step {t}: " + ("one row is left" if np.isnan(share) else f"{share:.0%} say the same")
        for t, share in enumerate(agreement)
    ]
    yield "<h2>Agreement by step</h2>"
    drawn = curves([(agreement, "var(--other)", 1.0)], 1.0, titles, trace.agree_from())
    yield f'<div class="wide">{drawn}</div>'
    yield _note("The share of the active rows that say the commonest token of the step.")


def _note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'
