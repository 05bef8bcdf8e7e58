"""
What compare.py shows: the table, and the picture of loss curves, differences to the baseline with their
intervals, and the time to the baseline's loss. Rows are those of compare.json; groups hold each row's
runs, in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median_high

import matplotlib
import numpy as np
from matplotlib.figure import Figure

DIFFERENCE = ("difference", "low", "high")
TOKENS = ("tokens_ratio", "tokens_low", "tokens_high")
TIME = ("time_ratio", "time_low", "time_high")
# readable in black and white: each colour has its own marker
STYLES = [("#000000", "o"), ("#d55e00", "s"), ("#0072b2", "^"), ("#009e73", "D"),
          ("#cc79a7", "v"), ("#7f6000", "P"), ("#56b4e9", "X"), ("#555555", "*")]  # fmt: skip


def big(x: float, of: float | None = None) -> str:
    """12345678 -> 12.3M, and how many times `of` that is."""
    rounded = float(f"{x:.3g}")
    unit = (len(str(int(rounded))) - 1) // 3
    text = f"{rounded / 1000**unit:#.3g}".rstrip(".") + " KMGT"[unit].strip()
    return text + (f" ({x / of:.2f}x)" if of else "")


def shown(row: dict, keys: tuple[str, str, str], spec: str, mark: str = "") -> str:
    """A value, with a mark before it, and its interval, as far as they are known."""
    value, low, high = ("" if row[k] is None else format(round(row[k], 4) + 0.0, spec) for k in keys)
    return value and mark + value + (f" [{low}, {high}]" if low else "")


def markdown(record: dict) -> str:
    """The table, aligned and without empty columns, and the notes below it."""
    rows, lines = record["rows"], []
    base = rows[0] if rows[0]["baseline"] else {}
    for row in rows:
        beyond = "~" * row["extrapolated"]
        loss = "" if row["val_loss"] is None else f"{row['val_loss']:.4f}"
        lines.append({
            "FFN": f"`{row['ffn']}`",
            "width": str(row["hidden"]) + row["label"].removeprefix(row["ffn"]),
            **{name: f"{row[name]:g}" * (len(tried) > 1) for name, tried in record["tried"].items()},
            "FFN parameters": big(row["params"], base.get("params")),
            "all": big(row["total_params"]),
            "FFN FLOPs/token": big(row["flops"], base.get("flops")),
            "ideal FLOPs": big(row["ideal_flops"], base.get("flops")),
            "active units": "" if row["active"] is None else f"{row['active']:.1%}",
            "val loss": loss + ("" if row["std"] is None else f" ± {row['std']:.4f}"),
            "n": str(row["n"]),
            "difference [95% CI]": shown(row, DIFFERENCE, "+.4f"),
            "p": "" if row["p"] is None else f"{row['p']:.2g}" if row["p"] > 1e-4 else "< 1e-4",
            "verdict": row["verdict"],
            "step time": "" if row["step_time_ratio"] is None else f"{row['step_time_ratio']:.2f}",
            "tokens to its loss": shown(row, TOKENS, ".3g", beyond),
            "time to its loss": shown(row, TIME, ".3g", beyond) + " wins" * row["wins"],
            "paper's difference": row["paper"] or "",
        })  # fmt: skip
    columns = [[name, *(line[name] for line in lines)] for name in lines[0]]
    columns = [column for column in columns if any(column[1:])]
    widths = [max(map(len, column)) for column in columns]
    cells = [*zip(*columns)]
    cells.insert(1, ["-" * width for width in widths])
    table = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths)) + " |" for line in cells]
    return "\n".join([f"# {record['title']}", "", *table, "", *(f"- {n}" for n in record["notes"]), ""])


def plot_losses(ax, rows: list[dict], groups: list[list]) -> None:
    """Loss against tokens of the baseline and the best rows: mean and range over the seeds that all of
    them have, or where fewer than three validations were made the mean training loss. The first quarter
    of the runs is left out, because it would flatten all the rest."""
    drawn = [i for i, row in enumerate(rows) if row["n"]]
    validated = any(len(r.val) > 2 for i in drawn for r in groups[i])
    if validated and len(groups) == len(groups[0]) == 1:
        batches = [r for r in groups[0][0].rows if math.isfinite(r.get("train_loss", math.nan))]
        late = [(r["tokens"], r["train_loss"]) for r in batches[len(batches) // 4 :]]
        ax.plot(*zip(*late), color="#999999", linewidth=0.9, label="training batch")
    best = sorted(drawn[1:], key=lambda i: rows[i]["val_loss"])
    kind = "val_loss" if validated else "train_loss"
    title = "Validation loss, band: shared seeds" if validated else "Training loss, mean over the seeds"
    chosen = [*drawn[:1], *best][: len(STYLES)]
    done = {i: [r for r in groups[i] if r.done] for i in chosen}
    # A seed has batches of its own, so curves of other seeds would differ by more than their FFNs do.
    shared = set.intersection(*({r.seeds for r in runs} for runs in done.values())) if done else set()
    for (color, marker), i in zip(STYLES, chosen):
        runs = [r for r in done[i] if r.seeds in shared or not shared]
        logs = [[row for row in r.rows if kind in row] for r in runs]
        curves = [{row["tokens"]: row[kind] for row in log if math.isfinite(row[kind])} for log in logs]
        tokens = sorted(set.intersection(*map(set, curves)))
        tokens = [t for t in tokens if t >= tokens[-1] / 4]
        losses = np.array([[c[t] for t in tokens] for c in curves])  # (seeds, points)
        ax.plot(tokens, losses.mean(0), color=color, marker=marker, markersize=4, linewidth=1.3,
                markevery=len(tokens) // 6 + 1, label=rows[i]["label"])  # fmt: skip
        if validated:
            ax.fill_between(tokens, losses.min(0), losses.max(0), color=color, alpha=0.2, linewidth=0)
    ax.set(xlabel="training tokens", ylabel="nats per token",
           title=f"{title}\n(without the run's first quarter)")  # fmt: skip
    if drawn:
        ax.legend()


def plot_intervals(ax, rows: list[dict], keys: Sequence[str], mark: float, title: str, x: str) -> None:
    """A line for each row, the smallest value on top: the value and its interval, filled where there is
    a verdict and the interval does not reach the mark. A value far beyond most of the others is an arrow
    at the axis's end."""
    rows = sorted((row for row in rows if row[keys[0]] is not None), key=lambda row: row[keys[0]])
    points = np.array([[row[keys[0]] if row[key] is None else row[key] for key in keys] for row in rows])
    reach = abs(points - mark).max(1)
    limit = 6 * median_high(reach) or 1e-4
    left, right = max(points.min(), mark - limit), min(points.max(), mark + limit)
    left, right = min(left, mark) - 0.02 * limit, max(right, mark) + 0.02 * limit
    ax.axvline(mark, color="black", linewidth=0.8)
    for y, (row, (value, low, high)) in enumerate(zip(rows, points)):
        judged = row["verdict"] in ("better", "worse", "no difference shown")
        fill = "black" if judged and not low <= mark <= high else "white"
        ax.errorbar(value, y, xerr=[[value - low], [high - value]], fmt="ok", markerfacecolor=fill)
        if not left <= value <= right:
            ax.plot(right if value > right else left, y, ">k" if value > right else "<k", clip_on=False)
    far = [row["extrapolated"] and keys is TIME for row in rows]  # as the table marks it
    ax.set_yticks(range(len(rows)), ["~ " * x + row["label"] for x, row in zip(far, rows)])
    legend = f"95% intervals; filled: judged, clear of {mark:g}" + "; ~ extrapolated" * any(far)
    ax.set(xlim=(left, right), ylim=(len(rows) - 0.4, -0.6), xlabel=x, title=f"{title}\n({legend})")


def plot(record: dict, groups: list[list], path: str) -> None:
    """Draw the loss curves, the differences and, where it is known, the time to the baseline's loss."""
    matplotlib.rcParams.update({"font.size": 8.5, "axes.grid": True, "grid.alpha": 0.3})
    matplotlib.rcParams["text.parse_math"] = False  # a folder's name may hold $
    rows, base = record["rows"], record["baseline"]
    compared = [row for row in rows if row["difference"] is not None]
    panels = 1 + bool(compared) + any(row["time_ratio"] for row in rows)
    size = (2 + 4.5 * panels, max(4.4, 1.9 + 0.27 * len(compared)))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    plot_losses(axes[0], rows, [group for group in groups if group])
    if panels > 1:
        plot_intervals(axes[1], compared, DIFFERENCE, 0, f"Final loss minus {base}'s",
                       "nats per token: better < 0 < worse")  # fmt: skip
    if panels > 2:
        plot_intervals(axes[2], compared, TIME, 1, f"Time to {base}'s final loss",
                       f"over {base}'s: faster < 1 < slower")  # fmt: skip
    figure.suptitle(record["title"])
    figure.savefig(path, dpi=120)
