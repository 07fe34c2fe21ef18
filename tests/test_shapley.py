"""True Shapley values: against enumeration, with standard errors that cover, efficiency, and every option apart."""

import itertools
import math
import random
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import Toy, additive, tangled, toy_outline

from blockpruner.artifacts import Work
from blockpruner.blocks import Block, Move
from blockpruner.criteria import shapley as module
from blockpruner.errors import InputError
from blockpruner.importance.criterion import Lab
from blockpruner.importance.game import MASKS
from blockpruner.journal import Journal
from blockpruner.searching.contract import BatchByBatch
from blockpruner.searching.evaluations import Evaluations

Shapley: Any = module.Shapley  # so that a score may be read without saying each time that it is not None
BLOCKS = toy_outline(4).blocks
MOVES = tuple(Move.of(block) for block in BLOCKS)
SIZES = (3, 2, 3)  # units per micro-batch of `Game`


@dataclass
class Game(BatchByBatch):
    """A loss for each set of blocks that are gone and each unit: random, rising on average, in no way additive."""

    seed: int
    players: tuple = BLOCKS
    shape: str = "random"
    asked: list = field(default_factory=list)

    batches = len(SIZES)
    unit = "nats per token"

    def __post_init__(self):
        self.table = {}

    def batch_losses(self, masks, batch):
        self.asked += [(mask, batch) for mask in masks]
        for mask in masks:
            yield tuple(self.loss(mask, unit) for unit in range(sum(SIZES[:batch]), sum(SIZES[: batch + 1])))

    def loss(self, mask, unit):
        if (mask, unit) not in self.table:
            self.table[mask, unit] = getattr(self, self.shape)(mask, unit)
        return self.table[mask, unit]

    def random(self, mask, unit):
        return 2 * len(mask) / len(self.players) + unit / 3 + self.number(unit, *mask)

    def quadratic(self, mask, unit=None):
        return sum(map(self.number, mask)) + sum(self.number(*pair) for pair in itertools.combinations(mask, 2))

    def saturating(self, mask, unit):
        return 10 * (1 - 0.01 ** (sum(1 + block.layer for block in mask) / 20))

    def number(self, *names):
        return random.Random(f"{self.seed} {sorted(map(str, names))}").gauss(0, 1)

    def mean(self, mask):
        return math.fsum(self.loss(mask, unit) for unit in range(sum(SIZES))) / sum(SIZES)

    def work(self, masks, batch):
        return Work(attention_tokens=len(masks))


def lab_of(objective, **options):
    evaluations = objective if isinstance(objective, Evaluations) else Evaluations(objective)
    nothing: Any = None  # neither a model nor its anatomy nor data are looked at
    return Lab(nothing, nothing, nothing, evaluations, **options)


def enumerated(value, players=BLOCKS):
    """The Shapley value of each player from all 2^n coalitions, by its definition."""
    n, exact = len(players), {}
    losses = {
        frozenset(gone): value(frozenset(gone)) for k in range(n + 1) for gone in itertools.combinations(players, k)
    }
    for player in players:
        exact[Move.of(player)] = math.fsum(
            math.factorial(len(gone)) * math.factorial(n - len(gone) - 1) / math.factorial(n) * (losses[more] - loss)
            for gone, loss in losses.items()
            if player not in gone and (more := gone | {player})
        )
    return exact


def values(scores):
    return {move: score.value for move, score in scores.items()}


# Against enumeration


@pytest.mark.parametrize("antithetic", [False, True])
def test_enough_orders_come_as_near_as_the_standard_error_says(antithetic):
    game = Game(1)
    exact = enumerated(game.mean)
    scores = Shapley(2000, antithetic=antithetic, data="all").scores(lab_of(game), MOVES)
    for move, score in scores.items():
        assert abs(score.value - exact[move]) < 4 * score.stderr
        assert score.stderr < 0.03
        assert score.unit == game.unit
        assert score.n == (1000 if antithetic else 2000)


@pytest.mark.parametrize("antithetic", [False, True])
def test_the_standard_error_covers_the_exact_value_in_about_95_of_100_runs(antithetic):
    inside = []
    for seed in range(3):
        game = Game(seed)
        exact, lab = enumerated(game.mean), lab_of(game)
        for run in range(60):
            scores = Shapley(80 if antithetic else 40, antithetic=antithetic, data="all", seed=run).scores(lab, MOVES)
            inside += [abs(score.value - exact[move]) < 1.96 * score.stderr for move, score in scores.items()]
    # 1440 intervals, those of one run not independent; with 40 draws the t distribution takes 0.7 points off.
    assert 0.925 < sum(inside) / len(inside) < 0.965


@pytest.mark.parametrize("permutations", [48, 52])  # 24 draws fill 8 cycles of micro-batches, 26 do not
def test_cycling_through_micro_batches_of_unequal_size_is_unbiased_for_the_mean_over_all_units(permutations):
    game = Game(5)
    exact, lab = enumerated(game.mean), lab_of(game)
    runs = [Shapley(permutations, seed=seed).scores(lab, MOVES) for seed in range(100)]
    inside = [abs(run[move].value - exact[move]) < 1.96 * run[move].stderr for run in runs for move in MOVES]
    assert 0.93 < sum(inside) / len(inside) <= 1  # the cycle is balanced, so the standard error is rather too large
    for move in MOVES:
        mean = math.fsum(run[move].value for run in runs) / len(runs)
        spread = math.sqrt(math.fsum((run[move].value - mean) ** 2 for run in runs) / len(runs) / (len(runs) - 1))
        assert abs(mean - exact[move]) < 4 * spread


def test_a_cycle_takes_each_micro_batch_in_turn():
    blocks = toy_outline(10).blocks
    game = Game(2, blocks)
    Shapley(6, antithetic=False).scores(lab_of(game), [Move.of(block) for block in blocks])
    batches = [batch for mask, batch in game.asked if len(mask) == 10]
    assert sorted(batches) == [0, 0, 1, 1, 2, 2]


# Efficiency


@given(seed=st.integers(0, 10**6), permutations=st.integers(1, 9), antithetic=st.booleans(), share=st.floats(0, 0.9))
@settings(max_examples=30)
def test_scores_add_up_to_the_loss_of_all_gone_minus_that_of_none(seed, permutations, antithetic, share):
    game = Game(seed)
    criterion = Shapley(permutations, antithetic, truncation=share, data="all", seed=seed)
    total = math.fsum(values(criterion.scores(lab_of(game), MOVES)).values())
    assert total == pytest.approx(game.mean(frozenset(BLOCKS)) - game.mean(frozenset()), abs=1e-12)


def test_whole_cycles_add_up_as_well():
    game = Game(3)
    total = math.fsum(values(Shapley(2 * 3 * 2).scores(lab_of(game), MOVES)).values())
    assert total == pytest.approx(game.mean(frozenset(BLOCKS)) - game.mean(frozenset()), abs=1e-12)


def test_scores_are_those_on_top_of_what_is_gone():
    game, gone = Game(4), frozenset(BLOCKS[:3])
    exact = enumerated(lambda mask: game.mean(mask | gone), BLOCKS[3:])
    scores = Shapley(2000, data="all").scores(lab_of(game, mask=gone), MOVES[3:])
    assert list(scores) == list(MOVES[3:])
    for move, score in scores.items():
        assert abs(score.value - exact[move]) < 4 * score.stderr
    total = math.fsum(values(scores).values())
    assert total == pytest.approx(game.mean(frozenset(BLOCKS)) - game.mean(gone), abs=1e-12)


# What makes a Shapley value one, with all orders in the place of random ones

THREE = BLOCKS[:3]
TABLES = st.lists(st.floats(-100, 100), min_size=8, max_size=8)
SUBSETS = [frozenset(gone) for k in range(4) for gone in itertools.combinations(THREE, k)]


def with_all_orders(rule):
    """The scores of three players when the draws are the six orders."""
    orders = list(itertools.permutations(range(3)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "shuffled", lambda count, _, *key: orders[key[0]] if count == 3 else range(count))
        criterion = Shapley(6, antithetic=False, data="all")
        return values(criterion.scores(lab_of(Toy(rule)), [Move.of(block) for block in THREE]))


@given(table=TABLES)
def test_with_all_orders_it_is_the_exact_value(table):
    rule = dict(zip(SUBSETS, table, strict=True)).__getitem__
    assert with_all_orders(rule) == pytest.approx(enumerated(rule, THREE), abs=1e-9)


@given(table=TABLES)
def test_players_that_can_be_exchanged_score_the_same(table):
    def rule(mask):
        of_the_pair = len({THREE[0], THREE[1]} & mask)  # which of the two is gone makes no difference
        return table[of_the_pair + 3 * (THREE[2] in mask)]

    scores = list(with_all_orders(rule).values())
    assert scores[0] == pytest.approx(scores[1], abs=1e-9)


@given(table=TABLES, seed=st.integers(0, 99))
def test_a_player_that_changes_nothing_scores_nothing_in_any_sample(table, seed):
    losses = dict(zip(SUBSETS, table, strict=True))
    objective = Toy(lambda mask: losses[mask - {THREE[1]}])
    score = Shapley(4, seed=seed).scores(lab_of(objective), [Move.of(b) for b in THREE])[Move.of(THREE[1])]
    assert (score.value, score.stderr) == (0.0, 0.0)


@given(first=TABLES, second=TABLES, seed=st.integers(0, 99))
def test_the_scores_of_two_games_add_up_to_those_of_their_sum_in_any_sample(first, second, seed):
    tables = [dict(zip(SUBSETS, table, strict=True)) for table in (first, second)]
    rules = [tables[0].__getitem__, tables[1].__getitem__, lambda mask: tables[0][mask] + tables[1][mask]]
    moves = [Move.of(block) for block in THREE]
    one, other, both = [values(Shapley(6, seed=seed).scores(lab_of(Toy(rule)), moves)) for rule in rules]
    assert both == pytest.approx({move: one[move] + other[move] for move in moves}, abs=1e-9)


# Antithetic orders


def test_where_players_interact_in_pairs_one_antithetic_pair_is_exact():
    game = Game(6, shape="quadratic")
    scores = Shapley(4, data="all").scores(lab_of(game), MOVES)
    assert values(scores) == pytest.approx(enumerated(game.quadratic), abs=1e-9)
    assert all(score.stderr < 1e-9 for score in scores.values())
    alone = Shapley(4, antithetic=False, data="all").scores(lab_of(game), MOVES)
    assert all(score.stderr > 0.05 for score in alone.values())


def test_antithetic_orders_are_nearer_for_the_same_number_of_evaluations():
    exact = enumerated(tangled)

    def error(antithetic):
        runs = [Shapley(16, antithetic, data="all", seed=seed).scores(lab_of(Toy(tangled)), MOVES) for seed in range(8)]
        return math.fsum((run[move].value - exact[move]) ** 2 for run in runs for move in MOVES)

    assert error(True) < error(False) / 2
    assert Shapley(16, True).cost(lab_of(Toy(tangled)), MOVES) == Shapley(16, False).cost(lab_of(Toy(tangled)), MOVES)


def test_an_odd_number_of_antithetic_orders_is_rounded_up_to_pairs():
    assert next(iter(Shapley(7).scores(lab_of(Toy(tangled)), MOVES).values())).n == 4


# Truncation


@given(share=st.sampled_from([0.01, 0.05, 0.2, 0.5]), antithetic=st.booleans(), seed=st.integers(0, 50))
@settings(max_examples=10)
def test_early_ends_save_evaluations_and_move_a_score_by_less_than_their_share_of_the_rise(share, antithetic, seed):
    found, asked = [], []
    for truncation in (0.0, share):
        game = Game(7, shape="saturating")
        criterion = Shapley(16, antithetic, truncation=truncation, data="all", seed=seed)
        found.append(values(criterion.scores(lab_of(game), MOVES)))
        asked.append(len(game.asked))
    rise = game.mean(frozenset(BLOCKS)) - game.mean(frozenset())
    assert asked[1] <= asked[0]
    assert all(abs(found[1][move] - found[0][move]) < share * rise for move in MOVES)
    assert math.fsum(found[1].values()) == pytest.approx(rise, abs=1e-12)


def test_early_ends_save_most_evaluations_where_the_loss_is_soon_as_bad_as_it_gets():
    blocks = toy_outline(20).blocks
    moves = [Move.of(block) for block in blocks]
    asked = {}
    for truncation in (0.0, 0.05):
        toy = Toy(lambda mask: float(min(len(mask), 6)))
        scores = Shapley(16, truncation=truncation).scores(lab_of(toy), moves)
        asked[truncation] = len(toy.asked)
        assert math.fsum(values(scores).values()) == pytest.approx(6.0)
    assert asked[0.05] < asked[0.0] / 3


def test_without_truncation_a_walk_goes_on_past_the_loss_of_all_gone():
    over = {0: 0.0, 1: 8.0, 2: 3.0, 3: 9.0, 4: 7.0, 5: 6.0, 6: 5.0, 7: 8.0, 8: 8.0}
    toy = Toy(lambda mask: over[len(mask)])
    Shapley(2, data="all").scores(lab_of(toy), MOVES)
    assert len({mask for mask, _ in toy.asked}) == 2 + 2 * 7


# The stop rule


def test_it_stops_when_the_ranking_has_been_the_same_three_times():
    toy = Toy(additive({str(block): 1.0 + place for place, block in enumerate(BLOCKS)}))
    scores = Shapley(1000, stable=1.0, check=4).scores(lab_of(toy), MOVES)
    assert {score.n for score in scores.values()} == {12}


def test_it_goes_on_while_the_ranking_changes():
    scores = Shapley(256, stable=1.0, check=1, data="all").scores(lab_of(Game(8)), MOVES)
    draws = {score.n for score in scores.values()}
    assert draws < set(range(4, 129))
    early = Shapley(256, stable=0.5, check=1, data="all").scores(lab_of(Game(8)), MOVES)
    assert {score.n for score in early.values()} <= set(range(3, min(draws)))


def test_it_never_stops_early_unless_it_is_asked_to():
    toy = Toy(additive({}))
    assert {score.n for score in Shapley(100).scores(lab_of(toy), MOVES).values()} == {50}


@pytest.mark.parametrize("check", [1, 3, 8, 100])
def test_how_often_it_checks_changes_no_score(check):
    assert Shapley(20, check=check).scores(lab_of(Game(9)), MOVES) == Shapley(20).scores(lab_of(Game(9)), MOVES)


# Losses that are not finite


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_the_move_without_which_the_loss_is_not_finite_has_no_score_and_the_others_keep_theirs(bad):
    culprit, weights = MOVES[3], {str(block): 1.0 + place for place, block in enumerate(BLOCKS)}
    plain = additive(weights)
    toy = Toy(lambda mask: bad if culprit.blocks <= mask else plain(mask))
    scores = Shapley(16).scores(lab_of(toy), MOVES)
    assert scores[culprit] is None
    for move in MOVES:
        if move != culprit:
            assert scores[move].value == pytest.approx(weights[str(move)])
            assert scores[move].n <= 8


def test_nothing_finite_is_no_score_at_all():
    toy = Toy(lambda mask: math.nan)
    assert Shapley(4, stable=0.5, truncation=0.1).scores(lab_of(toy), MOVES) == dict.fromkeys(MOVES)


def test_losses_near_the_end_of_floats_are_no_scores_and_no_error():
    toy = Toy(lambda mask: 1.7e308 if len(mask) % 2 else -1.7e308)
    assert set(Shapley(4).scores(lab_of(toy), MOVES).values()) == {None}


# Moves, options, cost


@pytest.mark.parametrize("data", ["all", "cycle"])
def test_moves_of_several_blocks_are_one_player(data):
    layers = [Move(frozenset(b for b in BLOCKS if b.layer == layer)) for layer in range(4)]
    scores = Shapley(2000, data=data).scores(lab_of(Toy(tangled)), layers)

    def rule(gone):
        return tangled(frozenset().union(*(layers[block.layer].blocks for block in gone)))

    exact = enumerated(rule, [Block("mlp", layer) for layer in range(4)])
    for layer, move in enumerate(layers):
        assert abs(scores[move].value - exact[Move.of(Block("mlp", layer))]) <= 4 * scores[move].stderr + 1e-9


def test_moves_that_share_a_block_are_refused_by_name():
    pair = [Move.parse("attention.1+mlp.0"), Move.parse("attention.0"), Move.parse("attention.1+mlp.1")]
    with pytest.raises(InputError) as error:
        Shapley().scores(lab_of(Toy(tangled)), pair)
    assert "attention.1+mlp.0 and attention.1+mlp.1 share attention.1" in error.value.what


def test_one_move_costs_two_evaluations_and_no_move_none():
    toy = Toy(tangled)
    assert Shapley().scores(lab_of(toy), []) == {}
    assert toy.asked == []
    score = Shapley().scores(lab_of(toy), MOVES[:1])[MOVES[0]]
    assert score.value == pytest.approx(tangled(MOVES[0].blocks) - tangled(frozenset()))
    assert len(toy.asked) == 2 * toy.batches


@pytest.mark.parametrize(
    "options",
    [{"permutations": 0}, {"truncation": 1.0}, {"truncation": -0.1}, {"stable": 1.5}, {"stable": -1}, {"check": 0}],
)
def test_options_out_of_range_are_refused_by_name(options):
    with pytest.raises(InputError, match=f"{next(iter(options))}="):
        Shapley(**options)


@pytest.mark.parametrize("data", ["all", "cycle"])
def test_the_cost_bounds_what_is_evaluated_and_is_near_it(data):
    blocks = toy_outline(10).blocks  # so many that hardly any coalition is met twice
    game, moves = Game(10, blocks), [Move.of(block) for block in blocks]
    criterion, lab = Shapley(12, data=data), lab_of(game)
    criterion.scores(lab, moves)
    assert len(game.asked) <= criterion.cost(lab, moves) * game.batches <= 1.1 * len(game.asked)


def test_no_call_has_more_masks_than_the_mask_tree_has_room_for():
    calls = []

    class Counted(Game):
        def batch_losses(self, masks, batch):
            calls.append(len(masks))
            return super().batch_losses(masks, batch)

    blocks = toy_outline(20).blocks
    Shapley(4, data="all").scores(lab_of(Counted(11, blocks)), [Move.of(block) for block in blocks])
    assert max(calls) == MASKS


# Determinism and resume


def test_the_same_seed_gives_the_same_scores_and_another_seed_others():
    first, again, other = [Shapley(8, seed=seed).scores(lab_of(Game(12)), MOVES) for seed in (1, 1, 2)]
    assert first == again
    assert first != other


def test_more_orders_begin_with_the_same_ones():
    asked = []
    for permutations in (4, 16):
        game = Game(13)
        Shapley(permutations, antithetic=False, check=4).scores(lab_of(game), MOVES)
        asked.append(game.asked)
    assert asked[1][: len(asked[0])] == asked[0]


@pytest.mark.parametrize("options", [{}, {"truncation": 0.2}, {"stable": 0.9, "check": 2}])
def test_a_killed_run_goes_on_to_the_same_scores_and_pays_for_nothing_twice(options, tmp_path):
    class Killed(Game):
        def batch_losses(self, masks, batch):
            for losses in super().batch_losses(masks, batch):
                if len(self.table) > 200:
                    raise KeyboardInterrupt
                yield losses

    class Silent(Game):
        def batch_losses(self, masks, batch):
            raise AssertionError(f"asked for {masks} again")

    criterion, path = Shapley(12, **options), tmp_path / "journal.jsonl"
    undisturbed = criterion.scores(lab_of(Game(14)), MOVES)

    def resumed(game):
        with Journal.open(path, {"model": "toy"}) as journal:
            return criterion.scores(lab_of(Evaluations(game, journal)), MOVES)

    with pytest.raises(KeyboardInterrupt):
        resumed(Killed(14))
    assert resumed(Game(14)) == undisturbed
    assert resumed(Silent(14)) == undisturbed
