"""Recovered models saved: they load in every way that pruned ones do, and generate with a cache as without."""

import copy
import json

import fresh
import pytest
import torch
import zoo
from labs import SIGNS
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from blockpruner.anatomy.reading import read_anatomy
from blockpruner.blocks import parse_mask
from blockpruner.errors import InputError
from blockpruner.recoveries import parse_recovery
from blockpruner.repairs.recovery import Bench
from blockpruner.standin import StandIn
from blockpruner.surgery.checkpoint import save_pruned
from blockpruner.surgery.gaps import repaired
from blockpruner.surgery.removal import prune_, skipped
from blockpruner.texts.examples import examples_of

CASES = {
    "causal/llama": ("attention.1+mlp.2", "linear:rank=4"),
    "causal/gpt2": ("attention.1+mlp.1+mlp.2", "linear"),
    "causal/gemma3_text": ("attention.0+mlp.2+attention.5", "linear:regressor=input"),
    "causal/mixtral": ("attention.1+mlp.1", "bias"),
    "masked/bert": ("attention.1+mlp.1+mlp.2", "linear:rank=3"),
    "seq2seq/t5": ("encoder.attention.1+decoder.attention.1+decoder.cross_attention.1+decoder.mlp.2", "linear"),
}
CAUSAL = [name for name in CASES if name.startswith("causal/")]


def mended(name):
    """A fresh model, its anatomy, what goes, and a repair."""
    model = zoo.build(name)
    anatomy, (removed, method) = read_anatomy(model), CASES[name]
    text = [examples_of(model, zoo.inputs(model, n, 24, seed=n)["input_ids"], SIGNS) for n in (16, 4)]
    mask = parse_mask(removed)
    repair, _ = parse_recovery(method).repair(Bench(model, anatomy, mask, *text, force=True))
    return model, anatomy, mask, repair


@pytest.fixture(scope="module")
def recovered():
    """name -> what `mended` gives."""
    return {name: mended(name) for name in CASES}


@pytest.fixture(scope="module")
def folders(recovered, tmp_path_factory):
    """name -> a checkpoint of the recovered model, of a copy that was pruned for good."""
    home = tmp_path_factory.mktemp("recovered")
    for name, (model, anatomy, mask, repair) in recovered.items():
        prune_(copy.deepcopy(model), mask, anatomy=anatomy, repair=repair).save_pretrained(home / name)
    return {name: home / name for name in CASES}


@pytest.fixture(scope="module", params=["remote", "import later"])
def loaded(request, folders, tmp_path_factory):
    """What a fresh process computes that loads the checkpoints of decoders this way."""
    causal = {name.partition("/")[2]: folders[name] for name in CAUSAL}
    return fresh.load_checkpoints(request.param, causal, tmp_path_factory.mktemp("way"))


@pytest.mark.parametrize("name", CAUSAL)
def test_a_fresh_process_computes_the_recovered_model_with_a_cache_and_without(loaded, recovered, name):
    model, anatomy, mask, repair = recovered[name]
    with repaired(model, anatomy, mask, repair):
        expected = fresh.computed(model)
    found = loaded[name.partition("/")[2]]
    for what in ("logits", "plain", "cached"):
        torch.testing.assert_close(found[what], expected[what], atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(found["cached"], found["plain"], atol=2e-4, rtol=1e-4)
    with skipped(model, mask, anatomy=anatomy):
        assert float((fresh.computed(model)["logits"] - expected["logits"]).abs().max()) > 1e-2


@pytest.mark.parametrize("name", CAUSAL)
def test_saved_by_a_fresh_process_the_folder_is_the_same(loaded, folders, name):
    again = loaded[name.partition("/")[2]]["saved"]
    assert {file.name for file in again.iterdir()} == {file.name for file in folders[name].iterdir()}
    for file in again.iterdir():
        assert file.read_bytes() == (folders[name] / file.name).read_bytes(), file.name


def test_an_encoder_is_loaded_again(folders, recovered):
    model, anatomy, mask, repair = recovered["masked/bert"]
    again, inputs = AutoModelForMaskedLM.from_pretrained(folders["masked/bert"]), zoo.inputs(model)
    with repaired(model, anatomy, mask, repair), torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits)


def test_an_encoder_decoder_is_loaded_again_and_generates_with_a_cache(folders, recovered):
    model, anatomy, mask, repair = recovered["seq2seq/t5"]
    again = AutoModelForSeq2SeqLM.from_pretrained(folders["seq2seq/t5"])
    ids = zoo.inputs(model)["input_ids"]
    options = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    options |= {"decoder_start_token_id": 3, "eos_token_id": None}
    cached, plain = (torch.stack(again.generate(ids, use_cache=use, **options).logits) for use in (True, False))
    torch.testing.assert_close(cached, plain, atol=1e-4, rtol=1e-4)
    with repaired(model, anatomy, mask, repair):
        expected = torch.stack(model.generate(ids, use_cache=True, **options).logits)
    torch.testing.assert_close(cached, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_the_file_holds_the_replacements_and_the_configuration_says_what_they_are(folders, recovered, name):
    _, _, _, repair = recovered[name]
    config = json.loads((folders[name] / "config.json").read_text())
    assert config["blockpruner"]["format_version"] == 2
    modules = config["blockpruner"]["modules"]
    assert {path: spec["replacement"] for path, spec in modules.items() if "replacement" in spec} == {
        path: replacement.spec for path, replacement in repair.replacements.items()
    }
    saved = load_file(folders[name] / "model.safetensors")
    held = {key: value for key, value in saved.items() if ".replacement." in key}
    assert sum(value.numel() for value in held.values()) == repair.added_parameters


def test_without_replacements_the_format_is_the_old_one(tmp_path):
    model = zoo.build("causal/llama")
    prune_(model, ["attention.1", "mlp.2"]).save_pretrained(tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())["blockpruner"]
    assert record["format_version"] == 1
    assert not [spec for spec in record["modules"].values() if "replacement" in spec]


def test_save_pruned_reloads_a_recovered_model_and_counts_what_was_added(recovered, tmp_path):
    model, anatomy, mask, repair = recovered["seq2seq/t5"]
    whole = copy.deepcopy(model)
    saved = save_pruned(whole, None, anatomy, mask, tmp_path / "model", repair=repair)
    assert (saved.form, saved.folder) == ("stand-ins", tmp_path / "model")
    assert saved.difference < 1e-4
    assert saved.parameters == sum(parameter.numel() for parameter in whole.parameters())


@pytest.mark.parametrize("form", ["stock", "zeroed"])
def test_other_forms_have_no_place_for_replacements(recovered, tmp_path, form):
    model, anatomy, mask, repair = recovered["causal/llama"]
    with pytest.raises(InputError, match=f"have no {form} form"):
        save_pruned(model, None, anatomy, mask, tmp_path / "model", form=form, repair=repair)


@pytest.mark.parametrize("name", ["causal/llama", "causal/gpt2", "causal/gemma3_text", "masked/bert"])
def test_a_recovered_model_can_be_read_and_pruned_further(folders, recovered, name):
    auto = AutoModelForMaskedLM if name.startswith("masked") else AutoModelForCausalLM
    model = auto.from_pretrained(folders[name]).eval()
    anatomy = read_anatomy(model)
    last = anatomy.outline.blocks[-1]
    with torch.no_grad(), skipped(model, [last], anatomy=anatomy):
        expected = model(**zoo.inputs(model)).logits
    prune_(model, [last], anatomy=anatomy)
    with torch.no_grad():
        torch.testing.assert_close(model(**zoo.inputs(model)).logits, expected)
    assert model.config.blockpruner["format_version"] == 2


def test_other_dtypes_and_models_without_their_head_load(folders):
    folder = folders["causal/llama"]
    half = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    whole, inner = AutoModelForCausalLM.from_pretrained(folder), AutoModel.from_pretrained(folder)
    ids = zoo.inputs(whole)["input_ids"]
    with torch.no_grad():
        assert torch.equal(inner(ids).last_hidden_state, whole.model(ids).last_hidden_state)
        assert torch.isfinite(half(ids).logits).all()


def test_a_replacement_that_no_configuration_of_ours_describes_is_refused(folders, tmp_path):
    config = json.loads((folders["causal/llama"] / "config.json").read_text())
    spec = next(spec for spec in config["blockpruner"]["modules"].values() if "replacement" in spec)
    spec["replacement"]["kind"] = "quadratic"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="no replacement is 'quadratic'"):
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))


def test_a_recovered_model_of_a_plan_that_leaves_whole_layers_still_needs_stand_ins(recovered):
    model, anatomy, _, repair = recovered["causal/mixtral"]  # layer 1 is gone, but not what is in its place
    pruned = prune_(copy.deepcopy(model), parse_mask("attention.1+mlp.1"), anatomy=anatomy, repair=repair)
    stand_ins = [module for module in pruned.modules() if isinstance(module, StandIn) and module.replacement]
    assert len(stand_ins) == 2
