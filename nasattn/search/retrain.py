"""Trains the final frontier anew. An evaluation is in the database as soon as it is done."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from nasattn.architecture import Architecture
from nasattn.config import Experiment
from nasattn.cost import measure
from nasattn.data import Data
from nasattn.errors import DataFailed, Stopped, TrialFailed
from nasattn.evaluate.candidate import Evaluator, load_training, score_test
from nasattn.record import Cost, counted
from nasattn.search.display import Display, duration
from nasattn.search.final import (
    FINAL,
    Contender,
    Evaluation,
    contenders,
    evaluations,
    in_full,
    progress,
)
from nasattn.search.lease import BACKBONE, Leases
from nasattn.search.outage import Machine, patiently
from nasattn.search.slots import take_training
from nasattn.search.study import Study
from nasattn.seed import derive
from nasattn.skeleton import in_words

Entry = tuple[Contender, int]  # one of the table to fill in: who, and by which seed

WAIT = 0.5  # seconds between two looks at what the other workers do


class Retraining:
    """One worker's part in a study's `final`: what is not in the database yet and nobody else is
    at, seed by seed, so that a comparison within a seed is whole as early as can be."""

    def __init__(
        self,
        study: Study,
        data: Data,
        display: Display,
        leases: Leases,
        machine: Machine,
        remark: Callable[[str], None],
    ) -> None:
        self.study, self.data, self.display, self.leases = study, data, display, leases
        self._machine = machine
        self.experiment: Experiment = study.config
        trials = patiently(lambda: study.trials, display.note)
        self.scores = [t.score for t in trials if t.score]
        self.planned = contenders(trials, study.frontier(trials))
        assert self.experiment.final is not None
        self.final = self.experiment.final

        def remarks(seed: int) -> Callable[[str], None]:
            return lambda text: remark(f"final, seed {seed}: {text}")

        self.evaluators = [
            evaluator_of(study, data, trials[0].architecture, s, remarks(s))
            for s in range(self.final.seeds)
        ]

    def run(self) -> None:
        """Evaluate until nothing is left, here or at another worker."""
        if not self._left():
            return
        self.display.final = self._progress()
        self._announce()
        load_training(self.experiment.trainer)
        waits = False
        while left := self._left():
            if job := self._claim(left):
                self._evaluate(*job)
            elif not waits:
                self._start("waiting for what other workers evaluate", waits=True)
            waits = job is None
            time.sleep(WAIT * waits)

    def _left(self) -> list[Entry]:
        final, stored = self.final, self._stored()
        return [
            (contender, seed)
            for seed in range(final.seeds)
            for contender in self.planned
            if (known := stored.get((contender.architecture.key, seed))) is None
            or not known.done(final.test)
        ]

    def _progress(self) -> dict[str, int]:
        return progress(self.final, self.planned, self._stored())

    def _stored(self) -> dict[tuple[str, int], Evaluation]:
        attributes = patiently(lambda: self.study.optuna.user_attrs, self.display.note)
        return evaluations(attributes)

    def _claim(self, left: Sequence[Entry]) -> Entry | None:
        """The first that is free, now this worker's; None when others are at all of them."""
        for seed in dict.fromkeys(seed for _, seed in left):
            if not self._have_backbone(seed, [c for c, s in left if s == seed]):
                continue
            for job in (job for job in left if job[1] == seed):
                name, files = _lease(*job), self._checkpoints(*job)
                if (killed := self._acquire(name, files)) is None:
                    continue
                if job in self._left():
                    if not killed:
                        return job
                    self._store(_blank(*job, killed))
                self._release(name)
        return None

    def _have_backbone(self, seed: int, todo: Sequence[Contender]) -> bool:
        """Whether the seed's evaluations can start: its backbone is trained by one worker, first.
        When it cannot be trained, none of them can be."""
        evaluator, name = self.evaluators[seed], f"{FINAL}:{BACKBONE}:{seed}"
        if not self.experiment.training.warm_start or evaluator.stored:
            return True
        killed = self._acquire(name, evaluator.training)
        if killed is None:
            return False
        try:
            if killed:
                raise TrialFailed(killed)
            if not evaluator.stored:
                self._start(f"final, seed {seed}: training the plain backbone anew")
            self._machine.guarded(
                lambda: evaluator.prepare(self._tick), f"final, seed {seed}: the plain backbone"
            )
        except DataFailed as error:
            raise Stopped(
                f"final, seed {seed}: the plain backbone could not be trained: {error}; the same "
                "command goes on"
            ) from error
        except TrialFailed as error:
            for contender in todo:
                why = f"the plain backbone could not be trained: {error}"
                self._store(_blank(contender, seed, why))
        self._release(name)
        return evaluator.stored

    def _evaluate(self, contender: Contender, seed: int) -> None:
        """Train and score one, as far as a process that died had not come, and store the end."""
        evaluator, architecture = self.evaluators[seed], contender.architecture
        files = self._checkpoints(contender, seed)
        try:
            evaluator.prepare(self._tick)
            self._start(f"final, seed {seed}: {self._name(contender)}")
            cost = contender.trial.cost if contender.trial else measure(architecture)
            score, weights = evaluator(architecture, self._tick, checkpoints=files)
            test = None
            if self.final.test:
                test = score_test(architecture, weights, evaluator.experiment, self.data)
        except Stopped:
            raise
        except Exception as error:
            self._end(contender, seed, _blank(contender, seed, self._machine.blamed(error)))
            self._machine.renew(error, f"final, seed {seed}: {self._name(contender)}")
        else:
            self._machine.works()
            done = replace(_blank(contender, seed, ""), cost=cost, seconds=score.seconds)
            self._end(contender, seed, replace(done, val=score.accuracy, test=test))

    def _name(self, contender: Contender) -> str:
        what = f"trial {contender.trial.number}: " if contender.trial else "control: "
        return what + in_words(self.experiment.space, contender.architecture)

    def _end(self, contender: Contender, seed: int, evaluation: Evaluation) -> None:
        self._store(evaluation)
        self.study.files.drop(self._checkpoints(contender, seed))
        self._release(_lease(contender, seed))

    def _acquire(self, name: str, files: Path) -> str | None:
        return take_training(self.study, self.leases, name, files, self.display.note)

    def _checkpoints(self, contender: Contender, seed: int) -> Path:
        return self.evaluators[seed].folder / "checkpoints" / contender.architecture.key

    def _release(self, name: str) -> None:
        patiently(lambda: self.leases.release(name), self.display.note)

    def _start(self, task: str, *, waits: bool = False) -> None:
        self.display.start(task, waits)
        self.leases.doing = {"task": task}

    def _tick(self, share: float, accuracy: float | None) -> None:
        self.display.tick(share, accuracy)
        self.leases.doing |= {"share": round(share, 3), "accuracy": accuracy}

    def _store(self, evaluation: Evaluation) -> None:
        value = evaluation.as_dict()
        patiently(
            lambda: self.study.optuna.set_user_attr(evaluation.name, value), self.display.note
        )
        seconds, _ = self._ahead()
        counts = self._progress()
        left = counts["evaluations"] - counts["done"]
        self.display.retrained(evaluation, counts, f"{left} to go, about {duration(seconds)} left")

    def _announce(self) -> None:
        seconds, backbones = self._ahead()
        count = sum("control" in c.roles for c in self.planned)
        anew = f", the backbone anew for each ({backbones} to train)" if backbones else ""
        self.display.note(
            f"final: {counted(len(self.planned) - count, 'architecture')} and "
            f"{counted(count, 'control')} (SE at the "
            f"same sites), {counted(self.final.seeds, 'seed')} each{anew}: "
            f"{counted(len(self._left()), 'evaluation')} to go, about {duration(seconds)}"
        )

    def _ahead(self) -> tuple[float, int]:
        """Seconds and plain backbones still to train, by what an epoch took so far."""
        stored = self._stored().values()
        schedule = in_full(self.experiment).training
        spent = [(e.seconds, schedule.epochs) for e in stored if not e.reason]
        spent = spent or [(s.seconds, s.epochs) for s in self.scores]
        epoch = sum(s for s, _ in spent) / max(1, sum(n for _, n in spent))
        left = self._left()
        backbones = 0
        if schedule.warm_start:
            backbones = sum(not self.evaluators[seed].stored for seed in {s for _, s in left})
        epochs = len(left) * schedule.epochs + backbones * self.experiment.pretrain.epochs
        return epoch * epochs, backbones


def evaluator_of(
    study: Study, data: Data, plain: Architecture, seed: int, note: Callable[[str], None]
) -> Evaluator:
    """That of one seed of the `final`: with a plain backbone of its own, and its own seeds."""
    experiment = in_full(study.config)
    search = experiment.search
    own = search.model_copy(update={"seed": derive(search.seed, FINAL, seed)})
    folder = study.folder / FINAL / f"seed{seed}"
    experiment = experiment.model_copy(update={"search": own})
    return Evaluator(experiment, data, plain, folder, note, study.files)


def _lease(contender: Contender, seed: int) -> str:
    return f"{FINAL}:{contender.architecture.key}:{seed}"


def _blank(contender: Contender, seed: int, why: str) -> Evaluation:
    cost = contender.trial.cost if contender.trial else Cost(values={})
    return Evaluation(seed=seed, architecture=contender.architecture, cost=cost, reason=why)
