"""Model cards: the README.md beside the weights says what the plan and the recovery say, whatever names users chose."""

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

import blockpruner as bp
from blockpruner.artifacts import Estimate
from blockpruner.blocks import Block
from blockpruner.loading.models import identify, load
from blockpruner.model_card import Written, license_of, model_card
from blockpruner.plan import ModelIdentity, Plan
from blockpruner.planning import find_plan, prepare
from blockpruner.repairs.recovery import GapRecord
from blockpruner.subject import open_subject, save_subject
from blockpruner.surgery import checkpoint as checkpoints

IDENTITY = ModelIdentity(name="org/whole-1b", model_type="llama", parameters=1000, fingerprint="00")
WRITTEN = Written("stand-ins", 800, "AutoModelForCausalLM")
BY_HAND = Plan.of(bp.Move.of(Block.parse("mlp.1")), bp.Move.of(Block.parse("attention.3")))


@pytest.fixture
def unreloaded(monkeypatch):
    """Spares the fresh process."""
    monkeypatch.setattr(checkpoints, "reload_difference", lambda *_, **__: 0.0)


def estimate(value):
    return Estimate(value=value, stderr=0.25, n=4, unit="nats per token")


def record(method: str = "span:rank=8", **more) -> Any:
    """A recovery of two gaps."""
    gap = GapRecord(
        removed="mlp.1", place="model.layers.1.mlp", added_parameters=40, settings={}, error=0.5, applied=True
    )
    span = gap.model_copy(update={"settings": {"stands for": "layers 1 to 2"}})
    told: dict[str, Any] = {
        "steps": (type("Step", (), {"method": method, "applied": True, "gaps": (gap, span)})(),),
        "tokens": (1024, 256),
        "gaps": (gap, span),
        "added_parameters": 80,
        "dense": estimate(2.0),
        "pruned": estimate(3.0),
        "recovered": estimate(2.25),
        "recovered_share": 0.75,
    }
    return type("Told", (), {**told, **more})()


def test_the_head_is_what_the_hub_reads():
    data: Any = ModelCard(model_card(IDENTITY, BY_HAND, WRITTEN, license_name="apache-2.0")).data
    assert (data.base_model, data.library_name, data.license) == ("org/whole-1b", "transformers", "apache-2.0")
    assert "blockpruner" in data.tags
    local = IDENTITY.model_copy(update={"name": "my-folder"})
    data = ModelCard(model_card(local, BY_HAND, WRITTEN)).data
    assert (data.base_model, data.license) == (None, None)


def test_a_plan_by_hand_is_told_without_evidence():
    text = model_card(IDENTITY, BY_HAND, WRITTEN)
    assert "1. mlp.1\n2. attention.3" in text
    assert "does not say how they were found" in text
    assert "800 of 1,000 parameters (20.0% less)" in text
    assert "What the search measured" not in text
    assert "import blockpruner" in text
    stock = model_card(IDENTITY, BY_HAND, Written("stock", 800, "AutoModelForMaskedLM"))
    assert "import blockpruner" not in stock
    assert "from transformers import AutoModelForMaskedLM, AutoTokenizer" in stock
    assert "as zeros" in model_card(IDENTITY, BY_HAND, Written("zeroed", 1000, "AutoModel"))


def test_what_a_recovery_did_is_told_with_its_errors_and_the_layers_that_are_left():
    text = model_card(IDENTITY, BY_HAND, WRITTEN, record())
    assert "`span:rank=8`, fitted on 1,024 tokens, with 80 parameters added. It won back 75% of the increase." in text
    assert "| recovered | 2.2500 ± 0.2500 |" in text
    assert "On 256 held-out tokens" in text
    assert "By the numbers of the whole model, `model.layers.1.mlp` stands for layers 1 to 2." in text
    layers = {"": [(0,), (1, 2), (4,)], "decoder": [(1,)]}
    text = model_card(IDENTITY, BY_HAND, WRITTEN, record(), layers=layers)
    assert (
        "Layers with anything left: 0, 1 (which stands for 2 too), 4. Layers of the decoder with anything left: 1."
        in text
    )
    assert "with anything left" not in model_card(IDENTITY, BY_HAND, WRITTEN)
    assert "| recovered | not known |" in model_card(IDENTITY, BY_HAND, WRITTEN, record(recovered=None))


def test_names_that_users_chose_are_one_short_line_of_harmless_letters():
    nasty = "a`b\n---\nlicense: mit\n<script>|[x](http://y)" + "z" * 500
    identity = IDENTITY.model_copy(update={"name": nasty, "model_type": nasty})
    method: Any = {"search": nasty, "objective": "loss", "moves": "block", "target": "x", "protected": ()}
    plan = Plan.from_value(
        {
            **BY_HAND.model_dump(mode="json"),
            "method": {**method, "seed": 0, "dtype": "float32"},
            "calibration": {"source": nasty, "windows": 1, "window": 2, "fingerprint": nasty},
        },
        "this",
    )
    text = model_card(identity, plan, WRITTEN, record(method=nasty))
    head, body = text.split("\n---\n", 1)
    assert "license" not in head
    assert "\nlicense" not in body
    for letters in ("<script", "z" * 121, "a`b"):
        assert letters not in body
    title = next(line for line in body.splitlines() if line.startswith("# "))
    assert "[" not in title  # elsewhere such names are code, where brackets are no link
    assert max(map(len, text.splitlines())) < 900


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("---\nlicense: apache-2.0\ntags:\n- a\n---\n# A\n", "apache-2.0"),
        ('---\r\nlicense: "mit"\r\n---\r\n', "mit"),
        ("# A\nlicense: mit\n", None),
        ("---\nlicense: a b: c\n---\n", None),
        ("---\ntags: x\n---\nlicense: mit\n", None),
        ("---\nlicense: [mit]\n---\n", None),
    ],
)
def test_a_license_is_taken_from_the_head_of_the_source_alone(text, expected, tmp_path):
    Path(tmp_path, "README.md").write_bytes(text.encode())
    assert license_of(tmp_path) == expected
    assert license_of(tmp_path / "none") is None
    assert license_of(None) is None


def test_a_saved_model_has_a_card_of_its_own_and_not_that_of_its_source(checkpoint, prose, unreloaded, tmp_path):
    subject = open_subject(load(str(checkpoint), dtype="float32", device="cpu"))
    text: Any = {"tokens": 64, "window": 16}
    plan: Any = find_plan(prepare(subject, target="blocks=2", calibration=str(prose), search="one-shot", **text))
    saved = save_subject(subject, plan, tmp_path / "out", first=1)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert f"{saved.parameters:,} of {subject.identity.parameters:,} parameters" in card
    assert f"1. {plan.steps[0].remove[0]}\n\n" in card
    assert "Found by the search `one-shot" in card
    assert f"4 windows of 16 tokens of `{prose.name}`" in card
    assert f"| whole model | {plan.dense_loss.value:.4f} ± " in card
    assert f"blockpruner {bp.__version__}" in card
    assert str(checkpoint) not in card
    assert str(tmp_path) not in card


def test_layers_that_are_gone_as_a_whole_are_told(checkpoint, unreloaded, tmp_path):
    subject = open_subject(load(str(checkpoint), dtype="float32", device="cpu"))
    plan = Plan.of(bp.Move.of(Block.parse("attention.3"), Block.parse("mlp.3")))
    save_subject(subject, plan, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "Layers with anything left: 0, 1, 2." in card
    assert "import blockpruner" not in card


def test_the_card_of_a_recovered_model_says_what_was_done_and_what_that_was_worth(
    checkpoint, prose, unreloaded, tmp_path
):
    loaded = load(str(checkpoint), dtype="float32", device="cpu")
    plan = BY_HAND.model_copy(update={"model": identify(loaded.model, str(checkpoint))})
    words: Any = {"method": "linear:rank=8", "calibration": str(prose), "tokens": 512, "window": 16}
    saved, record = bp.recover(loaded.model, loaded.tokenizer, plan, tmp_path / "out", **words)
    card = (saved.folder / "README.md").read_text(encoding="utf-8")
    assert f"`{record.method}`, fitted on {record.tokens[0]:,} tokens" in card
    assert f"with {record.added_parameters:,} parameters added" in card
    assert f"{saved.parameters:,} of" in card
    assert record.recovered is not None
    assert f"| recovered | {record.recovered.value:.4f} ± " in card
    assert "`recovery.json` what was done then" in card
