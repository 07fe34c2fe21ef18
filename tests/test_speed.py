"""Timings, ratios and operations against their definitions; benchmarks of every kind of model."""

import itertools
import json
import math
import random
from fractions import Fraction
from pathlib import Path

import pytest
import tiny
import torch
import zoo

from blockpruner.anatomy.reading import read_anatomy
from blockpruner.blocks import Move
from blockpruner.errors import InputError
from blockpruner.evaluation import speed, timing
from blockpruner.evaluation.compute import LENGTHS, counted, laws, on_card, prefill_flops
from blockpruner.evaluation.costing import alike, measured, saving
from blockpruner.evaluation.memory import random_inputs, read_ledger
from blockpruner.evaluation.speed import Benchmark, Contestant, interleaved, measure
from blockpruner.evaluation.timing import Protocol, Run, SpeedUp, Timing, parse_protocol
from blockpruner.plan import Plan
from blockpruner.searching.costs import Card
from blockpruner.searching.targets import Speed
from blockpruner.subject import subject_of
from blockpruner.surgery.removal import skipped
from blockpruner.weighing_tables import print_benchmark

SHORT = Protocol(batch=2, context=12, new=3, rounds=6, warm_up=1)


def subject(name):
    model = zoo.build(name) if "/" in name else tiny.FAMILIES[name]()
    return subject_of(model, None, name)


def test_a_timing_is_the_median_with_quartiles():
    assert Timing.of([5.0, 1.0, 2.0, 3.0, 4.0]) == Timing(median=3.0, low=2.0, high=4.0, runs=5)
    assert Timing.of([2.0]) == Timing(median=2.0, low=2.0, high=2.0, runs=1)


def test_a_speed_up_compares_round_by_round():
    found = SpeedUp.of([2.0, 20.0, 200.0], [1.0, 10.0, 100.0])
    assert (found.median, found.low, found.high, found.rounds) == (2.0, None, None, 3)


@pytest.mark.parametrize("n", [6, 9, 11, 20])
def test_the_interval_holds_the_median_in_95_of_100_cases(n):
    """By counting: of all 2^n ways in which n values fall on either side of the median (of a sample of them)."""
    marks = [float(value) for value in range(1, n + 1)]
    found = SpeedUp.of(marks, [1.0] * n)
    assert found.low is not None
    rank = int(found.low) - 1
    missed = sum(math.comb(n, below) for below in range(n + 1) if below <= rank or n - below <= rank) / 2**n
    wider = sum(math.comb(n, below) for below in range(n + 1) if below <= rank + 1 or n - below <= rank + 1) / 2**n
    assert missed <= 0.05 < wider


def test_contestants_take_turns_in_turned_order(monkeypatch):
    seen = []
    one, two = subject("llama"), subject("gpt2")
    monkeypatch.setattr(speed, "timed", lambda model, *_: seen.append(model.config.model_type) or Run(1.0, None))
    runs = interleaved([Contestant("a", one), Contestant("b", two)], Protocol(1, 8, 1, rounds=3, warm_up=1))
    assert seen == ["llama", "gpt2", "gpt2", "llama", "llama", "gpt2", "gpt2", "llama"]
    assert [len(mine) for mine in runs] == [3, 3]


def test_a_drift_of_the_machine_does_not_look_like_a_speed_up(monkeypatch):
    clock = itertools.count(100)
    monkeypatch.setattr(speed, "timed", lambda *_: Run(float(next(clock)), None))
    one = subject("llama")
    first, second = interleaved([Contestant("a", one), Contestant("b", one)], Protocol(1, 8, 1, rounds=40, warm_up=0))
    assert SpeedUp.of([r.prefill for r in first], [r.prefill for r in second]).median == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen2-moe", "seq2seq/t5", "causal/mamba", "masked/bert"])
def test_any_model_is_measured_with_and_without_blocks(name):
    one = subject(name)
    blocks = [block for block in one.anatomy.parts if block not in one.anatomy.outline.kept]
    cell = measure([Contestant("dense", one), Contestant("half", one, frozenset(blocks[::2]))], SHORT, limit=10**7)
    dense, half = cell.contestants
    assert (dense.prefill_speedup.median, dense.ideal_speedup, dense.of_ideal) == (1.0, 1.0, 1.0)
    assert half.ideal_speedup is not None
    assert half.ideal_speedup > 1
    assert half.of_ideal == pytest.approx(half.prefill_speedup.median / half.ideal_speedup)
    assert (half.decode is None) == (name == "masked/bert")
    assert half.weights_bytes < dense.weights_bytes
    for figures in cell.contestants:
        assert (figures.cache_bytes_measured or 0) == figures.cache_bytes_counted


@pytest.mark.parametrize(("name", "longest"), [("gemma3", 64), ("gpt2", 64), ("causal/mamba", None)])
def test_the_largest_context_is_no_longer_than_what_the_model_reads(capsys, name, longest):
    one = subject(name)
    cell = measure([Contestant("dense", one)], SHORT, limit=10**12)
    (dense,) = cell.contestants
    assert (dense.largest_context, dense.longest_context) == (longest, longest)
    print_benchmark(Benchmark.of(SHORT, one, [cell], 10**12))
    said = capsys.readouterr().out
    assert ("64, its own" in said) == ("reads no further" in said) == (longest is not None)


def test_masks_share_one_set_of_weights_and_leave_the_model_whole():
    one = subject("llama")
    ids = random_inputs(one.model, 1, 8)
    before = one.model(**ids).logits
    addresses = [p.data_ptr() for p in one.model.parameters()]
    mask = frozenset(list(one.anatomy.parts)[:3])
    measure([Contestant("dense", one), Contestant("less", one, mask)], SHORT)
    assert [p.data_ptr() for p in one.model.parameters()] == addresses
    assert torch.equal(one.model(**ids).logits, before)


def test_a_run_times_the_first_token_and_each_that_follows(monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(timing.time, "process_time", lambda: float(next(ticks) ** 2))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(ticks) ** 2))
    one = subject("llama")
    found = timing.timed(one.model, Protocol(1, 8, new=4), random_inputs(one.model, 1, 8))
    assert (found.prefill, found.decode) == (1.0, 5.0)  # marks at 0, 1, 4, 9, 16


def test_a_prompt_beyond_the_context_is_refused():
    one = subject("llama")
    with pytest.raises(InputError, match="context of 64"):
        measure([Contestant("dense", one)], Protocol(1, 62, 3))


def test_protocols_are_the_papers_and_can_be_changed():
    found = parse_protocol("shortened-llama:batch=8")
    assert (found.batch, found.context, found.new, found.warm_up, found.sample) == (8, 12, 128, 10, True)
    with pytest.raises(InputError, match="out of range"):
        parse_protocol("quick:batch=0")
    with pytest.raises(InputError, match="not a known"):
        parse_protocol("quik")


def plain_flops(model, tokens):
    """Two per weight of each linear map and token, of the head for one; attention: 4 x width per pair of tokens."""
    linear = [module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    head = model.get_output_embeddings()
    inside = sum(module.weight.numel() for module in linear if module is not head)
    pairs = len(model.model.layers) * 4 * tiny.HIDDEN * tokens**2
    return 2 * inside * tokens + 2 * head.weight.numel() + pairs


@pytest.mark.parametrize("tokens", [16, 40])
def test_operations_are_those_of_linear_maps_and_attention(tokens):
    assert prefill_flops(tiny.FAMILIES["llama"](), tokens) == plain_flops(tiny.FAMILIES["llama"](), tokens)


def test_the_law_of_growth_foretells_other_lengths():
    model = tiny.FAMILIES["llama"]()
    anatomy = read_anatomy(model)
    whole, blocks = laws(model, anatomy)
    assert max(LENGTHS) < 60
    assert whole.prefill(60) == pytest.approx(prefill_flops(model, 60))
    some = frozenset(list(anatomy.parts)[1:4])
    with skipped(model, some, anatomy=anatomy):
        less = prefill_flops(model, 60)
    assert whole.prefill(60) - sum(blocks[block].prefill(60) for block in some) == pytest.approx(less)


def test_removed_experts_count_where_tokens_meet_them():
    model = tiny.FAMILIES["qwen2-moe"]()
    found = counted(model, random_inputs(model, 1, 16))
    assert found is not None
    path, experts = next((n, m) for n, m in model.named_modules() if n.endswith("mlp.experts"))
    all_of_them = 2 * 16 * sum(p.numel() for p in experts.parameters())
    assert found[path] == all_of_them * 2 // 4  # two of four experts for each token


def test_a_card_is_bound_by_bandwidth_or_by_operations():
    one = subject("llama")
    ledger = read_ledger(one.model, one.anatomy)
    slow_memory, slow_units = Card("a", 1.0, 1e30, "toy"), Card("b", 1e30, 1.0, "toy")
    decode, prefill = Speed(Fraction(2), "decode", 1, 16), Speed(Fraction(2), "prefill", 1, 40)
    mlp = next(block for block in one.anatomy.parts if block.kind == "mlp")
    linear = 3 * 32 * 48
    assert on_card(ledger, slow_memory, decode).each[mlp] == linear * 4
    assert on_card(ledger, slow_units, prefill).each[mlp] == 2 * linear * 40
    assert on_card(ledger, slow_units, prefill).whole == pytest.approx(prefill_flops(one.model, 40))


def test_costs_measured_here_are_the_paired_differences(monkeypatch):
    """On a machine where an attention takes 1, an mlp 3 and the rest 10, with noise that comes and goes by rounds."""
    one = subject("llama")
    ledger, draw = read_ledger(one.model, one.anatomy), random.Random(0)
    noise = [draw.random() for _ in range(20)]

    def fake(contestants, protocol, progress):
        kept = [[b for b in one.anatomy.parts if b not in c.mask] for c in contestants]
        times = [10 + sum(3 if b.kind == "mlp" else 1 for b in blocks) for blocks in kept]
        return [[Run(time + n, None) for n in noise[: protocol.rounds]] for time in times]

    monkeypatch.setattr("blockpruner.evaluation.costing.interleaved", fake)
    costs = measured(one, Speed(Fraction(2), "prefill"), ledger)
    assert {block.kind: pytest.approx(value) for block, value in costs.each.items()} == {"attention": 1, "mlp": 3}


def test_a_saving_is_the_mean_of_a_normal_distribution_that_is_cut_off_at_nothing():
    """By drawing; a clear one is the median itself."""
    draw = random.Random(0)
    for middle in (-1.0, 0.0, 0.5, 2.0):
        gaps = [middle - 1.0, middle, middle + 1.0]
        error = 1.2533 * 1.4826 / math.sqrt(3)
        kept = [x for _ in range(100_000) if (x := draw.gauss(middle, error)) > 0]
        assert saving(gaps)[0] == pytest.approx(math.fsum(kept) / len(kept), rel=0.02)
    assert saving([99.0, 100.0, 101.0]) == (pytest.approx(100.0), True)
    assert saving([5.0] * 7) == (pytest.approx(5.0), True)
    assert saving([-1.0, 0.0, 1.0])[1] is False
    for gaps in ([0.0] * 7, [-5.0] * 7, [-1e6, -1e6 + 1e-6, -1e6]):
        assert 0 < saving(gaps)[0] < 1e-3
    found = [saving([x - 1, x, x + 1])[0] for x in (-9.0, -2.0, -1.0, 0.0, 1.0, 2.0, 9.0)]
    assert found == sorted(found)


@pytest.mark.parametrize(("attention", "noise"), [(0.0, 0.0), (-1.0, 0.0), (0.0, 0.5), (-0.2, 0.5), (1.0, 50.0)])
def test_no_measured_block_costs_nothing_or_more_than_the_whole(monkeypatch, attention, noise):
    """On a machine where an attention takes nothing, or seems to give time back, or all is noise."""
    one = subject("llama")
    draw = random.Random(3)

    def fake(contestants, protocol, progress):
        kept = [[b for b in one.anatomy.parts if b not in c.mask] for c in contestants]
        times = [10 + sum(3 if b.kind == "mlp" else attention for b in blocks) for blocks in kept]
        return [[Run(time + draw.random() * noise, None) for _ in range(protocol.rounds)] for time in times]

    monkeypatch.setattr("blockpruner.evaluation.costing.interleaved", fake)
    costs = measured(one, Speed(Fraction(2), "prefill"), read_ledger(one.model, one.anatomy))
    assert all(value > 0 for value in costs.each.values())
    assert costs.left(one.anatomy.outline, frozenset(costs.each)) >= -1e-9
    assert "not told from nothing: attention.0 and its like" in costs.source
    if noise < 1:
        mlp, other = (next(v for b, v in costs.each.items() if b.kind == kind) for kind in ("mlp", "attention"))
        assert mlp == pytest.approx(3, rel=0.1)
        assert other < 0.2


def test_sliding_and_full_attention_are_measured_apart():
    one = subject("gemma3")
    sizes = sorted(len(blocks) for blocks in alike(read_ledger(one.model, one.anatomy)))
    assert sum(sizes) == len(one.anatomy.parts)
    assert len(sizes) == 3


def test_the_command_benches_a_model_and_its_plan(run, checkpoint):
    Plan.of(Move.parse("mlp.1"), Move.parse("mlp.2")).save(Path("plan.json"))
    words = ("--protocol", "quick:rounds=6,new=2", "--batch", "1,2", "--context", "8", "--dtype", "float32")
    found = run("bench", checkpoint, "--plan", "plan.json[:1]", *words, "--limit", "1MiB", "--run", "out", "--json")
    assert found.code == 0, found.err
    value = json.loads(found.out)
    assert [(cell["batch"], cell["context"]) for cell in value["cells"]] == [(1, 8), (2, 8)]
    assert [one["removed"] for one in value["cells"][0]["contestants"]] == ["dense", "mlp.1"]
    found = run("prune", checkpoint, "--plan", "plan.json", "--out", "pruned", "--dtype", "float32")
    assert found.code == 0, found.err
    value = json.loads(run("bench", "pruned", *words, "--json").out)
    assert [one["removed"] for one in value["cells"][0]["contestants"]] == ["mlp.1+mlp.2"]
    found = run("bench", checkpoint, *words)
    assert (found.code, "prefill" in found.out) == (0, True)
    found = run("bench", checkpoint, "--batch", "0")
    assert (found.code, "no list of numbers" in found.err) == (2, True)
