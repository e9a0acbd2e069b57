"""Plots and the README's table, made from benchmark CSVs only.

    cutedsl-kernels bench plot bench/results/layer*.csv --out plots        all plots of every model in the files
    cutedsl-kernels bench plot bench/results/layer*.csv --readme           the table and the plot that README.md shows

Each plot is written as PNG and SVG. The SVG holds a hash of the numbers drawn, by which a test sees that a plot no
longer fits its CSV.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cutedsl_kernels import UserError

from .arguments import Parser, default_sparsity
from .records import read_rows
from .select import Case, Measured, by_gpu, measured, models

README_PLOT = Path("docs/images/speedup")  # and .svg, .png
MODELS_SHARES, MODELS_MOST_TOKENS = (0.0, 0.5, 0.7, 0.85), 256  # what the table of the other models shows
TABLE_MARKS = ("<!-- bench:table -->", "<!-- /bench:table -->")
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
Cases = Mapping[Case, Sequence[Measured]]


def data_hash(cases: Cases) -> str:
    """SHA-256 of what a plot of ``cases`` shows."""
    points = [
        [case.label, one.num_tokens, one.us, one.baseline_us, one.copy_share] for case in cases for one in cases[case]
    ]
    return hashlib.sha256(json.dumps(points).encode()).hexdigest()


def _figure() -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "cutedsl-kernels"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.2, 4.4), layout="constrained")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _tokens_axis(axes: Any, cases: Cases) -> None:
    tokens = sorted({one.num_tokens for case in cases for one in cases[case]})
    axes.set_xscale("log", base=2)
    axes.set_xticks(tokens, [f"{t // 1024}k" if t >= 1024 and t % 1024 == 0 else str(t) for t in tokens])
    axes.minorticks_off()
    axes.set_xlabel("tokens in the batch")


def _save(figure: Any, cases: Cases, path: Path) -> None:
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    note = f"data sha256 {data_hash(cases)}"
    figure.savefig(path.with_name(path.name + ".svg"), metadata={"Date": None, "Description": note})
    figure.savefig(path.with_name(path.name + ".png"), dpi=150, metadata={"Description": note})
    pyplot.close(figure)


def plot_speedup(cases: Cases, title: str, path: Path) -> None:
    """Dense time over sparse time, and dashed the ratio of the bytes both have to read."""
    figure, axes = _figure()
    for colour, (case, points) in zip(COLOURS * 3, cases.items(), strict=False):
        x = [one.num_tokens for one in points]
        axes.plot(x, [one.ratio for one in points], "o-", color=colour, markersize=4, label=case.label)
        axes.plot(x, [one.byte_cap for one in points], "--", color=colour, linewidth=1, alpha=0.7)
    axes.plot([], [], "--", color="#666666", linewidth=1, label="ratio of bytes (independent masks)")
    axes.axhline(1, color="#444444", linewidth=0.8)
    _tokens_axis(axes, cases)
    baseline = next(iter(cases.values()))[0].baseline
    axes.set_ylabel(f"times as fast as {baseline}")
    axes.set_ylim(bottom=0)
    axes.set_title(title, loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=8, title="inactive neurons", title_fontsize=8)
    _save(figure, cases, path)


def plot_bandwidth(cases: Cases, title: str, path: Path) -> None:
    """Bytes the layer had to read over its time, as a share of the device-to-device copy of the run."""
    figure, axes = _figure()
    for colour, (case, points) in zip(COLOURS * 3, cases.items(), strict=False):
        x = [one.num_tokens for one in points]
        axes.plot(x, [100 * one.copy_share for one in points], "o-", color=colour, markersize=4, label=case.label)
    _tokens_axis(axes, cases)
    axes.set_ylabel("% of a device-to-device copy")
    axes.set_ylim(0, 105)
    axes.set_title(title, loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=8, title="inactive neurons", title_fontsize=8)
    _save(figure, cases, path)


def plot_crossover(cases: Cases, title: str, path: Path) -> bool:
    """Time over sparsity for each number of tokens, its dense time dotted; False if no T has two sparsities."""
    lines: dict[int, list[Measured]] = {}
    for case, points in sorted(cases.items()):
        for one in points:
            if not case.router_weighted:
                lines.setdefault(one.num_tokens, []).append(one)
    lines = {tokens: points for tokens, points in sorted(lines.items()) if len(points) > 1}
    if not lines:
        return False
    figure, axes = _figure()
    shown = [t for i, t in enumerate(lines) if len(lines) <= len(COLOURS) or i % 2 == 0]
    for colour, tokens in zip(COLOURS * 3, shown, strict=False):
        points = lines[tokens]
        x = [100 * one.case.sparsity for one in points]
        axes.plot(x, [one.us for one in points], "o-", color=colour, markersize=4, label=f"{tokens}")
        axes.axhline(points[0].baseline_us, color=colour, linewidth=1, linestyle=":")
        for left, right in itertools.pairwise(points):
            if left.ratio < 1 <= right.ratio:
                share = math.log(1 / left.ratio) / math.log(right.ratio / left.ratio)
                at = left.case.sparsity + share * (right.case.sparsity - left.case.sparsity)
                axes.plot(100 * at, left.us * (right.us / left.us) ** share, "x", color=colour, markersize=9)
    axes.plot([], [], ":", color="#666666", linewidth=1, label="dense")
    axes.plot([], [], "x", color="#666666", label="crossover")
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("% of neurons inactive")
    axes.set_ylabel("microseconds")
    axes.set_title(title, loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=8, title="tokens", title_fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    _save(figure, cases, path)
    return True


def _title(rows: Sequence[Mapping[str, str]], model: str) -> str:
    row = next(row for row in rows if row["model"] == model)
    sizes = f"E={row['experts']}, k={row['top_k']}, H={row['hidden']}, I={row['intermediate']}"
    return f"{model} ({sizes}), one MoE layer, {row['gpu']}"


def _without_neighbours(cases: Cases, cutoff: float) -> dict[Case, Sequence[Measured]]:
    """Cases but those within a point of the cutoff, where that was measured itself: their lines would coincide."""
    has_cutoff = any(case.sparsity == cutoff and not case.router_weighted for case in cases)
    return {
        case: points
        for case, points in cases.items()
        if case.router_weighted or not has_cutoff or not 0 < abs(case.sparsity - cutoff) < 0.01
    }


def plot_all(rows: Sequence[Mapping[str, str]], out: Path) -> list[Path]:
    """Three plots for every GPU and model; the SVG paths. UserError if no row has a baseline to compare with."""
    made: list[Path] = []
    gpus = by_gpu(rows)
    for gpu, model in [(name, model) for name in gpus for model in models(gpus[name])]:
        cases = _without_neighbours(measured(gpus[gpu], model), default_sparsity(model))
        if not cases:
            continue
        name = f"{gpu} {model}" if len(gpus) > 1 else model
        title, stem = _title(gpus[gpu], model), re.sub(r"[^A-Za-z0-9.]+", "-", name)
        plot_speedup(cases, title, out / f"{stem}-speedup")
        plot_bandwidth(cases, title, out / f"{stem}-bandwidth")
        made += [out / f"{stem}-speedup.svg", out / f"{stem}-bandwidth.svg"]
        if plot_crossover(cases, title, out / f"{stem}-time"):
            made.append(out / f"{stem}-time.svg")
    if not made:
        raise UserError("the CSV files hold no sparse measurement with a baseline: nothing to plot")
    return made


def readme_cases(rows: Sequence[Mapping[str, str]]) -> tuple[str, Cases]:
    """What the README shows: of the first model its cutoff (or sparsest) case, and its sparsest routed case."""
    for model in models(rows):
        cases = measured(rows, model)
        plain = [case for case in cases if not case.router_weighted]
        routed = [case for case in cases if case.router_weighted]
        if plain or routed:
            cutoff = [case for case in plain if case.sparsity == default_sparsity(model)]
            chosen = [*(cutoff or plain[-1:]), *routed[-1:]]
            return model, {case: cases[case] for case in chosen}
    raise UserError("the CSV files hold no sparse measurement with a baseline: no table to make")


def readme_text(rows: Sequence[Mapping[str, str]]) -> str:
    """Markdown: a table for each GPU; with the first its plot, and a table of the other models."""
    plot = f"![Times as fast as dense over tokens]({README_PLOT.as_posix()}.svg)"
    parts = list(by_gpu(rows).values())
    first, *others = (readme_table(part) for part in parts)
    return "\n\n".join(filter(None, [first, plot, models_table(parts[0]), *others]))


def models_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Markdown: how many times as fast as dense the models are that readme_table does not show; "" if there is none.

    A line for each model and case, a column for each number of tokens up to the largest that decodes.
    """
    main, _ = readme_cases(rows)
    lines: list[tuple[str, Case, dict[int, Measured]]] = []
    for model in models(rows):
        cases = {} if model == main else measured(rows, model)
        routed = [case for case in cases if case.router_weighted]
        for case in [Case(share, 0.0, False) for share in MODELS_SHARES] + routed[-1:]:
            points = {one.num_tokens: one for one in cases.get(case, ()) if one.num_tokens <= MODELS_MOST_TOKENS}
            if points:
                lines.append((model, case, points))
    if not lines:
        return ""
    tokens = sorted({tokens for _, _, points in lines for tokens in points})
    days = _days(one for _, _, points in lines for one in points.values())
    table = [
        f"Other models on {rows[0]['gpu']}: times as fast as dense, measured as above, {days}.",
        "",
        "| model | inactive neurons | " + " | ".join(map(str, tokens)) + " |",
        "|---|---|" + "---:|" * len(tokens),
    ]
    for model, case, points in lines:
        cells = [f"{points[t].ratio:.2f}x" if t in points else "" for t in tokens]
        table.append("| " + " | ".join([model, case.label, *cells]) + " |")
    return "\n".join(table)


def readme_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Markdown: microseconds dense and sparse for each number of tokens, one pair of columns for each case."""
    model, cases = readme_cases(rows)
    shown = [one for points in cases.values() for one in points]
    row, days = max((one.source for one in shown), key=lambda row: row["date"]), _days(shown)
    by_tokens: dict[int, dict[Case, Measured]] = {}
    for case, points in cases.items():
        for one in points:
            by_tokens.setdefault(one.num_tokens, {})[case] = one
    some = next(iter(cases.values()))[0]
    versions = ", ".join(f"{name} {row[name]}" for name in ("torch", "triton", "vllm") if row[name])
    head = ["tokens", "dense us"]
    for case in cases:
        head += [f"{case.label}: us", "ratio", "of a copy"]
    how = "CUDA graph, L2 cold" if row["driver"] else "host clock"
    driver = f", driver {row['driver']}" if row["driver"] else ""
    lines = [
        f"One MoE layer of {model} on {row['gpu']}, bf16, random weights, uniform routing, independent masks;",
        f"medians, {how}. The columns after dense: share of inactive neurons. Dense is {some.baseline}, measured in",
        f'the same run; "of a copy" compares the bytes that had to be read with a copy. {days}{driver}, {versions}.',
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---:|" * (2 + 3 * len(cases)),
    ]
    for tokens, found in sorted(by_tokens.items()):
        dense = next(iter(found.values())).baseline_us
        cells = [str(tokens), f"{dense:.1f}"]
        for case in cases:
            cells += _cells(found.get(case))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _days(points: Iterable[Measured]) -> str:
    """The day of the measurements, or the first and the last one."""
    days = sorted({one.source["date"][:10] for one in points})
    return " to ".join(dict.fromkeys((days[0], days[-1])))


def _cells(one: Measured | None) -> list[str]:
    return ["", "", ""] if one is None else [f"{one.us:.1f}", f"**{one.ratio:.2f}x**", f"{one.copy_share:.0%}"]


def with_table(readme: str, table: str) -> str:
    """``readme`` with the text between the marks replaced. UserError if the marks are not there."""
    begin, end = (readme.find(mark) for mark in TABLE_MARKS)
    if begin < 0 or end < begin:
        raise UserError(f"README.md needs the lines {TABLE_MARKS[0]} and {TABLE_MARKS[1]}, in this order")
    return f"{readme[: begin + len(TABLE_MARKS[0])]}\n{table}\n{readme[end:]}"


def main(argv: Sequence[str] | None = None, prog: str = "bench.plot") -> int:
    parser = Parser(prog, __doc__)
    parser.add_argument("csv", nargs="+", type=Path, help="benchmark CSV files")
    parser.add_argument("--out", type=Path, default=Path("plots"), help="folder for the plots (default plots)")
    parser.add_argument("--readme", action="store_true", help="rewrite the README's table and plot instead")
    parser.add_argument("--root", type=Path, default=Path("."), help="folder of README.md for --readme")
    options = parser.parse_args(argv)
    try:
        rows = read_rows(options.csv)
        if options.readme:
            update_readme(rows, options.root)
            print(f"{options.root / 'README.md'}, {options.root / README_PLOT}.svg")
        else:
            print("\n".join(str(path) for path in plot_all(rows, options.out)))
    except ImportError as error:
        print(f"error: plots need matplotlib ({error}): pip install 'cutedsl-kernels[bench]'", file=sys.stderr)
        return 2
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def update_readme(rows: Sequence[Mapping[str, str]], root: Path) -> None:
    """Rewrites the table between the marks of ``root``/README.md, and the plot it refers to."""
    first = next(iter(by_gpu(rows).values()), [])
    model, cases = readme_cases(first)
    readme = root / "README.md"
    try:
        text = readme.read_text()
    except OSError as error:
        raise UserError(f"{readme}: {error.strerror}: give --root the folder of README.md") from None
    updated = with_table(text, readme_text(rows))
    plot_speedup(cases, _title(first, model), root / README_PLOT)
    readme.write_text(updated)


if __name__ == "__main__":
    raise SystemExit(main())
