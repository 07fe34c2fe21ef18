"""What a search is said to cost, in bytes too, and what it took."""

import json
import time

import pytest
from labs import examples
from tiny import anatomy_of, shared

from blockpruner.artifacts import Traffic, Work
from blockpruner.blocks import parse_mask
from blockpruner.engine.objective import ModelObjective
from blockpruner.loading import lending
from blockpruner.loading.models import load
from blockpruner.loading.streaming import load_streamed
from blockpruner.objectives.kl import KL
from blockpruner.objectives.loss import Loss
from blockpruner.planning import find_plan, prepare
from blockpruner.price import Receipt, quote, search_for
from blockpruner.searching.contract import DENSE, Stop
from blockpruner.subject import open_subject

MASKS = [parse_mask(text) for text in ("mlp.0", "attention.1", "attention.1+mlp.2", "mlp.3", "attention.0+mlp.0")]
STATE = 2 * 12 * 32 * 4  # bytes of a micro-batch's: rows, tokens, width, float32


def objective_of(family="llama", measure=None, memory=None, rows=6):
    text = examples(shared(family), rows, 12)
    return ModelObjective(
        shared(family), anatomy_of(family), text, measure or Loss(), batch_tokens=2 * text.tokens, memory=memory
    )


@pytest.mark.parametrize("measure", [Loss(), KL()])
@pytest.mark.parametrize("memory", [None, 0, STATE, 4 * STATE, 5 * STATE + 1, 9 * STATE, 2**30])
def test_bytes_are_counted_as_they_are_moved(measure, memory):
    objective = objective_of(measure=measure, memory=memory)
    asked = {0: [DENSE, *MASKS], 2: MASKS[:3], 1: MASKS[2:]}
    counted = objective.traffic(asked)
    list(objective.losses(asked))
    assert objective.moved == counted
    assert counted.held <= (2**30 if memory is None else memory)
    assert (counted.spilled > 0) == (memory is not None and memory < 2**30)
    layers = [shared("llama").get_submodule(layer.path) for layer in anatomy_of("llama").stacks[0].layers]
    weights = sum(parameter.nbytes for layer in layers for parameter in layer.parameters())
    assert counted.read == (0 if memory is None else weights)
    again = objective.traffic({0: MASKS})
    list(objective.losses({0: MASKS}))
    assert objective.moved == counted + again


def test_plain_passes_read_all_layers_each(caplog):
    objective = objective_of(memory=0)
    read = objective.traffic({0: [DENSE]}).read
    objective.fallback = "a test"
    for measure, beside in ((Loss(), 0), (KL(), 1)):
        objective.measure = measure
        before = objective.moved
        counted = objective.traffic({0: MASKS[:2], 1: MASKS[:1]})
        list(objective.losses({0: MASKS[:2], 1: MASKS[:1]}))
        assert objective.moved == before + counted
        assert counted == Traffic(read=(2 * (2 + beside) + 2 * (1 + beside)) * read)


@pytest.fixture
def task(checkpoint, prose):
    def make(streamed=False, **options):
        found = (
            load_streamed(str(checkpoint), dtype="float32")
            if streamed
            else load(str(checkpoint), dtype="float32", device="cpu")
        )
        subject = open_subject(found, 4000 if streamed else None)
        given = {"calibration": str(prose), "target": "blocks=3", "tokens": 96, "window": 16, **options}
        return prepare(subject, **given)

    return make


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("search", ["exhaustive", "greedy"])
def test_the_receipt_holds_what_was_said_and_what_was_spent(task, tmp_path, search, streamed):
    job = task(streamed, search=search)
    said = quote(job)
    plan, receipt = search_for(job, said, tmp_path)
    assert Receipt.load(tmp_path / "price.json") == receipt
    assert receipt.said == said
    assert plan.stop_reason == Stop.TARGET
    spent = receipt.spent
    assert (spent.evaluations, spent.work) == (plan.evaluations, plan.work)
    assert (spent.traffic.read > 0) == streamed
    assert (spent.traffic.spilled > 0) == streamed
    assert spent.traffic.model_dump() == pytest.approx(said.traffic.model_dump(), rel=0.3)  # other blocks went there
    assert said.memory == job.objective.weight_bytes + said.traffic.held  # its logits never exist as such
    assert spent.memory is None or spent.memory >= job.objective.weight_bytes
    assert not receipt.resumed
    _, again = search_for(task(streamed, search=search), said, tmp_path)  # which has nothing left to do
    assert not again.resumed
    assert (again.spent.traffic, again.spent.work) == (spent.traffic, plan.work)
    assert again.spent.seconds > spent.seconds
    (tmp_path / "price.json").unlink()  # as if the session that searched had been killed
    _, killed = search_for(task(streamed, search=search), said, tmp_path)
    assert killed.resumed
    assert (killed.spent.traffic, killed.spent.work) == (Traffic(), plan.work)


@pytest.mark.parametrize("streamed", [False, True])
def test_the_draw_of_a_vocabulary_is_in_price_receipt_and_plan_and_a_run_goes_on_with_it(task, tmp_path, streamed):
    job = task(streamed, search="exhaustive", objective="sampled-loss:vocabulary=40")
    whole = task(streamed, search="exhaustive")
    draw, moved = job.objective.drawing()
    assert draw.head_tokens == 2 * whole.objective.whole_pass().head_tokens
    said = quote(job)
    plan, receipt = search_for(job, said, tmp_path)
    assert plan.work is not None
    assert receipt.spent.work == plan.work
    assert plan.work.head_tokens == said.work.head_tokens  # each candidate, each token
    assert plan.work.head_tokens < quote(whole).work.head_tokens
    assert receipt.spent.traffic.read == said.traffic.read >= moved.read
    header = (tmp_path / "journal.jsonl").read_text(encoding="utf-8").splitlines()[0]
    assert job.objective.drawn in header
    again = find_plan(task(streamed, search="exhaustive", objective="sampled-loss:vocabulary=40"), tmp_path)
    assert again == plan
    assert plan.steps[0].loss is not None
    assert plan.steps[0].loss.unit == "nats per token, estimated"


def test_minutes_of_a_streamed_search_are_those_of_each_reading_and_not_of_each_token(checkpoint, prose, monkeypatch):
    pause, seen = 0.15, []

    class Slow(lending._Lender):
        def take(self, *args):
            if not self._kept:
                seen.append(self)
                time.sleep(pause)
            super().take(*args)

    monkeypatch.setattr(lending, "_Lender", Slow)
    subject = open_subject(load_streamed(str(checkpoint), dtype="bfloat16"), 4000)
    job = prepare(subject, target="blocks=1", calibration=str(prose), tokens=96, window=16, search="exhaustive")
    objective, layers = job.objective, len(subject.anatomy.stacks[0].layers)
    once = objective.traffic({0: [DENSE]})
    assert objective.seconds(Work(), once) > 0.9 * pause * layers
    assert objective.seconds(objective.whole_pass()) < objective.seconds(Work(), once)
    said = quote(job)
    seen.clear()
    find_plan(job)
    assert 0.9 < objective.seconds(Work(), said.traffic) / (pause * len(seen)) < 3  # by tokens it would be 40
    assert said.seconds == objective.seconds(said.work, said.traffic)


@pytest.mark.parametrize("search", ["greedy", "exhaustive", "random"])
def test_to_watch_the_loss_is_in_the_price(task, search):
    size = {"search": search, "tokens": 2048, "window": 64}
    plain, watched = (quote(task(target=target, **size)) for target in ("blocks=3", "blocks=3,loss=+90"))
    more = watched.work.head_tokens - plain.work.head_tokens
    assert (more > 0) == (search == "greedy")  # which has looked at a part of the text alone
    job = task(target="blocks=3,loss=+90", **size)
    plan = find_plan(job)
    assert plan.stop_reason == Stop.TARGET
    assert plan.work is not None
    if search != "greedy":
        assert plan.work.head_tokens == watched.work.head_tokens


def test_a_streamed_model_holds_its_layers_nowhere(task):
    whole, streamed = task(), task(streamed=True)
    layers = streamed.objective.traffic({0: [DENSE]}).read
    assert streamed.objective.weight_bytes == whole.objective.weight_bytes - layers > 0


def test_the_command_says_both(checkpoint, prose, tmp_path, capfd):
    from blockpruner.cli import app

    words = (
        f"search {checkpoint} --target blocks=2 --calibration {prose} --tokens 96 --window 16 --run {tmp_path / 'run'}"
    )
    app([*words.split(), "--dtype", "float32", "--device", "cpu"], standalone_mode=False)
    said = capfd.readouterr().err
    assert "of memory" in said.split("price: ")[1].split("\n")[0]
    assert "of the attention-tokens" in said.split("spent: ")[1].split("\n")[0]
    assert json.loads((tmp_path / "run" / "price.json").read_text())["format"] == "blockpruner.price"
