"""Why blocks went: classes of tokens, the stream, pairs from journals, and the command, against plain versions."""

import json
import shutil
from pathlib import Path
from typing import Any

import labs
import pytest
import torch
from torch.nn.functional import cosine_similarity, cross_entropy

from blockpruner import api
from blockpruner.anatomy.reading import read_anatomy
from blockpruner.artifacts import Estimate, write_json
from blockpruner.blocks import Move, parse_mask
from blockpruner.criteria import parse_criterion
from blockpruner.data import Data
from blockpruner.errors import InputError
from blockpruner.evaluation.explanation import Explanation, Interaction
from blockpruner.evaluation.interactions import Seen, interaction, partners, strongest
from blockpruner.evaluation.stream_account import stream_account
from blockpruner.evaluation.token_classes import DEFINITIONS, effects, mean_over, token_classes
from blockpruner.explaining import explain
from blockpruner.explanation_tables import print_explanation
from blockpruner.importance.streams import scores_by_state
from blockpruner.inquiry import CHEAP, inquiry_on
from blockpruner.journal import Journal
from blockpruner.loading.models import load
from blockpruner.plan import Plan
from blockpruner.repairs.closed_form import RIDGES
from blockpruner.subject import subject_of
from blockpruner.surgery.removal import skipped
from blockpruner.texts.calibration import CalibrationRecord, load_calibration
from blockpruner.texts.examples import IGNORED, Examples

DENSE = frozenset()


def plan_of(*steps, **more) -> Plan:
    value = {"format": Plan.FORMAT, "version": 1, "steps": [{"remove": [step]} for step in steps], **more}
    return Plan.from_value(value, "here")


def examples_of(*rows) -> Examples:
    ids = torch.tensor(rows)
    targets = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=IGNORED)
    return Examples("next token", {"input_ids": ids}, targets, (1,) * len(ids))


def marked(classes, by):
    """The name of the class of each predicted token."""
    found: dict[tuple[int, int], str] = {}
    for each in classes:
        if each.by == by:
            for place in each.where.nonzero().tolist():
                assert tuple(place) not in found
                found[tuple(place)] = each.name
    return [found[place] for place in sorted(found)]


def test_a_token_is_new_repeated_or_copied_by_what_stands_before_it():
    classes = token_classes(examples_of([5, 6, 7, 6, 5, 6, 9]))
    assert marked(classes, "occurrence") == ["new", "new", "repeated", "repeated", "copied", "new"]


def test_masked_text_is_repeated_if_it_is_anywhere_in_the_input():
    targets = torch.tensor([[IGNORED, 6, 8, IGNORED]])
    examples = Examples("masked tokens", {"input_ids": torch.tensor([[5, 1, 1, 6]])}, targets, (1,))
    assert marked(token_classes(examples), "occurrence") == ["repeated", "new"]


def test_frequent_tokens_are_the_most_frequent_that_make_up_half():
    classes = token_classes(examples_of([9, 5, 5, 5, 6, 6, 7, 8]))  # targets: 5 5 5 6 6 7 8
    assert marked(classes, "frequency") == ["frequent"] * 5 + ["rare"] * 2  # 3 of 7 are not half, 5 are
    alike = token_classes(examples_of([9, 5, 6, 7]))
    assert {each.name for each in alike if each.by == "frequency"} == {"frequent"}


def test_positions_are_the_first_eighth_the_rest_of_the_first_half_and_the_second_half():
    classes = token_classes(examples_of(list(range(16))))
    assert marked(classes, "position") == ["first eighth"] + ["rest of first half"] * 6 + ["second half"] * 8


def test_kinds_are_told_by_the_text_of_a_token(tokenizer):
    ids = tokenizer("<bos> a1 2,\n\n", add_special_tokens=False)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    ids = [ids[0], *ids, tokenizer("ï", add_special_tokens=False)["input_ids"][0]]
    classes = token_classes(examples_of(ids), tokenizer)
    texts = [tokenizer.decode([token]) for token in ids[1:]]
    assert texts[0] == "<bos>"
    for text, kind in zip(texts, marked(classes, "kind"), strict=True):
        wanted = (
            "other"
            if text == "<bos>" or "\ufffd" in text
            else "word"
            if any(c.isalpha() for c in text)
            else "number"
            if any(c.isdigit() for c in text)
            else "punctuation"
            if text.strip()
            else "whitespace"
        )
        assert kind == wanted
    assert {"other", "number", "punctuation", "whitespace"} <= set(marked(classes, "kind"))


def test_every_predicted_token_has_one_class_of_each_kind(tokenizer):
    examples = examples_of(*torch.randint(0, 300, (3, 24), generator=torch.Generator().manual_seed(0)).tolist())
    classes = token_classes(examples, tokenizer)
    asked = examples.targets != IGNORED
    assert torch.equal(classes[0].where, asked)
    for by in DEFINITIONS:
        assert torch.equal(torch.stack([each.where for each in classes if each.by == by]).sum(0), asked.int())
    assert all(bool(each.where.any()) for each in classes)


def test_the_mean_of_a_class_has_the_error_of_a_ratio_over_windows():
    values = torch.tensor([[1.0, 2.0, 9.0], [4.0, 9.0, 9.0], [9.0, 9.0, 9.0], [2.0, 2.0, 2.0]], dtype=torch.float64)
    where = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0], [1, 1, 1]]).bool()
    found: Any = mean_over(values, where)
    assert (found.value, found.n) == (pytest.approx(13 / 6), 3)
    r = 13 / 6
    spread = ((3 - 2 * r) ** 2 + (4 - r) ** 2 + (6 - 3 * r) ** 2) / 2
    assert found.stderr == pytest.approx((spread / 3) ** 0.5 / 2)
    assert mean_over(values, where.new_zeros(4, 3)) is None
    assert mean_over(values / 0, where) is None
    one = mean_over(values[:1], where[:1])
    assert one is not None
    assert (one.stderr, one.n) == (None, 1)


def test_changes_are_paired_token_by_token():
    examples = examples_of([5, 6, 7, 8], [5, 6, 7, 9])
    before = torch.rand(2, 4, dtype=torch.float64)
    found = effects(token_classes(examples), before, before + 0.25)
    assert all(each.change and each.change.value == pytest.approx(0.25) for each in found)
    assert all(each.change and each.change.stderr == pytest.approx(0, abs=1e-9) for each in found)
    assert (found[0].tokens, found[0].share) == (6, 1.0)


ENTRIES = ("causal/llama", "causal/falcon", "causal/mamba", "masked/bert", "seq2seq/fsmt")


@pytest.mark.parametrize("entry", ENTRIES)
def test_the_account_of_the_stream_is_that_of_all_states_at_once(entry):
    model, _ = labs.made(entry)
    lab = labs.lab_of(entry, examples=labs.examples(model, windows=16, tokens=24))
    for move in [labs.moves_of(lab)[1], labs.moves_of(lab, "layer")[-1]]:
        states: list[Any] = []

        def keep(before, after, states=states):
            states.append((before[0, 1:].double(), after[0, 1:].double()))
            return before[..., 0] * 0

        scores_by_state(lab, [move], keep, name="all", unit="")
        account = stream_account(lab, move)
        updates = [after - before for before, after in states]
        lengths = [u.norm(dim=-1) / x.norm(dim=-1) for u, (x, _) in zip(updates, states, strict=True)]
        turns = [cosine_similarity(u, x, dim=-1) for u, (x, _) in zip(updates, states, strict=True)]
        assert account.length is not None
        assert account.cosine is not None
        assert account.length.value == pytest.approx(float(torch.stack(lengths).mean()), rel=1e-4)
        assert account.cosine.value == pytest.approx(float(torch.stack(turns).mean()), abs=1e-5)
        assert account.length.n == len(states) == 16
        fit, rest = torch.cat(updates[:12]), torch.cat(updates[12:])
        power = rest.square().sum(-1).mean()
        constant = 1 - (rest - fit.mean(0)).square().sum(-1).mean() / power
        assert account.constant_share == pytest.approx(float(constant), abs=1e-4)
        assert account.linear_share == pytest.approx(linear_share(states, fit, rest, power), abs=1e-3)
        assert account.tokens == (len(fit), len(rest))


def linear_share(states, fit, rest, power):
    """The best of the same ridges, from all tokens at once."""
    given = [x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() for x, _ in states]
    x, other = torch.cat(given[:12]), torch.cat(given[12:])
    centred, y = x - x.mean(0), fit - fit.mean(0)
    found = []
    for ridge in RIDGES:
        level = centred.square().sum(0)
        level = ridge * level.clamp_min(level.median())
        weight = torch.linalg.solve(centred.T @ centred + torch.diag(level), centred.T @ y)
        made = (other - x.mean(0)) @ weight + fit.mean(0)
        found.append(1 - float((rest - made).square().sum(-1).mean() / power))
    return max(found)


def test_an_update_that_is_a_linear_map_of_the_stream_is_found_to_be_one():
    torch.manual_seed(0)
    model, _ = labs.made("causal/llama")
    lab = labs.lab_of("causal/llama", examples=labs.examples(model, windows=8, tokens=24))
    (move,) = [each for each in labs.moves_of(lab) if str(each) == "mlp.1"]
    norm, mlp = model.model.layers[1].post_attention_layernorm, model.model.layers[1].mlp
    weight = torch.randn(32, 32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mlp, "forward", lambda x: x / norm.weight @ weight)
        account = stream_account(lab, move)
    assert account.linear_share is not None
    assert account.constant_share is not None
    assert account.linear_share > 0.999
    assert account.constant_share < 0.5


def test_little_text_gives_what_it_can_and_says_what_it_cannot():
    model, _ = labs.made("causal/llama")
    lab = labs.lab_of("causal/llama", examples=labs.examples(model, windows=1))
    move = labs.moves_of(lab)[0]
    one = stream_account(lab, move)
    assert one.length is not None
    assert one.constant_share is None
    assert "one window" in (one.reason or "")
    few = stream_account(labs.lab_of("causal/llama"), move)
    assert few.constant_share is not None
    assert few.linear_share is None
    assert "takes more than 32 tokens" in (few.reason or "")


def test_a_move_that_is_no_run_of_blocks_has_a_reason_instead():
    account = stream_account(labs.lab_of("causal/llama"), Move.parse("attention.0+mlp.2"))
    assert account.length is None
    assert "do not follow each other" in (account.reason or "")


def journal_of(path: Path, losses, pieces=1, **identity) -> Path:
    """A journal of these losses, mask -> micro-batch -> values."""
    more = {"values per window": str(pieces)} if pieces > 1 else {}
    with Journal.open(path, {"model": "f", "objective": "loss", **more, **identity}) as journal:
        for mask, batches in losses.items():
            journal.append([{"mask": mask, "batch": b, "losses": values} for b, values in batches.items()])
    return path


PLAIN = {
    "dense": {0: [1.0, 1.0], 1: [1.0, 1.0]},
    "attention.0": {0: [1.1, 1.1], 1: [1.2, 1.2]},
    "mlp.1": {0: [1.2, 1.2], 1: [1.2, 1.2]},
    "mlp.2": {1: [1.5, 1.5]},
    "attention.0+mlp.1": {0: [1.9, 2.1], 1: [2.0, 2.0]},
    "attention.0+mlp.2": {0: [1.3, 1.3], 1: [1.4, 1.5]},
    "attention.0+mlp.1+mlp.2": {0: [2.5, 2.5]},
}


def test_an_interaction_is_the_mean_over_the_windows_that_all_four_masks_were_seen_on(tmp_path):
    seen = Seen.read(journal_of(tmp_path / "journal.jsonl", PLAIN))
    one, two, three = (Move.parse(text) for text in ("attention.0", "mlp.1", "mlp.2"))
    found: Any = interaction(seen, DENSE, one, two, "nats")
    assert found.value.value == pytest.approx(((1.9 - 1.3) + (2.1 - 1.3) + 0.6 + 0.6) / 4)
    assert (found.value.n, found.value.unit, found.rise) == (4, "nats", pytest.approx(0.2))
    partly: Any = interaction(seen, DENSE, one, three, "nats")
    assert (partly.value.value, partly.value.n) == (pytest.approx((-0.3 - 0.2) / 2), 2)
    assert interaction(seen, DENSE, two, three, "nats") is None
    later: Any = interaction(seen, one.blocks, two, three, "nats")
    assert later.value.value == pytest.approx((2.5 - 1.9 - 1.3 + 1.1 + 2.5 - 2.1 - 1.3 + 1.1) / 2)
    assert (later.value.n, later.given, later.rise) == (2, ("attention.0",), pytest.approx(0.2))


def test_pieces_of_one_window_are_one_value(tmp_path):
    seen = Seen.read(journal_of(tmp_path / "journal.jsonl", PLAIN, pieces=2))
    found: Any = interaction(seen, DENSE, Move.parse("attention.0"), Move.parse("mlp.1"), "nats")
    assert (found.value.value, found.value.n) == (pytest.approx(0.65), 2)
    assert found.value.stderr == pytest.approx(0.05)


def test_partners_are_given_what_was_gone_when_both_were_last_there(tmp_path):
    seen = Seen.read(journal_of(tmp_path / "journal.jsonl", PLAIN))
    scores = {"mlp.2": None, "mlp.1": None, "attention.0": None}
    steps = [{"remove": ["attention.0"], "scores": scores}, {"remove": ["mlp.1"]}]
    first, second = partners(seen, plan_of(steps=steps))
    assert [(pair.partner, pair.given) for pair in first] == [("mlp.1", ()), ("mlp.2", ())]
    assert [(pair.partner, pair.given) for pair in second] == [("attention.0", ()), ("mlp.2", ("attention.0",))]
    assert first[0].value == second[0].value


def test_partners_that_are_named_are_sure_among_all_pairs_and_leave_a_model_to_speak_of():
    def pair(partner, value, stderr, n=9, rise=0.1):
        estimate = Estimate(value=value, stderr=stderr, n=n, unit="nats")
        return Interaction(partner=partner, given=(), rise=rise, value=estimate)

    sure, large, few = pair("mlp.0", -0.5, 0.1), pair("mlp.1", 0.9, 0.1), pair("mlp.2", 0.5, 0.1, n=2)
    broken, alike = pair("mlp.3", 9.0, 0.1, rise=5.0), pair("mlp.4", 0.5, 0.0)
    assert strongest([sure, large, few, broken, alike]) == [large, sure]
    assert strongest([sure] + [pair("mlp.5", 0.0, 0.1)] * 100) == []  # five errors of t with 8 degrees: p = 0.001


def test_a_loss_that_is_not_finite_makes_no_interaction(tmp_path):
    wild = {**PLAIN, "mlp.1": {0: ["nan", 1.2], 1: [1.2, 1.2]}}
    seen = Seen.read(journal_of(tmp_path / "journal.jsonl", wild))
    assert interaction(seen, DENSE, Move.parse("attention.0"), Move.parse("mlp.1"), "nats") is None


def test_a_file_that_is_no_journal_is_refused(tmp_path):
    (tmp_path / "journal.jsonl").write_text("{}\n", encoding="utf-8")
    with pytest.raises(InputError, match="damaged"):
        Seen.read(tmp_path / "journal.jsonl")


TEXT = ("--tokens", "256", "--window", "32")


@pytest.fixture
def searched(run, checkpoint, prose):
    """A run folder with a plan of three steps, and the journal of all pairs."""
    words = ("search", checkpoint, "--target", "blocks=3", "--search", "exhaustive", "--calibration", prose)
    found = run(*words, *TEXT, "--run", "one", "--dtype", "float32")
    assert found.code == 0, found.err
    return "one"


def explained(run, folder, checkpoint, prose, *more) -> Any:
    found = run("explain", folder, "--model", checkpoint, "--data", prose, *TEXT, "--dtype", "float32", "--json", *more)
    assert found.code == 0, found.err
    return json.loads(found.out)


def test_the_command_explains_a_search_and_resumes_without_computing(run, searched, checkpoint, prose, monkeypatch):
    value = explained(run, searched, checkpoint, prose)
    written = Path("one/explanation.json")
    assert json.loads(written.read_text(encoding="utf-8")) == value
    assert Explanation.load(written).model_dump(mode="json") == value
    plan = Plan.read(Path("one/plan.json"))
    assert [step["remove"] for step in value["steps"]] == [list(step.remove) for step in plan.steps]
    assert [len(step["given"]) for step in value["steps"]] == [0, 1, 2]
    assert [len(step["partners"]) for step in value["steps"]] == [7, 7, 2]
    for step, planned in zip(value["steps"], plan.steps, strict=True):
        assert planned.loss is not None
        assert [score["of"] for score in step["scores"]] == [8] * 4
        assert step["choice"]["behind"] >= 0
        # the same text as the search had, so its rises are those of all tokens
        assert step["classes"][0]["change"]["value"] == pytest.approx(step["choice"]["rise"], abs=1e-5)
    whole = value["whole"][0]["change"]["value"]
    assert whole == pytest.approx(sum(step["classes"][0]["change"]["value"] for step in value["steps"]))
    monkeypatch.setattr("blockpruner.engine.objective.ModelObjective.batch_losses", None)
    assert explained_again(run, searched, checkpoint, prose) == value


def explained_again(run, folder, checkpoint, prose) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("blockpruner.evaluation.stream_account._read", None)
        patch.setattr("blockpruner.importance.streams._Reader.units", lambda *_: pytest.fail("states are read again"))
        patch.setattr("blockpruner.inquiry.Inquiry.price", lambda _: (0, 0.0, 0.0))
        return explained(run, folder, checkpoint, prose)


@pytest.mark.parametrize("search", ["greedy", "one-shot", "evolution:generations=2,offspring=4"])
def test_journals_of_other_searches_are_read(run, checkpoint, prose, search):
    words = ("search", checkpoint, "--target", "blocks=2", "--search", search, "--calibration", prose)
    found = run(*words, *TEXT, "--run", "one", "--dtype", "float32")
    assert found.code == 0, found.err
    value = explained(run, "one", checkpoint, prose, "--criteria", "cosine")
    assert len(value["steps"]) == 2
    windows = {pair["value"]["n"] for step in value["steps"] for pair in step["partners"]}
    assert windows <= set(range(1, 9))
    assert bool(windows) == ("partners" not in value["notes"])
    assert windows or search != "greedy"


def test_losses_of_tokens_are_those_of_plain_passes(checkpoint, prose, tokenizer):
    loaded = load(str(checkpoint), dtype="float32")
    model, plan = loaded.model, plan_of("attention.1", "mlp.3")
    found = api.explain(model, loaded.tokenizer, plan, calibration=str(prose), tokens=128, window=32)
    ids = load_calibration(str(prose), tokenizer, window=32, tokens=128).windows
    anatomy, losses = read_anatomy(model), {}
    for text in ("dense", "attention.1", "attention.1+mlp.3"):
        with torch.no_grad(), skipped(model, parse_mask(text), anatomy=anatomy):
            logits = model(ids).logits[:, :-1]
        each = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(ids), -1)
        losses[text] = torch.nn.functional.pad(each.double(), (0, 1))
    classes = token_classes(examples_of(*ids.tolist()), loaded.tokenizer)
    for step, (before, after) in zip(
        [*found.steps, None],
        [("dense", "attention.1"), ("attention.1", "attention.1+mlp.3"), ("dense", "attention.1+mlp.3")],
        strict=True,
    ):
        wanted = effects(classes, losses[before], losses[after])
        for mine, plain in zip(step.classes if step else found.whole, wanted, strict=True):
            assert (mine.by, mine.name, mine.tokens) == (plain.by, plain.name, plain.tokens)
            assert mine.before is not None
            assert plain.before is not None
            assert mine.before.value == pytest.approx(plain.before.value, abs=1e-5)
            assert mine.change is not None
            assert plain.change is not None
            assert mine.change.value == pytest.approx(plain.change.value, abs=1e-5)
            assert mine.change.stderr == pytest.approx(plain.change.stderr, abs=1e-5)


def test_a_block_that_does_nothing_is_said_to_write_nothing(run, checkpoint, prose):
    write_json(Path("hand.json"), plan_of("attention.2").model_dump(mode="json"))
    found = run("explain", "hand.json", "--model", checkpoint, "--data", prose, *TEXT, "--dtype", "float32")
    assert found.code == 0, found.err
    assert "It wrote nothing into the stream." in found.out
    assert "Tokens pay +0.0000" in found.out
    assert "cosine would take it 1st" in found.out
    assert "there is no journal" in found.out
    assert not Path("explanation.json").exists()


def test_scores_in_the_run_folder_are_not_computed_again(run, searched, checkpoint, prose):
    words = ("--criterion", "cosine", "--calibration", prose, "--tokens", "64", "--window", "16", "--run", searched)
    assert run("score", checkpoint, *words, "--dtype", "float32").code == 0
    value = explained(run, searched, checkpoint, prose, "--criteria", "cosine,magnitude")
    table = json.loads(Path("one/scores.json").read_text(encoding="utf-8"))["criteria"][0]
    for step in value["steps"]:
        assert step["scores"][0]["score"] == table["scores"][step["remove"][0]]
        assert [score["criterion"].partition(":")[0] for score in step["scores"]] == ["cosine", "magnitude"]
    assert "cosine" in value["notes"]["scores.json"]


def test_a_pruned_folder_is_explained_with_the_whole_model_and_stays_as_it_is(run, searched, checkpoint, prose):
    shutil.copytree(checkpoint, "cut")
    Plan.read(Path("one/plan.json")).cut(1).save(Path("cut/plan.json"))
    before = sorted(path.name for path in Path("cut").iterdir())
    value = explained(run, "cut", checkpoint, prose, "--run", "why")
    assert sorted(path.name for path in Path("cut").iterdir()) == before
    assert Path("why/explanation.json").exists()
    assert (len(value["steps"]), value["steps"][0]["partners"]) == (1, [])


def test_in_a_plan_that_is_not_nested_a_removal_is_given_all_others(checkpoint, prose):
    loaded = load(str(checkpoint), dtype="float32")
    plan = plan_of("attention.1", "mlp.3", nested=False)
    found = api.explain(loaded.model, loaded.tokenizer, plan, calibration=str(prose), tokens=64, window=32)
    assert [step.given for step in found.steps] == [("mlp.3",), ("attention.1",)]
    assert found.steps[0].choice.rise is None


def inquiry_of(model, *steps, windows=8) -> Any:
    """An inquiry on made-up text, for models without a tokenizer."""
    asked, subject = labs.examples(model, windows, 24), subject_of(model, None, "tiny")
    record: Any = {"source": "made up", "documents": 1, "window": 24, "windows": windows, "tokens": 24 * windows}
    record |= {"bytes": 0, "seed": 0, "bos": "none", "separator": "", "fingerprint": asked.fingerprint}
    data = Data(asked, CalibrationRecord(**record))
    return inquiry_on(subject, plan_of(*steps), data, [parse_criterion(name) for name in CHEAP])


@pytest.mark.parametrize(
    ("entry", "steps"),
    [
        ("causal/gpt2", ("attention.1", "mlp.0")),
        ("causal/mamba", ("mixer.1", "mixer.0")),
        ("causal/qwen2_moe", ("mlp.1", "attention.2")),
        ("masked/bert", ("attention.1", "mlp.1")),
        ("seq2seq/t5", ("encoder.mlp.1", "decoder.cross_attention.0")),
        ("seq2seq/bart", ("encoder.attention.1", "decoder.mlp.0")),
    ],
)
def test_every_architecture_that_predicts_tokens_is_explained_in_full(entry, steps, capsys):
    model, _ = labs.made(entry)
    found = explain(inquiry_of(model, *steps))
    inquiry = inquiry_of(model, *steps)
    asked = inquiry.data.examples.targets != IGNORED
    for classes in (found.whole, *(step.classes for step in found.steps)):
        assert classes[0].tokens == int(asked.sum())
        assert {each.by for each in classes} == {"all", "frequency", "occurrence", "position"}
    losses = inquiry.objective.batch_losses([DENSE], 0)
    assert found.whole[0].before is not None
    assert inquiry.objective.batches == 1
    (values,) = losses
    assert found.whole[0].before.value == pytest.approx(sum(values) / len(values), rel=1e-6)
    for step in found.steps:
        assert step.stream.length is not None
        assert step.stream.length.value > 0
        assert all(score.place for score in step.scores)
        assert len(step.scores) == len(CHEAP)
    print_explanation(found)
    assert f"1. {steps[0]}: " in capsys.readouterr().out


def test_a_model_without_a_head_has_scores_and_a_stream_and_says_what_it_lacks(capsys):
    model, _ = labs.made("masked/bert")
    found = explain(inquiry_of(model.bert, "attention.1", "mlp.3"))
    assert found.whole == ()
    assert "predicts no tokens" in found.notes["classes"]
    assert all(step.stream.linear_share is not None and step.scores[0].place for step in found.steps)
    print_explanation(found)
    assert "predicts no tokens" in capsys.readouterr().out


def test_the_price_is_said_and_a_dry_run_stops_there(run, searched, checkpoint, prose):
    found = run("explain", searched, "--model", checkpoint, "--data", prose, *TEXT, "--dry-run", "--json")
    assert found.code == 0, found.err
    value = json.loads(found.out)
    assert value["masks"] == 4
    assert value["passes"] > 3
    assert not Path("one/explanation.json").exists()


def test_criteria_are_named_with_several_options(run, searched, checkpoint, prose):
    words = ("explain", searched, "--model", checkpoint, "--data", prose, *TEXT)
    found = run(*words, "--criteria", "coalitions:share=0.5,draws=4,magnitude", "--dry-run", "--json")
    assert found.code == 0, found.err


@pytest.mark.parametrize("verb", ["explain", "pareto"])
def test_a_model_that_the_plan_names_and_that_is_not_here_can_be_named(run, searched, verb):
    found = run(verb, searched)
    assert found.code in (2, 4), found.err
    assert "plan.json is for 'planted'" in found.err
    assert "--model" in found.err


def test_plans_that_cannot_be_explained_are_refused(run, checkpoint):
    write_json(Path("empty.json"), plan_of().model_dump(mode="json"))
    for words, reason in (
        (("nowhere",), "no plan at nowhere"),
        (("empty.json",), "--model"),
        (("empty.json", "--model", checkpoint), "nothing to explain"),
    ):
        found = run("explain", *words)
        assert (found.code, reason in found.err) == (2, True), found.err
