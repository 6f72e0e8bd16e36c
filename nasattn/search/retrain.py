"""Trains the final frontier anew. An evaluation is in the database as soon as it is done."""

from collections.abc import Sequence

from nasattn.config import Experiment
from nasattn.cost import measure
from nasattn.data import Data
from nasattn.errors import TrialFailed, reason
from nasattn.evaluate.candidate import Evaluator, score_test
from nasattn.record import Cost
from nasattn.search.display import Display, duration, placed
from nasattn.search.final import FINAL, Contender, Evaluation, contenders, evaluations
from nasattn.search.study import Study
from nasattn.seed import derive


class Retraining:
    """One process's work on a study's `final`: what is not in the database yet, seed by seed, so
    that a comparison within a seed is whole as early as can be."""

    def __init__(self, study: Study, data: Data, display: Display) -> None:
        self.study, self.data, self.display = study, data, display
        self.experiment: Experiment = study.config
        trials = study.trials
        self.planned = contenders(trials, study.frontier(trials))
        seeds = self.experiment.final.seeds if self.experiment.final else 0
        self.evaluators = [evaluator_of(study, data, seed) for seed in range(seeds)]

    def run(self) -> None:
        """Evaluate until nothing is left."""
        if self.experiment.final is None or not self._left():
            return
        if self.display.study is None:
            self.display.begin(self.study, len(self.study.trials))
        self._announce()
        for seed in range(self.experiment.final.seeds):
            if todo := [c for c, s in self._left() if s == seed]:
                self._train_seed(seed, todo)
        self.study.write_final()

    def _left(self) -> list[tuple[Contender, int]]:
        final, stored = self.experiment.final, evaluations(self.study.optuna.user_attrs)
        assert final is not None
        return [
            (contender, seed)
            for seed in range(final.seeds)
            for contender in self.planned
            if (known := stored.get((contender.architecture.key, seed))) is None
            or not known.done(final.test)
        ]

    def _train_seed(self, seed: int, todo: Sequence[Contender]) -> None:
        evaluator = self.evaluators[seed]
        try:
            if self.experiment.training.warm_start and not evaluator.stored:
                self.display.start(f"final, seed {seed}: training the plain backbone anew")
            evaluator.prepare(self.display.tick)
        except TrialFailed as error:
            for contender in todo:
                failed = f"the plain backbone could not be trained: {error}"
                self._store(_blank(contender, seed, failed))
            return
        for contender in todo:
            self.display.start(f"final, seed {seed}: {_name(contender)}")
            self._store(self._evaluate(evaluator, contender, seed))

    def _evaluate(self, evaluator: Evaluator, contender: Contender, seed: int) -> Evaluation:
        final, architecture = self.experiment.final, contender.architecture
        assert final is not None
        try:
            cost = contender.trial.cost if contender.trial else measure(architecture)
            score, weights = evaluator(architecture, self.display.tick)
            test = None
            if final.test:
                test = score_test(architecture, weights, evaluator.experiment, self.data)
        except Exception as error:
            return _blank(contender, seed, reason(error))
        return Evaluation(
            seed=seed,
            architecture=architecture,
            cost=cost,
            val=score.accuracy,
            test=test,
            seconds=score.seconds,
        )

    def _store(self, evaluation: Evaluation) -> None:
        self.study.optuna.set_user_attr(evaluation.name, evaluation.as_dict())
        figures = {"test": evaluation.test, "val": evaluation.val}
        shown = [f"{split} {value:.4f}" for split, value in figures.items() if value is not None]
        seconds, _ = self._ahead()
        self.display.note(
            f"final, seed {evaluation.seed}: {', '.join(shown) or f'failed: {evaluation.reason}'}  "
            f"{placed(evaluation.architecture.specs)}  [{len(self._left())} to go, "
            f"about {duration(seconds)} left]"
        )

    def _announce(self) -> None:
        final = self.experiment.final
        assert final is not None
        seconds, backbones = self._ahead()
        count = sum("control" in c.roles for c in self.planned)
        anew = f", the backbone anew for each ({backbones} to train)" if backbones else ""
        self.display.note(
            f"final: {len(self.planned) - count} architectures and {count} controls (SE at the "
            f"same sites), {final.seeds} seeds each{anew}: {len(self._left())} evaluations to go, "
            f"about {duration(seconds)}"
        )

    def _ahead(self) -> tuple[float, int]:
        """Seconds and plain backbones still to train, by what an epoch took so far."""
        stored = evaluations(self.study.optuna.user_attrs).values()
        scores = [t.score for t in self.study.trials if t.score]
        schedule = full(self.experiment).training
        spent = [(e.seconds, schedule.epochs) for e in stored if not e.reason]
        spent = spent or [(s.seconds, s.epochs) for s in scores]
        epoch = sum(s for s, _ in spent) / max(1, sum(n for _, n in spent))
        left = self._left()
        backbones = 0
        if schedule.warm_start:
            backbones = sum(not self.evaluators[seed].stored for seed in {s for _, s in left})
        epochs = len(left) * schedule.epochs + backbones * self.experiment.pretrain.epochs
        return epoch * epochs, backbones


def full(experiment: Experiment) -> Experiment:
    """The experiment with one training an evaluation, by the full schedule: the candidates' own
    from the plain backbone, without a warm start `pretrain`'s."""
    training = experiment.training
    whole = {} if training.warm_start else experiment.pretrain.model_dump()
    update = {"training": training.model_copy(update={**whole, "seeds": 1})}
    return experiment.model_copy(update=update)


def evaluator_of(study: Study, data: Data, seed: int) -> Evaluator:
    """That of one seed of the `final`: with a plain backbone of its own, and its own seeds."""
    experiment = full(study.config)
    search = experiment.search
    own = search.model_copy(update={"seed": derive(search.seed, FINAL, seed)})
    plain = next(t.architecture for t in study.trials if t.baseline)
    folder = study.folder / FINAL / f"seed{seed}"
    return Evaluator(experiment.model_copy(update={"search": own}), data, plain, folder)


def _blank(contender: Contender, seed: int, why: str) -> Evaluation:
    cost = contender.trial.cost if contender.trial else Cost(values={})
    return Evaluation(seed=seed, architecture=contender.architecture, cost=cost, reason=why)


def _name(contender: Contender) -> str:
    what = f"trial {contender.trial.number}: " if contender.trial else "control: "
    return what + placed(contender.architecture.specs)
