"""Cost, Score and Trial: what they say of several repeats, and their JSON."""

import json
from dataclasses import FrozenInstanceError, replace
from statistics import pstdev

import pytest

from nasattn.architecture import Architecture, Backbone, Placement
from nasattn.record import FINISHED, Cost, Score, Trial, amount

ONE = Score(
    accuracy=0.5, curve=(0.25, 0.5), epochs=2, seconds=3.5, seed=7, evaluator="train", top5=0.75
)
TWO = replace(ONE, accuracy=0.75, curve=(0.5, 0.75), epochs=3, seconds=1.5, seed=8, top5=1.0)
PLAIN = Architecture(backbone=Backbone(name="mobilenet_v2"), classes=10, input=(1, 8, 8))


def test_one_score_is_its_own_mean_and_has_no_spread() -> None:
    assert Score.mean([ONE]) is ONE
    assert ONE.accuracies == (0.5,)
    assert ONE.spread is None


def test_the_mean_of_several() -> None:
    mean = Score.mean([ONE, TWO])
    assert mean == Score(
        accuracy=0.625,
        curve=(0.375, 0.625),
        epochs=5,
        seconds=5.0,
        seed=7,
        evaluator="train",
        top5=0.875,
        repeats=(ONE, TWO),
    )
    assert mean.accuracies == (0.5, 0.75)
    # The sample's deviation, n - 1: sqrt(2) times the population's for n = 2.
    assert mean.spread == pytest.approx(2**0.5 * pstdev([0.5, 0.75]))
    assert Score.mean([ONE, ONE, ONE]).spread == 0.0


def test_in_words() -> None:
    assert ONE.text == "0.5000 (one seed)"
    assert Score.mean([ONE, TWO]).text == "0.6250 ± 0.1768 (n=2)"


def test_top5_only_where_it_is_known() -> None:
    unknown = [replace(s, top5=None) for s in (ONE, TWO)]
    assert Score.mean(unknown).top5 is None
    assert Score.mean([unknown[0], TWO]).top5 == 1.0


def test_rungs() -> None:
    first, second = (replace(s, rungs=(s.accuracy, 1.0)) for s in (ONE, TWO))
    assert Score.mean([first, second]).rungs == (0.625, 1.0)
    fields = json.loads(json.dumps(first.as_dict()))
    assert Score.from_dict(fields) == first
    del fields["rungs"]  # as an earlier version wrote it
    assert Score.from_dict(fields) == ONE


def test_repeats_of_unequal_length_have_no_mean_curve() -> None:
    with pytest.raises(ValueError, match="shorter"):
        Score.mean([ONE, replace(TWO, curve=(0.5,))])


@pytest.mark.parametrize("score", [ONE, replace(ONE, top5=None), Score.mean([ONE, TWO, ONE])])
def test_json_round_trip(score: Score) -> None:
    stored = json.loads(json.dumps(score.as_dict()))
    assert Score.from_dict(stored) == score
    assert Score.from_dict(stored).spread == score.spread


def test_a_record_stays_as_it_is() -> None:
    for record, name in ((ONE, "accuracy"), (Cost(values={}), "values")):
        with pytest.raises(FrozenInstanceError):
            setattr(record, name, 1)


def test_a_row_of_the_frontier() -> None:
    placed = replace(PLAIN, placements=(Placement.parse("stage1.0", "se(ratio=.5)"),))
    cost = Cost(values={"macs": 12, "params": 3})
    trial = Trial(
        number=4, architecture=placed, cost=cost, score=Score.mean([ONE, TWO]), state="scored"
    )
    row = json.loads(json.dumps(trial.as_dict()))
    assert row == {
        "number": 4,
        "key": placed.key,
        "accuracy": 0.625,
        "spread": pytest.approx(0.1767766952966369),
        "seeds": 2,
        "cost": {"macs": 12, "params": 3},
        "placements": {"stage1.0": "se(ratio=0.5)"},
        "baseline": False,
        "state": "scored",
    }
    first = Trial(number=0, architecture=PLAIN, cost=cost, score=ONE, state="scored").as_dict()
    assert (first["baseline"], first["spread"], first["seeds"]) == (True, None, 1)


def test_a_failed_trial_has_no_accuracy() -> None:
    trial = Trial(
        number=1, architecture=PLAIN, cost=Cost(values={}), score=None, state="failed", reason="NaN"
    )
    row = trial.as_dict()
    assert (row["accuracy"], row["spread"], row["seeds"], row["state"]) == (None, None, 0, "failed")
    assert set(FINISHED) == {"scored", "stopped", "failed"}


@pytest.mark.parametrize(
    ("cost", "text"),
    [(89_760, "89,760"), (13_734_956_800, "13,734,956,800"), (0.002345678, "0.002346"), (0, "0")],
)
def test_a_cost_as_people_read_it(cost: int | float, text: str) -> None:
    assert amount(cost) == text
