import ast
from pathlib import Path

import pytest
import torch
import zoo
import zoo_rows

# What transformers 5.23 itself cannot do here: an image library is missing; keys and values come from another model.
NOT_ALONE = {"causal/gemma3n", "causal/gemma4_assistant", "causal/gemma4_unified_assistant"}
SAMPLE = [
    "causal/llama",
    "causal/bert",
    "causal/mamba",
    "causal/mixtral",
    "masked/modernbert",
    "masked/deberta-v2",
    "seq2seq/t5",
    "seq2seq/bart",
    "seq2seq/qwen2_audio",
]


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def test_every_entry_of_the_three_mappings_is_here():
    texts = [str(entry) for entry in zoo.entries()]
    assert len(texts) == len(set(texts)) == sum(map(len, zoo.MAPPINGS.values()))
    assert {"causal/llama", "masked/bert", "seq2seq/t5", "masked/bart", "causal/bart"} <= set(texts)
    assert zoo.Entry.parse("causal/llama") == zoo.Entry("causal", "llama")
    with pytest.raises(KeyError):
        zoo.Entry.parse("masked/llama")


@pytest.mark.parametrize("entry", SAMPLE)
def test_a_model_runs_on_its_inputs(entry):
    model = zoo.build(entry)
    inputs = zoo.inputs(model)
    found = logits(model, inputs)
    assert found.shape == (2, 16, zoo.VOCABULARY)
    assert found.isfinite().all()
    assert found.std() > 0.1
    assert not model.training
    assert all(value.min() >= zoo.FIRST_ORDINARY for name, value in inputs.items() if name.endswith("input_ids"))
    assert ("decoder_input_ids" in inputs) == model.config.is_encoder_decoder


@pytest.mark.slow
@pytest.mark.parametrize("entry", sorted({str(entry) for entry in zoo.entries()} - NOT_ALONE))
def test_every_model_runs(entry):
    model = zoo.build(entry)
    with torch.no_grad():
        output = model(**zoo.inputs(model))
    assert (output["logits"] if "logits" in output else output[0]).isfinite().all()
    assert sum(p.numel() for p in model.parameters()) < 1_000_000


@pytest.mark.parametrize("entry", ["causal/qwen3_next", "causal/gpt_oss", "seq2seq/switch_transformers"])
def test_equal_seeds_make_equal_models_and_others_others(entry):
    first, again, other = (zoo.build(entry, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_building_leaves_the_random_numbers_of_others_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    zoo.build("causal/llama")
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("entry", [*SAMPLE, "causal/gemma4_text", "causal/deepseek_v3", "causal/gpt_oss"])
def test_nothing_that_is_saved_is_the_same_all_over(entry):
    model = zoo.build(entry)
    same = [
        name
        for name, value in model.state_dict().items()
        if value.is_floating_point() and ((value.numel() > 1 and value.unique().numel() == 1) or value.eq(1).all())
    ]
    assert not same


def test_tables_that_a_checkpoint_leaves_out_stay_as_transformers_made_them():
    model = zoo.build("seq2seq/marian")
    table = model.get_submodule("model.encoder.embed_positions").weight
    assert torch.equal(table[0], torch.tensor([0.0] * 16 + [1.0] * 16))


@pytest.mark.parametrize("entry", ["causal/gemma3_text", "causal/minimax", "causal/xlm", "causal/falcon_h1"])
def test_causal_models_do_not_look_ahead(entry):
    model = zoo.build(entry)
    inputs = zoo.inputs(model)
    changed = {**inputs, "input_ids": inputs["input_ids"].clone()}
    changed["input_ids"][:, -1] = zoo.FIRST_ORDINARY
    moved = (logits(model, inputs) - logits(model, changed)).abs().amax(dim=(0, 2))
    assert moved[:-1].max() < 1e-5 < moved[-1]


@pytest.mark.parametrize(
    ("entry", "kinds"),
    [
        ("causal/gemma3_text", "ssfssf"),
        ("causal/gemma2", "sfsf"),
        ("causal/qwen3_next", "llfllf"),
        ("causal/cohere2", "ssfssf"),
        ("masked/modernbert", "fssfss"),
    ],
)
def test_patterns_of_layers_come_twice(entry, kinds):
    config = zoo.config_of(zoo.Entry.parse(entry))
    assert "".join(kind[0] for kind in config.layer_types) == kinds


def test_lists_per_layer_and_numbers_of_layers_follow_the_chosen_layers():
    fields = {"num_hidden_layers": 12, "layer_types": ["a", "a", "a", "b"] * 3, "moe_layers": [3, 7]}
    layers = zoo.chosen_layers(fields, {})
    assert layers == zoo.Chosen(12, (0, 1, 3, 4, 5, 7))
    assert zoo.by_rule("layer_types", fields["layer_types"], layers) == ["a", "a", "b"] * 2
    assert zoo.by_rule("moe_layers", fields["moe_layers"], layers) == [2, 5]
    assert zoo.by_rule("num_hidden_layers", 12, layers) == 6
    assert zoo.chosen_layers(fields, {"num_hidden_layers": 8}).indices == (0, 1, 2, 3, 4, 5, 6, 7)


def test_fields_that_no_rule_knows_stay_as_they_are():
    layers = zoo.chosen_layers({"n_layer": 12}, {})
    assert layers.indices == (0, 1, 2, 3)
    assert zoo.by_rule("rope_theta", 10000.0, layers) is None
    assert zoo.by_rule("use_cache", True, layers) is None
    assert zoo.by_rule("vocab_size", 32000, layers) == zoo.VOCABULARY
    assert zoo.by_rule("some_projection_dim", 768, layers) == zoo.HIDDEN
    assert zoo.by_rule("conv_dim", 3, layers) is None
    assert 3 <= zoo.by_rule("image_token_id", 255999, layers) < zoo.FIRST_ORDINARY


@pytest.mark.parametrize("module", [zoo, zoo_rows])
def test_the_zoo_knows_nothing_of_the_package(module):
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert not [name for name in names if name.partition(".")[0] in ("blockpruner", "tiny")]
