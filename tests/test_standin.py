"""Checkpoints with missing blocks: the ways to load them, and that every other way fails before it loads anything."""

import copy
import json
import pickle
import shutil
from typing import Any

import fresh
import pytest
import torch
from safetensors.torch import load_file
from tiny import FAMILIES, anatomy_of, shared, token_ids
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    pipeline,
)

from blockpruner import standin
from blockpruner.anatomy.reading import read_anatomy
from blockpruner.surgery.removal import prune_, skipped

REMOVED = ("attention.0", "mlp.2")
MATRIX = ("llama", "gemma3", "qwen2-moe", "gpt2", "bloom", "opt", "phi")


def pruned(family, removed=REMOVED):
    return prune_(FAMILIES[family](), removed, anatomy=anatomy_of(family))


@torch.no_grad()
def logits_of(model):
    return model(token_ids(2, 24)).logits


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """family -> a checkpoint without REMOVED."""
    home = tmp_path_factory.mktemp("stand-ins")
    for family in MATRIX:
        pruned(family).save_pretrained(home / family)
    return {family: home / family for family in MATRIX}


@pytest.fixture(scope="module")
def llama(folders):
    return folders["llama"]


@pytest.fixture(scope="module", params=["remote", "import first", "import later"])
def loaded(request, folders, tmp_path_factory):
    """What a fresh process computes that loads the checkpoints this way."""
    return fresh.load_checkpoints(request.param, folders, tmp_path_factory.mktemp("way"))


@pytest.mark.parametrize("family", MATRIX)
def test_every_way_to_load_computes_the_model_without_the_blocks(loaded, family):
    model = shared(family)
    with skipped(model, REMOVED, anatomy=anatomy_of(family)):
        expected = fresh.computed(model)
    found = loaded[family]
    assert float((found["logits"] - expected["logits"]).abs().max()) < 1e-4
    assert float((found["plain"] - expected["plain"]).abs().max()) < 1e-4
    assert float((found["cached"] - found["plain"]).abs().max()) < 1e-4


@pytest.mark.parametrize("family", MATRIX)
def test_no_removed_tensor_is_in_the_file(folders, family):
    model = shared(family)
    gone = {
        f"{path}."
        for block in map(str, REMOVED)
        for known, part in anatomy_of(family).parts.items()
        if str(known) == block
        for path in (*part.modules, *part.idle)
    }
    saved = load_file(folders[family] / "model.safetensors")
    assert not [name for name in saved if name.startswith(tuple(gone))]
    kept = sum(parameter.numel() for name, parameter in model.named_parameters() if not name.startswith(tuple(gone)))
    assert sum(tensor.numel() for tensor in saved.values()) == kept


WITHOUT_EITHER = """
import json, sys
from pathlib import Path
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

folder, renamed, results = sys.argv[1:]
tries = {
    "AutoConfig": AutoConfig.from_pretrained,
    "AutoModelForCausalLM": AutoModelForCausalLM.from_pretrained,
    "AutoModelForCausalLM, no code": lambda f: AutoModelForCausalLM.from_pretrained(f, trust_remote_code=False),
    "AutoModel": AutoModel.from_pretrained,
    "pipeline": lambda f: pipeline("text-generation", f),
    "LlamaConfig": LlamaConfig.from_pretrained,
    "LlamaModel": LlamaModel.from_pretrained,
    "LlamaForCausalLM": LlamaForCausalLM.from_pretrained,
    "LlamaForCausalLM, code": lambda f: LlamaForCausalLM.from_pretrained(f, trust_remote_code=True),
    "LlamaForCausalLM, dtype": lambda f: LlamaForCausalLM.from_pretrained(f, dtype="bfloat16", num_labels=2),
    "AutoTokenizer": AutoTokenizer.from_pretrained,
    "AutoTokenizer, no code": lambda f: AutoTokenizer.from_pretrained(f, trust_remote_code=False),
}
outcome = {}
for name, attempt in tries.items():
    for kind, where in (("whole", folder), ("without auto_map", renamed)):
        try:
            outcome[f"{name}: {kind}"] = ["loaded", type(attempt(where)).__name__]
        except Exception as error:
            outcome[f"{name}: {kind}"] = [type(error).__name__, str(error)]
Path(results).write_text(json.dumps(outcome))
"""


def without_auto_map(folder, out):
    """A copy in which a tool that knows nothing of it has dropped the pointer to the code."""
    shutil.copytree(folder, out)
    config = json.loads((out / "config.json").read_text())
    del config["auto_map"]
    (out / "config.json").write_text(json.dumps(config))
    (out / "standin.py").unlink()
    return out


def test_without_the_package_and_without_remote_code_all_but_the_tokenizer_fails_loudly(llama, tmp_path, tokenizer):
    whole = tmp_path / "whole"
    shutil.copytree(llama, whole)
    tokenizer.save_pretrained(whole)
    renamed = without_auto_map(whole, tmp_path / "renamed")
    done = fresh.run_script(WITHOUT_EITHER, whole, renamed, tmp_path / "results", scratch=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    outcome = json.loads((tmp_path / "results").read_text())
    assert len(outcome) == 24
    for name, (error, message) in outcome.items():
        if name.startswith("AutoTokenizer"):
            assert (error, message) == ("loaded", type(tokenizer).__name__), name
            continue
        assert error == "ValueError", (name, error, message)
        if name.startswith("Llama"):
            assert "blocks are missing here" in message, (name, message)
        elif name.endswith("without auto_map"):
            assert "model type `blockpruner`" in message, (name, message)
        else:
            assert "trust_remote_code=True" in message, (name, message)


def test_a_stock_class_that_is_given_the_folder_fails_loudly_with_the_package_too(llama):
    for kind in (LlamaForCausalLM, LlamaModel, LlamaForSequenceClassification, LlamaConfig):
        with pytest.raises(ValueError, match="blocks are missing here"):
            kind.from_pretrained(llama)


@pytest.mark.slow
def test_no_configuration_class_of_transformers_reads_such_a_folder(llama):
    config = json.loads((llama / "config.json").read_text())
    for name, kind in CONFIG_MAPPING.items():
        if name != "blockpruner":
            with pytest.raises(Exception):  # noqa: B017, PT011 (some need packages or networks, and say so first)
                kind.from_dict(dict(config))


def test_a_part_of_the_configuration_is_not_taken_for_the_whole_either(tmp_path):
    text = {**shared("gemma3").config.to_dict(), "num_hidden_layers": 3, "layer_types": None}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14})
    model = Gemma3ForConditionalGeneration(config).eval()
    standin.adopt(model, ["attention.0"], {})
    model.config.save_pretrained(tmp_path)
    for kind in (Gemma3Config, Gemma3TextConfig):
        with pytest.raises(ValueError, match="blocks are missing here"):
            kind.from_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again.text_config) is Gemma3TextConfig
    assert again.to_dict()["text_config"] == model.config.to_dict()["text_config"]


def test_a_format_or_an_architecture_that_is_not_known_here_is_named(llama, tmp_path):
    for change, message in (
        ({"format_version": 99}, "in format 1 or 2 .found: 99."),
        ({"base_model_type": "llama9"}, "does not know model type 'llama9'"),
    ):
        config = json.loads((llama / "config.json").read_text())
        config["blockpruner"] |= change
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=message):
            AutoConfig.from_pretrained(tmp_path)


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("family", MATRIX)
def test_saved_and_loaded_again_it_stays_the_same(folders, tmp_path, family):
    model = AutoModelForCausalLM.from_pretrained(folders[family])
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    again.save_pretrained(tmp_path / "third")
    assert files_of(tmp_path / "again") == files_of(folders[family])
    assert files_of(tmp_path / "third") == files_of(folders[family])
    assert torch.equal(logits_of(again), logits_of(model))
    config = json.loads((folders[family] / "config.json").read_text())
    assert config["auto_map"] == {"AutoConfig": "standin.BlockprunerConfig"}
    assert config["blockpruner"]["removed"] == list(REMOVED)


@pytest.mark.parametrize("family", MATRIX)
def test_saved_by_a_fresh_process_the_folder_is_the_same_too(loaded, folders, family):
    assert files_of(loaded[family]["saved"]) == files_of(folders[family])


def test_a_configuration_saved_alone_brings_the_file_too(llama, tmp_path):
    AutoConfig.from_pretrained(llama).save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "standin.py"}
    assert (tmp_path / "config.json").read_bytes() == (llama / "config.json").read_bytes()


@pytest.mark.parametrize("family", ["llama", "gemma3", "opt"])
def test_a_pruned_model_can_be_pruned_further_and_saved(folders, tmp_path, family):
    model = AutoModelForCausalLM.from_pretrained(folders[family])
    prune_(model, ["mlp.0", "attention.3"])
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with skipped(shared(family), [*REMOVED, "mlp.0", "attention.3"], anatomy=anatomy_of(family)):
        expected = logits_of(shared(family))
    torch.testing.assert_close(logits_of(again), expected, atol=1e-4, rtol=0)
    assert again.config.blockpruner["removed"] == [*REMOVED, "attention.3", "mlp.0"]


def test_another_model_that_holds_the_same_configuration_is_left_alone(tmp_path):
    model = FAMILIES["llama"]()
    other = LlamaForCausalLM(model.config)
    prune_(model, REMOVED, anatomy=anatomy_of("llama"))
    assert model.model.config is model.config
    assert type(other.config) is LlamaConfig
    assert not hasattr(other.config, "blockpruner")


def test_in_memory_the_configuration_is_that_of_the_architecture():
    model = pruned("llama")
    assert isinstance(model, LlamaForCausalLM)
    assert isinstance(model.config, LlamaConfig)
    assert model.config.to_dict()["model_type"] == model.config.model_type == "llama"
    assert type(model.config).from_dict(model.config.to_dict()).blockpruner == model.config.blockpruner


@pytest.mark.parametrize("asked", ["_can_set_attn_implementation", "_can_set_experts_implementation"])
@pytest.mark.parametrize("family", ["llama", "qwen2-moe"])
def test_attention_and_experts_are_computed_as_in_the_architecture(monkeypatch, family, asked):
    made = type(pruned(family))
    for kind in made.__mro__:  # where newer versions of transformers keep what they found
        if f"{asked}_cached_value" in vars(kind):
            monkeypatch.delattr(kind, f"{asked}_cached_value")
    assert getattr(made, asked)() == getattr(standin.unpruned(made), asked)() == (family != "llama" or "attn" in asked)


def test_copies_and_pickles_stay_pruned():
    model = pruned("llama")
    expected = logits_of(model)
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(made) is type(model)
        assert torch.equal(logits_of(made), expected)
    config = pickle.loads(pickle.dumps(model.config))
    assert config.to_dict() == copy.deepcopy(model.config).to_dict() == model.config.to_dict()
    assert type(config) is type(model.config)


UNPICKLED = """
import pickle, sys
from pathlib import Path
model = pickle.loads(Path(sys.argv[1]).read_bytes())
print(type(model).__name__, type(model.config).__name__, len(model.config.blockpruner["removed"]))
"""


@pytest.mark.slow
def test_pickles_open_in_a_process_that_has_not_seen_the_class(tmp_path):
    (tmp_path / "model").write_bytes(pickle.dumps(pruned("llama")))
    done = fresh.run_script(UNPICKLED, tmp_path / "model", scratch=tmp_path, blocked=False)
    assert done.stdout == "BlockprunerLlamaForCausalLM BlockprunerLlamaConfig 2\n", done.stderr[-3000:]


def test_names_that_are_no_pruned_classes_are_not_made_up():
    for name in ("BlockprunerNonsense", "Nonsense", "__wrapped__", "Blockpruner"):
        assert not hasattr(standin, name)


def test_tied_weights_stay_tied(folders):
    model = AutoModelForCausalLM.from_pretrained(folders["gemma3"])
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert "lm_head.weight" not in load_file(folders["gemma3"] / "model.safetensors")


@pytest.mark.parametrize("family", ["llama", "qwen2-moe"])
def test_other_dtypes_shards_and_placements_load(folders, tmp_path, family):
    model = AutoModelForCausalLM.from_pretrained(folders[family], dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    for options in ({}, {"dtype": "auto"}, {"device_map": "cpu"}):
        again = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
        assert again.dtype == torch.bfloat16
        assert torch.equal(logits_of(again), logits_of(model))
    wide = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert wide.dtype == torch.float32


def test_the_model_without_its_head_loads_from_the_same_folder(llama):
    whole, inner = AutoModelForCausalLM.from_pretrained(llama), AutoModel.from_pretrained(llama)
    assert type(inner).__name__ == "BlockprunerLlamaModel"
    with torch.no_grad():
        expected = whole.model(token_ids()).last_hidden_state
        assert torch.equal(inner(token_ids()).last_hidden_state, expected)


def test_a_model_without_a_head_is_saved_and_loaded(tmp_path):
    inner = LlamaModel(copy.deepcopy(shared("llama").config)).eval()
    prune_(inner, ["attention.1"])
    inner.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(token_ids()).last_hidden_state, inner(token_ids()).last_hidden_state)
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path).model.layers[1].self_attn, standin.StandIn)


def test_labels_of_a_classifier_survive(tmp_path):
    config = copy.deepcopy(shared("llama").config)
    config.id2label, config.label2id = {0: "no", 1: "yes", 2: "perhaps"}, {"no": 0, "yes": 1, "perhaps": 2}
    config.problem_type = "single_label_classification"
    model = LlamaForSequenceClassification(config).eval()
    prune_(model, ["mlp.1"], anatomy=read_anatomy(model))
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert again.config.id2label == config.id2label
    assert again.config.problem_type == config.problem_type
    assert torch.equal(logits_of(again), logits_of(model))
    with pytest.raises(ValueError, match="blocks are missing here"):
        LlamaForSequenceClassification.from_pretrained(tmp_path, num_labels=3)


def test_the_tokenizer_loads_as_ever_and_the_pipeline_generates(llama, tmp_path, tokenizer):
    folder = tmp_path / "with tokenizer"
    shutil.copytree(llama, folder)
    tokenizer.save_pretrained(folder)
    again = AutoTokenizer.from_pretrained(folder)
    assert (type(again), again.get_vocab()) == (type(tokenizer), tokenizer.get_vocab())
    assert pipeline("text-generation", str(folder)).model.config.blockpruner["removed"] == list(REMOVED)


def test_loading_a_pruned_model_leaves_stock_models_alone(llama, tmp_path):
    stock = shared("llama")
    stock.save_pretrained(tmp_path)
    AutoModelForCausalLM.from_pretrained(llama)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is LlamaForCausalLM
    assert type(again.config) is LlamaConfig
    assert torch.equal(logits_of(again), logits_of(stock))


ZEROS = {"input": 0, "output": "zeros", "width": 5}


def filled(spec, replacement) -> Any:
    """A stand-in with a replacement whose parameters are not zero."""
    made = standin.StandIn({**spec, "replacement": replacement})
    for number, parameter in enumerate(made.parameters()):
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(number))
    return made.requires_grad_(False)


@pytest.mark.parametrize("flat", [False, True])
def test_a_replacement_is_added_where_the_update_of_the_block_was(flat):
    hidden = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(9))
    zeros = filled({**ZEROS, "flat": flat}, {"kind": "linear", "inputs": 4, "outputs": 5})
    expected = hidden @ zeros.replacement.weight + zeros.replacement.bias
    torch.testing.assert_close(zeros(hidden), expected.reshape(6, 5) if flat else expected)
    through = filled({"input": 0, "output": {"tuple": ["input", None]}}, {"kind": "bias", "inputs": 0, "outputs": 4})
    first, second = through(hidden)
    torch.testing.assert_close(first, hidden + through.replacement.bias)
    assert second is None


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_a_replacement_of_low_rank_reads_what_a_norm_without_gain_makes(norm):
    hidden = 3 + torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(9))
    made = filled(ZEROS, {"kind": "linear", "inputs": 4, "outputs": 5, "rank": 2, "norm": norm, "eps": 1e-5})
    module = torch.nn.LayerNorm(4, eps=1e-5) if norm == "layer" else torch.nn.RMSNorm(4, eps=1e-5)
    part = made.replacement
    torch.testing.assert_close(made(hidden), module(hidden) @ (part.down @ part.up) + part.bias)
    assert made.to(torch.bfloat16)(hidden.bfloat16()).dtype == torch.bfloat16


def test_what_a_replacement_returns_may_be_changed_in_place():
    made = filled({**ZEROS, "width": 4}, {"kind": "bias", "inputs": 0, "outputs": 4})
    before = made.replacement.bias.clone()
    made(torch.zeros(2, 3, 4)).add_(1)
    assert torch.equal(made.replacement.bias, before)


@pytest.mark.parametrize("change", [{"kind": "cubic"}, {"norm": "batch"}, {"rank": -1}, {"inputs": -4}])
def test_a_replacement_that_is_none_is_refused(change):
    with pytest.raises(ValueError, match="no replacement is"):
        standin.Replacement(**{"kind": "linear", "inputs": 4, "outputs": 5, **change})


def test_a_stand_in_without_a_replacement_owns_no_parameters():
    assert not list(standin.StandIn(ZEROS).state_dict())
