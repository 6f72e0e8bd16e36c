"""What a person sees while a search runs: a live panel on a terminal, plain lines elsewhere."""

import errno
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType

from rich.console import Console, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from nasattn.record import Trial, amount, counted
from nasattn.search import final_text
from nasattn.search.final import Evaluation
from nasattn.search.stopping import ParetoHalving
from nasattn.search.study import Study, accuracy, finished
from nasattn.skeleton import in_words

BARS = "▁▂▃▄▅▆▇█"
FAILURES = 4  # that the panel names
REDRAW = 0.2  # seconds between two drawings of the panel


def duration(seconds: float) -> str:
    """`1 h 05 min`, `4 min 10 s`, `9 s`."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"


def sparkline(values: Sequence[float]) -> str:
    """A row of bars from the least to the largest value."""
    low, top = min(values, default=0.0), max(values, default=0.0)
    scale = (len(BARS) - 1) / (top - low) if top > low else 0.0
    return "".join(BARS[round((v - low) * scale)] for v in values)


def bar(share: float, width: int) -> Text:
    full = round(width * min(1.0, max(0.0, share)))
    return Text("━" * full, style="green") + Text("━" * (width - full), style="grey37")


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """What a process does. where: host and pid, empty for this process; share: of its task;
    accuracy: the last one measured."""

    task: str = ""
    share: float = 0.0
    accuracy: float | None = None
    where: str = ""


class Display:
    """Shows one search, whichever the number of its workers. `note` says one thing; the rest
    follows the loop's events, or what search.watch reads of other processes' work."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.again = "the same command"  # what goes on with the search after Ctrl-C
        self.live = Live(console=console, refresh_per_second=4, transient=True)
        self.total, self.study = 0, None  # type: tuple[int, Study | None]
        self.trials: list[Trial] = []
        self.workers: Sequence[Worker] = ()
        self.refused = 0
        self.final: Mapping[str, int] | None = None  # how far it is
        self.ends: float | None = None  # by time.monotonic(), as it was estimated at the start
        self._redrawn = 0.0
        self._to_come: tuple[list[Trial] | None, list[float]] = (None, [])
        self._told = 0  # lines of what the rungs are worth, which only grow
        self._ending = False  # whether it was told that the end of halving has begun

    def __enter__(self) -> "Display":
        if self.console.is_terminal:
            self._shown(self.live.start)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._shown(self.live.stop)

    @property
    def task(self) -> str:
        """What this process does."""
        return self.workers[0].task if self.workers else ""

    def note(self, text: str) -> None:
        self._shown(lambda: self.console.print(text, markup=False, highlight=False, soft_wrap=True))

    def begin(self, study: Study, total: int, *, rungs: bool = True) -> None:
        """rungs: say what those of halving have shown."""
        self.study, self.total = study, total
        self.trials = study.trials
        if rungs:
            self._tell_rungs()
        self._draw()

    def start(self, task: str, waits: bool = False) -> None:
        """A training begins, or a wait, in which nothing else happens."""
        self.workers = [Worker(task=task)]
        if not self.console.is_terminal:
            self.note(f"{task} ...")
        self._draw(at_once=waits)

    def tick(self, share: float, accuracy: float | None) -> None:
        """A share of the running training is done."""
        self.workers = [Worker(task=self.task, share=share, accuracy=accuracy)]
        self._draw(at_once=share >= 1)

    def end(self, trial: Trial, trials: list[Trial], refused: int) -> None:
        """A trial has finished; `trials` are all of the study's."""
        self.trials, self.refused = trials, refused
        ended = f"trial {trial.number}:"  # its share is not one of what is left any more
        self.workers = [
            replace(w, share=0.0) if w.task.startswith(ended) else w for w in self.workers
        ]
        outcome = trial.reason or trial.state
        if trial.state == "failed" and trial.reason:
            outcome = f"failed: {trial.reason}"
        if trial.score:
            outcome = f"accuracy {accuracy(trial):.4f}"
        assert self.study is not None
        costs = "  ".join(f"{m} {amount(trial.cost.values[m])}" for m in self.study.config.costs)
        self.note(
            f"trial {trial.number:>3}  {finished(self.trials)}/{self.total}  {outcome}  "
            f"{costs}  {self._in_words(trial)}"
            + ("" if self.console.is_terminal else f"  [{self.summary()}]")
        )
        self._tell_rungs()

    def retrained(self, evaluation: Evaluation, final: Mapping[str, int], left: str) -> None:
        """An evaluation of the `final` is done; final: how far that is; left: what is to come."""
        assert self.study is not None
        self.final = final
        blocks = in_words(self.study.config.space, evaluation.architecture)
        self.note(f"{final_text.line(evaluation, blocks)}  [{left}]")
        self._draw()

    def show(self, workers: Sequence[Worker], trials: list[Trial], refused: int) -> None:
        """How far the study is, and what all of its workers do."""
        self.workers, self.trials, self.refused = workers, trials, refused
        self._draw()

    def summary(self) -> str:
        """On one line."""
        front = self.study.frontier(self.trials) if self.study else []
        parts = [f"best {accuracy(front[-1]):.4f}" if front else "best -"]
        if self.study and (volume := self.study.hypervolume(self.trials)) is not None:
            parts.append(f"hypervolume {volume:.4f}")
        parts.append(f"{self.refused} refused over budget or max_blocks")
        for state in ("stopped", "failed"):
            if count := sum(t.state == state for t in self.trials):
                parts.append(f"{count} {state}")
        if left := self._left():
            parts.append(left)
        return ", ".join(parts)

    def panel(self) -> RenderableType:
        """On a dozen lines: how far the study is, what each worker does, what went wrong."""
        assert self.study is not None
        grid = Table.grid(padding=(0, 2, 0, 0), expand=True)
        grid.add_column(style="bold", no_wrap=True)
        grid.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
        grid.add_row("study", Text(self.study.name))
        states = [t.state for t in self.trials]
        counts = {s: states.count(s) for s in ("scored", "stopped", "failed")}
        counts["running" if self.workers else "interrupted"] = states.count("running")
        done = finished(self.trials)
        told = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
        share = bar(done / max(1, self.total), 24)
        grid.add_row("trials", Text.assemble(share, f"  {done}/{self.total}  {told}"))
        self._add_results(grid)
        if self.final:
            share = bar(self.final["done"] / max(1, self.final["evaluations"]), 24)
            grid.add_row("final", Text.assemble(share, f"  {final_text.count(self.final)}"))
        if halving := self._halving:
            if told := halving.trainings(self._coming(halving)):
                grid.add_row("to come", Text(told))
        if left := self._left():
            grid.add_row("time", Text(left))
        if self.refused:
            grid.add_row("refused", Text(f"{self.refused:,} over budget or max_blocks"))
        self._add_workers(grid)
        self._add_troubles(grid)
        return grid

    def _in_words(self, trial: Trial) -> str:
        assert self.study is not None
        return in_words(self.study.config.space, trial.architecture)

    def _add_results(self, grid: Table) -> None:
        assert self.study is not None
        front = self.study.frontier(self.trials)
        if not front:
            return
        best, plain = front[-1], self.study.facts["plain"]
        costs = ", ".join(
            f"{m} {amount(best.cost.values[m])} ({best.cost.values[m] / plain[m]:.3f}x)"
            for m in self.study.config.costs
        )
        told = f"{accuracy(best):.4f}  trial {best.number}  {costs}  {self._in_words(best)}"
        grid.add_row("best", Text(told))
        members = counted(len(front), "trial")
        if volumes := self.study.growth(self.trials):
            members += f"  hypervolume {volumes[-1]:.4f}  {sparkline(volumes)}"
        grid.add_row("frontier", Text(members))

    def _add_workers(self, grid: Table) -> None:
        """As many as there is room for."""
        shown = self.workers[: max(1, self.console.height - 13 - FAILURES)]
        for worker in shown:
            done = f"{worker.share:>4.0%}" if worker.share else "    "
            last = f"{worker.accuracy:.4f}" if worker.accuracy is not None else " " * 6
            row = Text.assemble(
                bar(worker.share, 10), f" {done}  {last}  {worker.task or 'starts'}"
            )
            grid.add_row(worker.where or "now", row)
        if len(shown) < len(self.workers):
            grid.add_row("", Text(f"... and {len(self.workers) - len(shown)} more workers"))

    def _add_troubles(self, grid: Table) -> None:
        """The latest failures, and the latest stop, with their reasons."""
        failed = [t for t in self.trials if t.state == "failed"]
        stopped = [t for t in self.trials if t.state == "stopped"]
        for trial in stopped[-1:] + failed[-FAILURES:]:
            told = f"trial {trial.number}: {trial.reason or 'no reason given'}"
            style = "red" if trial.state == "failed" else "yellow"
            grid.add_row(Text(trial.state, style=style), Text(told.replace("\n", " ")))
        if len(failed) > FAILURES:
            grid.add_row("", Text(f"... and {len(failed) - FAILURES} earlier failures"))

    def _left(self) -> str:
        """How long the rest may take, from the trainings so far, before the first as was estimated
        at the start; empty where nothing tells."""
        shares = sum(w.share for w in self.workers)
        if halving := self._halving:  # in epochs, for most trials take only a part of them
            known = [t.known for t in self.trials if t.known]
            done = sum(halving.rungs[len(score.rungs) - 1] for score in known)
            coming = self._coming(halving)
            left = halving.epochs(coming) * (1 - shares / max(1.0, sum(coming)))
        else:
            known = [t.score for t in self.trials if t.score]
            done = len(known)
            left = self.total - finished(self.trials) - shares
        if left <= 0 or not self.workers:
            return ""
        if done:
            seconds = left * sum(score.seconds for score in known) / done / len(self.workers)
        else:
            seconds = self.ends - time.monotonic() if self.ends else 0.0
            if seconds <= 0:
                return ""
        return f"about {duration(seconds)} left"

    @property
    def _halving(self) -> ParetoHalving | None:
        return ParetoHalving.of(self.study.config) if self.study else None

    def _coming(self, halving: ParetoHalving) -> list[float]:
        """Trainings that are to come to each rung. Counted once for the trials as they are shown,
        not at each drawing: thousands have to be ranked."""
        if self._to_come[0] is not self.trials:
            self._to_come = self.trials, halving.to_come(self.trials, self.total)
        return self._to_come[1]

    def _tell_rungs(self) -> None:
        """What the probes of halving have shown, and that its end has begun; each once."""
        halving = self._halving
        lines = halving.notes(self.trials, self.total) if halving else []
        for text in lines[self._told :]:
            self.note(text)
        self._told = max(self._told, len(lines))
        all_begun = len(self.trials) >= self.total
        if halving and all_begun and not self._ending:
            self._ending = halving.promotable(self.trials, all_begun=True) is not None
            if self._ending:
                self.note("all trials have begun; stopped ones go on, the best first")

    def _draw(self, at_once: bool = True) -> None:
        """at_once: even if the panel was drawn a moment ago, as no later event may follow."""
        now = time.monotonic()
        if not at_once and now - self._redrawn < REDRAW:
            return
        self._redrawn = now
        if self.console.is_terminal and self.study is not None:
            self._shown(lambda: self.live.update(self.panel()))

    def _shown(self, show: Callable[[], None]) -> None:
        """On a terminal that has gone away, as that of a lost connection, the search goes on."""
        try:
            show()
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            self.console.quiet = True
