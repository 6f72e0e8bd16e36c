"""What a worker does next. Decisions are made in turns, one worker at a time, from the rows as they
stand then: so slots are exact in number, no architecture comes twice, and nothing is left behind.
"""

import copy
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from optuna.exceptions import UpdateFinishedTrialError
from optuna.study import Study as OptunaStudy
from optuna.trial import FrozenTrial, TrialState, create_trial

from nasattn.errors import TrialFailed
from nasattn.evaluate.checkpoint import STEP
from nasattn.files import Files
from nasattn.record import Score, Trial, counted
from nasattn.search.lease import TRIAL, TURN, WORKER, Lease, Leases, trial_lease
from nasattn.search.outage import patiently
from nasattn.search.samplers import Exhausted, Gate, Snapshot
from nasattn.search.stopping import ParetoHalving
from nasattn.search.study import FACTS, PARTIAL, REASON, SCORE, TOKEN, Study, claim, read_trial

DEATHS = "deaths"
FIRST = "first"  # of a trial in a new row: Optuna's id of the first of its rows
# So many workers die at the same step of a training, or at any since its last checkpoint, before it
# is given up: what kills by itself does so at one step, kills from outside fall at many.
MOST_DEATHS, MOST_ANYWHERE = 3, 8


@dataclass(frozen=True, slots=True)
class Job:
    """A trial to evaluate, and Optuna's id of its row. token: tells it from the trial of another
    database that had the same number."""

    row: int
    trial: Trial
    token: str


@dataclass(frozen=True, slots=True)
class Turn:
    """What a turn brought: a job or none, all trials as they stood, and how many of them others
    are evaluating."""

    job: Job | None
    trials: list[Trial]
    others: int

    @property
    def over(self) -> bool:
        return self.job is None and not self.others


class TurnLost(Exception):
    """This process stood still for so long that another has taken its turn."""


class Slots:
    """One worker's hand on a study's trials, of which there are to be `total`."""

    def __init__(
        self,
        study: Study,
        total: int,
        leases: Leases,
        gate: Gate,
        stopping: ParetoHalving | None,
        note: Callable[[str], None],
    ) -> None:
        self.study, self.leases, self.gate = study, leases, gate
        self.stopping, self.note = stopping, note
        self.total, self.exhausted = total, False

    def next(self, publish: Callable[[list[Trial]], None]) -> Turn:
        """Take the next job: a trial whose worker has gone, else a stopped one that should go on,
        else a new slot. publish: called with all trials, in turn."""
        while True:
            with suppress(TurnLost), self.leases.turn():
                return self._decided(publish)

    def _decided(self, publish: Callable[[list[Trial]], None]) -> Turn:
        # The leases first: who gives one back has told how its trial ended before.
        held = self.leases.table()
        rows = self.study.rows()
        trials = self.study.read(rows)
        publish(trials)
        job, others, ended = self._interrupted(rows, trials, held)
        if ended:
            rows = self.study.rows()
            trials = self.study.read(rows)
        slot = held.get(trial_lease(len(rows)))
        others += slot is not None and not self.leases.dead(slot.owner, held)
        job = job or self._promoted(rows, trials) or self._fresh(rows, trials)
        if any(self.leases.dead(lease.owner, held) for lease in held.values()):
            running = {trial_lease(t.number) for t in trials if t.state == "running"}
            # The leases of other trainings show that somebody died at them, until they are taken.
            elsewhere = {name for name in held if not name.startswith((WORKER, TURN, TRIAL))}
            self.leases.reap(held, running | elsewhere)
        return Turn(job, trials, others)

    def finish(self, job: Job, score: Score) -> None:
        """Tell a trial's score; done twice, it is as done once."""
        if not self._mine(job):
            return
        objectives = self._values(job.trial, score.accuracy)
        self._tell(job, TrialState.COMPLETE, {SCORE: score.as_dict()}, objectives)

    def fail(self, job: Job, reason: str, trace: str) -> None:
        """Tell that a trial has failed. The baseline stays open, to be tried again."""
        if not self._mine(job):
            return
        state = TrialState.RUNNING if job.trial.baseline else TrialState.FAIL
        self._tell(job, state, {REASON: reason, "traceback": trace})

    def reopen(self, opened: set[int]) -> None:
        """Have the failed trials trained again, by any worker. Those that are comes into `opened`,
        also where the database goes away half-way."""
        while True:
            with suppress(TurnLost), self.leases.turn():
                for row in self.study.rows():
                    if row.state is TrialState.FAIL:
                        opened.add(self._again(row).trial.number)
                return

    def goes_on(self, job: Job, partial: Score) -> bool:
        """Store a trial's score at a rung; whether it is trained on. If not, it is told so."""
        if not self._mine(job):
            return False
        assert self.stopping is not None
        with self.leases.turn(), suppress(UpdateFinishedTrialError):
            self._storage.set_trial_user_attr(job.row, PARTIAL, partial.as_dict())
            trials = self.study.trials
            trial, all_begun = trials[job.trial.number], self._all_begun(trials)
            if self.stopping.goes_on(trial, trials, all_begun=all_begun):
                return True
            epochs = self.stopping.rungs[len(partial.rungs) - 1]
            reason = f"stopped at {counted(epochs, 'epoch')} with {partial.rungs[-1]:.4f}"
            self._tell(job, TrialState.PRUNED, {REASON: reason})
        return False

    def checkpoints(self, number: int) -> Path:
        """The folder of a trial's training."""
        return self.study.folder / "checkpoints" / str(number)

    def _interrupted(
        self, rows: Sequence[FrozenTrial], trials: Sequence[Trial], held: Mapping[str, Lease]
    ) -> tuple[Job | None, int, bool]:
        """The first trial under evaluation that nobody has; how many others have; whether one has
        ended: it has killed too many, or the end was told since the rows were read."""
        found, others, ended = None, 0, False
        for row, trial in zip(rows, trials, strict=True):
            if trial.state != "running":
                continue
            lease = held.get(trial_lease(trial.number))
            if lease and lease.owner != self.leases.me and not self.leases.dead(lease.owner, held):
                others += 1
            elif found is None and self.leases.acquire(trial_lease(trial.number)):
                if self.study.database.get_trial(row._trial_id).state.is_finished():
                    self.leases.ended.add(trial_lease(trial.number))  # and then its owner has gone
                    ended = True
                    continue
                # A lease that its owner could not give back: it died at this trial.
                killed = lease is not None and lease.owner != self.leases.me
                if killed and self._died(row, trial):
                    ended = True
                    continue
                self.note(f"going on with trial {trial.number}")
                found = Job(row._trial_id, trial, row.user_attrs.get(TOKEN, ""))
        return found, others, ended

    def _died(self, row: FrozenTrial, trial: Trial) -> bool:
        """Count a worker's death at a trial; True when it was the last: the trial has failed."""
        folder, weights = self.checkpoints(trial.number), weights_file(self.study, trial.number)
        put = partial(self._storage.set_trial_user_attr, row._trial_id, DEATHS)
        before = row.user_attrs.get(DEATHS)
        why = _one_more(before, put, self.study.files, folder, weights)
        if not why:
            return False
        if trial.baseline:
            raise TrialFailed(f"the plain backbone could not be trained: {why}")
        self.fail(Job(row._trial_id, trial, ""), why, "")
        self.note(f"trial {trial.number} failed: {why}")
        return True

    def _promoted(self, rows: Sequence[FrozenTrial], trials: Sequence[Trial]) -> Job | None:
        """The stopped trial that should go on, if any."""
        if self.stopping is None:
            return None
        trial = self.stopping.promotable(trials, all_begun=self._all_begun(trials))
        if trial is None or not self.leases.acquire(trial_lease(trial.number)):
            return None
        return self._again(rows[trial.number])

    def _again(self, old: FrozenTrial) -> Job:
        """A trial goes on in a new row, as a row that was told cannot change any more."""
        kept = (FACTS, PARTIAL, TOKEN, FIRST)
        attributes = {k: v for k, v in old.user_attrs.items() if k in kept}
        attributes.setdefault(FIRST, old._trial_id)
        return self._written(old.params, old.distributions, attributes, old.system_attrs)

    def _all_begun(self, trials: Sequence[Trial]) -> bool:
        """Whether no new trial is to come: from here, or from who was asked for more of them."""
        return self.exhausted or len(trials) >= max(self.total, self.study.asked)

    def _fresh(self, rows: Sequence[FrozenTrial], trials: Sequence[Trial]) -> Job | None:
        slot = len(rows)
        if slot >= self.total or self.exhausted or not self.leases.acquire(trial_lease(slot)):
            return None
        self.gate.slot = slot
        snapshot = Snapshot(self.study.optuna, self._believed(rows, trials), slot)
        view = OptunaStudy(self.study.name, snapshot)
        options = self.gate.infer_relative_search_space(view, snapshot.trial)
        try:
            params = self.gate.sample_relative(view, snapshot.trial, options)
        except Exhausted:
            self.note("no new architecture was found within the budget: complete")
            self.exhausted = True
            self.leases.release(trial_lease(slot))
            return self._promoted(rows, trials)  # more may go on when no new one is to come
        candidates = self.gate.candidates
        architecture = candidates.space.draw(lambda name, labels: str(params[name]))
        cost = candidates.pricing.cost(params)
        excesses = {m: cost.values[m] - limit for m, limit in candidates.limits.items()}
        # optuna-dashboard (0.21) reads constraints only by their key before Optuna 5.
        system = snapshot.kept | {"constraints": list(excesses.values())}
        system |= {f"constraints:{metric}": value for metric, value in excesses.items()}
        attributes = {FACTS: claim(slot, architecture, cost), TOKEN: secrets.token_hex(8)}
        return self._written(params, options, attributes, system)

    def _believed(
        self, rows: Sequence[FrozenTrial], trials: Sequence[Trial]
    ) -> Sequence[FrozenTrial]:
        """The rows as samplers should see them, which learn from whole trials only: what was not
        trained to the end as it is believed to end. A promoted trial goes by the id of its first
        row, by which NSGA-II remembers parents."""
        if self.stopping is None:
            return rows
        believed = self.stopping.believed(trials)
        shown = [copy.copy(row) for row in rows]
        for row, trial in zip(shown, trials, strict=True):
            row._trial_id = row.user_attrs.get(FIRST, row._trial_id)
            if trial.number in believed:
                row.state = TrialState.COMPLETE
                row.values = self._values(trial, believed[trial.number])
        return shown

    def _values(self, trial: Trial, accuracy: float) -> list[float]:
        """A trial's objectives, in the study's order."""
        values = {**trial.cost.values, "accuracy": accuracy}
        return [float(values[o]) for o in self.study.config.objectives]

    def _written(
        self,
        params: Mapping[str, Any],
        distributions: Mapping[str, Any],
        user: Mapping[str, Any],
        system: Mapping[str, Any],
    ) -> Job:
        """A new row, whole in one transaction. Raises TurnLost."""
        template = create_trial(
            state=TrialState.RUNNING,
            params=dict(params),
            distributions=dict(distributions),
            user_attrs=dict(user),
            system_attrs=dict(system),
        )
        row = self.study.database.add(
            self.study.optuna._study_id, template, partial(self.leases.keeps, TURN)
        )
        if row is None:
            raise TurnLost
        return Job(row, read_trial(template), user[TOKEN])

    def _tell(
        self,
        job: Job,
        state: TrialState,
        attributes: Mapping[str, Any],
        values: Sequence[float] = (),
    ) -> None:
        """Write how a trial ended, in one transaction; its lease goes back with the next turn."""
        self.study.database.tell(job.row, state, attributes, values)
        if state.is_finished():
            self.leases.ended.add(trial_lease(job.trial.number))

    def _mine(self, job: Job) -> bool:
        return self.leases.holds(trial_lease(job.trial.number))

    @property
    def _storage(self) -> Any:
        return self.study.optuna._storage


def take_training(
    study: Study, leases: Leases, name: str, files: Path, note: Callable[[str], None]
) -> str | None:
    """Take the lease `name` of a training that is no trial's and leaves its checkpoints in `files`.
    None when another has it; else why it is given up, if too many workers died with it, or the
    empty string."""
    held = patiently(leases.table, note)
    if not patiently(lambda: leases.acquire(name), note):
        return None
    if name not in held or not leases.dead(held[name].owner, held):
        return ""

    def count() -> str:
        key = f"{DEATHS}:{name}"
        put = partial(study.optuna.set_user_attr, key)
        return _one_more(study.optuna.user_attrs.get(key), put, study.files, files)

    return patiently(count, note)


def _one_more(
    before: Mapping[str, Any] | None,
    put: Callable[[dict[str, Any]], None],
    files: Files,
    folder: Path,
    *more: Path,
) -> str:
    """Count a worker's death at a training; why it is given up, if that is one too many, after
    which they are counted anew, or the empty string. A training that has come to another checkpoint
    begins a new count: then it was not what killed. before, put: the counts so far, and how they
    are stored; folder: that of the checkpoints; more: what else tells that it has come further.
    Deaths on disks that this process does not see all count as at one step, the unknown."""
    at, steps = files.marks(folder, *more), sorted(folder.rglob(STEP))
    step = []
    with suppress(OSError):
        step = [[file.parent.name, file.read_text().strip()] for file in steps]
    known = before if before and before.get("at") == at else {}
    here = 1 + (known["count"] if known.get("step") == step else 0)
    anywhere = 1 + known.get("anywhere", 0)
    why = ""
    if here >= MOST_DEATHS:
        why = f"its worker was killed {here} times while it was evaluated"
        why += ", at the same step" if step else ""
    elif anywhere >= MOST_ANYWHERE:
        why = f"its worker was killed {anywhere} times while it was evaluated, within one epoch"
    count = {"count": 0, "anywhere": 0} if why else {"count": here, "anywhere": anywhere}
    put({**count, "at": at, "step": step})
    with suppress(OSError):
        for file in steps:  # or the next death, before a first step, is taken for one at this
            file.unlink(missing_ok=True)
    return why


def named_by_number(path: Path) -> bool:
    """Whether a file or folder is a trial's: `3.safetensors`, `3`. Not `3.bak`, a person's."""
    return path.name.removesuffix(".safetensors").isdecimal()


def weights_file(study: Study, number: int) -> Path:
    return study.folder / "weights" / f"{number}.safetensors"
