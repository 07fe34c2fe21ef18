"""What each recovery wins back on the demo model, per parameter added and token spent, beside plans of equal size.

    python benchmarks/recovery.py --plan experiments/recovery_plan.json \\
        --data "$BLOCKPRUNER_DATA" --json experiments/recovery.json

The plan is nested; its first 6, 9 and 12 blocks are removed. All is fitted on C4 documents 0 to 189, documents 190 to
199 make the choices, and reported are C4 documents 200 to 299 and WikiText-2 valid. Closed forms have --tokens of text
at all three sizes; trained recoveries see --trained tokens at 9 blocks. LoRA at 0 blocks is the whole model trained on
the same tokens: what that gains is the domain, which no recovery can claim.

Equal parameters: a plain plan with fewer removals has more parameters, so each recovered model stands beside the plan
cut to the most removals that leave at least as many parameters as it has itself, with what was added. So the plain plan
is never the smaller one, and by less than one block the larger.

--replaceable is a second plan, found by `search --recovery linear:rank=64` on the same text. What INSIDE names is
fitted to it too, so that recovery inside the search stands beside recovery after it; blocks differ in size, so compare
rows by their parameters.

--tasks N adds to the rows of what --only names the first N items each of PIQA, ARC-Easy and LAMBADA, as
lm-evaluation-harness scores them, each beside the dense model and the plain plan on the same items.

A row is a plan, a method, what it was fitted on, a number of removals, a dtype and a text, and stands beside plain rows
of its own dtype. Rows are written as they come, and the same command goes on after an interruption; a method that fails
is a row that says why.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from beside import accuracy, compared, jackknife, mean_of, told, won
from ladder import CEILING, CLOSED, INSIDE, TRAINED
from search_cost import commit
from torch.utils.flop_counter import FlopCounterMode

from blockpruner.blocks import Mask
from blockpruner.console import Progress
from blockpruner.data import Data, read_data
from blockpruner.engine.objective import ModelObjective
from blockpruner.errors import BlockprunerError, InputError
from blockpruner.evaluation.paired import together
from blockpruner.evaluation.suites import Task
from blockpruner.evaluation.tasks import Harness
from blockpruner.loading.models import load
from blockpruner.objectives.loss import Loss
from blockpruner.plan import Plan
from blockpruner.recoveries import parse_chain
from blockpruner.recovering import recover
from blockpruner.repairs.recovery import Trained
from blockpruner.searching.contract import DENSE, Values
from blockpruner.searching.evaluations import Evaluations
from blockpruner.subject import Subject, open_subject
from blockpruner.surgery.gaps import UNREPAIRED, Repair, repaired

SIZES = (6, 9, 12)
TRAINED_AT = 9
C4, WIKITEXT = "text/c4_demo.jsonl", "text/wikitext2_raw_valid.txt"
TASKS = (Task("piqa", 0, "acc"), Task("arc_easy", 0, "acc"), Task("lambada", 0, "acc"))


@dataclass(frozen=True)
class Run:
    """One method on the model without the first `blocks` blocks of a plan; method: empty for nothing.

    trained: on the text that training sees; plan: `searched`, or `replaceable` for the one with recovery inside the
    search.
    """

    method: str
    blocks: int
    trained: bool = False
    plan: str = "searched"

    def __str__(self) -> str:
        more = " (on the text for training)" if self.trained and "tokens=" not in self.method else ""
        return f"{self.plan}, {self.blocks} blocks: {self.method or 'plain'}{more}"


class Bench:
    """The model, the texts and what is known so far, which is in the file after every run."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.subject: Subject = open_subject(load(options.model, dtype=options.dtype))
        self.plans = {"searched": self._plan(options.plan)}
        if options.replaceable:
            self.plans["replaceable"] = self._plan(options.replaceable)
        first, report = f"{options.data / C4}[0:190]", {"tokens": options.report, "window": options.window}
        judge = {"tokens": options.judge, "window": options.window}
        self.judge = self._read(f"{options.data / C4}[190:200]", judge)
        self.fit = {
            False: self._read(first, {"tokens": options.tokens, "window": options.window}),
            True: self._read(first, {"tokens": options.trained or None, "window": options.window}),
        }
        self.texts = {
            "C4 200-299": self._read(f"{options.data / C4}[200:300]", report),
            "WikiText-2 valid": self._read(str(options.data / WIKITEXT), report),
        }
        self.file: Path = options.json
        self.commit = commit()  # before what takes hours, in which others may commit
        self.figures = self._begun()

    def _plan(self, path: Path) -> Plan:
        plan = Plan.read(path, self.subject.anatomy.outline)
        plan.check(self.subject.anatomy.outline, self.subject.identity, str(path))
        if not plan.nested:
            raise InputError(f"{path} is not nested, so its first part is no plan", fix="search with greedy")
        return plan

    def _read(self, source: str, size: dict[str, Any]) -> Data:
        return read_data(self.subject, source, Loss(), **size)

    def _begun(self) -> dict[str, Any]:
        """What an earlier session has left; InputError if that was under other settings."""
        settings = {
            "model": self.subject.identity.model_dump(mode="json"),
            "orders": {name: [list(step.remove) for step in plan.steps] for name, plan in self.plans.items()},
            "fitted": {
                ("trained" if kind else "closed"): data.record.model_dump(mode="json")
                for kind, data in self.fit.items()
            },
            "judged": self.judge.record.model_dump(mode="json"),
            "reported": {name: data.record.model_dump(mode="json") for name, data in self.texts.items()},
        }
        if self.file.exists():
            figures = json.loads(self.file.read_text(encoding="utf-8"))
            known = figures["settings"]["orders"]  # of plans one may be new, or not be given this time
            same = known | settings["orders"] == settings["orders"] | known
            if figures["settings"] != settings | {"orders": known} or not same:
                raise InputError(f"{self.file} was begun with other settings", fix="give another --json")
            figures["settings"]["orders"] = known | settings["orders"]
            return figures
        return {
            "command": "python benchmarks/recovery.py --plan experiments/recovery_plan.json "
            '--data "$BLOCKPRUNER_DATA" --json experiments/recovery.json',
            "commit": self.commit,
            "versions": {package: version(package) for package in ("torch", "transformers", "blockpruner")},
            "settings": settings,
            "rows": [],
        }

    @property
    def rows(self) -> list[dict[str, Any]]:
        return self.figures["rows"]

    def masks(self, plan: str) -> dict[int, Mask]:
        """The first parts of a plan by the number of blocks they take."""
        taken = self.plans[plan]
        return {len(mask): mask for mask in (frozenset(), *(taken.mask(n + 1) for n in range(len(taken.steps))))}

    def mask(self, run: Run) -> Mask:
        found = self.masks(run.plan).get(run.blocks)
        if found is None:
            raise InputError(f"no first part of the plan removes {run.blocks} blocks", fix="search further")
        return found

    def parameters(self, mask: Mask) -> int:
        return self.subject.identity.parameters - self.subject.anatomy.outline.removed_parameters(mask)

    def found(self, run: Run, text: str) -> dict[str, Any] | None:
        wanted = {**self._named(run), "text": text}
        return next((row for row in self.rows if wanted.items() <= row.items()), None)

    def do(self, run: Run) -> None:
        """The rows of one run, unless they are there."""
        held = [self.found(run, text) for text in self.texts]
        if all(row and "failed" not in row for row in held):
            return
        print(f"--- {run}", flush=True)
        self._known_windows.pop(str(run), None)
        try:
            new = self._measured(run)
        except BlockprunerError as error:
            new = [{**self._named(run), "text": text, "failed": str(error)} for text in self.texts]
            print(f"    failed: {error}", flush=True)
        self.figures["rows"] = [*(row for row in self.rows if row not in held), *new]
        self._write()

    def _write(self) -> None:
        part = self.file.with_suffix(".part")
        part.write_text(json.dumps(self.figures, indent=1) + "\n", encoding="utf-8")
        part.replace(self.file)

    def task(self, run: Run) -> None:
        """The tasks of one run, in its rows, unless they are there; those that it stands beside come first."""
        self.do(run)
        rows = [row for text in self.texts if (row := self.found(run, text)) and "failed" not in row]
        if not rows or all(row["tasks"] for row in rows):
            return
        known = self.figures.setdefault("items", self.options.tasks)
        if known != self.options.tasks:
            raise InputError(f"{self.file} has tasks of {known} items each", fix=f"give --tasks {known}")
        plain = {"dense": Run("", 0)} | ({"pruned": Run("", run.blocks, plan=run.plan)} if run.blocks else {})
        beside = {name: other for name, other in plain.items() if other != run}
        for other in beside.values():
            self.task(other)
        print(f"--- {run}: tasks", flush=True)
        answers = self.answers.setdefault(self.subject.dtype, {})
        mine = answers[str(run)] = self._answered(run)
        tasks = {task: accuracy(column) for task, column in mine.items()}
        for name, other in beside.items():
            its = answers[str(other)]
            for task, found in together({task: compared(its[task], mine[task]) for task in mine}).items():
                tasks[task][f"beside_{name}"] = found.model_dump(mode="json", exclude={"test", "higher_is_better"})
        for row in rows:
            row["tasks"] = tasks
        self._write()

    @property
    def answers(self) -> dict[str, dict[str, dict[str, str]]]:
        """By dtype and run what came out for each item of each task, a digit for each: 1 where it was right."""
        return self.figures.setdefault("answers", {})

    def _answered(self, run: Run) -> dict[str, str]:
        mask, options = self.mask(run), self.options
        repair = self._recovered(run, mask)[0] if run.method else UNREPAIRED
        harness, answers = Harness(options.data / "lm_eval"), dict[str, str]()
        for task in TASKS:
            with repaired(self.subject.model, self.subject.anatomy, mask, repair):
                found = harness.run(
                    *(self.subject.model, self.subject.tokenizer, task),
                    contestant=str(run),
                    computation="",
                    limit=options.tasks,
                    batch=8,
                )
            answers[task.name] = "".join(str(int(value)) for value in found.column().values())
        return answers

    def _measured(self, run: Run) -> list[dict[str, Any]]:
        mask, start = self.mask(run), time.perf_counter()
        repair, said = UNREPAIRED, dict[str, Any]()
        if run.method:
            repair, said = self._recovered(run, mask)
        seconds = time.perf_counter() - start
        parameters = self.parameters(mask) + repair.added_parameters
        shared = {
            **self._named(run),
            "commit": self.commit,
            "added_parameters": repair.added_parameters,
            "parameters": parameters,
            "prefill_flops": self._prefill(mask, repair),
            **said,
        }
        return [
            {**shared, **self._worth(run, text, mask, repair, parameters), "seconds": round(seconds, 1), "tasks": None}
            for text in self.texts
        ]

    def _named(self, run: Run) -> dict[str, Any]:
        fitted = "trained" if run.trained else "closed"
        named = {"plan": run.plan, "method": run.method or "plain", "removed_blocks": run.blocks, "fitted": fitted}
        return {**named, "dtype": self.subject.dtype}

    def _recovered(self, run: Run, mask: Mask) -> tuple[Repair, dict[str, Any]]:
        subject, chain = self.subject, parse_chain(run.method)
        fit = self.fit[run.trained].examples
        name = f"{run} {subject.dtype}"
        folder = self.options.runs / "".join(letter if letter.isalnum() else "-" for letter in name)
        repair, record = recover(
            *(subject.model, subject.anatomy, mask, chain, fit, self.judge.examples),
            progress=Progress(),
            folder=folder,
        )
        gaps = [gap.model_dump(mode="json", exclude={"curve"}) for gap in record.gaps]
        said = {"tokens": record.tokens[0], "applied": record.applied, "reason": record.reason, "gaps": gaps}
        said |= {"held_out": {"pruned": told(record.pruned), "recovered": told(record.recovered)}}
        trained = any(isinstance(method, Trained) for method in chain)
        return repair, {**said, "trained_tokens": self.options.trained if trained else 0}

    def _worth(self, run: Run, text: str, mask: Mask, repair: Repair, parameters: int) -> dict[str, Any]:
        """The loss on a text, beside those of the dense model, the plain plan and the plain plan of equal size."""
        mine = self._windows(run, text, mask, repair)
        row = {"text": text, **mean_of(mine)}
        if not run.method:
            return row
        sizes = {blocks: self.parameters(mask) for blocks, mask in self.masks("searched").items()}
        equal = max(blocks for blocks, size in sizes.items() if size >= parameters or not blocks)
        names = ("removed_blocks", "parameters", "log_perplexity", "standard_error")
        others = {"dense": Run("", 0), "pruned": Run("", run.blocks, plan=run.plan), "equal": Run("", equal)}
        rows = {name: self._plain(other, text) for name, other in others.items()}
        windows = {name: self._windows(other, text, self.mask(other), UNREPAIRED) for name, other in others.items()}
        share, error = jackknife(won, windows["dense"], windows["pruned"], mine) if run.blocks else (None, None)
        gap = jackknife(lambda own, other: own - other, mine, windows["equal"])
        return {
            **row,
            "dense": rows["dense"]["log_perplexity"],
            "pruned": rows["pruned"]["log_perplexity"],
            "recovered_share": share,
            "recovered_share_error": error,
            "equal_parameters": {name: rows["equal"][name] for name in names}
            | {"difference": gap[0], "difference_error": gap[1]},
        }

    @property
    def _known_windows(self) -> dict[str, dict[str, str]]:
        """By run and text, the loss of each window, of runs in this dtype."""
        return self.figures.setdefault("windows", {}).setdefault(self.subject.dtype, {})

    def _windows(self, run: Run, text: str, mask: Mask, repair: Repair) -> Values:
        """The loss of each window of a text, in nats a token; computed once for each run, and kept on one line."""
        known = self._known_windows.setdefault(str(run), {})
        if text not in known:
            print(f"    {run}: {text}", flush=True)
            model, anatomy = self.subject.model, self.subject.anatomy
            with repaired(model, anatomy, mask, repair):
                asked = Evaluations(ModelObjective(model, anatomy, self.texts[text].examples))
                asked.losses([DENSE], "measuring")
            known[text] = " ".join(f"{value:.6f}" for value in asked.values(DENSE))
        return tuple(map(float, known[text].split()))

    def _plain(self, run: Run, text: str) -> dict[str, Any]:
        self.do(run)
        found = self.found(run, text)
        assert found is not None
        return found

    @torch.no_grad()
    def _prefill(self, mask: Mask, repair: Repair) -> int:
        """Floating-point operations of the layers on one window, without the head, counted by torch."""
        model, window = self.subject.model, self.fit[False].examples.inputs["input_ids"][:1]
        with repaired(model, self.subject.anatomy, mask, repair), FlopCounterMode(display=False) as counter:
            model.base_model(input_ids=window.to(model.device), use_cache=False)
        return counter.get_total_flops()


def runs(options: argparse.Namespace) -> list[Run]:
    """All of them, those first that others are beside."""
    closed = [Run(method, blocks) for blocks in SIZES for method in ("", *CLOSED)]

    def given(method: str) -> str:
        return method.format(tokens=options.trained)

    trained = [Run(given(method), TRAINED_AT, trained=True) for method in TRAINED]
    inside = [Run(method, blocks, plan="replaceable") for blocks in SIZES for method in INSIDE]
    second = inside if options.replaceable else []
    return [Run("", 0), *closed, *second, *trained, Run(given(CEILING), 0, trained=True)]


def wanted(found: Sequence[Run], only: Sequence[str] | None) -> list[Run]:
    """Those whose name has one of the given parts in it."""
    return [run for run in found if not only or any(part in str(run) for part in only)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", type=Path, required=True, help="a nested plan of 12 blocks, for this model")
    parser.add_argument("--replaceable", type=Path, help="a second one, of a search with recovery inside")
    parser.add_argument("--data", type=Path, required=True, help="folder with text/")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument(
        "--only", nargs="*", help="parts of the names of runs, as in `9 blocks: linear`; all if left out"
    )
    parser.add_argument("--model", default="demo")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, default=16384, help="that closed forms are fitted on")
    parser.add_argument("--trained", type=int, default=96_000, help="tokens that trained recoveries see")
    parser.add_argument("--judge", type=int, default=4096, help="held-out tokens that make choices")
    parser.add_argument("--report", type=int, default=8192, help="tokens of each text that is reported on")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--tasks", type=int, default=0, help="items of each task, for the runs that --only names")
    parser.add_argument("--runs", type=Path, default=Path("runs/recovery"), help="checkpoints of what is trained")
    options = parser.parse_args()
    bench = Bench(options)
    for run in wanted(runs(options), options.only):
        bench.do(run)
        if options.tasks:
            bench.task(run)


if __name__ == "__main__":
    main()
