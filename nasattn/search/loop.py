"""The search: ask, gate, evaluate, tell. What must not be lost is in the database first."""

import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState
from safetensors.torch import load_file

from nasattn.config import Experiment
from nasattn.data import Data, load
from nasattn.errors import TrialFailed
from nasattn.evaluate.candidate import Evaluator, Weights, store
from nasattn.pricing import Candidates, Pricing
from nasattn.record import Score, Trial
from nasattn.search.display import Display, duration, placed
from nasattn.search.lease import Lease
from nasattn.search.samplers import Exhausted, Gate
from nasattn.search.study import (
    FACTS,
    REASON,
    SCORE,
    Study,
    accuracy,
    claim,
    finished,
    open_study,
    read_trial,
)
from nasattn.space import SearchSpace


def space_facts(pricing: Pricing, limits: Mapping[str, float]) -> dict[str, Any]:
    """What is known of the space before any training, in the form the study stores it."""
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
    """One process's work on a study."""

    def __init__(self, experiment: Experiment, display: Display) -> None:
        self.experiment, self.display = experiment, display
        self.space = SearchSpace.of(experiment.space)
        self.pricing = Pricing.of(experiment, self.space)
        plain = self.pricing.plain
        limits = {str(m): limit.resolve(plain[m]) for m, limit in experiment.budget.items()}
        self.candidates = Candidates(self.pricing, limits)
        self.candidates.refuse_empty()
        self.data: Data = load(experiment.data, experiment.space.input, experiment.space.classes)
        self.data.loader("train", experiment.training.batch_size, 0)
        self.gate = Gate(self.candidates, experiment.search, experiment.objectives)
        self.study = open_study(experiment, space_facts(self.pricing, limits), self.gate)
        self.evaluator = Evaluator(experiment, self.data, self.space.baseline(), self.study.folder)

    @property
    def _optuna(self) -> optuna.Study:
        return self.study.optuna

    def run(self, total: int) -> Study:
        """Go on until the study has `total` finished trials or the space is exhausted."""
        with Lease(self._optuna), self.display:
            unfinished = self._recover()
            count = self.candidates.count()
            total = total if count is None else min(total, count)
            done = finished(self.study.trials)
            if done >= total:
                self.display.note(f"the study '{self.study.name}' is complete: {done} trials")
                return self.study
            self._remember(total)
            self._announce(total, done, count)
            self.display.begin(self.study, total)
            claimed = len(self.study.trials)
            for row in unfinished:
                self._evaluate(optuna.trial.Trial(self._optuna, row._trial_id), read_trial(row))
            for slot in range(claimed, total):
                try:
                    asked = self._ask(slot)
                except Exhausted:
                    self.display.note("no new architecture was found within the budget: complete")
                    self._recover()
                    break
                self._evaluate(*asked)
        return self.study

    def _recover(self) -> list[FrozenTrial]:
        """The trials that a dead process left running, to be run again in their own slots."""
        unfinished = []
        for row in self._optuna.get_trials(deepcopy=False):
            if row.state is not TrialState.RUNNING:
                continue
            if FACTS in row.user_attrs:
                unfinished.append(row)
            else:
                self._optuna.tell(row.number, state=TrialState.FAIL)
        if unfinished:
            numbers = ", ".join(str(row.user_attrs[FACTS]["slot"]) for row in unfinished)
            self.display.note(f"going on with what was interrupted: trial {numbers}")
        return unfinished

    def _announce(self, total: int, done: int, count: int | None) -> None:
        space, note = self.space, self.display.note
        for text in (*self.study.notes, *self.data.notes):
            note(text)
        if space.dropped:
            lines = {f"{spec} @ {site}: {why}" for site, spec, why in space.dropped}
            note(f"{len(lines)} placements cannot stand and are left out:")
            for line in sorted(lines):
                note(f"  {line}")
        if latency := self.pricing.context.get("latency"):
            note(f"latency_s is that of another time and perhaps another place: {latency}")
        fitting = "" if count is None else f", {count:,} within the budget"
        note(f"{self.study.name}: {space.size():,} architectures{fitting}; {done} trials done")
        prepare = self.experiment.training.warm_start and not self.evaluator.stored
        if prepare and done:
            note("the plain backbone's weights are gone: it is trained again")
        seconds = [t.score.seconds for t in self.study.trials if t.score]
        left = total - done
        if seconds and not prepare:
            estimate = left * sum(seconds) / len(seconds)
        else:
            estimate = self.evaluator.estimate(left, prepare=prepare)
        seeds = self.experiment.training.seeds
        note(
            f"{left * seeds + prepare} trainings to go, about {duration(estimate)}; "
            f"Ctrl-C stops, the same command goes on"
        )

    def _remember(self, total: int) -> None:
        """Store the number of trials asked for last, so that a bare `resume` goes on to it."""
        facts = dict(self.study.facts)
        experiment = dict(facts["experiment"])
        experiment["search"] = {**experiment["search"], "trials": total}
        self._optuna.set_user_attr(FACTS, facts | {"experiment": experiment})

    def _ask(self, slot: int) -> tuple[optuna.trial.Trial, Trial]:
        """A new row whose architecture is drawn and stored, and the trial it is."""
        self.gate.slot = slot
        row = self._optuna.ask()
        architecture = self.space.draw(row.suggest_categorical)
        cost = self.pricing.cost(row.params)
        excesses = {m: cost.values[m] - limit for m, limit in self.candidates.limits.items()}
        for metric, value in excesses.items():
            row.set_constraint(metric, value)
        # optuna-dashboard (0.21) reads constraints only by their key before Optuna 5.
        row.storage.set_trial_system_attr(row._trial_id, "constraints", list(excesses.values()))
        row.set_user_attr(FACTS, claim(slot, architecture, cost))
        return row, Trial(
            number=slot, architecture=architecture, cost=cost, score=None, state="running"
        )

    def _evaluate(self, row: optuna.trial.Trial, trial: Trial) -> None:
        """Train a trial's architecture and record how it did."""
        try:
            stored = row.user_attrs.get(SCORE)
            # A stored score that was not told yet: the process died between the two.
            score = Score.from_dict(stored) if stored else self._train(trial)
            if not stored:
                row.set_user_attr(SCORE, score.as_dict())
            values = {**trial.cost.values, "accuracy": score.accuracy}
            self._optuna.tell(row, [values[o] for o in self.experiment.objectives])
        except Exception as error:
            known = isinstance(error, TrialFailed)
            reason = str(error) if known else f"{type(error).__name__}: {error}"
            row.set_user_attr(REASON, reason)
            row.set_user_attr("traceback", traceback.format_exc())
            if trial.baseline:
                raise TrialFailed(f"the plain backbone could not be trained: {reason}") from error
            self._optuna.tell(row, state=TrialState.FAIL)
        trials = self.study.trials
        self._keep_frontier(trials)
        self.display.end(trials[trial.number], trials, self.candidates.refused)

    def _train(self, trial: Trial) -> Score:
        self._prepare()
        self.display.start(f"trial {trial.number}: {placed(trial.architecture.specs)}")
        score, weights = self.evaluator(trial.architecture, self.display.tick)
        store(weights_file(self.study, trial.number), weights, {"key": trial.architecture.key})
        return score

    def _prepare(self) -> None:
        if self.experiment.training.warm_start and not self.evaluator.stored:
            self.display.start("training the plain backbone, from which all go on")
        self.evaluator.prepare(self.display.tick)

    def train_again(self, trial: Trial) -> Weights:
        """A scored trial's weights, from the same seed."""
        self.display.note(f"the weights of trial {trial.number} are gone: it is trained again")
        with self.display:
            self._prepare()
            self.display.start(f"trial {trial.number}: {placed(trial.architecture.specs)}")
            again, weights = self.evaluator(trial.architecture, self.display.tick)
        if again.accuracy != accuracy(trial):
            self.display.note(
                f"its accuracy is {again.accuracy:.4f} now and was {accuracy(trial):.4f}: "
                "another machine or another version computes a little differently"
            )
        return weights

    def _keep_frontier(self, trials: list[Trial]) -> None:
        """Rewrite the frontier's files; a trial that left the frontier never returns to it, so its
        weights can go."""
        self.study.write_frontier(trials)
        kept = {weights_file(self.study, t.number) for t in self.study.frontier(trials)}
        kept.add(weights_file(self.study, 0))
        for path in weights_file(self.study, 0).parent.glob("*.safetensors"):
            if path not in kept:
                path.unlink()


def weights_file(study: Study, number: int) -> Path:
    return study.folder / "weights" / f"{number}.safetensors"


def weights_of_trial(study: Study, trial: Trial, display: Display) -> Weights:
    """A scored trial's weights: those kept (the frontier's, the baseline's), or trained again."""
    path = weights_file(study, trial.number)
    return load_file(path) if path.exists() else Search(study.config, display).train_again(trial)
