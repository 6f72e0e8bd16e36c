"""What the commands print for people: tables, a line for each fact, a bar for one long thing.

Some of them read no study: what is of the search is imported where it is printed.
"""

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from nasattn.record import amount

if TYPE_CHECKING:
    from nasattn.search.study import Study


def print_results(study: "Study") -> None:
    print_frontier(study)
    print_final(study)
    print(f"files: {study.folder}")
    print("pictures: nasattn report; files for a device: nasattn export (same arguments)")


def print_frontier(study: "Study") -> None:
    from nasattn.search.choice import Choice
    from nasattn.skeleton import in_words

    trials = study.trials
    front = study.frontier(trials)
    baseline = [t for t in trials if t.baseline and t.score]
    choice = Choice(study, trials)
    knee = choice.knee.number if front else None
    table = Table(box=None, title=f"frontier of {study.name}", title_justify="left")
    metrics = list(study.facts["plain"])
    for column in ("trial", "accuracy", *metrics, "blocks"):
        table.add_column(column, justify="left" if column == "blocks" else "right")
    for trial in baseline + [t for t in front if not t.baseline]:
        assert trial.score is not None
        score = f"{trial.score.accuracy:.4f}" if trial.score.spread is None else trial.score.text
        costs = []
        for metric in metrics:
            value, plain = trial.cost.values[metric], study.facts["plain"][metric]
            ratio = f" ({value / plain:.3f}x)" if metric in study.config.costs else ""
            costs.append(f"{amount(value)}{ratio}")
        over = " (over budget)" * (not trial.cost.within(study.facts["limits"]))
        name = f"{trial.number}" + (" (knee)" if trial.number == knee else over)
        table.add_row(name, score, *costs, in_words(study.config.space, trial.architecture))
    console().print(table)
    if choice.means:
        print("knee: by the final's means on val")
    if baseline and all(len(t.score.accuracies) == 1 for t in front if t.score):
        print("one seed a point: an anecdote, not yet a finding (training.seeds repeats them)")


def print_final(study: "Study") -> None:
    from nasattn.search import final_text

    final = study.final()
    if not final or not final["done"]:
        return
    head, *rows = final_text.table(final)
    shown = Table(box=None, title=final_text.title(study.name, final), title_justify="left")
    for column in head:
        shown.add_column(column, justify="left" if column == "blocks" else "right")
    for row in rows:
        shown.add_row(*row)
    console().print("", shown, markup=False)
    for line in final_text.notes(final):
        print(line)


def print_summary(summary: dict[str, Any]) -> None:
    """A line for each, whole: for files and pipes."""
    from nasattn.search.final_text import count

    if final := summary["final"]:
        told = count(final) if final["evaluations"] else "to come"
        summary = summary | {"final": told}
    for key, value in summary.items():
        if key not in ("halving", "remarks", "workers", "failures"):
            shown = f"{value:.4f}" if isinstance(value, float) else value
            print(f"{key:>12}  {'-' if value is None else shown}")
    if summary["running"] and not summary["workers"]:
        print("  what is running was interrupted: the next search goes on with it")
    for text in (*summary["halving"], *summary["remarks"]):
        print(f"  {text}")
    for worker in summary["workers"]:
        print(f"  worker {worker['host']}:{worker['pid']}: {worker.get('task') or 'starts'}")
    for failure in summary["failures"]:
        print(f"  trial {failure['number']} failed: {failure['reason']}")


def print_costs(rows: Sequence[Mapping[str, Any]], total: Mapping[str, Any]) -> None:
    table = Table(box=None)
    table.add_column("")
    for metric in total:
        table.add_column(metric, justify="right")
    for row in rows:
        place = row.get("site") or row["block"]
        detail = row.get("spec") or "x".join(map(str, row["output"]))
        over = "" if row.get("fits", True) else "  over budget"
        figures = (amount(row["cost"][m]) for m in total)
        table.add_row(f"{place}  {detail}{over}", *figures)
    table.add_row("the network", *map(amount, total.values()))
    console().print(table)


def print_blocks(rows: Sequence[Mapping[str, Any]]) -> None:
    size = "x".join(map(str, rows[0]["shape"]))
    figures = Table(box=None, title=f"on one map of {size}, default options", title_justify="left")
    options = Table(box=None)
    metrics = {"params": "params", "macs": "MACs", "map_elements": "map elements"}
    for column in ("block", "identity by"):
        figures.add_column(column)
    for column in metrics.values():
        figures.add_column(column, justify="right")
    for column in ("option", "default", "allowed"):
        options.add_column(column, no_wrap=column != "allowed")
    for row in rows:
        costs = ["-" if row[m] is None else amount(row[m]) for m in metrics]
        figures.add_row(row["block"], row["identity"], *costs)
        for option, rule in row["options"].items():
            shown = json.dumps(rule["default"]).strip('"')
            options.add_row(f"{row['block']}.{option}", shown, rule["allowed"])
    terminal = console()
    for row in rows:
        terminal.print(f"{row['block']:>14}  {row['title']} ({row['year']})", highlight=False)
    terminal.print("", options, "", figures)
    for row in rows:
        if row["reason"]:
            print(f"- {row['reason']}")


def console() -> Console:
    # A file or a pipe has no width: lines there are as long as they need to be.
    if sys.stdout.isatty():
        return Console(emoji=False)
    return Console(emoji=False, width=200, soft_wrap=True)


@contextmanager
def progress(console: Console, text: str) -> Iterator[Callable[[float, float | None], None]]:
    """A bar for one training; what it yields takes the share done and the last accuracy."""
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[last]}"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task(text, total=1.0, last="")

        def tick(share: float, accuracy: float | None) -> None:
            last = "" if accuracy is None else f"accuracy {accuracy:.4f}"
            bar.update(task, completed=share, last=last)

        yield tick


@contextmanager
def counting(text: str) -> Iterator[Callable[[float, int, float], None]]:
    """A bar on standard error, a line a tenth where that is no terminal. What it yields takes how
    many are done, of how many, and the noise."""
    console, told = Console(stderr=True, emoji=False), -1
    with Progress(
        TextColumn("{task.description}  {task.completed:.0f}/{task.total:.0f}"),
        BarColumn(),
        TextColumn("noise {task.fields[noise]:.0%}"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task(text, total=None, noise=0.0)

        def tell(done: float, total: int, noise: float) -> None:
            nonlocal told
            bar.update(task, completed=done, total=total, noise=noise)
            if not console.is_terminal and int(10 * done / total) > told:
                told = int(10 * done / total)
                print(f"{text}  {done:.0f}/{total}  noise {noise:.0%}", file=sys.stderr)

        yield tell
