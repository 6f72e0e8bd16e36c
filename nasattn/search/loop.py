"""The search: ask, gate, evaluate, tell. What must not be lost is in the database first."""

import json
import time
import traceback
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from nasattn.config import Experiment, Schedule
from nasattn.data import Data, load
from nasattn.errors import DeviceLost, Stopped, TrialFailed, UserError, first_few
from nasattn.evaluate import on_cuda
from nasattn.evaluate.candidate import Evaluator, Weights, check_trainable, facts_of, store
from nasattn.files import check_writable
from nasattn.pricing import Candidates
from nasattn.record import Score, Trial, counted
from nasattn.search.artifacts import open_store, share
from nasattn.search.display import Display, duration
from nasattn.search.lease import BACKBONE, Leases
from nasattn.search.opening import FREE, open_study, same_images
from nasattn.search.outage import Machine, full, gone, patiently
from nasattn.search.retrain import Retraining
from nasattn.search.samplers import Gate
from nasattn.search.slots import (
    Job,
    Slots,
    Turn,
    named_by_number,
    take_training,
    weights_file,
)
from nasattn.search.stopping import ParetoHalving
from nasattn.search.study import FACTS, TOKEN, Study, accuracy, finished
from nasattn.skeleton import in_words
from nasattn.space import SearchSpace

WAIT = 0.5  # seconds between two looks at what the other workers do


def space_facts(candidates: Candidates) -> dict[str, Any]:
    """What is known of the space before any training, in the form the study stores it."""
    pricing, limits = candidates.pricing, candidates.asked
    space, plain, dearest = pricing.space, pricing.plain, pricing.dearest
    cheapest = {
        m: plain[m] + (pricing.chain.cheapest(m) if m in pricing.table.plain else 0) for m in plain
    }
    return {
        "plain": dict(plain),
        "limits": dict(limits),
        "cheapest": cheapest,
        "reference": {m: limits.get(m, dearest[m]) for m in plain},
        "size": str(space.size()),  # a string: JSON numbers end at 2**53 for many readers
        "choices": {site: list(specs) for site, specs in space.choices.items()},
    }


class Search:
    """One process's work on a study, alone or beside others. found: the study, where it has been
    read already."""

    def __init__(
        self, experiment: Experiment, display: Display, found: Study | None = None
    ) -> None:
        self.experiment, self.display = experiment, display
        self.space = SearchSpace.of(experiment.space)
        self.candidates = Candidates.of(experiment, self.space)
        self.candidates.refuse_empty()
        self.data: Data = load(experiment.data, experiment.space.input, experiment.space.classes)
        schedules: dict[str, Schedule] = {"training": experiment.training}
        if experiment.training.warm_start or experiment.final:
            schedules["pretrain"] = experiment.pretrain
        for key, schedule in schedules.items():
            check_trainable(schedule, key, self.space.baseline(), self.data)
        self.gate = Gate(self.candidates, experiment.search, experiment.objectives)
        store = open_store(experiment.artifacts, found)
        facts = space_facts(self.candidates) | {"images": dict(self.data.facts)}
        self.study = open_study(experiment, facts, found)
        for text in self.study.notes:
            display.note(text)
        check_writable(self.study.folder)
        share(self.study, store, self.display.note)
        self.evaluator = Evaluator(
            experiment,
            self.data,
            self.space.baseline(),
            self.study.folder,
            self._remark,
            self.study.files,
        )
        self._job: Job | None = None  # what is being evaluated
        self._remarks: set[str] = set()  # that were said
        self.stopping = ParetoHalving.of(experiment)
        self._published: list[Trial] = []
        self._machine = Machine()

    def run(self, total: int | None) -> Study:
        """Go on until the study has `total` finished trials (None: as many as it was asked for) or
        the space is exhausted.

        Raises Stopped when the database or the disk fails, TrialFailed when the baseline does.
        """
        with self._leases() as self.leases, self.display:
            self._tell_trouble("")
            try:
                self._run(self.plan(total))
            except (TrialFailed, Stopped) as error:
                # Not where it cannot be written, nor where a new process goes on at once.
                if not (gone(error) or full(error) or isinstance(error, DeviceLost)):
                    self._tell_trouble(str(error))
                raise
            self._tell_trouble("")  # another worker may have had one since
        return self.study

    def retry(self) -> None:
        """Have what has failed trained again, by any worker."""
        note = self.display.note
        with self._leases() as leases:
            slots = Slots(self.study, 0, leases, self.gate, self.stopping, note)
            trials, final = set[int](), set[str]()
            patiently(partial(slots.reopen, trials), note)
        patiently(partial(self.study.reopen, final), note)
        more = f" and {counted(len(final), 'evaluation')} of the final" if final else ""
        note(f"to be tried again: {counted(len(trials), 'trial')}{more} that failed")

    def _run(self, total: int) -> None:
        to_train = self.to_train(total)
        if to_train:
            self.announce(total)
        patiently(lambda: self.display.begin(self.study, total), self.display.note)
        if to_train:
            self._have_backbone()
        running = True
        while running:  # others may open failed trials again while this one is at the final
            self._work(total)
            if self.study.config.final:
                Retraining(
                    self.study, self.data, self.display, self.leases, self._machine, self._remark
                ).run()
            trials = patiently(lambda: self.study.trials, self.display.note)
            running = any(t.state == "running" for t in trials)
        patiently(self.study.write_final, self.display.note)
        self.display.note(patiently(self.study.completion, self.display.note))

    def _tell_trouble(self, text: str) -> None:
        patiently(partial(self.study.trouble, text), self.display.note)

    def _leases(self) -> Leases:
        return Leases(self.study.engine, self.study.name, note=self.display.note)

    def plan(self, total: int | None) -> int:
        """How many trials the study can have, of so many; stored with `final`, `artifacts` and the
        loaders, so that a bare `resume` (None) goes on to it, and stores nothing."""
        return patiently(lambda: self._planned(total), self.display.note)

    def _planned(self, total: int | None) -> int:
        self.study.refresh()  # another may have changed them since they were read
        count, asked = self.candidates.count(), total or self.study.config.search.trials
        if count is not None:  # the plain backbone has a slot also where it is over the budget
            asked = min(asked, count + (not self.candidates.fits({})))
        number = max(asked, len(self.study.rows()))
        facts = dict(self.study.facts)
        if facts["choices"] != {site: list(specs) for site, specs in self.space.choices.items()}:
            raise UserError(f"the space of '{self.study.name}' has just grown: run this again")
        other = not same_images(facts.get("images") or {}, self.data.facts)
        if other or self.study.edits(self.experiment, FREE):
            raise UserError(f"the study '{self.study.name}' was edited just now: run this again")
        if total is None:
            return number
        experiment = dict(facts["experiment"])
        experiment["search"] = {**experiment["search"], "trials": number}
        given = self.experiment.as_dict()
        experiment |= {key: given[key] for key in ("artifacts", "final")}
        if "loaders" in given["data"]:
            experiment["data"] = {**experiment["data"], "loaders": given["data"]["loaders"]}
        if experiment["artifacts"] != facts["experiment"].get("artifacts"):
            self.study.files.forget()  # what lies in another store is not in this one
        if experiment != facts["experiment"]:
            self.study.optuna.set_user_attr(FACTS, facts | {"experiment": experiment})
            self.study.refresh()
        return number

    def to_train(self, total: int) -> bool:
        """Whether trials are left to be trained; else it is only the final that may be."""
        study = self.study
        return patiently(
            lambda: finished(study.trials) < total or bool(study.promotable()), self.display.note
        )

    def announce(self, total: int, workers: int = 1) -> None:
        """Say what is searched, and about how long it will take."""
        space, note = self.space, self.display.note
        trials = patiently(lambda: self.study.trials, note)
        done, count = finished(trials), self.candidates.count()
        for text in self.data.notes:
            note(text)
        if names := self.data.facts.get("names"):
            sizes = (
                f"{len(getattr(self.data, part)):,} {part}" for part in ("train", "val", "test")
            )
            note(f"images: {', '.join(sizes)}; classes: {first_few(names)}")
        if space.dropped:
            lines = {f"{spec} @ {site}: {why}" for site, spec, why in space.dropped}
            note(f"{len(lines)} placements cannot stand and are left out:")
            for line in sorted(lines):
                note(f"  {line}")
        if latency := self.candidates.pricing.context.get("latency"):
            note(f"latency_s is that of another time and perhaps another place: {latency}")
        if getattr(self.experiment.data, "loaders", 1) == 0 and on_cuda(self.experiment.trainer):
            note(
                "the training process reads the images, for which a GPU may wait; data.loaders: 4 "
                "reads by four others"
            )
        fitting = "" if count is None else f", {count:,} within the budget"
        note(f"{self.study.name}: {space.size():,} architectures{fitting}")
        prepare = self.experiment.training.warm_start and not self.evaluator.stored
        if prepare and done:
            note("the plain backbone's weights are gone: it is trained again")
        seconds = [t.score.seconds for t in trials if t.score]
        whole: float = total - done
        seeds = self.experiment.training.seeds
        togo = counted((total - done) * seeds + prepare, "training") + " to go"
        if halving := self.stopping:  # most take only a part of the epochs
            coming = halving.to_come(trials, total)
            whole = halving.epochs(coming) / halving.rungs[-1]
            togo = f"trials to go: {halving.trainings(coming)}"
            togo += f", {seeds} times each" * (seeds > 1) + "; the plain backbone first" * prepare
        if seconds and not prepare:
            estimate = whole * sum(seconds) / len(seconds)
        else:
            estimate = self._estimate(whole, prepare=prepare)
        about = f", in about {duration(estimate / workers)}" if estimate else ""
        self.display.ends = time.monotonic() + estimate / workers if estimate else None
        final = ", then the final" if self.experiment.final else ""
        note(f"{togo}{about}{final}; Ctrl-C stops, {self.display.again} goes on")

    def _estimate(self, trainings: float, *, prepare: bool) -> float:
        """Seconds; zero where a few steps of an untrained network do not tell, or where another
        machine trains and this one cannot."""
        try:
            return self.evaluator.estimate(trainings, prepare=prepare)
        except Exception:
            return 0.0

    def _work(self, total: int) -> None:
        """Do job after job until all slots are finished, by this worker or by others."""
        slots = Slots(
            self.study,
            total,
            self.leases,
            self.gate,
            self.stopping,
            self.display.note,
        )
        ended: int | None = None
        waits = False
        while True:
            turn = self._turn(slots)
            if ended is not None:
                self.display.end(turn.trials[ended], turn.trials, self.candidates.refused)
                self._sweep(turn.trials)
                ended = None
            if turn.over:
                self._sweep(turn.trials)
                return
            if turn.job is None:
                if not waits:
                    task = f"waiting for {counted(turn.others, 'trial')} of other workers"
                    self.display.start(task, waits=True)
                    self.leases.doing = {"task": self.display.task}
                waits = True
                time.sleep(WAIT)
                continue
            waits, ended = False, turn.job.trial.number
            self._have_backbone()  # which a trial that goes on needs too, when all slots are taken
            self._evaluate(slots, turn.job)

    def _turn(self, slots: Slots) -> Turn:
        return patiently(lambda: slots.next(self._publish), self.display.note)

    def _remark(self, text: str) -> None:
        """Of a training, such as a checkpoint that cannot be used: said once, and kept with the
        study and in its trial's row."""
        if text not in self._remarks:
            self.display.note(text)
        self._remarks.add(text)
        row = self._job.row if self._job else None
        patiently(partial(self.study.remark, text, row), self.display.note)

    def _evaluate(self, slots: Slots, job: Job) -> None:
        """Train a trial's architecture and record how it did."""
        self._job = job
        self._start(job.trial)  # what the display raises is not the architecture's fault
        try:
            score = self._kept_score(job) or self._train(slots, job)
        except Stopped:
            raise
        except Exception as error:
            why, trace = self._machine.blamed(error), traceback.format_exc()
            patiently(lambda: slots.fail(job, why, trace), self.display.note)
            self._machine.renew(error, f"trial {job.trial.number}")
            if job.trial.baseline:
                how = " as candidates are, by `training`" * self.experiment.training.warm_start
                raise TrialFailed(f"the plain backbone could not be trained{how}: {why}") from error
        else:
            self._machine.works()
            if score is not None:
                patiently(lambda: slots.finish(job, score), self.display.note)
        finally:
            self._job = None

    def _train(self, slots: Slots, job: Job) -> Score | None:
        """The score of a whole training, whose weights are stored; None when it was stopped."""
        number, architecture = job.trial.number, job.trial.architecture
        files = slots.checkpoints(number)
        score, weights = job.trial.partial, None
        reached = len(score.rungs) if score else 0
        for rung in range(reached, len(self.stopping.rungs)) if self.stopping else [None]:
            # Also of a rung that was reached before: its worker may have died before it was judged.
            if score and not patiently(partial(slots.goes_on, job, score), self.display.note):
                return None
            score, weights = self.evaluator(architecture, self._tick, checkpoints=files, rung=rung)
        assert score is not None
        if weights:
            self._keep(job.trial, job.token, score, weights, must=True)
        return score

    def _keep(
        self, trial: Trial, token: str, score: Score, weights: Weights, *, must: bool
    ) -> None:
        path = weights_file(self.study, trial.number)
        more = {"of": token, "score": json.dumps(score.as_dict())}
        store(path, weights, {"key": trial.architecture.key, **more})
        self.study.files.publish(path, must=must)

    def _kept_score(self, job: Job) -> Score | None:
        """The score of a training that had ended when the database or the process went away: it
        stands with the weights."""
        path = weights_file(self.study, job.trial.number)
        try:
            facts = self.study.files.read(path, facts_of)
        except (OSError, SafetensorError):
            return None
        if facts.get("of") != job.token or "score" not in facts:
            return None
        self.study.files.publish(path, must=True)
        return Score.from_dict(json.loads(facts["score"]))

    def _have_backbone(self) -> None:
        """With a warm start: the backbone's weights, which one worker trains while others wait."""
        waits = False
        while self.experiment.training.warm_start and not self.evaluator.stored:
            files, note = self.evaluator.training, self.display.note
            killed = take_training(self.study, self.leases, BACKBONE, files, note)
            if killed:
                raise TrialFailed(f"the plain backbone could not be trained: {killed}")
            if killed is not None:
                self._start(None)
                self._prepare()
                patiently(lambda: self.leases.release(BACKBONE), self.display.note)
            elif not waits:
                task = "waiting for the plain backbone, which another worker trains"
                self.display.start(task, waits=True)
                self.leases.doing = {"task": self.display.task}
                waits = True
            time.sleep(WAIT * waits)
        self._prepare()

    def _prepare(self) -> None:
        try:
            self._machine.guarded(lambda: self.evaluator.prepare(self._tick), "the plain backbone")
        except TrialFailed as error:
            raise TrialFailed(f"the plain backbone could not be trained: {error}") from error

    def _start(self, trial: Trial | None) -> None:
        """Show what begins: a trial's training, or the backbone's."""
        task = "training the plain backbone, from which all go on"
        if trial is not None:
            task = f"trial {trial.number}: {in_words(self.experiment.space, trial.architecture)}"
        self.display.start(task)
        number = None if trial is None else trial.number
        self.leases.doing = {"task": task, "slot": number, "refused": self.candidates.refused}

    def _tick(self, share: float, accuracy: float | None) -> None:
        self.display.tick(share, accuracy)
        self.leases.doing |= {"share": round(share, 3), "accuracy": accuracy}

    def train_again(self, trial: Trial, token: str) -> tuple[Trial, Weights]:
        """As weights_of_trial, from the same seed; kept again where it does as well."""
        self.display.note(f"the weights of trial {trial.number} are gone: it is trained again")
        with self._leases() as self.leases, self.display:
            self.display.begin(self.study, self.study.asked, rungs=False)
            self._have_backbone()
            self._start(trial)
            again, weights = self.evaluator(trial.architecture, self._tick)
        if again.accuracy != accuracy(trial):
            self.display.note(
                f"its accuracy is {again.accuracy:.4f} now and was {accuracy(trial):.4f}: "
                "another machine or another version computes a little differently"
            )
            return replace(trial, score=again), weights
        with suppress(OSError):  # they are at hand
            self._keep(trial, token, again, weights, must=False)
        return trial, weights

    def _publish(self, trials: list[Trial]) -> None:
        """Rewrite the frontier's files when it has changed."""
        frontier = self.study.frontier(trials)
        if frontier != self._published:
            self.study.write_frontier(frontier)
            self._published = frontier

    def _sweep(self, trials: list[Trial]) -> None:
        """Delete what will not be asked for again: a trial that left the frontier never returns to
        it. A trial that is running, or may go on, keeps all it has. What is kept
        and was not published, as the study had no store then, is now."""
        kept = {0} | {t.number for t in self._published}  # of these trials, in their turn
        weights, checkpoints = weights_file(self.study, 0).parent, self.study.folder / "checkpoints"
        # Not of those that have failed: another worker may just have opened them again.
        ended = {t.number for t in trials if t.state == "scored"}
        over = {weights: ended - kept, checkpoints: ended}
        files, shared = self.study.files, self.study.files.elsewhere()
        for path in {*weights.glob("*.safetensors"), *checkpoints.glob("*"), *shared}:
            if path.parent not in over or not named_by_number(path):
                continue
            if int(path.stem) in over[path.parent]:
                files.drop(path)
            elif path.parent == weights and int(path.stem) in kept and path not in shared:
                files.publish(path)


def weights_of_trial(study: Study, trial: Trial, display: Display) -> tuple[Trial, Weights]:
    """A scored trial's weights: those kept (the frontier's, the baseline's), or trained again. And
    the trial, with the score of that training where it did otherwise."""
    path = weights_file(study, trial.number)
    token = study.rows()[trial.number].user_attrs.get(TOKEN, "")
    share(study, open_store(study.config.artifacts, study), display.note)
    try:
        # One of another database's study may have lain there since.
        facts, weights = study.files.read(path, lambda file: (facts_of(file), load_file(file)))
        if facts.get("of", "") == token:
            return trial, weights
        display.note(f"{path} is of another study")
    except FileNotFoundError:
        pass
    except (OSError, SafetensorError) as error:
        display.note(f"{path} cannot be read: {error}")
    return Search(study.config, display, study).train_again(trial, token)
