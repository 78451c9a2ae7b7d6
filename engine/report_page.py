"""The page of a report: one HTML file without a framework, a font or a picture from elsewhere.

Everything that comes from the data (names, paths, errors) passes through `text` or `as_script_data`.
"""

import base64
import html
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from engine.report import Findings, Share, Strip, centre_view
from engine.scores import Scores
from engine.statistics import BINS, Interval
from engine.view_details import VideoDetails

FOLDER = Path(__file__).parent
MOST_PAIRS, MOST_ERRORS, MOST_REASONS = 50, 500, 200
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def page(result: Scores, details: VideoDetails, numbers: Findings, strips: list[Strip], facts: dict[str, Any]) -> str:
    """The text of report.html; arguments as of `engine.report.write_report`."""
    protocol = result.protocol
    title = f"Test on {protocol['dataset']}"
    sections = [
        ("views", "Views", _views(numbers)),
        ("classes", "Classes", _classes(numbers)),
        ("confusion", "Confused classes", _confusion(numbers)),
        ("calibration", "Calibration", _calibration(numbers)),
        ("length", "Length of videos", _lengths(numbers)),
        ("strips", "Worst errors" if numbers.errors else "Least certain answers", _strips(result, numbers, strips)),
        ("errors", "Wrong videos", _errors(result, numbers)),
        ("unreadable", "Videos that could not be read", _unreadable(result, details)),
        ("damaged", "Damaged videos", _damaged(result, details)),
        ("protocol", "Protocol and versions", _facts(protocol, facts)),
    ]
    sections = [(name, heading, body) for name, heading, body in sections if body]
    links = " ".join(f'<a href="#{name}">{text(heading)}</a>' for name, heading, _ in sections)
    bodies = "\n".join(
        f'<section id="{name}">\n<h2>{text(heading)}</h2>\n{body}\n</section>' for name, heading, body in sections
    )
    views = protocol["test_crops"] * protocol["test_clips"]
    summary = (
        f"{len(result.paths):,} videos of {len(numbers.classes)} classes. {protocol['num_segments']} frames x "
        f"{protocol['test_crops']} crop{_s(protocol['test_crops'])} x {protocol['test_clips']} "
        f"clip{_s(protocol['test_clips'])}: a score is the mean over {views} view{_s(views)} of a video."
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{text(title)}</title>
<style>
{(FOLDER / "report.css").read_text(encoding="utf-8")}</style>
</head>
<body>
<header>
<h1>{text(title)}</h1>
<p class="checkpoint"><code>{text(protocol["checkpoint"])}</code></p>
<p>{text(summary)}</p>
{_cards(numbers, details)}
<nav>{links}</nav>
</header>
<main>
{bodies}
</main>
<script type="application/json" id="matrix-data">{as_script_data(_matrix_data(numbers))}</script>
<script>
{(FOLDER / "report.js").read_text(encoding="utf-8")}</script>
</body>
</html>
"""


def text(value: object) -> str:
    """A value as HTML text or as a quoted attribute; characters that cannot be seen are shown as escapes."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape", "replace").decode() for c in str(value))
    return html.escape(shown)


def name_of(value: object) -> str:
    """A name from the data, set apart so that its direction of writing does not turn its surroundings."""
    return f"<bdi>{text(value)}</bdi>"


def as_script_data(value: object) -> str:
    """JSON that ends no script element, whatever strings it holds."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def _s(count: int) -> str:
    return "" if count == 1 else "s"


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.2f}"


def _between(interval: Interval) -> str:
    if interval.low == interval.high:  # a bootstrap of equal values
        return "not known without an error"
    return f"{100 * interval.low:.1f} to {100 * interval.high:.1f}"


def _cards(numbers: Findings, details: VideoDetails) -> str:
    mean, interval = numbers.mean_class
    cards = [("Top-1", f"{numbers.top1.percent:.2f} %", _between(numbers.top1.interval))]
    if numbers.top5:
        cards.append(("Top-5", f"{numbers.top5.percent:.2f} %", _between(numbers.top5.interval)))
    cards.append(("Mean class accuracy", f"{100 * mean:.2f} %", _between(interval)))
    cards.append(
        ("Calibration error", f"{100 * numbers.calibration.error:.2f} %", _between(numbers.calibration_interval))
    )
    shown = "".join(
        f'<div class="card"><div>{name}</div><div class="number">{value}</div>'
        f'<div class="note">95 %: {between}</div></div>'
        for name, value, between in cards
    )
    unread = ""
    if details.unreadable:
        count = len(details.unreadable)
        be = "was" if count == 1 else "were"
        unread = (
            f'<p class="warning"><a href="#unreadable">{count} video{_s(count)} could not be read</a> and {be} counted '
            "as wrong.</p>"
        )
    if details.damaged:
        count = len(details.damaged)
        unread += f'<p class="warning"><a href="#damaged">{count} damaged video{_s(count)}</a> scored in part.</p>'
    return f"""<div class="cards">{shown}</div>
{unread}
<p class="note">"95 %" is the range in which the value probably lies for other videos of the same kind: Wilson's
interval for top-1 and top-5, a bootstrap over videos for the others. Mean class accuracy counts each class alike,
however many videos it has. The calibration error says how far scores are from the share of right answers.</p>"""


def _table(
    name: str, columns: Iterable[tuple[str, str]], rows: Iterable[Iterable[str]], search: str = "", shown: int = 0
) -> str:
    """A table that can be sorted and, with `search`, filtered.

    Args:
        columns: (heading, "number" or "text").
        rows: cells as HTML, made by `_cell` or a `<td>`.
        search: what the field for filtering asks for.
        shown: rows before scrolling; 0: all.
    """
    columns, rows = list(columns), [list(row) for row in rows]
    heads = "".join(
        f'<th scope="col" class="{kind}"><button type="button" data-kind="{kind}">{heading}</button></th>'
        for heading, kind in columns
    )
    body = "\n".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    field = ""
    if search:
        field = (
            f'<p class="search"><label>{text(search)} <input type="search" data-table="{name}"></label> '
            f'<output data-count="{name}">{len(rows)} of {len(rows)}</output></p>'
        )
    scroll = ' class="scroll tall"' if shown and len(rows) > shown else ' class="scroll"'
    return (
        f'{field}<div{scroll}><table id="{name}" class="sortable"><thead><tr>{heads}</tr></thead>'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def _cell(value: object) -> str:
    return f'<td class="text">{name_of(value)}</td>'


def _number(value: float | int, shown: str | None = None) -> str:
    key = -1 if isinstance(value, float) and math.isnan(value) else value
    return f'<td class="number" data-value="{key}">{text(shown if shown is not None else value)}</td>'


def _share_cells(share: Share) -> list[str]:
    """The cells of a share: percent with a bar and a whisker for its interval, and the interval in numbers."""
    low, high = (100 * bound for bound in share.interval)
    bar = (
        '<svg class="bar" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="track" width="100" height="10"/><rect class="fill" width="{share.percent:.2f}" height="10"/>'
        f'<rect class="whisker" x="{low:.2f}" y="4" width="{max(high - low, 0.5):.2f}" height="2"/></svg>'
    )
    return [_number(share.percent, f"{share.percent:.2f}"), f"<td>{bar}</td>", _number(low, f"{low:.1f} to {high:.1f}")]


def _views(numbers: Findings) -> str:
    if len(numbers.views) == 1:
        return ""
    rows = [
        [
            f"<td>{of.crops} crop{_s(of.crops)} x {of.clips} clip{_s(of.clips)}</td>",
            _number(of.crops * of.clips),
            *_share_cells(share),
        ]
        for of, share in numbers.views
    ]
    columns = [("Views", "text"), ("Of a video", "number"), ("Top-1 %", "number"), ("", "text"), ("95 %", "number")]
    return (
        "<p>The same run, scored by fewer of its views. One crop is the centre crop; one clip is the one nearest to "
        "the clip of a test with one clip. A separate test with one crop may cut a pixel beside it.</p>"
        + _table("views-table", columns, rows)
    )


def _classes(numbers: Findings) -> str:
    has_top5 = numbers.top5 is not None
    columns = [("Label", "number"), ("Class", "text"), ("Videos", "number"), ("Top-1 %", "number"), ("", "text")]
    columns += [("95 %", "number"), *([("Top-5 %", "number")] if has_top5 else [])]
    columns += [("Predicted", "number"), ("Most often taken for", "text")]
    rows = []
    for item in sorted(numbers.classes, key=lambda item: (item.top1.percent, item.label)):
        taken = "<td></td>"
        if item.taken_for:
            label, videos = item.taken_for
            taken = f'<td class="text">{name_of(numbers.names[label])} ({videos})</td>'
        rows.append(
            [
                _number(item.label),
                _cell(numbers.names[item.label]),
                _number(item.top1.n),
                *_share_cells(item.top1),
                *([_number(item.top5.percent, f"{item.top5.percent:.2f}")] if item.top5 else []),
                _number(item.predicted),
                taken,
            ]
        )
    without = len(numbers.names) - len(numbers.classes)
    note = f" {without} class{'' if without == 1 else 'es'} without a video left out." if without else ""
    return (
        "<p>The lowest accuracy first; a heading sorts. The thin line in a bar is the 95 % interval: with few videos, "
        f"it is long.{note} The same table is in <code>per_class.csv</code>.</p>"
        + _table("class-table", columns, rows, "Search classes", shown=20)
    )


def _confusion(numbers: Findings) -> str:
    confusion, names = numbers.confusion, numbers.names
    totals = confusion.sum(axis=1)
    pairs = [
        (int(confusion[true, label]), true, label)
        for true, label in zip(*confusion.nonzero(), strict=True)
        if true != label
    ]
    if not pairs:
        return "<p>No class was taken for another one. The counts are in <code>confusion.csv</code>.</p>"
    pairs.sort(key=lambda pair: (-pair[0], -pair[0] / totals[pair[1]], pair[1], pair[2]))
    rows = [
        [
            _cell(names[true]),
            _cell(names[label]),
            _number(count),
            _number(count / totals[true], f"{100 * count / totals[true]:.1f} % of {totals[true]}"),
            _number(int(confusion[label, true])),
            f'<td><button type="button" class="show" data-true="{true}" data-predicted="{label}">show</button></td>'
            if len(names) > 1
            else "<td></td>",
        ]
        for count, true, label in pairs[:MOST_PAIRS]
    ]
    columns = [("True class", "text"), ("Taken for", "text"), ("Videos", "number"), ("Of the class", "number")]
    columns += [("The other way round", "number"), ("In the matrix", "text")]
    more = f"The {MOST_PAIRS} most frequent of {len(pairs)} pairs. " if len(pairs) > MOST_PAIRS else ""
    return f"""<p>{more}All counts are in <code>confusion.csv</code>.</p>
{_table("pair-table", columns, rows, "Search pairs", shown=12)}
<h3>Confusion matrix</h3>
<p>Rows are true classes, columns predicted ones. Classes that are confused with each other stand side by side. Blue is
the diagonal: right answers. Red are errors; the stronger, the larger the part of the row's class.
<span class="wide-only">Point at the matrix to read it; click to see that part with names below.</span></p>
<div id="overview" class="scroll" hidden>
<canvas tabindex="0" role="img" aria-label="confusion matrix of all classes"></canvas></div>
<p id="readout" aria-live="polite" class="note"></p>
<div id="detail" class="scroll"></div>
<noscript><p>The matrix needs JavaScript.</p></noscript>"""


def _matrix_data(numbers: Findings) -> dict[str, Any]:
    confusion = numbers.confusion
    true, predicted = confusion.nonzero()
    counts = confusion[true, predicted]
    return {
        "names": [text_in_script(name) for name in numbers.names],
        "order": numbers.order,
        "cells": [true.tolist(), predicted.tolist(), counts.tolist()],
    }


def text_in_script(name: str) -> str:
    """A name for `textContent`, which needs no escaping; what cannot be seen is shown as an escape."""
    return html.unescape(text(name))


def _calibration(numbers: Findings) -> str:
    bins = numbers.calibration
    size, left, top, low = 320, 46, 12, 70
    wide, high = left + size + 12, top + size + 18 + low + 40

    def x(value: float) -> float:
        return left + size * value

    def y(value: float) -> float:
        return top + size * (1 - value)

    parts = []
    for tick in (0, 0.25, 0.5, 0.75, 1):
        parts.append(f'<line class="grid" x1="{x(0)}" x2="{x(1)}" y1="{y(tick)}" y2="{y(tick)}"/>')
        parts.append(f'<text x="{x(0) - 6}" y="{y(tick) + 4}" text-anchor="end">{100 * tick:.0f}</text>')
    base = top + size + 18 + low
    most = max(1, int(bins.videos.max()))
    for number, videos in enumerate(bins.videos.tolist()):
        start, end = number / BINS, (number + 1) / BINS
        label = f"scores {100 * start:.0f} to {100 * end:.0f} %: {videos} video{_s(videos)}"
        if videos:
            accuracy, confidence = bins.accuracy[number], bins.confidence[number]
            label += f", {100 * accuracy:.1f} % right at a mean score of {100 * confidence:.1f} %"
            parts.append(
                f'<rect class="fill" x="{x(start) + 1:.1f}" y="{y(accuracy):.1f}" width="{size / BINS - 2:.1f}" '
                f'height="{size * accuracy:.1f}"><title>{label}</title></rect>'
            )
            parts.append(
                f'<circle class="dot" cx="{x(confidence):.1f}" cy="{y(accuracy):.1f}" r="3"><title>{label}</title>'
                "</circle>"
            )
        parts.append(
            f'<rect class="count" x="{x(start) + 1:.1f}" y="{base - low * videos / most:.1f}" '
            f'width="{size / BINS - 2:.1f}" height="{low * videos / most:.1f}"><title>{label}</title></rect>'
        )
    parts.append(f'<line class="ideal" x1="{x(0)}" y1="{y(0)}" x2="{x(1)}" y2="{y(1)}"/>')
    parts.append(f'<line class="axis" x1="{x(0)}" x2="{x(1)}" y1="{base}" y2="{base}"/>')
    for tick in (0, 0.25, 0.5, 0.75, 1):
        parts.append(f'<text x="{x(tick)}" y="{base + 14}" text-anchor="middle">{100 * tick:.0f}</text>')
    parts.append(f'<text x="{x(0.5)}" y="{base + 32}" text-anchor="middle">score of the answer, %</text>')
    parts.append(
        f'<text transform="translate(12 {y(0.5)}) rotate(-90)" text-anchor="middle">right answers, %</text>'
        f'<text x="{x(0) - 6}" y="{base - low + 8}" text-anchor="end">{most}</text>'
        f'<text transform="translate(12 {base - low / 2}) rotate(-90)" text-anchor="middle">videos</text>'
    )
    read = int(bins.videos.sum())
    confidence = float((bins.confidence * bins.videos)[bins.videos > 0].sum() / max(1, read))
    accuracy = float((bins.accuracy * bins.videos)[bins.videos > 0].sum() / max(1, read))
    verdict = "more careful than it needs to be" if confidence < accuracy else "surer than it should be"
    if abs(confidence - accuracy) < 0.005:
        verdict = "as sure as it should be, on the whole"
    return f"""<p>Are 80 % of the answers with a score of 80 % right? Bars that end on the dashed line say yes. Above
it, the model is too careful, below it too sure. Here the mean score is {_percent(confidence)} %, and
{_percent(accuracy)} % of the answers are right: the model is {verdict}. The expected calibration error is
{100 * bins.error:.2f} % (95 %: {_between(numbers.calibration_interval)}), over {BINS} bins of equal width. The grey
bars below say how many videos have such a score.</p>
<svg class="chart" viewBox="0 0 {wide} {high}" role="img" aria-label="reliability diagram" style="max-width:{wide}px">
{"".join(parts)}
</svg>"""


def _lengths(numbers: Findings) -> str:
    if len(numbers.lengths) == 1:
        fewest, most, _ = numbers.lengths[0]
        return f"<p>All videos have {fewest if fewest == most else f'{fewest} to {most}'} frames.</p>"
    rows = [
        [
            _number(fewest, f"{fewest}" if fewest == most else f"{fewest} to {most}"),
            _number(share.n),
            *_share_cells(share),
        ]
        for fewest, most, share in numbers.lengths
    ]
    columns = [("Frames", "number"), ("Videos", "number"), ("Top-1 %", "number"), ("", "text"), ("95 %", "number")]
    return "<p>Groups of about as many videos each, by number of frames.</p>" + _table("length-table", columns, rows)


def _strips(result: Scores, numbers: Findings, strips: list[Strip]) -> str:
    if not strips:
        return ""
    figures = []
    for strip in strips:
        label, predicted = int(result.labels[strip.index]), int(numbers.predicted[strip.index])
        scores = result.scores[strip.index]
        answer = f"<b>{name_of(numbers.names[predicted])}</b> {100 * scores[predicted]:.1f} %"
        true = f"{name_of(numbers.names[label])} {100 * scores[label]:.1f} %"
        line = f"taken for {answer}, is {true}" if predicted != label else f"{answer}, which is right"
        picture = base64.b64encode(strip.jpeg).decode()
        figures.append(
            f'<figure><img src="data:image/jpeg;base64,{picture}" alt="{strip.shown} frames">'
            f'<figcaption>{line}<br><code class="path">{name_of(result.paths[strip.index])}</code></figcaption>'
            "</figure>"
        )
    frames, shown = result.protocol["num_segments"], strips[0].shown
    which = f"{shown} of the {frames} frames" if shown < frames else f"The {frames} frames"
    what = (
        f"The {len(strips)} of {len(numbers.errors)} wrong videos whose score is highest above that of the true class."
        if numbers.errors
        else "No video that could be read was wrong. These have the two highest scores nearest to each other."
    )
    return f"""<p>{what} {which} as the model saw them: {centre_view(numbers)}.</p>
<div class="strips">{"".join(figures)}</div>"""


def _errors(result: Scores, numbers: Findings) -> str:
    if not numbers.errors:
        return ""
    rows = []
    for index in numbers.errors[:MOST_ERRORS]:
        label, predicted = int(result.labels[index]), int(numbers.predicted[index])
        scores = [float(result.scores[index, k]) for k in (predicted, label)]
        rows.append(
            [
                f'<td class="text"><code class="path">{name_of(result.paths[index])}</code></td>',
                _cell(numbers.names[label]),
                _cell(numbers.names[predicted]),
                *(_number(score, f"{100 * score:.1f}") for score in scores),
                _number(int(numbers.rank[index])),
            ]
        )
    columns = [("Video", "text"), ("True class", "text"), ("Taken for", "text"), ("Its score %", "number")]
    columns += [("Score of the true class %", "number"), ("Place of the true class", "number")]
    count = len(numbers.errors)
    which = f"The {MOST_ERRORS} most confident of {count}" if count > MOST_ERRORS else f"{count}"
    return f"<p>{which} wrong video{_s(count)}. <code>videos.csv</code> has every video.</p>" + _table(
        "error-table", columns, rows, "Search videos and classes", shown=12
    )


def _unreadable(result: Scores, details: VideoDetails) -> str:
    count = len(details.unreadable)
    return _reasons(
        result,
        "unreadable-table",
        f"{count} of {len(result.paths)} videos. They count as wrong. The confusion matrix and the calibration are "
        "without them.",
        details.unreadable,
    )


def _damaged(result: Scores, details: VideoDetails) -> str:
    count = len(details.damaged)
    return _reasons(
        result,
        "damaged-table",
        f"{count} of {len(result.paths)} videos. What could be decoded of them was scored.",
        details.damaged,
    )


def _reasons(result: Scores, name: str, words: str, videos: list[tuple[int, str]]) -> str:
    if not videos:
        return ""
    rows = [
        [f'<td class="text"><code class="path">{name_of(result.paths[index])}</code></td>', _cell(reason)]
        for index, reason in videos[:MOST_REASONS]
    ]
    first = f" The first {MOST_REASONS} of them:" if len(videos) > MOST_REASONS else ""
    return f"<p>{words}{first}</p>" + _table(name, [("Video", "text"), ("Reason", "text")], rows, shown=12)


PROTOCOL_WORDS = {
    "dataset": "data set",
    "protocol": "protocol of frames and pixels",
    "num_segments": "frames of a clip",
    "index_base": "number of the first frame file",
    "resize": "resize: shorter side, or height and width",
    "input_size": "height and width of the crop",
    "dense": "dense sampling",
    "test_crops": "crops of a clip",
    "test_clips": "clips of a video",
    "list": "list of the videos",
    "decoder": "decoder of video files",
    "accepted_changes": "changes since the training",
    "model_sha256": "SHA-256 of the trained weights",
    "list_sha256": "SHA-256 of the list",
}


def _facts(protocol: dict[str, Any], facts: dict[str, Any]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{text(PROTOCOL_WORDS.get(key, key))}</th>'
        f"<td><code>{name_of(_plain(value))}</code></td></tr>"
        for key, value in {**protocol, **facts}.items()
        if value not in (None, {}, [])
    )
    return f'<div class="scroll"><table class="facts"><tbody>{rows}</tbody></table></div>'


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return str(value)
