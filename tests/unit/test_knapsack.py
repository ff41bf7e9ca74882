import random
from itertools import product

import numpy as np
import pytest
from search_fakes import forecast, space

from jobs.search.knapsack import neighbours, priced
from jobs.search.predictor import Predictor
from jobs.search.proposals import knapsack_front, propose, uniform_assignments
from jobs.search.space import UNCHANGED


def test_priced_when_compared_with_all_assignments_is_not_dominated() -> None:
    generator = np.random.default_rng(0)
    rises, sizes = generator.random((5, 3)), generator.random((5, 3))
    every = [
        (sum(rises[g, c] for g, c in enumerate(each)), sum(sizes[g, c] for g, c in enumerate(each)))
        for each in product(range(3), repeat=5)
    ]
    found = priced(rises, sizes)
    assert len(found) >= 5
    for each in found:
        loss = sum(rises[g, c] for g, c in enumerate(each))
        size = sum(sizes[g, c] for g, c in enumerate(each))
        assert not any(o[0] < loss - 1e-12 and o[1] < size - 1e-12 for o in every)


def test_priced_when_latency_counts_finds_what_is_fastest() -> None:
    rises = np.array([[0.0, 0.1, 0.2]])
    sizes = np.array([[3.0, 1.0, 2.0]])
    latency = np.array([[3.0, 2.0, 0.0]])
    assert (2,) not in priced(rises, sizes)
    assert (2,) in priced(rises, sizes, latency)


def test_neighbours_when_made_differ_in_at_most_three_groups() -> None:
    given = [(0,) * 10]
    found = list(neighbours(given, 4, 50, random.Random(0)))
    assert len(found) == 50
    assert all(sum(c != 0 for c in each) <= 3 for each in found)


def test_propose_when_first_begins_with_the_uniform_and_adds_mixtures() -> None:
    known = forecast(space())
    found = propose(known, 6, {UNCHANGED: 0.0}, 0)
    assert found[:2] == uniform_assignments(known.space)
    assert len(set(found)) == 6
    assert any(each in knapsack_front(known) for each in found[2:])


def test_propose_when_asked_again_repeats_nothing_that_was_scored() -> None:
    known = forecast(space())
    scored = {each: known.predictor.rise(each) for each in propose(known, 6, {UNCHANGED: 0.0}, 0)}
    later = propose(known, 6, {UNCHANGED: 0.0, **scored}, 1)
    assert later
    assert not set(later) & set(scored)


def test_refitted_when_joint_results_are_larger_moves_towards_them() -> None:
    of = space(schemes=("bf16", "w8a8", "w4a16"))
    plain = forecast(of).predictor
    seen = [of.uniform(c) for c in range(3)] + knapsack_front(forecast(of))[:10]
    wanted = [1.8 * plain.rise(each) for each in seen]
    refitted = plain.refitted(of, seen, wanted)
    unseen = tuple(1 + g % 2 for g in range(len(of.groups)))
    assert refitted.rise(unseen) == pytest.approx(1.8 * plain.rise(unseen), rel=0.1)


def test_refitted_when_nothing_finite_was_seen_stays() -> None:
    of = space()
    plain = forecast(of).predictor
    assert plain.refitted(of, [UNCHANGED, of.uniform(1)], [0.0, float("inf")]) == plain


def test_rise_when_nothing_is_changed_is_zero() -> None:
    assert Predictor(np.ones((2, 2))).rise(UNCHANGED) == 0.0
