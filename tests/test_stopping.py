"""Halving: who goes on, by hand and on a table of real learning curves."""

import io
import itertools
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import ROOT
from rich.console import Console
from scipy.stats import kendalltau
from test_workers import forked, kill_at

from nasattn.architecture import Architecture, Placement
from nasattn.config import Experiment, TrainerFile
from nasattn.errors import Stopped, TrialFailed, UserError
from nasattn.evaluate import candidate
from nasattn.evaluate.table import TableEvaluator
from nasattn.pareto import non_dominated
from nasattn.record import Cost, Score, Trial
from nasattn.search.display import Display, Worker, duration
from nasattn.search.loop import Search
from nasattn.search.opening import load_study
from nasattn.search.samplers import SAMPLERS, Exhausted, Gate
from nasattn.search.slots import FIRST, Slots
from nasattn.search.stopping import CHANCE, PROBES, TRUSTED, ParetoHalving, reached
from nasattn.search.study import Study, finished
from nasattn.search.watch import Follower
from nasattn.search.workers import ended
from nasattn.space import SearchSpace
from nasattn.uncertainty import kendall

FOLDER = ROOT / "experiments/005_halving"
TABLE = FOLDER / "curves.csv"
RUNGS = (1, 3, 9)
TRIALS = 40  # of the searches on the table


def scored(*accuracies: float) -> Score:
    """A score that has come to as many rungs."""
    return Score(
        accuracy=accuracies[-1],
        curve=(),
        epochs=RUNGS[len(accuracies) - 1],
        seconds=1.0,
        seed=0,
        evaluator="fake",
        rungs=accuracies,
    )


def trial(number: int, macs: float, *accuracies: float, state: str = "stopped") -> Trial:
    """Whole with three accuracies; costs beside the MACs: as many parameters."""
    whole = len(accuracies) == len(RUNGS)
    score = scored(*accuracies) if accuracies else None
    return Trial(
        number=number,
        architecture=PLAIN,
        cost=Cost(values={"macs": macs, "params": macs}),
        score=score if whole else None,
        partial=None if whole else score,
        state="scored" if whole else state,  # type: ignore[arg-type]
    )


PLAIN = SearchSpace.load(ROOT / "search_spaces/cued_digits.yaml").baseline()
HALVING = ParetoHalving(RUNGS, 3, ["macs"])


def probed(count: int = PROBES[0]) -> list[Trial]:
    """Trials that ended in the order of their rungs, all at the same cost."""
    return [trial(n, 100, 0.1 + n / 100, 0.2 + n / 100, 0.3 + n / 100) for n in range(count)]


PROBED = trial(0, 100, 0.1, 0.2, 0.3)


def numbers(trials: Sequence[Trial]) -> list[int]:
    return [t.number for t in trials]


def survivors(level: int, trials: Sequence[Trial], *, all_begun: bool = False) -> list[int]:
    return numbers(HALVING.survivors(level, trials, all_begun=all_begun))


def test_the_probes_go_on_whatever_they_show() -> None:
    trials = [*probed(5), trial(5, 100, 0.01, state="running")]
    assert HALVING.goes_on(trials[5], trials, all_begun=False)
    assert HALVING.probes(trials) == (PROBES[0], None)
    (line,) = HALVING.notes(trials, 9)
    assert line == f"halving: the first {PROBES[0]} trials are trained to the end, as probes"
    assert HALVING.notes(trials, 8) == ["halving: every trial is trained to the end, as probes"]
    assert HALVING.notes([], 1) == ["halving: every trial is trained to the end, as a probe"]


def test_one_in_eta_goes_on_and_equals_share_a_rank() -> None:
    first = probed()
    better = [trial(8 + i, 100, 0.3 + i / 100) for i in range(4)]
    # Twelve have come to the rung: four go on.
    assert survivors(0, first + better)[-4:] == [11, 10, 9, 8]
    same = [trial(8 + i, 100, 0.3) for i in range(4)]
    assert survivors(0, first + same) == [*range(8), 8, 9, 10, 11]
    # Seven equals take the ranks 0 to 6, so 3 each: fewer than 15 / 3 go before each of them.
    assert len(survivors(0, first + [trial(8 + i, 100, 0.3) for i in range(7)])) == 15
    # Eleven of nineteen share rank 5, and 19 / 3 is more; the twelve of twenty share 5.5.
    assert len(survivors(0, first + [trial(8 + i, 100, 0.01) for i in range(12)])) == 8


def test_in_the_end_more_go_on_down_to_one_in_two() -> None:
    """Nobody who goes on while new ones come is stopped then."""
    first = probed()
    more = [trial(8 + i, 100, 0.3 + i / 100) for i in range(16)]
    assert survivors(0, first + more)[8:] == [*range(23, 15, -1)], "24 / 3"
    assert survivors(0, first + more, all_begun=True)[8:] == [*range(23, 11, -1)], "24 / 2"
    trials = [*first, *more]
    trials[16:] = [replace(t, state="running") for t in trials[16:]]
    assert HALVING.promotable(trials, all_begun=False) is None
    assert HALVING.promotable(trials, all_begun=True) == trials[15]
    trials[12] = replace(trials[12], state="running")
    assert not HALVING.goes_on(trials[12], trials, all_begun=False)
    assert HALVING.goes_on(trials[12], trials, all_begun=True)
    assert ParetoHalving(RUNGS, 1.5, ["macs"]).in_the_end == 1.5, "no fewer than before the end"


def test_the_cheapest_do_not_survive_for_being_cheap() -> None:
    """In each band those that are good for it; none that cheaper ones surpass."""
    first = probed()
    cheap = [trial(8 + i, 10 + i, 0.2 + i / 1000 + (i == 15) / 10) for i in range(20)]
    dear = [trial(28 + i, 200 + i, 0.21 + i / 1000 + (i == 7) / 10) for i in range(20)]
    found = set(survivors(0, first + cheap + dear))
    assert {23, 35} <= found
    assert 8 not in found, "the cheapest of all, which nothing dominates"
    assert len(found - set(range(8))) < 20
    assert {28, 29, 30}.isdisjoint(found), "cheaper ones are better"
    with_params = ParetoHalving(RUNGS, 3, ["macs", "params"])
    also = with_params.survivors(0, first + cheap + dear, all_begun=False)
    assert set(numbers(also)) == found


def test_bands_hold_as_many_trials_and_several_costs_count_alike() -> None:
    some = [trial(n, 10 + n * n, 0.5) for n in range(200)]
    sizes = Counter(band for band, _ in HALVING._banded(some))
    assert list(sizes) == list(range(6)) and set(sizes.values()) <= {33, 34}
    assert {band for band, _ in HALVING._banded(some[:23])} == {0}, "too few for two"
    # What is dearer in one is as much cheaper in the other: all are alike.
    opposed = [
        replace(t, cost=Cost(values={"macs": t.cost.values["macs"], "params": 200 - n}))
        for n, t in enumerate(some)
    ]
    both = ParetoHalving(RUNGS, 3, ["macs", "params"])
    assert {band for band, _ in both._banded(opposed)} == {0}


def test_rungs_that_do_not_rank_stop_nobody() -> None:
    rng = random.Random(0)
    ends = [0.3 + n / 100 for n in range(PROBES[-1])]
    first = rng.sample(ends, len(ends))
    # The first rung has no order, the second that of the end.
    trials = [trial(n, 100, first[n] - 0.2, ends[n] - 0.1, ends[n]) for n in range(len(ends))]
    for count in PROBES[:-1]:
        assert HALVING.probes(trials[:count])[0] == 2 * count
        assert survivors(0, trials[:count]) == numbers(trials[:count])
    assert HALVING.probes(trials) == (PROBES[-1], [False, True])
    more = [trial(32 + i, 100, 0.01, 0.01) for i in range(6)]
    assert survivors(0, trials + more)[-6:] == numbers(more)
    assert not set(numbers(more)) & set(survivors(1, trials + more))
    told = "\n".join(HALVING.notes(trials, 40))
    assert HALVING.notes(trials[:8], 16)[-1] == "  to be sure, every trial is trained to the end"
    for count in PROBES:
        assert f"{count} probes have ended" in told
        further = f"to be sure, the first {2 * count} trials are trained to the end"
        assert (further in told) == (count < PROBES[-1])
        early = HALVING.notes(trials[:count], 40)
        assert "\n".join(early) in told and ("stops nobody" in early[-2]) == (count == PROBES[-1])
    told_of_second = "Kendall's tau 1.00 (p 0.000): one in 3 goes on, up to one in 2 in the end"
    assert f"rung of 3 epochs: {told_of_second}" in told


@pytest.mark.parametrize("levels", [2, 4, 1000])
def test_kendall_is_that_of_scipy_and_of_all_orders(levels: int) -> None:
    """The probability is that of all orders to .01; where values tie, none is called rare that is
    not."""
    rng, rare = np.random.default_rng(levels), 0
    for count in (4, 5, *[6] * 30):
        x, y = np.sort(rng.integers(0, levels, count)), rng.integers(0, levels, count)
        y = np.where(rng.random(count) < 0.8, np.sort(y), y)  # often much alike
        tau, chance = kendall(x, y)
        if tau:
            assert tau == pytest.approx(kendalltau(x, y).statistic)
        agreed = [kendall(x, order)[0] for order in itertools.permutations(y)]
        exact = np.mean(np.array(agreed) >= tau - 1e-9)
        assert exact <= 0.055 or chance > CHANCE
        assert levels < 1000 or chance == pytest.approx(exact, abs=0.015)
        rare += exact < 0.06
    assert rare
    ten = rng.integers(0, 10, (2, 12))
    assert kendall(*ten)[0] == pytest.approx(kendalltau(*ten).statistic)
    assert kendall(ten[0], ten[0])[0] == pytest.approx(1.0)
    assert kendall([0.1] * 5, range(5)) == kendall([0.1], [0.2]) == (0.0, 1.0)


def test_one_training_that_did_not_collapse_ranks_nothing() -> None:
    ends = [0.1] * 7 + [0.6]
    trials = [trial(n, 100, e, e, e) for n, e in enumerate(ends)]
    assert HALVING.tau(0, trials)[0] == pytest.approx(1.0) and not HALVING.trusts(0, trials)
    assert HALVING.tau(0, trials[:1]) == HALVING.tau(0, []) == (0.0, 1.0)


def test_a_rung_that_ranks_by_chance_is_hardly_ever_trusted() -> None:
    """By eight probes as rarely as chance may; an order that is real is trusted all the same."""
    rng = random.Random(0)
    ends = [0.3 + n / 100 for n in range(PROBES[0])]
    found = 0
    for _ in range(1000):
        rung = rng.sample(ends, len(ends))
        found += HALVING.trusts(0, [trial(n, 100, rung[n], e, e) for n, e in enumerate(ends)])
    assert 0.25 * CHANCE < found / 1000 < 1.3 * CHANCE
    assert HALVING.trusts(0, probed())
    swapped = probed()
    swapped[2], swapped[4] = (
        trial(2, 100, 0.14, 0.24, 0.32),
        trial(4, 100, 0.12, 0.22, 0.34),
    )
    assert HALVING.trusts(0, swapped), "tau .79"
    assert HALVING.tau(0, [trial(n, 100, 0.1, 0.2, e) for n, e in enumerate(ends)]) == (0.0, 1.0)


def test_an_order_that_is_real_and_weak_is_not_trusted() -> None:
    """The most probes show what is not chance and yet ranks too little."""
    ends = [0.3 + n / 100 for n in range(PROBES[-1])]
    rng, looked = random.Random(0), 0
    while looked < 20:
        rung = [e + rng.gauss(0, 0.3) for e in ends]
        trials = [trial(n, 100, rung[n], e, e) for n, e in enumerate(ends)]
        tau, chance = HALVING.tau(0, trials)
        if chance <= CHANCE and tau < TRUSTED:
            assert not HALVING.trusts(0, trials)
            looked += 1


def test_a_failed_probe_tells_nothing() -> None:
    trials = probed()
    trials[3] = replace(trials[3], score=None, state="failed", reason="out of memory")
    assert HALVING.probes(trials) == (PROBES[0], [True, True])


def test_what_is_dominated_even_with_the_greatest_gain_is_hopeless() -> None:
    first = probed()  # each gains 0.2 from the first rung on; the best ends at 0.37
    some = [trial(8, 100, 0.16), trial(9, 100, 0.18), trial(10, 99, 0.16)]
    assert HALVING.hopeless(some, 0, first) == {8}, "9 may come to more, 10 is cheaper"
    assert HALVING.hopeless(some, 0, first[1:]) == set(), "too few have ended"
    both = ParetoHalving(RUNGS, 3, ["macs", "params"])
    dearer = Cost(values={"macs": 101, "params": 99})
    some = [trial(8, 101, 0.16), replace(trial(9, 101, 0.16), cost=dearer)]
    assert both.hopeless(some, 0, first) == {8}, "9 is cheaper in one"


def test_the_highest_rung_is_promoted_first_and_of_it_the_best() -> None:
    trials = [*probed(), trial(8, 100, 0.5), trial(9, 100, 0.6), trial(10, 100, 0.4, 0.5)]
    promoted = []
    while found := HALVING.promotable(trials, all_begun=False):
        promoted.append(found.number)
        trials[found.number] = replace(found, state="running")
    assert promoted == [10, 9, 8]


def test_trainings_to_come_are_counted_from_those_that_may_go_on() -> None:
    first = probed()
    trials = first + [trial(8 + i, 100, 0.3 + i / 100) for i in range(16)]
    assert HALVING.to_come(trials, 24) == [0, 12, 6], "24 / 2 of the first rung, half of them"
    assert HALVING.to_come(trials, 34) == [10, 13, 6.5], "of 34, 8 probes and half of the others"
    trials[23] = replace(trials[23], state="running")
    assert HALVING.to_come(trials, 24) == [0, 12, 6]
    assert HALVING.to_come(trials[:6], 24) == [18, 16 - 6, 12 - 6], "8 probes, half of 16, of 8"
    lost = first + [trial(8 + i, 100, 0.01) for i in range(16)]
    assert HALVING.to_come(lost, 34) == [10, 0, 0], "they are hopeless"
    lost += [replace(trial(24 + i, 100), state="running") for i in range(10)]
    assert HALVING.to_come(lost, 34) == [10, 0, 0], "and so are those that have begun"
    probes = [replace(trial(n, 100), state="running") for n in range(4)]
    assert HALVING.to_come([], 4) == HALVING.to_come(probes, 4) == [4, 4, 4]
    last = replace(trial(7, 100, 0.2), state="running")
    assert HALVING.to_come([*first[:7], last], 8) == [0, 1, 1]


def test_ranks_are_those_of_fronts_that_are_peeled_off() -> None:
    rng = random.Random(0)
    for count in (1, 5, 40, 200):
        some = [trial(n, rng.randrange(9), rng.randrange(20) / 20) for n in range(count)]
        left = np.array([[band, -reached(t)[0]] for band, t in HALVING._banded(some)])
        fronts, front = np.full(count, -1), 0
        while (fronts < 0).any():
            inside = np.flatnonzero(fronts < 0)
            fronts[inside[non_dominated(left[inside])]] = front
            front += 1
        before = [(fronts < f).sum() + ((fronts == f).sum() - 1) / 2 for f in fronts]
        assert HALVING._ranks(0, some).tolist() == before


def test_samplers_see_a_stopped_trial_as_it_would_have_ended() -> None:
    trials = [*probed(), trial(8, 100, 0.5), trial(9, 100, 0.4, 0.95), trial(10, 100)]
    trials += [trial(11, 100, 0.6, state="running")]
    trials[10] = replace(trials[10], state="running")
    assert HALVING.believed(trials) == pytest.approx({8: 0.7, 9: 1.0, 11: 0.8})


# --- on the table of experiments/005_halving


def experiment(folder: Path, storage: str = "", **search: Any) -> Experiment:
    path = folder / "experiment.yaml"
    fields = yaml.safe_load((FOLDER / "curves.yaml").read_text())
    fields["space"] = str(ROOT / "search_spaces/cued_digits.yaml")
    fields["search"] |= search
    fields["storage"] = storage or fields["storage"]
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(fields))
    return Experiment.load(path)


def searching(folder: Path, storage: str = "", **search: Any) -> Search:
    found = Search(experiment(folder, storage, **search), Display(Console(quiet=True)))
    found.evaluator = TableEvaluator(TABLE)  # type: ignore[assignment]
    return found


def told(trials: Sequence[Trial]) -> list[tuple[Any, ...]]:
    return [(t.architecture.key, t.state, t.known) for t in trials]


@pytest.fixture(scope="module")
def halved(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return searching(tmp_path_factory.mktemp("halved"), sampler="random").run(TRIALS)


def test_a_search_that_halves_trains_less_and_by_the_rule(halved: Study) -> None:
    trials, halving = halved.trials, ParetoHalving.of(halved.config)
    assert halving is not None
    states = [t.state for t in trials]
    assert len(trials) == TRIALS and set(states) == {"scored", "stopped"}
    assert halved.summary()["epochs"] <= 0.85 * TRIALS * halving.rungs[-1]
    assert halving.promotable(trials, all_begun=True) is None, "nobody is left who should go on"
    assert ended(halved) == len(halved.optuna.get_trials()) > TRIALS, "a promoted one has two rows"
    assert all("stopped at" in t.reason for t in trials if t.state == "stopped")
    table = TableEvaluator(TABLE)
    for t in trials:  # each has the accuracies of its row, as far as it came
        assert t.known is not None
        whole, _ = table(t.architecture, lambda share, accuracy: None, rung=2)
        assert t.known.rungs == whole.rungs[: len(t.known.rungs)]


def test_the_search_decides_as_the_simulation_does(
    halved: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ways to one answer: through the database, and in memory."""
    monkeypatch.syspath_prepend(FOLDER)
    import simulate

    table, halving = simulate.Table(0, []), ParetoHalving.of(halved.config)
    order = [t.architecture for t in halved.trials]
    _, trials = simulate.halved(table, order, halving)
    assert told(trials) == told(halved.trials)


def test_trainings_to_come_are_about_those_that_come(
    halved: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    import simulate

    seen: list[tuple[int, list[int], list[float]]] = []

    class Seen(ParetoHalving):
        def promotable(self, trials: Sequence[Trial], *, all_begun: bool) -> Trial | None:
            here = [sum(len(reached(t)) > k for t in trials) for k in range(3)]
            seen.append((len(trials), here, self.to_come(trials, TRIALS)))
            return super().promotable(trials, all_begun=all_begun)

    config = halved.config
    halving = Seen(config.rungs, config.search.eta, config.costs)
    order = [t.architecture for t in halved.trials]
    simulate.halved(simulate.Table(0, []), order, halving)
    _, ended, left = seen[-1]
    assert left == [0, 0, 0]
    for begun, here, left in seen[:-1]:
        assert left[0] == TRIALS - begun
        for rung in (1, 2):
            come = ended[rung] - here[rung]
            assert abs(left[rung] - come) <= max(3, 0.5 * come), (begun, rung, left, come)
    assert len(seen) > 40


def test_the_end_of_halving_is_announced_when_it_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All trials have finished then, and some of them go on."""
    whole = searching(tmp_path, sampler="random")

    def end(*_: Any, **__: Any) -> None:
        if len(whole.study.trials) == TRIALS and finished(whole.study.trials) == TRIALS:
            raise Stopped("enough")

    monkeypatch.setattr(whole, "_publish", end)
    with pytest.raises(Stopped):
        whole.run(TRIALS)
    assert whole.study.promotable()
    again, said = searching(tmp_path, sampler="random"), list[str]()
    monkeypatch.setattr(again.display, "note", said.append)
    coming = ParetoHalving.of(again.experiment).to_come(again.study.trials, TRIALS)  # type: ignore[union-attr]
    again.run(TRIALS)
    (announced,) = (text for text in said if " to go" in text)
    _, second, third = map(round, coming)
    rungs = again.experiment.rungs
    expected = f"trials to go: about {second} to {rungs[1]} epochs, {third} to {rungs[2]} epochs"
    assert announced.startswith(expected)
    assert again.study.promotable() is None


def test_the_end_of_halving_is_told_once_with_what_is_to_come(halved: Study) -> None:
    """Nobody's training is new in it, so done of total says nothing of how long it takes."""
    trials, rungs = list(halved.trials), halved.config.rungs
    for t in trials[PROBES[-1] :]:
        assert t.known is not None
        early = replace(
            t.known, rungs=t.known.rungs[:1], accuracy=t.known.rungs[0], epochs=rungs[0]
        )
        trials[t.number] = replace(t, state="stopped", score=None, partial=early)
    halving = ParetoHalving.of(halved.config)
    assert halving is not None
    _, second, third = (round(n) for n in halving.to_come(trials, TRIALS))
    assert second and third
    text = io.StringIO()
    display = Display(Console(file=text, width=200))
    display.begin(halved, TRIALS)
    begun = "all trials have begun; stopped ones go on, the best first"
    assert begun not in text.getvalue()
    display.show([Worker(task="trains")], trials, 0)
    for number in (PROBES[-1], PROBES[-1] + 1):
        display.end(trials[number], trials, 0)
    assert text.getvalue().count(begun) == 1
    display.console.print(display.panel())
    assert f"about {second} to {rungs[1]} epochs, {third} to {rungs[2]} epochs" in text.getvalue()
    seconds = sum(t.known.seconds for t in trials if t.known)
    epochs = sum(rungs[len(reached(t)) - 1] for t in trials)
    _, b, c = halving.to_come(trials, TRIALS)
    legs = b * (rungs[1] - rungs[0]) + c * (rungs[2] - rungs[1])
    assert f"about {duration(legs * seconds / epochs)} left" in text.getvalue()


def test_who_looks_on_waits_for_what_goes_on_in_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = searching(tmp_path, sampler="random")
    mine = search.study.folder / "checkpoints" / "3.bak"
    mine.mkdir(parents=True)
    with monkeypatch.context() as patch:
        patch.setattr(ParetoHalving, "promotable", lambda *_, **__: None)
        study = search.run(TRIALS)
    assert finished(study.trials) == TRIALS and study.promotable()
    assert Follower(study, Display(Console(quiet=True))).look(), "stopped ones are to go on"
    study = searching(tmp_path, sampler="random").run(TRIALS)
    assert not Follower(study, Display(Console(quiet=True))).look()
    assert mine.exists(), "what a person put there is not the search's to delete"


def test_who_looks_on_is_told_what_the_rungs_are_worth_once(halved: Study) -> None:
    text = io.StringIO()
    follower = Follower(halved, Display(Console(file=text, width=200)))
    follower.look()
    halving = ParetoHalving.of(halved.config)
    assert halving is not None
    lines = halving.notes(halved.trials, TRIALS)
    assert len(lines) > 3 and text.getvalue().splitlines() == lines
    follower.look()
    assert text.getvalue().splitlines() == lines


def test_kills_at_any_statement_change_nothing(halved: Study, tmp_path: Path) -> None:
    rng, died = random.Random(0), 0
    for _ in range(6):
        statement = rng.randrange(1, 200)

        def work(statement: int = statement) -> None:
            search = searching(tmp_path / "torn", sampler="random")
            kill_at(search.study.engine, statement)
            search.run(TRIALS)

        child = forked(work)
        child.join()
        died += child.exitcode != 0
    assert died >= 4
    study = searching(tmp_path / "torn", sampler="random").run(TRIALS)
    assert told(study.trials) == told(halved.trials)


def test_what_failed_at_a_rung_is_tried_again(tmp_path: Path) -> None:
    search, calls = searching(tmp_path, sampler="random"), itertools.count(1)
    table, rungs = search.evaluator, dict[str, int]()

    class Failing(TableEvaluator):
        def __call__(self, architecture: Architecture, tick: Any, **options: Any) -> Any:
            if next(calls) % 7 == 0:
                rungs[architecture.key] = options["rung"]
                raise TrialFailed("out of memory")
            return table(architecture, tick, **options)

    search.evaluator = Failing(TABLE)
    failed = [t.state for t in search.run(TRIALS).trials].count("failed")
    assert failed == len(rungs) and min(rungs.values()) == 0 < max(rungs.values())
    search, again = searching(tmp_path, sampler="random"), dict[str, int]()
    search.retry()

    class Noting(TableEvaluator):
        def __call__(self, architecture: Architecture, tick: Any, **options: Any) -> Any:
            again.setdefault(architecture.key, options["rung"])
            return table(architecture, tick, **options)

    search.evaluator = Noting(TABLE)
    study = search.run(TRIALS)
    assert rungs.items() <= again.items(), "each goes on from the rung that it had come to"
    assert {t.state for t in study.trials} == {"scored", "stopped"}
    assert study.complete(study.config, TRIALS)


def test_two_workers_halve_one_study(tmp_path: Path, storage: str) -> None:
    def search() -> Search:
        return searching(tmp_path, storage, sampler="random")

    search()  # the study is there before they begin
    crew = [forked(lambda: search().run(TRIALS)) for _ in range(2)]
    for worker in crew:
        worker.join()
    assert [worker.exitcode for worker in crew] == [0, 0]
    study = search().study
    assert len({t.architecture.key for t in study.trials}) == len(study.trials) == TRIALS
    assert {t.state for t in study.trials} == {"scored", "stopped"}
    assert study.complete(study.config, TRIALS), "nobody is left who should go on"


def test_stopped_trials_go_on_in_the_end_of_a_space_that_is_exhausted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = Gate.sample_relative

    def some(gate: Gate, *arguments: Any) -> dict[str, Any]:
        if gate.slot >= 30:
            raise Exhausted
        return sample(gate, *arguments)

    monkeypatch.setattr(Gate, "sample_relative", some)
    study = searching(tmp_path, sampler="random").run(TRIALS)
    assert len(study.trials) == 30 and "stopped" in {t.state for t in study.trials}
    assert study.promotable() is None


def test_who_was_asked_for_fewer_trials_judges_as_who_was_asked_for_more(tmp_path: Path) -> None:
    search = searching(tmp_path, sampler="random")
    search.plan(60)
    arguments: Any = (search.stopping, search.display.note)
    for total, end in ((24, 60), (80, 80)):
        slots = Slots(search.study, total, search._leases(), search.gate, *arguments)
        assert [slots._all_begun([PROBED] * n) for n in (24, end - 1, end)] == [False, False, True]


def test_small_populations_keep_parents_that_were_promoted(tmp_path: Path) -> None:
    search = searching(tmp_path, sampler="nsga2", population=4, seed=4, eta=3)
    study = search.run(TRIALS)
    arguments: Any = (search.stopping, search.display.note)
    slots = Slots(study, TRIALS, search._leases(), search.gate, *arguments)
    shown = {row._trial_id for row in slots._believed(study.rows(), study.trials)}
    attributes = study.optuna._storage.get_study_system_attrs(study.optuna._study_id)
    parents = {i for k, ids in attributes.items() if ":parent:" in k for i in ids}
    assert parents <= shown, "Optuna looks for them by these"
    rows = study.optuna.get_trials()
    times = Counter(row.user_attrs.get(FIRST, row._trial_id) for row in rows)
    assert {1, 2, 3} == {times[i] for i in parents}, "some have gone on, once and twice"


def test_a_trial_goes_on_when_all_slots_are_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real trainings: a process that only promotes needs the plain backbone, too."""
    fields = yaml.safe_load((FOLDER / "curves.yaml").read_text())
    fields["space"] = str(ROOT / "search_spaces/cued_digits.yaml")
    fields["data"] |= {"train": 256, "val": 64, "test": 64}
    fields["training"] |= {"epochs": 2, "epoch_steps": 1}
    fields["pretrain"] |= {"epochs": 1, "epoch_steps": 1}
    fields["search"] = {"stopping": "pareto_halving", "rungs": [1, 2], "eta": 1.1}
    path, count = tmp_path / "experiment.yaml", PROBES[0] + 2
    path.write_text(yaml.safe_dump(fields))

    def run() -> Study:
        return Search(Experiment.load(path), Display(Console(quiet=True))).run(count)

    with monkeypatch.context() as patch:
        patch.setattr(ParetoHalving, "promotable", lambda *_, **__: None)
        patch.setattr(ParetoHalving, "probes", lambda *_: (PROBES[0], [True]))
        few = lambda self, t, ts, **_: t.number < PROBES[0]  # noqa: E731
        patch.setattr(ParetoHalving, "goes_on", few)
        states = [t.state for t in run().trials]
    assert states == ["scored"] * PROBES[0] + ["stopped"] * 2
    monkeypatch.setattr(ParetoHalving, "probes", lambda *_: (PROBES[0], [False]))

    def killed(where: TrainerFile) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(candidate, "load_training", killed)
        run()
    now = load_study(Experiment.load(path).storage, "cued-digits-curves").trials
    assert [t.state for t in now] == states, "nobody is taken before what trains is loaded"
    assert [t.state for t in run().trials] == ["scored"] * count


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_every_sampler_works_beside_stopped_trials(tmp_path: Path, sampler: str) -> None:
    count = 24 if sampler == "gp" else 30
    study = searching(tmp_path, sampler=sampler).run(count)
    keys = [t.architecture.key for t in study.trials]
    assert len(set(keys)) == len(keys) == count
    assert "stopped" in {t.state for t in study.trials}


def test_the_table_says_what_a_training_would(tmp_path: Path) -> None:
    table = TableEvaluator(TABLE)
    tick: Any = lambda share, accuracy: None  # noqa: E731
    parts = [table(PLAIN, tick, rung=rung)[0] for rung in range(len(table.rungs))]
    whole = table(PLAIN, tick)[0]
    assert [p.rungs for p in parts] == [parts[-1].rungs[:n] for n in (1, 2, 3)]
    assert whole.accuracy == parts[-1].accuracy and whole.rungs == ()
    assert whole.epochs == len(whole.curve) == table.rungs[-1] < parts[-1].epochs
    schedule = experiment(tmp_path).training
    for rung, part in zip(table.rungs, parts[:-1], strict=False):
        assert len(part.curve) == rung - schedule.decay_epochs(rung)
    other = replace(PLAIN, placements=(Placement(site="stem", block="se"),))
    with pytest.raises(TrialFailed, match="no training of"):
        table(other, tick)
    (tmp_path / "empty.csv").write_text("key,repeat\n")
    with pytest.raises(UserError, match=r"empty.csv: no table of learning curves"):
        TableEvaluator(tmp_path / "empty.csv")


def test_the_whole_space_is_in_the_table() -> None:
    space = SearchSpace.load(ROOT / "search_spaces/cued_digits.yaml")
    every: Mapping[str, Architecture] = {a.key: a for a in space.enumerate()}
    assert TableEvaluator(TABLE).rows.keys() == every.keys()
