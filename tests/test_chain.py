"""Rows counted, drawn and listed, against a brute force over all products of labels."""

import itertools
import random
from collections import Counter

import pytest

from nasattn import chain as module
from nasattn.chain import Chain, Step


def brute_force(chain: Chain) -> list[tuple[str, ...]]:
    """Every product of labels that keeps the rules, written out from their words."""
    found = []
    for labels in itertools.product(*(step.labels for step in chain.steps)):
        blocks, ended, allowed = 0, False, True
        for i, (label, step) in enumerate(zip(labels, chain.steps, strict=True)):
            if ended and step.stage and chain.steps[i - 1].stage == step.stage:
                allowed &= label == step.rest
                continue
            ended = step.ends is not None and label == step.ends
            blocks += label in step.blocks
        if allowed and blocks <= chain.most:
            found.append(labels)
    return found


def random_chain(rng: random.Random) -> Chain:
    steps = []
    for i in range(rng.randint(1, 5)):
        labels = tuple("abcd"[: rng.randint(2, 4)])
        stage = rng.choice(["", "s", "t"])
        costs = {label: rng.choice([0, 3, 6, rng.randint(-20, 200)]) for label in labels}
        steps.append(
            Step(
                name=f"p{i}",
                labels=labels,
                blocks=frozenset(labels[1:2]),
                stage=stage,
                ends=rng.choice([None, labels[-1]]) if stage else None,
                rest=labels[-1] if stage else "",
                costs={"m": costs},
            )
        )
    return Chain(steps, rng.randint(0, len(steps)))


def cost(chain: Chain, row: tuple[str, ...]) -> float:
    return sum(s.costs["m"][label] for s, label in zip(chain.steps, row, strict=True))


@pytest.mark.parametrize("seed", range(60))
def test_against_brute_force(seed: int) -> None:
    rng = random.Random(seed)
    chain = random_chain(rng)
    every = brute_force(chain)
    assert chain.size() == len(every)
    assert [tuple(row.values()) for row in chain.rows()] == every
    assert chain.dearest("m") == max(cost(chain, row) for row in every)
    slack = rng.randint(-5, 300)
    limit = chain.cheapest("m") + slack
    fitting = [row for row in every if cost(chain, row) <= limit]
    budget = chain.within("m", slack)
    assert budget.exact and budget.refused == 0.0
    assert budget.count == len(fitting)
    assert [tuple(row.values()) for row in chain.rows([budget])] == fitting
    if fitting:
        assert {tuple(budget.sample(rng).values()) for _ in range(40)} <= set(fitting)
    else:
        with pytest.raises(ValueError, match="no row fits"):
            budget.sample(rng)


@pytest.mark.parametrize("seed", range(20))
def test_rounding_only_refuses(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a few coarse units the strict table holds only rows that fit, the lenient one all of
    them, and the share that is refused lies within the stated bound."""
    monkeypatch.setattr(module, "BUCKETS", 7)
    rng = random.Random(seed)
    chain = random_chain(rng)
    slack = rng.randint(20, 300)
    limit = chain.cheapest("m") + slack
    fitting = {row for row in brute_force(chain) if cost(chain, row) <= limit}
    strict = {tuple(r.values()) for r in chain.rows([chain.within("m", slack)])}
    lenient = {tuple(r.values()) for r in chain.rows([chain.within("m", slack, lenient=True)])}
    assert strict <= fitting <= lenient
    budget = chain.within("m", slack)
    assert budget.count == len(strict)
    if fitting:
        assert 1 - len(strict) / len(fitting) <= budget.refused + 1e-12


def test_draws_are_uniform_within_the_budget() -> None:
    rng = random.Random(3)
    chain = random_chain(rng)
    while len(brute_force(chain)) < 40:
        chain = random_chain(rng)
    costs = sorted(cost(chain, row) for row in brute_force(chain))
    slack = costs[25] - chain.cheapest("m")
    budget = chain.within("m", slack)
    draws = 400 * int(budget.count)
    seen = Counter(tuple(budget.sample(rng).values()) for _ in range(draws))
    assert len(seen) == budget.count
    chi2 = sum((n - 400) ** 2 / 400 for n in seen.values())
    degrees = len(seen) - 1
    assert chi2 < degrees + 4 * (2 * degrees) ** 0.5


def test_a_chain_of_thousands_of_steps_is_drawn_from() -> None:
    """Longer than Python's own stack is deep."""
    costs = {"m": {"none": 0, "one": 1}}
    one = frozenset({"one"})
    steps = [
        Step(name=f"s{i}", labels=("none", "one"), blocks=one, costs=costs) for i in range(3000)
    ]
    chain = Chain(steps, 2)
    assert chain.size() == 1 + 3000 + 3000 * 2999 // 2
    budget = chain.within("m", 1)
    for most, drawn in (1, budget), (2, chain):
        row = drawn.sample(random.Random(0))
        assert len(row) == 3000 and sum(label == "one" for label in row.values()) <= most
    assert budget.count == 3001


def test_a_tight_budget_of_a_huge_space_is_drawn_without_rejection() -> None:
    """17 steps of 11 labels, a budget that less than one row in a million fits."""
    rng = random.Random(0)
    labels = tuple("abcdefghijk")
    steps = [
        Step(
            name=f"p{i}",
            labels=labels,
            blocks=frozenset(labels[1:]),
            costs={"m": {label: rng.randint(0, 10**7) for label in labels}},
        )
        for i in range(17)
    ]
    chain = Chain(steps, 17)
    assert chain.size() == 11**17
    budget = chain.within("m", 2 * 10**7)
    assert budget.count / chain.size() < 1e-6
    assert 0 < budget.refused < 0.02
    for _ in range(50):
        row = tuple(budget.sample(rng).values())
        assert cost(chain, row) - chain.cheapest("m") <= 2 * 10**7
