"""What a person sees while a search runs: a live panel on a terminal, plain lines elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from nasattn.record import Trial
from nasattn.search.study import Study, accuracy, finished


def duration(seconds: float) -> str:
    """`1 h 05 min`, `4 min 10 s`, `9 s`."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"


def placed(specs: dict[str, str]) -> str:
    """An architecture's blocks on one line."""
    return ", ".join(f"{spec} @ {site}" for site, spec in specs.items()) or "plain backbone"


def counted(count: int, what: str) -> str:
    """`1 trial`, `2 trials`."""
    return f"{count} {what}{'' if count == 1 else 's'}"


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


class Display:
    """Shows one search. `note` says one thing; the rest follows the loop's events."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.live = Live(console=console, refresh_per_second=4, transient=True)
        self.total, self.study = 0, None  # type: tuple[int, Study | None]
        self.trials: list[Trial] = []
        self.task, self.share, self.last = "", 0.0, None  # type: tuple[str, float, float | None]
        self.refused, self.volume = 0, None  # type: tuple[int, float | None]
        self.spent: list[float] = []
        self._redrawn = 0.0

    def __enter__(self) -> "Display":
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.live.stop()

    def note(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def begin(self, study: Study, total: int) -> None:
        self.study, self.total, self.trials = study, total, study.trials
        self.spent = [t.score.seconds for t in self.trials if t.score]
        self._draw()

    def start(self, task: str) -> None:
        """A training begins."""
        self.task, self.share, self.last = task, 0.0, None
        if not self.console.is_terminal:
            self.note(f"{task} ...")
        self._draw()

    def tick(self, share: float, accuracy: float | None) -> None:
        """A share of the running training is done."""
        self.share, self.last = share, accuracy
        if time.monotonic() - self._redrawn > 0.2 or share >= 1:
            self._draw()

    def end(self, trial: Trial, trials: list[Trial], refused: int) -> None:
        """A trial has finished; `trials` are all of the study's."""
        assert self.study is not None
        self.trials, self.refused = trials, refused
        self.volume = self.study.hypervolume(self.trials)
        if trial.score:
            self.spent.append(trial.score.seconds)
            outcome = f"accuracy {accuracy(trial):.4f}"
        else:
            outcome = f"{trial.state}: {trial.reason}"
        self.note(
            f"trial {trial.number:>3}  {finished(self.trials)}/{self.total}  {outcome}  "
            f"macs {trial.cost.values['macs']:,}  {placed(trial.architecture.specs)}"
            + ("" if self.console.is_terminal else f"  [{self._summary()}]")
        )
        self._draw()

    def _summary(self) -> str:
        scored = [accuracy(t) for t in self.trials if t.score]
        parts = [f"best {max(scored):.4f}" if scored else "best -"]
        if self.volume is not None:
            parts.append(f"hypervolume {self.volume:.4f}")
        parts.append(f"{self.refused} refused over budget or max_blocks")
        failed = sum(t.state == "failed" for t in self.trials)
        if failed:
            parts.append(f"{failed} failed")
        left = self.total - finished(self.trials)
        if self.spent and left > 0:
            mean = sum(self.spent) / len(self.spent)
            parts.append(f"about {duration(max(0.0, left - self.share) * mean)} left")
        return ", ".join(parts)

    def _draw(self) -> None:
        self._redrawn = time.monotonic()
        if not self.console.is_terminal or self.study is None:
            return
        done = finished(self.trials)
        grid = Table.grid(padding=(0, 1))
        grid.add_row(
            "trials",
            ProgressBar(total=max(1, self.total), completed=done, width=30),
            f"{done}/{self.total}",
        )
        last = "" if self.last is None else f"accuracy {self.last:.4f}"
        grid.add_row(
            "now",
            ProgressBar(total=1.0, completed=self.share, width=30),
            Text(f"{self.task}  {last}"),
        )
        self.live.update(Group(grid, Text(self._summary())))
