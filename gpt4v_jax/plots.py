"""Plots and pictures of a page, as text to put into HTML: matplotlib's SVG in the page's colours, PNG as data."""

import base64
import html
import io
import re

import numpy as np
from PIL import Image

# What matplotlib draws with -> the page's colours, so that plots follow light and dark.
COLOURS = {f"#{i:02x}{i:02x}{i:02x}": name for i, name in enumerate(("ink", "faint", "line", *"abcdefg"), 1)}
INK, FAINT, LINE, A, B, C, D, E, F, G = COLOURS
DASHES = ("-", "--", "-.", ":")


def curves(title: str, series, log: bool = False, top: float | None = None) -> str:
    """Curves against steps; series: (name, [(step, value)], colour), empty ones are left out."""
    figure, axes = _figure(3.1, title)
    series = [(name, points, colour) for name, points, colour in series if points]
    for i, (name, points, colour) in enumerate(series):
        marker = ("o", "s", "^", "D", "v", "P", "X", "*")[i % 8] if len(points) < 30 else None
        axes.plot(*zip(*points, strict=True), color=colour, lw=1.5, label=name, marker=marker, ms=3.5)
    values = [value for _, points, _ in series for _, value in points]
    if log:
        _log(axes, values)
    else:
        axes.set_ylim(0, top)
    axes.set_xlabel("step")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    if max(values) > 100:
        axes.yaxis.set_major_formatter("{x:,.0f}")
    if len(series) > 1:
        axes.legend(frameon=False, fontsize=9, labelcolor=INK, ncols=1 + len(series) // 5)
    return _svg(figure, title)


def families(title: str, x: str, series, log: bool = False) -> str:
    """Curves of several runs each, against `x`; series: (name, [[(x, value)] of each run], colour). Runs are thin, and
    where all have the same x their mean is thick. A colour that comes again is dashed."""
    figure, axes = _figure(3.2 + 0.22 * (len(series) // 3), title)
    for i, (name, runs, colour) in enumerate(series):
        dashes = DASHES[[other for *_, other in series[:i]].count(colour) % len(DASHES)]
        shared = sorted(set.intersection(*({at for at, _ in points} for points in runs)))
        thin, pale = (0.8, 0.45) if shared else (1.2, 0.8)
        for points in runs:
            axes.plot(*zip(*points, strict=True), color=colour, lw=thin, alpha=pale, ls=dashes)
        means = [np.mean([dict(points)[at] for points in runs]) for at in shared]
        axes.plot(shared, means, color=colour, lw=1.8, label=name, ls=dashes)  # against seconds: for the legend alone
    values = [value for _, runs, _ in series for points in runs for _, value in points]
    if log:
        _log(axes, values)
    axes.set_xlabel(x)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter("{x:,.4g}")
    figure.legend(frameon=False, fontsize=9, labelcolor=INK, ncols=3, loc="outside lower left")
    return _svg(figure, f"{title} against {x}")


def dots(title: str, x: str, rows, marks=(), zero: bool = False) -> str:
    """Means with whiskers, one above the other; rows: (name, colour, mean, low, high, [value of each run]), low and
    high None where there is no interval. marks: (name, marker, [value of each row, or None]). zero: a line at 0."""
    figure, axes = _figure(0.42 * len(rows) + 1.15 + 0.2 * bool(marks), title)
    for y, (_, colour, mean, low, high, values) in enumerate(rows):
        if low is not None:
            axes.plot((low, high), (y, y), color=colour, lw=2.2, solid_capstyle="butt")
            axes.plot((low, high), (y, y), color=colour, ls="", marker="|", ms=9, mew=1.6)
        axes.plot(values, [y] * len(values), color=colour, ls="", marker="o", ms=4, alpha=0.5)
        axes.plot([mean], [y], color=colour, ls="", marker="o", ms=8)
        axes.annotate(f"{mean:+.3f}" if zero else f"{mean:.3f}", (mean, y), (0, 7), textcoords="offset points",
                      ha="center", fontsize=8.5, color=INK)  # fmt: skip
    for name, marker, values in marks:
        there = [(value, y) for y, value in enumerate(values) if value is not None]
        axes.plot(*zip(*there, strict=True), color=C, ls="", marker=marker, ms=7, mew=1.4, fillstyle="none", label=name)
    if zero:
        axes.axvline(0, color=FAINT, lw=1)
    axes.set_ylim(len(rows) - 0.5, -0.7)
    axes.set_yticks(range(len(rows)), [row[0] for row in rows])
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(x)
    if marks:
        figure.legend(frameon=False, fontsize=9, ncols=len(marks), loc="outside lower left", labelcolor=INK)
    return _svg(figure, title)


def bars(title: str, rows: list[str], series) -> str:
    """Shares by row, several beside one another; series: (name, [(share, low, high) of each row], colour).

    The first series says its numbers; the last row is set apart.
    """
    figure, axes = _figure(0.5 * len(rows) + 1, f"{title}: questions right (share)")
    thick = 0.8 / len(series)
    for k, (name, shares, colour) in enumerate(series):
        at = np.arange(len(rows)) + (k - (len(series) - 1) / 2) * thick
        share, low, high = np.array(shares).T
        axes.barh(at, share, thick * 0.9, color=colour, label=name)
        sides = np.maximum((share - low, high - share), 0)  # at a share of 0 rounding makes one of them -1e-17
        axes.errorbar(share, at, xerr=sides, fmt="none", ecolor=INK, elinewidth=1)
        for y, value, end in zip(at, share, high, strict=True) if k == 0 else ():
            axes.text(end + 0.015, y, f"{value:.2f}", va="center", fontsize=8.5, color=INK)
    axes.set(xlim=(0, 1.08), ylim=(len(rows) - 0.4, -0.6), xticks=np.arange(0, 1.01, 0.2))
    axes.set_yticks(range(len(rows)), rows)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.axhline(len(rows) - 1.5, color=FAINT, lw=0.8)
    figure.legend(frameon=False, fontsize=9, ncols=2, loc="outside lower left", handlelength=1, labelcolor=INK)
    return _svg(figure, f"accuracy by kind, {title}")


def _log(axes, values: list[float]) -> None:
    """A logarithmic axis, where the values go far enough."""
    if not 0 < 4 * min(values) < max(values):
        return
    axes.set_yscale("log")
    ticks = [digit * 10.0**k for k in range(-5, 4) for digit in (1, 2, 5)]
    axes.set_yticks([t for t in ticks if min(values) / 1.5 < t < max(values) * 1.5])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter("{x:g}")


def _figure(height: float, title: str):
    from matplotlib.figure import Figure  # heavy; and without pyplot there is no window and no global state

    figure = Figure((5.0, height), layout="constrained")
    axes = figure.subplots()
    axes.grid(color=LINE, lw=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(color=FAINT, labelcolor=INK, labelsize=9)
    axes.spines[:].set_color(FAINT)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.label.set(color=INK, size=9)
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    return figure, axes


def _svg(figure, label: str) -> str:
    """-> the figure as inline SVG, in the page's colours and font."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
        figure.savefig(buffer, format="svg", transparent=True)
    svg = re.sub(r"<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.DOTALL)
    box, svg = re.search(r'viewBox="[^"]*"', svg)[0], svg[svg.index(">", svg.index("<svg")) + 1 :]
    for drawn, name in COLOURS.items():
        svg = svg.replace(drawn, f"var(--{name})")
    return f'<figure><svg {box} role="img" aria-label="{html.escape(label)}">{svg}</figure>'


def heat(picture: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The weights of a picture's patches, dark to bright, and over them the picture: what is unlike its background."""
    import matplotlib

    shape = (3 * picture.shape[0],) * 2
    unlike = np.abs(picture - np.median(picture, (0, 1))).max(-1).clip(0, 255).astype(np.uint8)
    unlike = np.asarray(Image.fromarray(unlike).resize(shape, Image.Resampling.BICUBIC))[..., None]
    heat = np.kron(weights / max(weights.max(), 1e-12), np.ones((shape[0] // len(weights),) * 2))
    heat = 255 * matplotlib.colormaps["inferno"](heat)[..., :3]
    return (0.7 * heat + 0.3 * unlike).astype(np.uint8)


def img(picture: np.ndarray, label: str) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "png")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{html.escape(label)}">'
