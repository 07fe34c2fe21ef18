"""Are bytes counted as they are held, are targets met, and does removed compute turn into speed?

    OMP_NUM_THREADS=1 python benchmarks/bench_targets.py --json experiments/evaluation.json

Four figures, each of which can be asked for alone (--only): `kv_bytes`, counted and measured in the cache after a real
prefill, of tiny models and the demo model, whole and pruned; `memory_target` and `speed_target`, of one-shot plans for
the demo model, measured without the blocks; `speedup_of_ideal`, prefill of 512 tokens without the blocks of
the demo's plan. Speeds are compared in turns; with one thread in seconds of CPU time, since others use the machine.
"""

import argparse
import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from search_cost import commit
from transformers import AutoConfig, AutoModelForCausalLM

from blockpruner.artifacts import read_json, write_json
from blockpruner.blocks import Mask, format_mask, parse_mask
from blockpruner.console import say
from blockpruner.evaluation.memory import filled_cache, held_bytes, random_inputs, read_ledger, weights_bytes
from blockpruner.evaluation.speed import Contestant, measure
from blockpruner.evaluation.timing import Protocol, SpeedUp, clock_of
from blockpruner.loading.models import load
from blockpruner.planning import find_plan, prepare
from blockpruner.searching.targets import Goals, Memory, Speed
from blockpruner.subject import Subject, open_subject, subject_of
from blockpruner.surgery.removal import prune_, skipped

COMMAND = "OMP_NUM_THREADS=1 python benchmarks/bench_targets.py --json experiments/evaluation.json"
DEMO_PLAN = "attention.7+attention.16+attention.17+mlp.6+mlp.13+mlp.16"  # experiments/demo.json, `pruned`
SEARCH = {"calibration": "builtin", "search": "one-shot", "criterion": "cosine", "tokens": 128, "window": 64}

_SIZES = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
TINY: dict[str, dict[str, Any]] = {
    "llama": {**_SIZES, **_HEADS},
    "gemma3_text": {**_SIZES, **_HEADS, "head_dim": 8, "sliding_window": 8, "sliding_window_pattern": 2},
    "qwen2_moe": {**_SIZES, **_HEADS, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "gpt2": {"vocab_size": 128, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--only", choices=FIGURES, action="append")
    options = parser.parse_args()
    demo = open_subject(load("demo"))
    for name in options.only or FIGURES:
        with last_state_as_it_should_be(demo.model):
            found = FIGURES[name](demo)
        made = {"command": COMMAND, "commit": commit(), "clock": clock_of(demo.model.device)}
        versions = {"torch": torch.__version__, "transformers": version("transformers"), "dtype": demo.dtype}
        held = read_json(options.json) if options.json.exists() else {}  # others write other figures there
        write_json(options.json, {**held, name: {**made, **versions, "threads": torch.get_num_threads(), **found}})
        print(json.dumps({name: found}, indent=1), flush=True)


@contextlib.contextmanager
def last_state_as_it_should_be(model: Any) -> Iterator[None]:
    """While the block runs, the head is given a last state with ordinary strides.

    With those of a slice of all positions, torch 2.13 copies the whole head on the CPU (335 MB here) for one position:
    nine tenths of a prefill, which no removal makes faster.
    """

    def packed(_: Any, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        return (torch.empty(given[0].shape, dtype=given[0].dtype).copy_(given[0]),)

    handle = model.get_output_embeddings().register_forward_pre_hook(packed)
    try:
        yield
    finally:
        handle.remove()


def kv_bytes(demo: Subject) -> dict[str, Any]:
    """Counted and measured bytes of the cache, below and beyond the sliding windows."""
    rows = []
    for name, fields in TINY.items():
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **fields)).eval()
        for mask in ("dense", "attention.1", "attention.0+mlp.1+attention.2+mlp.2"):
            rows += [held(subject_of(model, None, name), parse_mask(mask), 2, tokens) for tokens in (6, 24)]
    for mask in ("dense", DEMO_PLAN):
        rows += [held(demo, parse_mask(mask), batch, tokens) for batch, tokens in ((2, 16), (1, 600))]
    return {"all_equal": all(row["counted"] == row["measured"] for row in rows), "rows": rows}


def held(subject: Subject, mask: Mask, batch: int, tokens: int) -> dict[str, Any]:
    counted = read_ledger(subject.model, subject.anatomy).footprint(mask).cache(tokens, batch)
    with skipped(subject.model, mask, anatomy=subject.anatomy):
        measured = held_bytes(filled_cache(subject.model, random_inputs(subject.model, batch, tokens)))
    row = {"model": subject.identity.name, "removed": format_mask(mask), "batch": batch, "context": tokens}
    return {**row, "counted": counted, "measured": measured}


def memory_target(demo: Subject) -> dict[str, Any]:
    """A plan for nine tenths of the memory at 128 tokens x 2, and what the model without its blocks really holds."""
    context, batch = 128, 2
    demo = replace(demo, stored=None)  # counted in the dtype in memory, since that is measured
    dense = read_ledger(demo.model, demo.anatomy).footprint().total(context, batch)
    target = Memory(dense * 9 // 10, context, batch)
    task = prepare(demo, target=str(target), **SEARCH)
    plan = find_plan(task)
    goals = task.problem.target
    assert isinstance(goals, Goals)
    costs = goals.costs[target.workload]
    last = costs.saved(demo.anatomy.outline, plan.mask()) - costs.saved(
        demo.anatomy.outline, frozenset(block for step in plan.steps[:-1] for block in step.blocks)
    )
    model: Any = load("demo").model  # pruned for good, so that its own bytes are counted
    prune_(model, plan.mask())
    measured = weights_bytes(model) + held_bytes(filled_cache(model, random_inputs(model, batch, context)))
    return {
        "target": str(target),
        "target_bytes": target.most,
        "dense_bytes": dense,
        "plan_bytes": int(costs.left(demo.anatomy.outline, plan.mask())),
        "measured_bytes": measured,
        "last_block_bytes": int(last),
        "met": measured <= target.most < measured + last,
        "removed": format_mask(plan.mask()),
        "search": SEARCH,
    }


def speed_target(demo: Subject) -> dict[str, Any]:
    """Plans for a speed-up of prefill and one of decoding, by costs measured here; then both are raced."""
    rows = []
    for ratio, phase, context in ((Fraction(13, 10), "prefill", 128), (Fraction(11, 10), "decode", 32)):
        target = Speed(ratio, phase, 1, context)  # type: ignore[arg-type]
        task = prepare(demo, target=str(target), progress=lambda *said: say(str(said)), **SEARCH)
        plan, goals = find_plan(task), task.problem.target
        assert isinstance(goals, Goals)
        costs = goals.costs[target.workload]
        protocol = Protocol(1, context, 8 if phase == "decode" else 1, rounds=7)
        cell = measure([Contestant("dense", demo), Contestant("plan", demo, plan.mask())], protocol)
        both = cell.contestants[1]
        found: SpeedUp | None = both.decode_speedup if phase == "decode" else both.prefill_speedup
        assert found is not None
        rows.append(
            {
                "target": str(target),
                "expected": costs.whole / costs.left(demo.anatomy.outline, plan.mask()),
                "measured": found.model_dump(),
                "within_10_percent": abs(found.median / float(ratio) - 1) <= 0.1,
                "removed": format_mask(plan.mask()),
                "whole_seconds": costs.whole,
                "block_seconds": {
                    str(block): seconds for block, seconds in costs.each.items() if block.layer in (0, 5)
                },
            }
        )
    return {"rows": rows, "search": SEARCH}


def speedup_of_ideal(demo: Subject) -> dict[str, Any]:
    """Prefill of 512 tokens, the head on the last position, with and without the blocks of the demo's plan."""
    mask = parse_mask(DEMO_PLAN)
    contestants = [Contestant("dense", demo), Contestant("demo plan", demo, mask)]
    cell = measure(contestants, Protocol(1, 512, 1, rounds=21), progress=lambda *said: say(str(said)))
    plan = cell.contestants[1]
    return {
        "removed": DEMO_PLAN,
        "context": 512,
        "ideal": plan.ideal_speedup,
        "measured": plan.prefill_speedup.model_dump(),
        "of_ideal": plan.of_ideal,
        "seconds": {one.name: one.prefill.model_dump() for one in cell.contestants},
    }


FIGURES: dict[str, Callable[[Subject], dict[str, Any]]] = {
    "kv_bytes": kv_bytes,
    "speedup_of_ideal": speedup_of_ideal,
    "memory_target": memory_target,
    "speed_target": speed_target,
}


if __name__ == "__main__":
    main()
