"""Which candidates are trained on: asynchronous successive halving for several objectives.

Every candidate is trained to the first rung, the best few of each rung on to the next. When no new
one is to come, those stopped before go on, the best first, until the better half of each rung has
(one in `eta`, where that is more), but for those, often the most, that no gain seen so far could
bring to the frontier. All is derived from the study's rows and how many there are to be, so any
number of workers, and those that come later, decide alike.
After Li et al. 2020 (ASHA, https://arxiv.org/abs/1810.05934), who have one objective; ranks within
bands of cost are in its place here, since the cheapest network is never dominated and would always
survive.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import pairwise
from statistics import fmean, median

import numpy as np
from numpy.typing import NDArray

from nasattn.config import Experiment
from nasattn.record import Trial, counted
from nasattn.uncertainty import kendall

PROBES = (8, 16, 32)  # so many first trials are trained to the end: they tell what a rung is worth
# A rung is trusted by Kendall's tau from it to the end, if it is no less than this and chance alone
# gives as much at most so often, each time that it is asked: by eight probes .3 one time in seven.
TRUSTED, CHANCE = 0.3, 0.05
END = 2.0  # of so many that reach a rung, one goes on when no new trial is to come
BAND, BANDS = 12, 6  # trials that a band of cost needs, and the most bands there are


class ParetoHalving:
    """rungs: epochs, the last those of the whole training; eta: of so many that reach a rung, one
    goes on while new trials come; costs: the metrics that are minimised beside the accuracy.
    all_begun, of the methods: whether no new trial is to come."""

    def __init__(self, rungs: Sequence[int], eta: float, costs: Sequence[str]) -> None:
        self.rungs, self.eta, self.costs = tuple(rungs), eta, tuple(costs)

    @property
    def in_the_end(self) -> float:
        """Of so many that have reached a rung, one has gone on when the search is over."""
        return min(self.eta, END)

    @classmethod
    def of(cls, experiment: Experiment) -> "ParetoHalving | None":
        """What the experiment asks for."""
        if experiment.search.stopping == "none":
            return None
        return cls(experiment.rungs, experiment.search.eta, experiment.costs)

    def goes_on(self, trial: Trial, trials: Sequence[Trial], *, all_begun: bool) -> bool:
        """Whether a trial that has just reached a rung is trained to the next one."""
        survivors = self.survivors(len(reached(trial)) - 1, trials, all_begun=all_begun)
        return any(t.number == trial.number for t in survivors)

    def promotable(self, trials: Sequence[Trial], *, all_begun: bool) -> Trial | None:
        """The stopped trial that goes on next: of the highest rung that has one, the best."""
        for level in reversed(range(len(self.rungs) - 1)):
            here = {t.number for t in trials if t.state == "stopped" and at(t, level)}
            if here:
                survivors = self.survivors(level, trials, all_begun=all_begun)
                if found := next((t for t in survivors if t.number in here), None):
                    return found
        return None

    def survivors(self, level: int, trials: Sequence[Trial], *, all_begun: bool) -> list[Trial]:
        """Who goes on from a rung (0: the first), best first: the probes, and of the others one in
        `eta` of all that reached it (in the end one in two, where that is more), but for the
        hopeless. A rung that is not trusted stops nobody."""
        probes, trusted = self.probes(trials)
        here = [t for t in trials if len(reached(t)) > level]
        if not here:
            return []
        first = [t for t in here if t.number < probes]
        if trusted is None:
            return first
        if not trusted[level]:
            return here
        ranks = self._ranks(level, here)
        order = np.argsort(ranks, kind="stable")
        places = len(here) / (self.in_the_end if all_begun else self.eta)
        best = [here[i] for i in order if ranks[i] < places]
        later = [t for t in best if t.number >= probes]
        lost = self.hopeless(later, level, trials)
        return first + [t for t in later if t.number not in lost]

    def probes(self, trials: Sequence[Trial]) -> tuple[int, list[bool] | None]:
        """How many of the first trials are trained to the end whatever they show, and which rungs
        they have shown to rank as the end does (None: not known yet). While one does not, they are
        doubled, up to the most."""
        looks = list(self._looks(trials))
        if looks and (all(looks[-1][1]) or len(looks) == len(PROBES)):
            first, trusted = looks[-1]
            return len(first), trusted
        return PROBES[len(looks)], None

    def _looks(self, trials: Sequence[Trial]) -> Iterator[tuple[list[Trial], list[bool]]]:
        """Each look at the probes that has been taken: at which, and which rungs it trusts."""
        for count in PROBES:
            first = [t for t in trials if t.number < count]
            if len(first) < count or not all(t.score or t.state == "failed" for t in first):
                return
            trusted = [self.trusts(k, first) for k in range(len(self.rungs) - 1)]
            yield first, trusted
            if all(trusted):
                return

    def trusts(self, level: int, trials: Sequence[Trial]) -> bool:
        """Whether the scored trials show that a rung ranks as the end does."""
        tau, chance = self.tau(level, trials)
        return tau >= TRUSTED and chance <= CHANCE

    def tau(self, level: int, trials: Sequence[Trial]) -> tuple[float, float]:
        """Kendall's rank correlation from a rung to the end, over the scored trials, and how likely
        chance alone ranks as well."""
        pairs = [(reached(t)[level], t.score.accuracy) for t in trials if t.score]
        return kendall(*zip(*pairs, strict=True)) if pairs else (0.0, 1.0)

    def hopeless(self, some: Sequence[Trial], level: int, trials: Sequence[Trial]) -> set[int]:
        """The numbers of those to whom a scored trial that costs no more is superior even if they
        had the greatest gain that any trial had from this rung to its end."""
        gains = self._gains(level, trials)
        if len(gains) < PROBES[0]:
            return set()
        ended = [(t.score.accuracy, self._cost(t)) for t in trials if t.score]
        accuracies = np.array([accuracy for accuracy, _ in ended])
        costs = np.array([cost for _, cost in ended])
        return {
            t.number
            for t in some
            if np.any(
                (accuracies > reached(t)[level] + max(gains))
                & np.all(costs <= self._cost(t), axis=1)
            )
        }

    def believed(self, trials: Sequence[Trial]) -> dict[int, float]:
        """Of each trial that has come to a rung and not to the end, by number: the accuracy that it
        would have there, by the usual gain from its rung on."""
        usual = [median(self._gains(k, trials) or [0.0]) for k in range(len(self.rungs))]
        partial = [(t, reached(t)) for t in trials if t.state in ("stopped", "running")]
        return {t.number: min(1.0, r[-1] + usual[len(r) - 1]) for t, r in partial if r}

    def to_come(self, trials: Sequence[Trial], total: int) -> list[float]:
        """About how many trials, of `total` in all, will still be trained to each rung."""
        comes, found = float(max(0, total - len(trials))), list[float]()
        for level in range(len(self.rungs)):
            comes += sum(t.state == "running" and len(reached(t)) == level for t in trials)
            found.append(comes)
            if level < len(self.rungs) - 1:
                comes = self._leave(level, comes, trials, total)
        return found

    def epochs(self, coming: Sequence[float]) -> float:
        """Of so many trainings to each rung, without their decays."""
        return sum(
            n * (b - a) for n, (a, b) in zip(coming, pairwise((0, *self.rungs)), strict=True)
        )

    def _leave(self, level: int, comes: float, trials: Sequence[Trial], total: int) -> float:
        """About how many will leave a rung for the next one, to which so many will still come."""
        probes, trusted = self.probes(trials)
        share = 1.0 if trusted and not trusted[level] else 1 / self.in_the_end
        here = [t for t in trials if len(reached(t)) > level]
        best = self.survivors(level, trials, all_begun=True)
        later = sum(t.number >= probes for t in here)
        if trusted and trusted[level] and later >= PROBES[0]:  # fewer, as some are hopeless
            share = min(share, sum(t.number >= probes for t in best) / later)
        if len(trials) >= total:
            on_the_way = [t for t in trials if t.state == "running" and len(reached(t)) <= level]
            whole = sum(t.number < probes for t in on_the_way)
            stopped = sum(t.state == "stopped" and at(t, level) for t in best)
            return whole + share * (comes - whole) + stopped
        left = sum(t.state != "stopped" or not at(t, level) for t in here)
        every = len(here) + comes
        return max(0.0, min(probes, every) + share * max(0.0, every - probes) - left)

    def trainings(self, coming: Sequence[float]) -> str:
        """So many trainings to each rung, for people: `about 12 to 2 epochs, 3 to 12 epochs`."""
        counts = zip(map(round, coming), self.rungs, strict=True)
        told = [f"{n:,} to {counted(rung, 'epoch')}" for n, rung in counts if n]
        return f"about {', '.join(told)}" if told else ""

    def notes(self, trials: Sequence[Trial], total: int) -> list[str]:
        """What the probes have shown so far, of `total` trials in all, for people."""

        def whole(count: int) -> str:
            which = f"the first {count} trials are" if count < total else "every trial is"
            return f"{which} trained to the end"

        told = [f"halving: {whole(PROBES[0])}, as {'probes' if total > 1 else 'a probe'}"]
        for first, trusted in self._looks(trials):
            count = len(first)
            known = all(trusted) or count == PROBES[-1]
            told.append(f"{count} probes have ended; rank correlation with the end:")
            yes, no = "it ranks as the end does", "not seen to rank"
            if known:
                yes = f"one in {self.eta:g} goes on, up to one in {self.in_the_end:g} in the end"
                no = "it stops nobody"
            for level, rung in enumerate(self.rungs[:-1]):
                tau, chance = self.tau(level, first)
                rank = f"Kendall's tau {tau:.2f} (p {chance:.3f})"
                worth = yes if trusted[level] else no
                told.append(f"  rung of {counted(rung, 'epoch')}: {rank}: {worth}")
            if not known:
                told.append(f"  to be sure, {whole(2 * count)}")
        return told

    def _cost(self, trial: Trial) -> list[float]:
        return [trial.cost.values[m] for m in self.costs]

    def _gains(self, level: int, trials: Sequence[Trial]) -> list[float]:
        """From a rung to the end, of the scored trials."""
        return [t.score.accuracy - reached(t)[level] for t in trials if t.score and reached(t)]

    def _ranks(self, level: int, trials: Sequence[Trial]) -> NDArray[np.float64]:
        """Ranks from 0, equal for equals: how many trials lie on fronts before one's own, and half
        of those that share it. Within a band all costs count as equal."""
        from scipy.stats import rankdata

        points = np.array([[band, -reached(t)[level]] for band, t in self._banded(trials)])
        different, places = np.unique(points, axis=0, return_inverse=True)
        fronts, least = [], list[float]()  # the least error on each front, of those looked at
        for _, error in different.tolist():  # by band, and within it the best first
            front = bisect_right(least, error)
            fronts.append(front)
            least[front : front + 1] = [error]
        return np.asarray(rankdata(np.array(fronts)[places.reshape(-1)]) - 1)

    def _banded(self, trials: Sequence[Trial]) -> list[tuple[float, Trial]]:
        """Each trial with its band, of about as many trials each; several costs by the mean of
        their ranks."""
        from scipy.stats import rankdata

        ranks = [rankdata([t.cost.values[m] for t in trials]) for m in self.costs]
        dearness = np.array([fmean(r) for r in zip(*ranks, strict=True)])
        count = min(BANDS, max(1, len(trials) // BAND))
        edges = np.quantile(dearness, np.arange(1, count) / count)
        return list(zip(np.searchsorted(edges, dearness).tolist(), trials, strict=True))


def reached(trial: Trial) -> tuple[float, ...]:
    """The accuracies at the rungs that a trial has reached."""
    return trial.known.rungs if trial.known else ()


def at(trial: Trial, level: int) -> bool:
    """Whether the trial has come to this rung and no further."""
    return len(reached(trial)) == level + 1
