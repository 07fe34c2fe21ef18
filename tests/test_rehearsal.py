"""The objective that costs nothing: it counts as the real one does, and is as cheap as it says."""

import dataclasses

from toys import NOISE, Toy, tangled, toy_problem

from blockpruner.artifacts import Work
from blockpruner.searches.exhaustive import Exhaustive
from blockpruner.searches.greedy import Greedy
from blockpruner.searching.contract import DENSE
from blockpruner.searching.driver import run
from blockpruner.searching.rehearsal import Rehearsal


class Sized(Toy):
    """A toy that says how many values it gives."""

    sizes = tuple(map(len, NOISE))


def test_what_evaluates_everything_is_counted_exactly_and_nothing_is_evaluated():
    real, counted = Sized(tangled), Sized(tangled)
    problem = toy_problem(4, "block", "blocks=3")
    truth, rehearsed = run(Exhaustive(), problem, real), run(Exhaustive(), problem, Rehearsal(counted))
    assert (rehearsed.evaluations, rehearsed.looks, rehearsed.work) == (truth.evaluations, truth.looks, truth.work)
    assert counted.asked == []


def test_it_gives_as_many_values_as_the_real_one():
    rehearsal, real = Rehearsal(Sized(tangled)), Sized(tangled)
    for asked in ({0: [DENSE]}, {1: [DENSE]}, {0: [DENSE], 1: [DENSE]}):
        ours, theirs = list(rehearsal.losses(asked)), list(real.losses(asked))
        assert [(batch, mask, len(values)) for batch, mask, values in ours] == [
            (batch, mask, len(values)) for batch, mask, values in theirs
        ]


def test_its_losses_are_the_same_each_time_and_differ_between_masks():
    rehearsal = Rehearsal(Sized(tangled))
    masks = [move.blocks for move in toy_problem(3, "block", "blocks=1").moves(DENSE)]
    found = list(rehearsal.losses({0: masks}))
    assert found == list(rehearsal.losses({0: masks}))
    assert len({values for _, _, values in found}) == len(masks)


def test_a_race_is_rehearsed_for_less_than_everything():
    class Long(Sized):
        batches = 32
        sizes = (4,) * 32

        def work(self, masks, batch):
            return Work(head_tokens=len(masks))

    problem = toy_problem(6, "block", "blocks=3")
    problem = dataclasses.replace(problem, sizes=Long.sizes)
    result = run(Greedy(), problem, Rehearsal(Long(tangled)))
    assert result.looks < 0.5 * result.evaluations * 32
