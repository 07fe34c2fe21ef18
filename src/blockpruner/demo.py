"""`blockpruner demo`: the whole job on a small real model, with random removals beside it."""

import shlex
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from blockpruner.blocks import Mask
from blockpruner.console import Progress, duration, say
from blockpruner.contestants import at_random
from blockpruner.errors import CheckFailedError
from blockpruner.evaluation.quality import Evaluation, evaluate_masks
from blockpruner.loading.models import load
from blockpruner.planning import find_plan, prepare
from blockpruner.price import quote
from blockpruner.searching.contract import Stop
from blockpruner.subject import open_subject, save_subject
from blockpruner.tables import print_evaluation, print_plan, print_saved
from blockpruner.texts.calibration import load_calibration

WINDOW, SEARCH_TOKENS, EVALUATION_TOKENS, BLOCKS, RANDOM_PLANS = 256, 1024, 8192, 6, 5
CALIBRATION, HELD_BACK = "builtin[:40]", "builtin[40:]"
PROMPT = "The most important thing to know about water is"

GENERATE = """
import sys, blockpruner
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
written = model.generate(**tokenizer(sys.argv[2], return_tensors="pt"), max_new_tokens=32, do_sample=False)
print(tokenizer.decode(written[0], skip_special_tokens=True))
"""


def run_demo(folder: Path, dtype: str) -> None:
    """Search 6 of 36 blocks on 1,024 tokens of Python's documentation, evaluate on other topics, save, generate.

    The run folder gets the journal, plan.json, evaluation.json and the pruned model. CheckFailedError if the plan is
    not better than the mean of 5 random removals by 3 standard errors.
    """
    out = folder / "model"
    say("loading Gemma 3 270M (Gemma terms of use apply); the first time it is unpacked, which takes a minute")
    subject = open_subject(load("demo", dtype=dtype))
    task = prepare(
        subject,
        target=f"blocks={BLOCKS}",
        calibration=CALIBRATION,
        objective="sampled-loss",  # this model is two thirds head
        tokens=SEARCH_TOKENS,
        window=WINDOW,
        quiet=True,
    )
    held_back = load_calibration(HELD_BACK, subject.tokenizer, window=WINDOW, tokens=EVALUATION_TOKENS, quiet=True)
    price = quote(task)
    say(f"searching: {price.evaluations} evaluations of {SEARCH_TOKENS} tokens, about {duration(price.seconds)}")
    plan = find_plan(task, folder, Progress())
    print_plan(plan)
    if plan.stop_reason != Stop.TARGET:
        raise KeyboardInterrupt

    random = at_random(task, plan, RANDOM_PLANS)
    contestants: dict[str, Mask] = {"dense": frozenset(), "pruned": plan.mask(), **random}
    found = evaluate_masks(subject.model, subject.anatomy, held_back, contestants, progress=Progress())
    evaluation = Evaluation.of(found, held_back.record)
    evaluation.save(folder / "evaluation.json")
    print_evaluation(evaluation)

    if (out / "plan.json").exists():  # of an earlier demo in this folder
        shutil.rmtree(out)
    print_saved(save_subject(subject, plan, out), subject.identity.parameters)
    say("generating with the saved model in a new process")
    print(_generated(out))
    _check(evaluation)
    print(f"next: {shlex.join(['blockpruner', 'evaluate', 'demo', str(out), '--data', HELD_BACK, '--tokens', '4096'])}")
    prune = [
        "blockpruner",
        "prune",
        "demo",
        "--plan",
        str(folder / "plan.json"),
        "--first",
        "3",
        "--out",
        "smaller-cut",
    ]
    print(f"next: {shlex.join(prune)}")
    print("next: blockpruner search MODEL --target params=-20% --calibration alpaca --run runs/mine")


def _generated(model: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", GENERATE, str(model), PROMPT], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise CheckFailedError(
            f"the saved model does not generate in a new process: {done.stderr.strip().splitlines()[-1:]}",
            fix="report this message",
        )
    return done.stdout.strip()


def _check(evaluation: Evaluation) -> None:
    """Compare the pruned model with the mean of the random ones, in standard errors over windows of their difference.

    The same windows serve all, so the standard error of a difference is at most the sum of the two.
    """
    losses = {q.name: q.loss for q in evaluation.contestants}
    pruned, random = losses["pruned"], [loss for name, loss in losses.items() if name.startswith("random")]
    gap = statistics.mean(loss.value for loss in random) - pruned.value
    spread = (pruned.stderr or 0.0) + statistics.mean(loss.stderr or 0.0 for loss in random)
    beaten = sum(pruned.value < loss.value for loss in random)
    text = f"the plan loses {gap:.3f} nats less than the mean of {len(random)} random removals of as many blocks"
    print(f"{text} (at least {gap / spread:.1f} standard errors), and less than {beaten} of them")
    if gap <= 3 * spread:
        raise CheckFailedError(
            f"{text}: not more than 3 standard errors", fix="report the run folder's evaluation.json"
        )
