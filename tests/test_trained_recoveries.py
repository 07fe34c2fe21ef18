"""Adapters, LoRA, distillation, continued pretraining: what they win back, on whatever model, and what they leave."""

import builtins
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from labs import examples, made
from transformers import AutoModelForCausalLM

from blockpruner import recoveries
from blockpruner.anatomy.probing import evaluating
from blockpruner.anatomy.reading import read_anatomy
from blockpruner.blocks import parse_mask
from blockpruner.errors import InputError, MachineError
from blockpruner.recoveries import RECOVERIES, check_installed, format_chain, parse_chain
from blockpruner.recovering import recover as recovered
from blockpruner.repairs.adapters import Updates
from blockpruner.repairs.closed_form import MADE_UP
from blockpruner.repairs.factors import lora_targets
from blockpruner.repairs.pupil import Pupil
from blockpruner.repairs.recovery import Bench, RecoveryRecord, Trained
from blockpruner.repairs.updates import UpdatesAt, token_axes
from blockpruner.searching.costs import readable_bytes
from blockpruner.standin import Replacement, StandIn
from blockpruner.surgery.gaps import UNREPAIRED, Gap, Repair, gaps, repaired
from blockpruner.texts.examples import examples_of

recover: Any = recovered  # what it may not know, it knows here: losses and errors are numbers
QUICK = "batch=4,accumulate=1,epochs=4"
LORA = f"lora:lr=0.003,{QUICK}"
MASK = parse_mask("mlp.1+mlp.3")


@pytest.fixture(scope="module")
def learned(checkpoint, prose, tokenizer):
    """A tiny Llama that has learned a text, its anatomy, and windows of it."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    ids = tokenizer(prose.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    windows = torch.tensor(ids[: 32 * 15]).view(32, 15)
    return model, read_anatomy(model), examples_of(model, torch.nn.functional.pad(windows, (1, 0), value=0))


def mended(learned, method, mask=MASK, **more) -> Any:
    model, anatomy, text = learned
    return recover(model, anatomy, mask, parse_chain(method), text.part(8, 32), text.part(0, 8), **more)


def repair_of(bench, method) -> Any:
    (recovery,) = parse_chain(method)
    return recovery.repair(bench)


def bench_of(name, mask, count=8, **more) -> Bench:
    model, anatomy = made(name)
    return Bench(model, anatomy, parse_mask(mask), examples(model, count, 16), examples(model, 4, 16), **more)


@pytest.mark.parametrize(
    "method",
    [
        f"adapter:rank=8,loss=block,init=zero,lr=0.01,{QUICK}",
        f"adapter:rank=8,loss=kl,init=zero,lr=0.01,{QUICK}",
        f"adapter:rank=8,loss=lm,init=linear,lr=0.005,{QUICK}",
        f"adapter:rank=0,loss=kl,init=zero,lr=0.01,temperature=2,{QUICK}",
        LORA,
        f"{LORA},loss=kl,targets=attention+down_proj",
        f"{LORA},loss=fisher",
        f"adapter:rank=8,loss=fisher,init=zero,lr=0.01,{QUICK}",
        f"distill:lr=0.003,loss=fisher,{QUICK}",
        f"streamline:lr=0.01,{QUICK}",
        f"distill:lr=0.003,hidden=0.1,{QUICK}",
        f"continued:lr=0.003,{QUICK}",
    ],
)
def test_a_pruned_model_that_is_trained_gets_much_of_its_loss_back_and_the_dense_one_stays_as_it_was(learned, method):
    model = learned[0]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    marks = {name: p.requires_grad for name, p in model.named_parameters()}
    keys = set(vars(model))
    repair, record = mended(learned, method)
    assert record.applied
    assert record.dense.value < record.recovered.value < record.pruned.value
    assert record.recovered_share > 0.15
    assert record.gaps[0].curve[0].step == 0
    assert repair != UNREPAIRED
    assert not [module for module in model.modules() if isinstance(module, StandIn) or "lora" in str(type(module))]
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == marks
    assert all(p.grad is None for p in model.parameters())
    assert set(vars(model)) == keys


def test_an_adapter_that_begins_with_the_closed_form_is_no_worse_than_that(learned):
    plain, closed = mended(learned, "linear:rank=8")
    trained, record = mended(learned, f"adapter:rank=8,init=linear,loss=lm,lr=0.005,{QUICK}")
    assert record.recovered.value < closed.recovered.value
    assert record.added_parameters == closed.added_parameters
    kept, record = mended(learned, f"adapter:rank=8,init=linear,loss=kl,lr=9,clip=0,{QUICK}")
    assert record.recovered.value == pytest.approx(closed.recovered.value, rel=1e-6)
    assert "better off as it was before the training" in record.gaps[0].reason
    for path, module in plain.replacements.items():
        assert kept.replacements[path].spec == module.spec == trained.replacements[path].spec
        assert torch.equal(kept.replacements[path].bias, module.bias)


def test_a_chain_goes_on_from_what_it_has_and_says_what_each_step_did(learned):
    repair, record = mended(learned, f"linear:rank=8,{LORA}")
    _, linear = mended(learned, "linear:rank=8")
    _, lora = mended(learned, LORA)
    first, second = record.steps
    assert first.recovered == linear.recovered
    assert second.recovered == record.recovered
    assert record.recovered.value < min(linear.recovered.value, lora.recovered.value)
    assert (first.applied, second.applied) == (True, True)
    assert set(repair.replacements) == {"model.layers.1.mlp", "model.layers.3.mlp"}
    model, anatomy, _ = learned
    assert set(repair.weights) == {f"{path}.weight" for path in lora_targets(model, anatomy, MASK, "all")}
    assert record.gaps == (*first.gaps, *second.gaps)
    assert record.added_parameters == linear.added_parameters


def test_blocks_that_were_trained_for_are_not_added_once_more(learned):
    _, record = mended(learned, f"{LORA},linear:rank=8")
    assert [step.applied for step in record.steps] == [True, False]
    assert {gap.reason for gap in record.steps[1].gaps} == {MADE_UP}


def test_what_stands_in_a_gap_is_trained_on(learned):
    _, linear = mended(learned, "linear:rank=4")
    repair, record = mended(learned, f"linear:rank=4,adapter:rank=16,loss=lm,lr=0.005,{QUICK}")
    assert record.recovered.value < linear.recovered.value
    assert {module.rank for module in repair.replacements.values()} == {4}
    weights, record = mended(learned, "linear:rank=4,continued:lr=0.0001,batch=2,accumulate=1,epochs=4")
    assert record.recovered.value < linear.recovered.value
    assert set(weights.replacements) == set(repair.replacements)
    assert weights.made_up == MASK


def test_a_step_that_makes_held_out_text_worse_is_left_out_unless_forced(learned, monkeypatch):
    def worse(_, bench):
        noise = {gap.path: Replacement("bias", 0, 32) for gap in gaps(bench.anatomy, bench.mask)}
        for each in noise.values():
            torch.nn.init.normal_(each.bias, std=3, generator=torch.Generator().manual_seed(0))
        return Repair({**bench.start.replacements, **noise}), ()

    monkeypatch.setattr(RECOVERIES["bias"], "repair", worse)
    repair, record = mended(learned, "linear:rank=8,bias")
    assert [step.applied for step in record.steps] == [True, False]
    assert record.steps[1].reason.startswith("the held-out loss rises with it, from ")
    assert record.recovered == record.steps[0].recovered
    assert record.applied
    assert not record.reason
    assert {module.kind for module in repair.replacements.values()} == {"linear"}
    repair, record = mended(learned, "linear:rank=8,bias", force=True)
    assert {module.kind for module in repair.replacements.values()} == {"bias"}
    assert record.recovered.value > record.pruned.value


def test_a_method_that_would_drop_what_was_there_cannot_follow(learned, monkeypatch):
    monkeypatch.setattr(RECOVERIES["bias"], "repair", lambda *_: (UNREPAIRED, ()))
    with pytest.raises(InputError, match="bias begins with the plain pruned model"):
        mended(learned, "linear:rank=8,bias")


def test_training_that_does_not_help_leaves_nothing_behind(learned):
    for method in ("lora:lr=1,clip=0", "continued:lr=3", "adapter:rank=4,init=zero,loss=lm,lr=50,clip=0"):
        repair, record = mended(learned, f"{method},{QUICK}")
        assert repair == UNREPAIRED, method
        assert not record.gaps[0].applied
        assert "better off as it was before the training" in record.gaps[0].reason
        assert record.recovered == record.pruned


def test_training_that_did_not_help_can_still_be_taken_by_force(learned, tmp_path):
    method = f"lora:lr=1,{QUICK},evaluate_every=2"
    repair, record = mended(learned, method, folder=tmp_path)
    assert (repair == UNREPAIRED, record.applied) == (True, False)
    forced, record = mended(learned, method, folder=tmp_path, force=True)
    assert record.applied
    alone, _ = mended(learned, method, force=True)
    assert forced.weights
    assert all(torch.equal(value, alone.weights[name]) for name, value in forced.weights.items())


def test_a_whole_model_can_be_trained_too_as_a_ceiling(learned):
    repair, record = mended(learned, f"lora:lr=0.001,{QUICK}", parse_mask("dense"))
    assert record.removed == "dense"
    assert record.pruned == record.dense
    assert (repair == UNREPAIRED) == (record.gaps[0].curve[-1].loss >= record.gaps[0].curve[0].loss)


def test_lora_trains_what_stands_in_gaps_too_if_it_is_told(learned):
    closed, _ = mended(learned, "linear:rank=8")
    apart, plain = mended(learned, f"linear:rank=8,{LORA}")
    together, record = mended(learned, f"linear:rank=8,{LORA},maps=true")
    assert record.recovered.value < plain.recovered.value
    assert record.added_parameters == plain.added_parameters
    assert [step.gaps[-1].settings.get("maps") for step in (*plain.steps, *record.steps)] == [None, None, None, 2]
    with pytest.raises(InputError, match="nothing stands in the gaps"):
        mended(learned, f"{LORA},maps=true")
    for path, module in closed.replacements.items():
        assert torch.equal(apart.replacements[path].down, module.down)
        assert not torch.equal(together.replacements[path].down, module.down)
        assert not together.replacements[path].down.requires_grad
        assert together.replacements[path].spec == module.spec
    assert set(together.weights) == set(apart.weights)
    model, anatomy, text = learned
    bench = Bench(model, anatomy, MASK, text.part(8, 32), text.part(0, 8), start=closed)
    frozen, counted = (next(iter(parse_chain(f"{LORA}{more}"))) for more in ("", ",maps=true"))
    assert isinstance(frozen, Trained)
    assert isinstance(counted, Trained)
    assert counted.numbers(bench) == frozen.numbers(bench) + closed.added_parameters


def test_hidden_states_are_taught_to_lora_too(learned):
    """Beside a loss on predictions, so that streams end nearer to the dense ones than by that alone."""
    model, anatomy, text = learned

    def off(repair):
        with torch.no_grad(), evaluating(model):
            whole = model(**text.inputs, output_hidden_states=True).hidden_states[1:-1]
            with repaired(model, anatomy, MASK, repair):
                found = model(**text.inputs, output_hidden_states=True).hidden_states[1:-1]
        return sum(float((s - t).square().sum() / t.square().sum()) for s, t in zip(found, whole, strict=True))

    alone, beside = (mended(learned, f"{LORA},loss=kl{more},patience=0")[0] for more in ("", ",hidden=10"))
    assert off(beside) < off(alone)
    (method,) = parse_chain("lora:hidden=0.5")
    assert isinstance(method, Trained)
    assert method.taught


def test_merged_lora_computes_what_its_factors_did(learned, monkeypatch):
    model, anatomy, text = learned
    seen = []
    made_pupils: list[Pupil] = []
    original = Pupil.__init__

    def remember(self, *args, **kwargs):
        original(self, *args, **kwargs)
        made_pupils.append(self)

    monkeypatch.setattr(Pupil, "__init__", remember)
    method = f"{LORA},patience=0,evaluate_every=1,targets=all"
    bench = Bench(model, anatomy, MASK, text.part(8, 16), text.part(0, 8), force=True)
    repair, (record,) = repair_of(bench, method)
    best = min((look.loss, look.step) for look in record.curve)[1]
    assert record.settings["best step"] == best
    pupil = next(each for each in made_pupils if each.modules)
    pupil.train(False)
    with torch.no_grad(), evaluating(model):
        with pupil.pruned():
            seen.append(model(**text.inputs).logits)
        with repaired(model, anatomy, MASK, repair):
            seen.append(model(**text.inputs).logits)
        with repaired(model, anatomy, MASK):
            plain = model(**text.inputs).logits
    torch.testing.assert_close(seen[0], seen[1], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(seen[0], plain, atol=1e-2)


@pytest.mark.parametrize(
    ("name", "mask", "projections"),
    [
        ("causal/gpt2", "attention.1+mlp.2", 3 * 2 + 3 * 2),  # Conv1D
        (
            "causal/mamba",
            "mixer.1",
            3 * 3,
        ),  # peft refuses such models' out_proj by name; of dt_proj only weights are read
        ("causal/mixtral", "mlp.1", 4 * 4),
        ("masked/bert", "attention.1+mlp.2", 3 * 4 + 3 * 2),
        ("seq2seq/bart", "encoder.mlp.1+decoder.attention.1", 4 * 4 + 4 * 4 + 3 * 4 + 2 * 3 + 2 * 4),
    ],
)
def test_lora_trains_whatever_projections_are_left_in_blocks(name, mask, projections):
    bench = bench_of(name, mask)
    repair, (record,) = repair_of(bench, "lora:lr=0.01,batch=4,accumulate=1,epochs=4,warmup=0")
    assert record.applied
    first, *_, last = record.curve
    assert last.loss < first.loss - 0.05
    changed = [n for n, w in repair.weights.items() if not torch.equal(w, bench.model.get_parameter(n))]
    assert len(changed) == len(repair.weights) == projections
    assert record.settings.get("no projections in") == ("mlp" if name == "causal/mixtral" else None)


@pytest.mark.parametrize(("name", "mask"), [("masked/bert", "attention.1"), ("seq2seq/t5", "decoder.mlp.1")])
def test_other_models_are_trained_on_their_own_question(name, mask):
    bench = bench_of(name, mask)
    for method in ("adapter:rank=4,loss=lm,init=zero,lr=0.02", "continued:lr=0.003", "distill:lr=0.001,hidden=1"):
        _, records = repair_of(bench, f"{method},batch=4,accumulate=1,epochs=3,warmup=0")
        curve = next(record.curve for record in records if record.curve)
        assert min(look.loss for look in curve) < curve[0].loss or method.startswith("distill")


def test_an_encoder_without_a_head_learns_the_updates_of_its_blocks():
    whole, _ = made("masked/bert")
    model = whole.bert
    anatomy = read_anatomy(model)
    text = examples_of(model, zoo.inputs(whole, 8, 16, seed=1)["input_ids"])
    bench = Bench(model, anatomy, parse_mask("mlp.1+attention.2"), text, text)
    method = "adapter:rank=8,loss=block,init=zero,lr=0.02,batch=2,accumulate=1,epochs=4"
    repair, (record, _) = repair_of(bench, method)
    assert len(repair.replacements) == 2
    assert record.curve[0].loss == pytest.approx(1.0)
    assert min(look.loss for look in record.curve) < 0.9
    for other in ("lora", "continued", "distill", "adapter:loss=kl"):
        with pytest.raises(InputError, match="no head that predicts tokens"):
            repair_of(bench, other)


def test_the_loss_of_updates_is_what_is_missing_beside_all_of_it():
    bench = bench_of("causal/llama", "attention.1+mlp.2")
    places = {gap.path: gap for gap in gaps(bench.anatomy, bench.mask)}
    repair = Repair({path: Replacement("bias", 0, 32) for path in places})
    for module in repair.replacements.values():
        torch.nn.init.normal_(module.bias, std=0.3, generator=torch.Generator().manual_seed(0))
    lesson, expected = Updates(bench, places, repair), 0.0

    def seen(gap: Gap):
        here = (bench.model, bench.anatomy, bench.mask, gap, repair)
        return UpdatesAt(*here, sinks=0.0, dense=False, axes=token_axes(bench.model)).observe(bench.examples)

    for path, gap in places.items():
        y = seen(gap).y.view(8, 16, 32)[:, 1:]
        bias = repair.replacements[path].bias
        expected += float(((bias - y).square().sum() / y.square().sum()).detach()) / 2
    assert lesson.measure(bench.examples) / lesson.weigh(bench.examples) == pytest.approx(expected, rel=1e-5)
    lesson.backward(bench.examples, 1 / 8)
    found: Any = {path: module.bias.grad for path, module in repair.replacements.items()}
    for path, gap in places.items():
        y = seen(gap).y.view(8, 16, 32)[:, 1:]
        bias = repair.replacements[path].bias
        (truth,) = torch.autograd.grad((bias - y).square().sum() / y.square().sum() / 2, bias)
        torch.testing.assert_close(found[path], truth)


def test_blocks_that_go_on_running_get_no_adapter():
    model, anatomy = made("seq2seq/t5")
    kept = next(block for block, part in anatomy.parts.items() if part.kept)
    (method,) = parse_chain("adapter:rank=2,init=zero")
    repair, (record,) = method.repair(Bench(model, anatomy, frozenset([kept]), examples(model), examples(model)))
    assert repair == UNREPAIRED
    assert "goes on running" in record.reason


def test_targets_are_kinds_of_blocks_or_names_of_projections():
    model, anatomy = made("causal/llama")
    mask = parse_mask("attention.0")
    count = {targets: len(lora_targets(model, anatomy, mask, targets)) for targets in ("all", "attention", "mlp")}
    assert count == {"all": 3 * 4 + 4 * 3, "attention": 12, "mlp": 12}
    assert set(lora_targets(model, anatomy, mask, "q_proj+mlp")) == {
        *(f"model.layers.{layer}.self_attn.q_proj" for layer in (1, 2, 3)),
        *lora_targets(model, anatomy, mask, "mlp"),
    }
    with pytest.raises(InputError, match="goes by nose_proj") as error:
        lora_targets(model, anatomy, mask, "q_proj+nose_proj")
    assert "attention, down_proj, gate_proj" in error.value.fix


def test_the_same_seed_gives_the_same_repair_and_another_one_another(learned):
    first, again, other = (
        mended(learned, f"lora:lr=0.003,batch=4,accumulate=1,epochs=1,seed={seed}")[0].weights for seed in (1, 1, 2)
    )
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(first[name], again[name])
    assert not torch.equal(first[name], other[name])


def test_in_bfloat16_the_factors_are_float32_and_what_is_merged_is_not(checkpoint, learned):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).eval()
    text = learned[2]
    few = "batch=4,accumulate=1,epochs=2"
    for method in (f"lora:lr=0.003,{few}", f"continued:lr=0.001,{few}", f"adapter:rank=4,loss=kl,lr=0.005,{few}"):
        repair, record = mended((model, read_anatomy(model), text), method)
        assert record.recovered.value < record.pruned.value, method
        assert {w.dtype for w in repair.weights.values()} <= {torch.bfloat16}
        assert {p.dtype for m in repair.replacements.values() for p in m.parameters()} <= {torch.bfloat16}


def test_a_model_in_float16_is_refused(learned, checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float16).eval()
    with pytest.raises(InputError, match="leave the range of float16"):
        mended((model, read_anatomy(model), learned[2]), "lora")


def test_killed_in_the_second_step_of_a_chain_it_goes_on_to_the_same_bits(learned, tmp_path):
    method = f"linear:rank=4,{LORA},evaluate_every=4,patience=0"
    whole, record = mended(learned, method)

    class Killed(Exception):
        pass

    def stop(done, _, message):
        if message.startswith("training") and done == 10:
            raise Killed

    with pytest.raises(Killed):
        mended(learned, method, folder=tmp_path, progress=stop)
    assert "step-000000008" in {path.name for path in (tmp_path / "2-lora").iterdir()}
    trained = []
    resumed, again = mended(
        learned,
        method,
        folder=tmp_path,
        progress=lambda done, _, what: trained.append(done) if "train" in what else None,
    )
    assert trained[0] == 9
    assert again == record
    assert all(torch.equal(value, whole.weights[name]) for name, value in resumed.weights.items())


def test_commas_separate_methods_and_options_alike():
    chain = parse_chain("linear:rank=64,target=dense, lora:rank=8,targets=q_proj+mlp ,bias", seed=3)
    assert [type(method).__name__ for method in chain] == ["Linear", "Lora", "Bias"]
    linear, lora, _ = chain
    assert isinstance(lora, Trained)
    assert (vars(linear)["rank"], vars(linear)["target"], vars(lora)["rank"], lora.seed) == (64, "dense", 8, 3)
    assert parse_chain(format_chain(chain)) == chain
    for text, said in (
        ("", "no recovery is named"),
        ("linear:rank=2,lore", "'lore' is not a known recovery"),
        ("linear,lora:rang=2", "no option 'rang'"),
        ("lora:rank=0", "no LoRA with rank=0"),
        ("distill:hidden=-1", "nothing is taught"),
        ("lora:hidden=nan", "finite"),
        ("lora:loss=fisher,hidden=1", "no hidden states beside it"),
        ("adapter:temperature=0", "no map is trained"),
    ):
        with pytest.raises(InputError, match=said):
            parse_chain(text)


def test_a_missing_package_is_said_with_the_command_that_installs_it(learned, monkeypatch):
    monkeypatch.setattr(recoveries, "find_spec", lambda name: None)
    with pytest.raises(MachineError, match="LoRA needs the package 'peft'") as error:
        check_installed(parse_chain("linear,lora"))
    assert error.value.fix == "pip install 'blockpruner[train]'"
    check_installed(parse_chain("linear,adapter,distill,continued"))
    real = builtins.__import__

    def without(name, *rest):
        if name == "peft":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MachineError, match="peft"):
        mended(learned, "lora")


def test_the_price_counts_tokens_forward_and_backward():
    lora, distill, block, adapter = parse_chain("lora,distill,adapter:loss=block,adapter")
    prices = [
        method.effort(640, 256, 4096) for method in (lora, distill, block, adapter) if isinstance(method, Trained)
    ]
    assert prices[0].startswith("20 steps, 327,680 tokens forward and backward, no second copy")
    assert "163,840 tokens forward and backward, as many forward in the dense model, a second copy" in prices[1]
    assert "40 steps, 163,840 tokens forward, up to the layer of each gap" in prices[2]
    assert "as many forward in the dense model, no second copy" in prices[3]
    assert all("times 4,096 held-out tokens" in price for price in prices)


def test_the_price_says_what_lies_on_disk_which_is_what_checkpoints_hold(learned, tmp_path):
    model, anatomy, text = learned
    bench = Bench(model, anatomy, MASK, text.part(8, 32), text.part(0, 8))
    few = "batch=4,accumulate=1,evaluate_every=3,patience=0"
    for name in (f"adapter:rank=4,init=zero,loss=lm,{few}", f"lora:{few}", f"streamline:{few}"):
        folder = tmp_path / name.partition(":")[0]
        (method,) = parse_chain(name)
        method.repair(replace(bench, folder=folder))
        sizes = [sum(f.stat().st_size for f in step.glob("*.safetensors")) for step in folder.glob("step-*")]
        assert isinstance(method, Trained)
        said = 12 * method.numbers(bench)
        assert said == pytest.approx(max(sizes), rel=0.3), name  # what tells names and shapes comes on top
        assert said < max(sizes)
        assert f"up to {readable_bytes(2 * said)} of checkpoints on disk" in method.price(bench)
    (whole,) = parse_chain("continued:masters=stored")
    left = sum(p.numel() for p in model.parameters()) - sum(anatomy.parts[block].parameters for block in MASK)
    assert isinstance(whole, Trained)
    assert whole.numbers(bench) == left


def test_closed_forms_say_their_passes_over_both_texts(learned):
    model, anatomy, text = learned
    bench = Bench(model, anatomy, parse_mask("attention.1+mlp.1+mlp.3"), text.part(8, 32), text.part(0, 8))
    said = {
        "bias": "3 gaps: about 2.1 forward passes",
        "linear:target=dense": "3 gaps: about 4.2 forward passes",
        "replaceme": "2 runs: about 4 forward passes",
        "span": "1 run: about 2.8 forward passes",
        "refit": "3 blocks: about 4.2 forward passes",
    }
    for name, price in said.items():
        (method,) = parse_chain(name)
        held = ", up to 256 KiB of states in memory and on disk" if name == "span" else ""
        assert method.price(bench) == f"{price} over 384 + 128 tokens{held}"
    (adapter,) = parse_chain("adapter")
    assert adapter.price(bench).startswith("3 gaps: about 2.1 forward passes over 384 + 128 tokens, then 2 steps, ")


def test_records_of_one_method_still_load(tmp_path):
    step: dict[str, Any] = {
        "method": "bias:sinks=0.0",
        "gaps": [
            *[{"removed": "mlp.1", "place": "x", "added_parameters": 4, "settings": {"ridge": 0.1}, "error": 0.5}],
        ],
        "recovered": None,
        "applied": True,
        "reason": "",
    }
    step["gaps"][0] |= {"applied": True, "reason": ""}
    old = {
        "format": "blockpruner.recovery",
        "version": 1,
        "removed": "mlp.1",
        "examples": "a",
        "held_out": "b",
        "tokens": [4, 2],
        "added_parameters": 4,
        "dense": None,
        "pruned": None,
        "recovered_share": None,
        **step,
    }
    path = Path(tmp_path, "recovery.json")
    path.write_text(json.dumps(old))
    record = RecoveryRecord.load(path)
    assert record.version == 2
    assert record.steps[0].method == record.method == "bias:sinks=0.0"
    assert record.gaps[0].error == 0.5
    record.save(path)
    assert RecoveryRecord.load(path) == record
