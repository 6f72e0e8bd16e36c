"""Following a search from another process: what its database says, look after look."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from nasattn.record import FINISHED, Trial, counted
from nasattn.search.display import Display, Worker
from nasattn.search.final import evaluations
from nasattn.search.final_text import count
from nasattn.search.lease import Heartbeats
from nasattn.search.outage import patiently
from nasattn.search.study import Study, finished


class Follower:
    """Shows a study's progress and all of its workers on a display, which each `look` brings up to
    date. It writes nothing."""

    def __init__(self, study: Study, display: Display, every: float = 0.0) -> None:
        self.study, self.display = study, display
        self._beats = Heartbeats(every=every)
        self._states: dict[int, str] = {}
        self._workers: set[str] | None = None
        self._remarks: set[str] = set()
        self._backbone = False  # whether its training was told
        self._evaluated: set[tuple[str, int]] | None = None  # of the `final`, what was told

    def look(self) -> bool:
        """Show what there is now, and say what has come since the last look, if this is not the
        first. False when nothing is left to wait for: the study is complete and nobody works."""
        # The workers first: a trial that one of them ends meanwhile is then seen to end.
        facts = self.study.workers(self._beats)
        trials, display = self.study.trials, self.display
        remarks = self.study.remarks()
        workers, refused = described(facts), sum(f.get("refused", 0) for f in facts)
        total = self.study.asked
        if self._workers is None:
            display.begin(self.study, total)
        else:
            display.total = total
            self._tell_workers(workers)
            for text in remarks:
                if text not in self._remarks:
                    display.note(text)
            for trial in trials:
                if trial.state in FINISHED and self._states.get(trial.number) != trial.state:
                    display.end(trial, trials, refused)
        self._tell_final(trials)
        self._workers = {w.where for w in workers}
        self._remarks = set(remarks)
        self._states = {t.number: t.state for t in trials}
        display.show(workers, trials, refused)
        return bool(workers) or not self.study.over(total, trials)

    def _tell_final(self, trials: Sequence[Trial]) -> None:
        """Say what of the `final` was evaluated since the last look."""
        display, final = self.display, self.study.config.final
        display.final = None
        if final is None or finished(trials) < display.total:
            return
        stored = evaluations(self.study.optuna.user_attrs)
        counts = self.study.final_progress(trials, stored)
        assert counts is not None
        display.final = counts
        left = counts["evaluations"] - counts["done"]
        done = {key for key, evaluation in stored.items() if evaluation.done(final.test)}
        if left and self._evaluated is None and self._workers is not None:
            display.note(f"final: {counted(left, 'evaluation')} to go")
        new = done - (done if self._evaluated is None else self._evaluated)
        for n, (seed, key) in enumerate(sorted((seed, key) for key, seed in new)):
            display.retrained(stored[key, seed], counts, f"{left + len(new) - 1 - n} to go")
        self._evaluated = done

    def _tell_workers(self, workers: Sequence[Worker]) -> None:
        before, now = self._workers or set(), {w.where for w in workers}
        if not self.display.console.is_terminal:
            for where in sorted(now - before):
                self.display.note(f"worker {where} began")
            for worker in workers:  # before the first trial it is all that happens, for long
                if "training the plain backbone" in worker.task and not self._backbone:
                    self.display.note(f"worker {worker.where}: {worker.task} ...")
                    self._backbone = True
            for where in sorted(before - now):
                self.display.note(f"worker {where} ended")


def described(facts: Sequence[Mapping[str, Any]]) -> list[Worker]:
    """Workers by what they say of themselves, those of one host by their process alone."""
    one = len({f["host"] for f in facts}) == 1
    return [
        Worker(
            where=f"pid {f['pid']}" if one else f"{f['host']}:{f['pid']}",
            task=f.get("task", ""),
            share=f.get("share") or 0.0,
            accuracy=f.get("accuracy"),
        )
        for f in sorted(facts, key=lambda f: (f["host"], f["pid"]))
    ]


def watch(study: Study, display: Display, interval: float) -> None:
    """Follow the study until it is complete, or until Ctrl-C."""
    follower = Follower(study, display, interval)

    def look() -> bool:
        return patiently(follower.look, display.note)

    try:
        with display:
            goes_on = look()
            if not display.console.is_terminal:
                done = f"{finished(display.trials)} of {display.total} trials"
                final = f", final {count(display.final)}" if display.final else ""
                display.note(f"{study.name}: {done}, {display.summary()}{final}")
            if goes_on and not display.workers:
                display.note("nobody works on it; it goes on by `nasattn search` or `resume`")
            while look():
                time.sleep(interval)
    except KeyboardInterrupt:
        pass
    if display.console.is_terminal:
        display.console.print(display.panel())
