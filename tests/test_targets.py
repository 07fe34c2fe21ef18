"""Targets of memory, speed and loss: their text, when they are reached, and how searches meet them."""

import itertools
import json
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import Toy, additive, plan_of, tangled, toy_outline, toy_problem

from blockpruner.artifacts import Estimate
from blockpruner.blocks import Block, Move, Outline
from blockpruner.errors import InputError
from blockpruner.searches import SEARCHES
from blockpruner.searches.enumeration import Enumeration
from blockpruner.searches.exhaustive import Exhaustive
from blockpruner.searches.greedy import Greedy
from blockpruner.searches.knapsack import Knapsack, cheapest
from blockpruner.searches.one_shot import begun, gone
from blockpruner.searching import driver
from blockpruner.searching.contract import DENSE, Problem, Stop
from blockpruner.searching.costs import Costs, CostTable, format_bytes, parse_bytes, parse_card
from blockpruner.searching.evaluations import Evaluations
from blockpruner.searching.moves import Target
from blockpruner.searching.targets import Goals, Memory, Speed, parse_target

TEXTS = [
    "memory=16GiB,context=32768,batch=8",
    "memory=500MB,context=2048,batch=1,reserve=1MiB",
    "speed=1.3x:decode,batch=1,context=512",
    "speed=2x:prefill,batch=8,context=64",
    "loss=+0.1",
    "blocks=6,loss=+0.25",
    "params=-25%,memory=16GiB,context=32768,batch=8,speed=1.3x:decode,batch=1,context=512,loss=+0.1",
]


@pytest.mark.parametrize("text", TEXTS)
def test_targets_are_written_as_they_are_read(text):
    assert str(parse_target(text)) == text


def test_one_count_is_the_target_it_always_was():
    assert parse_target("blocks=6") == Target("blocks", 6)


def test_options_belong_to_the_target_before_them():
    found = parse_target("memory=1GiB,batch=8,speed=1.5x,batch=2,context=9")
    assert isinstance(found, Goals)
    assert found.limits == (Memory(2**30, 2048, 8), Speed(Fraction(3, 2), "decode", 2, 9))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("speed=0.9x", "no speed-up"),
        ("speed=1.3", "no speed-up"),
        ("speed=1.3x:write", "no speed-up"),
        ("memory=16", "no size"),
        ("memory=16GiB,batch=0", "no number of batch"),
        ("memory=16GiB,batch=1,batch=2", "twice"),
        ("loss=0.1", "no rise"),
        ("loss=+0", "no rise"),
        ("loss=+0.1,batch=3", "option of loss"),
        ("batch=3", "not a target"),
        ("blocks=6,", "not a target"),
        ("blocks=6,blocks=7", "given twice"),
        ("fast", "not a target"),
        ("blocks=0", "not a target"),
    ],
)
def test_what_is_no_target_is_refused_with_the_reason(text, said):
    with pytest.raises(InputError) as error:
        parse_target(text)
    assert said in str(error.value)


@settings(deadline=None)
@given(st.integers(1, 2**45))
def test_sizes_are_written_as_they_are_read(size):
    assert parse_bytes(format_bytes(size)) == size


def test_cards_go_by_name_or_by_their_peaks():
    assert parse_card("h100").bandwidth == 3350e9
    assert (parse_card("bandwidth=900GB/s,flops=120TFLOPS").flops, parse_card("L4").flops) == (120e12, 121e12)
    with pytest.raises(InputError, match="not a device"):
        parse_card("abacus")


def priced(outline, shared=0.0):
    """10 for an attention, 30 for an mlp, 40 for what is not removed, and what layers share."""
    each = {block: 30.0 if block.kind == "mlp" else 10.0 for block in outline.blocks}
    layers = dict.fromkeys(outline.layers(), shared) if shared else {}
    return Costs(40.0 + sum(each.values()) + sum(layers.values()), each, layers, "seconds", "a toy")


def goals(text, outline, shared=0.0):
    found = parse_target(text)
    assert isinstance(found, Goals)
    return found.bound({limit.workload: priced(outline, shared) for limit in found.limits})


def problem_of(text, depth=4, moves="block", shared=0.0):
    outline = toy_outline(depth)
    return Problem(outline, moves, goals(text, outline, shared), sizes=(2, 3))


def follow(search, problem, rule=tangled, **options):
    return driver.run(search, problem, Toy(rule), **options)


def test_memory_is_reached_when_what_is_left_fits():
    problem = problem_of("memory=150B")  # of 200
    assert not problem.reached(frozenset([Block("mlp", 0), Block("attention", 0)]), 2)
    assert problem.reached(frozenset([Block("mlp", 0), Block("mlp", 1)]), 2)
    assert not problem_of("memory=150B,reserve=11B").reached(frozenset([Block("mlp", 0), Block("mlp", 1)]), 2)


def test_a_layer_that_is_gone_saves_what_its_blocks_share():
    problem = problem_of("memory=150B", shared=10.0)  # of 240
    mask = frozenset([Block("mlp", 0), Block("mlp", 1), Block("attention", 0)])
    assert not problem.reached(mask, 3)
    assert problem.reached(mask | {Block("attention", 1)}, 4)


def test_speed_is_the_ratio_to_the_whole_model():
    assert problem_of("speed=1.25x").reached(frozenset([Block("mlp", 0), Block("attention", 0)]), 2)  # 200 / 160
    assert not problem_of("speed=1.26x").reached(frozenset([Block("mlp", 0), Block("attention", 0)]), 2)


def test_several_targets_are_reached_when_all_are():
    problem = problem_of("blocks=3,speed=1.25x")
    assert not problem.reached(frozenset([Block("mlp", 0), Block("mlp", 1)]), 2)
    assert not problem.reached(frozenset(Block("attention", layer) for layer in range(3)), 3)
    assert problem.reached(frozenset([Block("mlp", 0), Block("attention", 0), Block("attention", 1)]), 3)


@pytest.mark.parametrize(
    ("text", "moves", "nearest"),
    [("memory=39B", "block", "memory=40B"), ("speed=2x", "attention", "speed=1.25x:decode")],
)
def test_a_target_that_cannot_be_had_names_the_nearest_that_can(text, moves, nearest):
    with pytest.raises(InputError) as error:
        problem_of(text, moves=moves)
    assert nearest in str(error.value)


@pytest.mark.parametrize("moves", ["block", "layer", "stock"])
@settings(deadline=None)
@given(limit=st.integers(41, 199), choices=st.randoms())
def test_no_road_to_a_limit_is_longer_than_foreseen(moves, limit, choices):
    problem, mask, steps = problem_of(f"memory={limit}B", moves=moves), DENSE, 0
    while not problem.reached(mask, steps):
        mask, steps = mask | choices.choice(problem.moves(mask)).blocks, steps + 1
    assert steps <= problem.most_steps()


PLAIN = [name for name, kind in SEARCHES.items() if not kind.ranks]


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("text", ["memory=141B", "speed=1.4x", "blocks=3,memory=141B"])
def test_every_search_goes_on_until_the_target_holds(name, text):
    problem = problem_of(text)
    search = SEARCHES[name](**({"offspring": 4, "initial": 4, "generations": 3} if name == "evolution" else {}))
    result = follow(search, problem)
    mask = gone(step.move for step in result.steps)
    assert result.stop_reason == Stop.TARGET
    assert problem.reached(mask, len(result.steps))


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize(
    ("text", "moves"),
    [
        ("blocks=3,memory=131B", "block"),  # of 200: two mlps at least
        ("blocks=4,memory=121B,speed=1.4x", "block"),
        ("blocks=2,params=-15%", "mlp"),
        ("layers=2,memory=121B", "stock"),
        ("blocks=4,layers=2,memory=121B", "layer"),
    ],
)
def test_a_number_beside_other_targets_is_met_exactly_by_every_search(name, text, moves):
    problem = problem_of(text, moves=moves)
    few = {"evolution": {"offspring": 4, "initial": 4, "generations": 3}}

    def scorer(evaluations: Evaluations):
        return lambda mask, moves: {m: Estimate(value=len(str(m)), stderr=None, n=1, unit="x") for m in moves}

    if name == "span" and (moves == "mlp" or "blocks=3" in text):  # whole layers of two blocks
        with pytest.raises(InputError, match="span"):
            follow(SEARCHES[name](), problem, scorer=scorer)
        return
    result = follow(SEARCHES[name](**few.get(name, {})), problem, scorer=scorer)
    mask = gone(step.move for step in result.steps)
    assert problem.reached(mask, len(result.steps))
    assert not problem.target.exceeded(problem.outline, mask, len(result.steps))
    assert len(mask) == {"blocks=3": 3, "blocks=2": 2}.get(text.split(",")[0], 4)


@pytest.mark.parametrize("moves", ["block", "layer"])
@settings(deadline=None)
@given(
    costs=st.lists(st.integers(1, 9), min_size=6, max_size=6),
    shared=st.sampled_from([0.0, 2.0]),
    most=st.integers(0, 40),
    number=st.integers(1, 3),
)
def test_a_move_is_on_offer_if_and_only_if_some_set_of_the_number_has_it_and_meets_the_rest(
    moves, costs, shared, most, number
):
    outline = toy_outline(3)
    layers = {key: shared for key in outline.layers() if moves == "layer"}
    each = dict(zip(outline.blocks, map(float, costs), strict=True))
    found = parse_target(f"{moves}s={number},memory={most + 1}B")
    assert isinstance(found, Goals)
    whole = Costs(sum(each.values()) + sum(layers.values()), each, layers, "bytes", "a toy")
    target = found.bound({found.limits[0].workload: whole})
    first = Problem(outline, moves, Target.parse(f"{moves}s=1")).moves(DENSE)
    meeting = [
        taken
        for taken in itertools.combinations(first, number)
        if target.reached(outline, gone(taken), number) and not target.reached(outline, DENSE, 0)
    ]
    if not meeting:
        with pytest.raises(InputError):
            Problem(outline, moves, target)
        return
    problem = Problem(outline, moves, target)
    for size in range(number):
        for before in itertools.combinations(first, size):
            left = {m for taken in meeting if set(before) < set(taken) for m in taken} - set(before)
            assert set(problem.moves(gone(before))) == left
    assert all(problem.moves(gone(taken)) == () for taken in meeting)


@pytest.mark.parametrize(
    ("text", "nearest"),
    [
        ("blocks=3,memory=90B", "memory=110B"),
        ("blocks=2,params=-40%", "params=-18.7%"),
        ("blocks=1,speed=1.5x,memory=100B", "memory=170B"),
    ],
)
def test_a_number_that_cannot_meet_the_rest_is_refused_before_the_search_with_the_nearest(text, nearest):
    with pytest.raises(InputError) as error:
        problem_of(text)
    number = text.split(",")[0]
    assert f"with {number} the nearest is" in error.value.what
    assert nearest in error.value.what
    problem_of(f"{number},{nearest}")


def test_blocks_and_layers_that_are_not_the_same_number_of_moves_are_refused():
    with pytest.raises(InputError, match="not as many moves"):
        problem_of("blocks=2,layers=2", moves="layer")


@pytest.mark.parametrize("text", ["memory=200B", "memory=12GiB,context=8192,loss=+0.1"])
def test_what_the_whole_model_meets_is_refused_with_what_it_has(text):
    with pytest.raises(InputError) as error:
        problem_of(text)
    assert "the whole model meets" in error.value.what
    assert "it has memory=200B" in error.value.what
    problem_of("memory=199B")
    problem_of("blocks=1,memory=200B")


def test_a_nested_search_overshoots_by_less_than_its_last_block():
    problem = problem_of("memory=141B")
    steps = follow(Exhaustive(), problem).steps
    assert problem.reached(gone(s.move for s in steps), len(steps))
    assert not problem.reached(gone(s.move for s in steps[:-1]), len(steps) - 1)


WEIGHTS = {"attention.0": 0.25, "mlp.1": 0.5, "attention.2": 1.0}


@pytest.mark.parametrize("search", [Exhaustive(), Greedy()])
@pytest.mark.parametrize(("rise", "steps"), [("0.2", 0), ("0.25", 1), ("0.8", 2), ("1.75", 3)])
def test_a_loss_target_ends_before_the_first_step_that_loses_more(search, rise, steps):
    result = follow(search, problem_of(f"loss=+{rise}"), additive(WEIGHTS))
    assert [str(s.move) for s in result.steps] == ["attention.0", "mlp.1", "attention.2"][:steps]
    assert result.stop_reason == Stop.LOSS


def test_a_loss_target_that_nothing_exceeds_ends_when_all_is_gone():
    result = follow(Exhaustive(), problem_of("loss=+99"), lambda mask: 0.0)
    assert (len(result.steps), result.stop_reason) == (8, Stop.TARGET)


def test_a_loss_target_beside_another_ends_with_whichever_comes_first():
    assert follow(Exhaustive(), problem_of("blocks=2,loss=+0.8"), additive(WEIGHTS)).stop_reason == Stop.TARGET
    result = follow(Exhaustive(), problem_of("blocks=3,loss=+0.8"), additive(WEIGHTS))
    assert (len(result.steps), result.stop_reason) == (2, Stop.LOSS)


def test_a_set_chosen_together_that_loses_too_much_leaves_no_plan():
    result = follow(Enumeration(), problem_of("memory=191B,loss=+0.1"), additive(WEIGHTS))
    assert (result.steps, result.stop_reason) == ((), Stop.LOSS)
    result = follow(Enumeration(), problem_of("memory=191B,loss=+0.3"), additive(WEIGHTS))
    assert ([str(step.move) for step in result.steps], result.stop_reason) == (["attention.0"], Stop.TARGET)


def test_the_budget_covers_the_looks_at_the_loss():
    result = follow(Exhaustive(), problem_of("loss=+0.8"), additive(WEIGHTS), budget=9)
    assert (len(result.steps), result.stop_reason) == (1, Stop.BUDGET)


def cheapest_by_trying(problem, scores):
    """The summed score of the best set, from all sets."""
    sets = itertools.chain.from_iterable(itertools.combinations(scores, n) for n in range(len(scores) + 1))
    fitting = [taken for taken in sets if problem.reached(gone(taken), len(taken))]
    return min(sum(scores[move] for move in taken) for taken in fitting)


@pytest.mark.parametrize("moves", ["block", "layer"])
@settings(deadline=None)
@given(
    numbers=st.lists(st.integers(1, 40), min_size=6, max_size=6),
    limit=st.integers(45, 155),
    shared=st.sampled_from([0.0, 7.0]),
)
def test_the_knapsack_is_the_cheapest_set_of_all(moves, numbers, limit, shared):
    problem = problem_of(f"memory={limit}B", depth=3, moves=moves, shared=shared)
    scores = dict(zip(problem.moves(DENSE), map(float, numbers), strict=False))
    best = next(cheapest(problem, scores))
    assert problem.reached(gone(best), len(best))
    assert sum(scores[move] for move in best) == cheapest_by_trying(problem, scores)


@pytest.mark.parametrize("text", ["blocks=3", "params=-30%", "layers=2"])
def test_the_knapsack_meets_counts_too(text):
    problem = toy_problem(3, "layer" if "layers" in text else "block", text)
    scores = {move: float(place % 4) + 1 for place, move in enumerate(problem.moves(DENSE))}
    sets = list(itertools.islice(cheapest(problem, scores), 5))
    assert len({gone(taken) for taken in sets}) == len(sets)
    assert all(problem.reached(gone(taken), len(taken)) for taken in sets)
    sums = [sum(scores[move] for move in taken) for taken in sets]
    assert sums == sorted(sums)


def test_the_knapsack_is_verified_by_the_real_loss():
    problem = problem_of("memory=151B")
    scores = {move: Estimate(value=1.0, stderr=None, n=1, unit="x") for move in problem.moves(DENSE)}

    def scorer(evaluations: Evaluations):
        return lambda mask, moves: scores

    result = follow(Knapsack(tries=4), problem, scorer=scorer)
    best, tried = result.steps[-1].loss, list(result.steps[0].scores.values())
    assert best is not None
    assert all(best.value <= other.value for other in tried if other is not None)
    assert plan_of(result, Knapsack(), problem).nested is False


def test_a_knapsack_needs_an_amount():
    with pytest.raises(InputError, match="how much to remove"):
        Knapsack().evaluations(problem_of("loss=+1"))


def test_costs_in_a_file_come_back_as_they_were(tmp_path):
    outline = Outline((Block("mlp", 0, "encoder"), Block("mlp", 1)), {}, 1)
    costs = Costs(3.5, dict.fromkeys(outline.blocks, 1.25), {("encoder", 0): 0.5, ("", 1): 0.25}, "seconds", "here")
    CostTable.of("f", "float32", "cpu", {"decode": costs}).save(tmp_path / "costs.json")
    assert CostTable.load(tmp_path / "costs.json").workloads["decode"].costs() == costs


@pytest.fixture
def words(checkpoint, prose):
    text = ("--calibration", prose, "--tokens", "128", "--window", "32", "--dtype", "float32", "--run", "out")
    return ("search", checkpoint, *text, "--search")


def test_a_memory_target_is_met_on_the_command_line(run, words):
    found = run(*words, "exhaustive", "--target", "memory=180KiB,context=32,batch=2", "--json")
    assert found.code == 0, found.err
    plan = json.loads(found.out)
    assert plan["method"]["target"] == "memory=180KiB,context=32,batch=2"
    assert plan["steps"]


def test_a_target_that_the_whole_model_meets_ends_with_2_and_what_it_has(run, words):
    found = run(*words, "knapsack", "--target", "memory=12GiB,context=32")
    assert (found.code, "the whole model meets" in found.err) == (2, True)


def test_the_dtype_that_is_counted_is_said_with_the_price(run, words):
    found = run(*words, "one-shot", "--target", "memory=180KiB,context=32", "--dry-run")
    assert (
        "memory=180KiB,context=32,batch=1 (costs: counted: weights and what each block caches, in float32" in found.err
    )


def test_an_impossible_target_ends_with_2_and_the_nearest(run, words):
    found = run(*words, "one-shot", "--target", "memory=1KiB,context=32")
    assert (found.code, "the nearest is memory=" in found.err) == (2, True)


def test_a_speed_target_leaves_its_costs_in_the_run_folder_and_resumes_with_them(run, words):
    aim = ("--target", "speed=1.05x:prefill,context=32")
    first = run(*words, "one-shot", *aim, "--json")
    assert first.code == 0, first.err
    costs = Path("out/costs.json").read_bytes()
    again = run(*words, "one-shot", *aim, "--json")
    assert (again.out, Path("out/costs.json").read_bytes()) == (first.out, costs)


def test_a_card_that_is_not_here_is_computed_for(run, words):
    found = run(*words, "one-shot", "--target", "speed=1.2x:decode", "--device-spec", "l4", "--json")
    assert found.code == 0, found.err
    assert "speed=1.2x:decode" in found.out
    assert not Path("out/costs.json").exists()  # where what is measured here lies


def test_a_loss_that_no_step_keeps_to_is_said(run, words):
    found = run(*words, "exhaustive", "--target", "blocks=7,loss=+0.01")
    assert (found.code, "within that loss" in found.err) == (2, True)


def test_a_loss_target_is_for_searches_that_go_step_by_step(run, words):
    found = run(*words, "beam", "--target", "loss=+0.1")
    assert (found.code, "step by step" in found.err) == (2, True)


def test_scores_of_an_earlier_run_seed_a_knapsack(run, words, checkpoint, prose):
    text = ("--tokens", "128", "--window", "32", "--dtype", "float32")
    done = run("score", checkpoint, "--criterion", "leave-one-out", "--calibration", prose, *text, "--run", "scored")
    assert done.code == 0, done.err
    aim = ("--target", "memory=180KiB,context=32", "--criterion")
    asked, filed = (run(*words, "knapsack:tries=3", *aim, name, "--json") for name in ("leave-one-out", "again"))
    assert filed.code == 2
    filed = run(*words[:-2], "filed", "--search", "knapsack:tries=3", *aim, "scored/scores.json", "--json")
    assert filed.code == 0, filed.err
    one, other = ([step["remove"] for step in json.loads(found.out)["steps"]] for found in (asked, filed))
    assert one == other
    again = run(*words[:-2], "other", "--search", "iterative", *aim, "scored/scores.json")
    assert (again.code, "other blocks are gone" in again.err or "no score" in again.err) == (2, True)


def two_kinds(attention, mlp):
    """Costs to which each attention and each mlp of `toy_outline` adds so much."""
    outline = toy_outline(4)
    each = {block: float(mlp if block.kind == "mlp" else attention) for block in outline.blocks}
    return Costs(100.0 + sum(each.values()), each, {}, "bytes", "a toy")


def test_a_number_beside_two_targets_that_ask_for_different_kinds_takes_some_of_each():
    """Memory that attentions hold and parameters that are in mlps: two of each meet both, four of one kind neither."""
    found = parse_target("blocks=4,params=-20%,memory=120B")
    assert isinstance(found, Goals)
    costs = {limit.workload: two_kinds(10, 0) for limit in found.limits}
    problem = Problem(toy_outline(4), "block", found.bound(costs), sizes=(2, 3))
    sets = [gone(step.move for step in follow(search, problem).steps) for search in (Exhaustive(), Greedy())]
    sets.append(gone(next(cheapest(problem, dict.fromkeys(problem.offered(DENSE), 1.0)))))
    for mask in sets:
        assert sorted(block.kind for block in mask) == ["attention"] * 2 + ["mlp"] * 2


def test_a_plan_to_start_from_that_cannot_meet_the_target_is_told_from_one_of_other_moves():
    found = parse_target("blocks=3,memory=112B")  # three attentions
    assert isinstance(found, Goals)
    costs = {limit.workload: two_kinds(10, 0) for limit in found.limits}
    start = (Move.parse("mlp.0"), Move.parse("mlp.1"), Move.parse("mlp.2"))
    problem = Problem(toy_outline(4), "block", found.bound(costs), start=start)
    with pytest.raises(InputError, match=r"with mlp\.0 of the plan to start from gone, .* cannot be met"):
        begun(problem)
