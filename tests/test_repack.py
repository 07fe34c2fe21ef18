"""Whole layers out: what is left reloads in plain transformers and computes the same, or is refused by name."""

import copy

import pytest
import torch
import transformers
import zoo
from tiny import anatomy_of, shared, tiny

from blockpruner.anatomy.reading import read_anatomy
from blockpruner.blocks import parse_mask
from blockpruner.surgery import smaller as search
from blockpruner.surgery.fields import countings, options
from blockpruner.surgery.likeness import Likeness, looks
from blockpruner.surgery.origins import Origin
from blockpruner.surgery.pairing import NewLayer, Rest, Unfit
from blockpruner.surgery.reloading import first_output
from blockpruner.surgery.removal import skipped
from blockpruner.surgery.repack import repacked, smaller_model

OLDER = tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23)


def read(name):
    """The tiny model of this name and its anatomy; older releases of transformers lack or break some."""
    try:
        model = zoo.build(name)
        return model, read_anatomy(model)
    except Exception as error:
        if not OLDER:
            raise
        pytest.skip(f"not in transformers {transformers.__version__}: {error}")


def layers(anatomy, **dropped):
    """The blocks of the layers with these numbers, by the name of their stack (`only`: the one stack there is)."""
    stacks = {stack.name or "only": stack for stack in anatomy.stacks}
    return frozenset(p.block for name, places in dropped.items() for i in places for p in stacks[name].layers[i].parts)


@torch.no_grad()
def logits(model, inputs):
    return first_output(model(**inputs))


def reloaded(made, folder):
    """What plain transformers makes of `made`; nothing may be missing, left over or of another shape."""
    made.save_pretrained(folder)
    model, info = type(made).from_pretrained(folder, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


RELOADS = [
    # one field counts, lists with an entry for each layer are cut
    ("causal/gpt_neo", {"only": (0, 2)}, {"num_layers": 2, "attention_types": [[["local", "local"], 1]]}),
    ("causal/longcat_flash", {"only": (0, 2)}, {"num_layers": 2}),
    # several fields count together, or none does
    ("causal/xlstm", {"only": (0, 2)}, {"num_hidden_layers": 2, "num_blocks": 2}),
    ("causal/nemotron_h", {"only": (0, 5)}, {"num_hidden_layers": 6}),
    # lists of layer numbers, and dictionaries by layer
    ("causal/bamba", {"only": (0, 2)}, {"attn_layer_indices": [0, 1]}),
    ("causal/zamba2", {"only": (0, 4)}, {"hybrid_layer_ids": [1, 3]}),
    ("causal/dots3_note_text", {"only": (0, 3)}, {"num_hidden_layers": 4}),
    # numbers that say where another kind of layer begins
    ("causal/deepseek_v3", {"only": (0, 2)}, {"first_k_dense_replace": 0}),
    # periods, offsets and patterns
    ("causal/jamba", {"only": (0, 7)}, {"attn_layer_offset": 1, "expert_layer_offset": 0, "attn_layer_period": 4}),
    pytest.param(
        "causal/recurrent_gemma",
        {"only": (0, 3)},
        {"block_types": ["recurrent", "attention"] * 2},
        marks=pytest.mark.skipif(OLDER, reason="its caches look into the layers"),
    ),
    ("causal/qwen2_moe", {"only": (0, 3)}, {"decoder_sparse_step": 1, "mlp_only_layers": [1]}),
    # a scale that is divided by the number of layers
    ("causal/minicpm3", {"only": (0, 2)}, {"num_hidden_layers": 2}),
    # two stacks: configurations in the configuration, lists of one stack only, numbers in a list, a stack left alone
    ("seq2seq/encoder-decoder", {"encoder": (0, 2), "decoder": (1, 3)}, {}),
    ("seq2seq/led", {"encoder": (1, 3)}, {"encoder_layers": 2}),
    ("seq2seq/led", {"decoder": (0, 2)}, {"decoder_layers": 2, "attention_window": [8, 8, 8, 8]}),
    ("masked/funnel", {"funnel_encoder_blocks_0": (0,), "funnel_encoder_blocks_1": (1,)}, {"block_sizes": [1, 1]}),
    ("seq2seq/pegasus_x", {"decoder": (0, 2)}, {"encoder_layers": 4, "decoder_layers": 2}),
    # what the first layer owns, tables packed over layers
    ("seq2seq/t5", {"encoder": (0, 2), "decoder": (0, 3)}, {"num_layers": 2, "num_decoder_layers": 2}),
    ("causal/gemma3n_text", {"only": (0, 5)}, {"num_kv_shared_layers": 1}),
    # a layer that somebody looks into, but nobody needs
    ("masked/xmod", {"only": (0, 2)}, {"num_hidden_layers": 2}),
]


@pytest.mark.parametrize(
    ("name", "dropped", "fields"), RELOADS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_model_without_two_layers_is_a_stock_model(name, dropped, fields, tmp_path):
    model, anatomy = read(name)
    inputs, mask = zoo.inputs(model), layers(anatomy, **dropped)
    dense, before = logits(model, inputs), copy.deepcopy(model.config.to_dict())
    with skipped(model, mask, anatomy=anatomy):
        expected = logits(model, inputs)
    assert not torch.equal(expected, dense)
    found = reloaded(smaller_model(model, anatomy, mask), tmp_path)
    assert torch.equal(logits(found, inputs), expected)
    assert {field: getattr(found.config, field) for field in fields} == fields
    assert model.config.to_dict() == before
    assert torch.equal(logits(model, inputs), dense)


REFUSALS = [
    ("causal/diffllama", {"only": (1,)}, r"lambda_init is another in every place: it would be 0\.35"),
    ("masked/esmc", {"only": (1,)}, r"in the nearest, esmc\.layers\.0\.scaling_factor would be 0\.28\d+, not 0\.33"),
    ("causal/gemma3n_text", {"only": (3,)}, r"^attention\.3 makes what other layers need$"),
    ("causal/zaya", {"only": (2,)}, r"^attention\.2 makes what other layers need$"),
    ("causal/rwkv", {"only": (0,)}, r"rwkv\.blocks\.0\.pre_ln would be new"),
    ("masked/modernbert", {"only": (0,)}, r"layers\.0\.attn_norm would be of class Identity, not LayerNorm"),
    ("causal/zamba2", {"only": (2,)}, r"shared_transformer\.self_attn\.num_fwd_mem_blocks would be 1, not 2"),
]


@pytest.mark.parametrize(("name", "dropped", "reason"), REFUSALS, ids=lambda value: value if "/" in value else "")
def test_what_no_stock_model_can_be_is_refused_by_name(name, dropped, reason):
    model, anatomy = read(name)
    with pytest.raises(Unfit, match=reason):
        smaller_model(model, anatomy, layers(anatomy, **dropped))


@pytest.mark.parametrize(
    ("family", "mask", "reason"),
    [
        ("llama", "attention.1", "^mlp.1 is left without a mixing block before it$"),
        ("llama", "mlp.2", "^attention.2 is left without an mlp after it$"),
        ("phi", "mlp.1+attention.2", "^attention.1 alone is no layer, and halves of two layers cannot be one here$"),
        ("llama", "+".join(f"attention.{i}+mlp.{i}" for i in range(4)), "^no layer is left of model.layers$"),
    ],
)
def test_what_is_not_whole_layers_is_refused_by_name(family, mask, reason):
    with pytest.raises(Unfit, match=reason):
        smaller_model(shared(family), anatomy_of(family), parse_mask(mask))
    with repacked(shared(family), anatomy_of(family), parse_mask(mask)) as fit:
        assert not fit
        assert len(list(shared(family).model.layers)) == 4


def test_a_model_is_the_smaller_one_for_a_while_only(tmp_path):
    model = shared("gemma3")
    before = dict(vars(model))
    with repacked(model, anatomy_of("gemma3"), parse_mask("attention.1+mlp.1")) as fit:
        assert fit
        assert model.config.num_hidden_layers == len(model.model.layers) == 5
        model.save_pretrained(tmp_path)
    assert vars(model) == before
    with pytest.raises(KeyboardInterrupt), repacked(model, anatomy_of("gemma3"), parse_mask("attention.1+mlp.1")):
        raise KeyboardInterrupt
    assert vars(model) == before


def test_weights_that_were_put_aside_on_disk_are_read(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model, anatomy = read("causal/llama")
    inputs, mask = zoo.inputs(model), layers(anatomy, only=(1,))
    with skipped(model, mask, anatomy=anatomy):
        expected = logits(model, inputs)
    accelerate.disk_offload(model, tmp_path / "aside")
    assert model.lm_head.weight.is_meta
    found = reloaded(smaller_model(model, anatomy, mask), tmp_path / "made")
    assert torch.equal(logits(found, inputs), expected)


def test_trials_are_few_and_bounded(monkeypatch):
    made = []
    make = search._Search._made
    monkeypatch.setattr(search._Search, "_made", lambda self, plain: made.append(plain) or make(self, plain))
    smaller_model(shared("gemma3"), anatomy_of("gemma3"), parse_mask("attention.1+mlp.1"))
    assert len(made) == 2  # the whole model, and the one that fits
    model, anatomy = read("causal/jamba")
    monkeypatch.setattr(search, "LIMIT", 20)
    made.clear()
    with pytest.raises(Unfit, match="would be of class"):
        smaller_model(model, anatomy, layers(anatomy, only=(4,)))
    assert len(made) == 20


def test_every_field_that_counts_layers_says_the_same():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = tiny("qwen2", **sizes, num_hidden_layers=4, max_window_layers=4)
    anatomy = read_anatomy(model)
    made = smaller_model(model, anatomy, layers(anatomy, only=(2,)))
    assert (made.config.num_hidden_layers, made.config.max_window_layers) == (3, 3)


LIST = Rest("layers", 6, tuple(NewLayer(i, i) for i in (1, 3, 4)), (frozenset(),) * 6, ())


@pytest.mark.parametrize(
    ("plain", "changes"),
    [
        ({"n_layer": 6, "kinds": list("abcdef")}, {("n_layer",): 3, ("kinds",): ["b", "d", "e"]}),
        ({"n_layer": 6, "moe_layers": [0, 4]}, {("n_layer",): 3, ("moe_layers",): [2]}),
        ({"n_layer": 6, "moe_layers": [2, 6]}, {("n_layer",): 3, ("moe_layers",): [1]}),  # numbered from 1
        ({"n_layer": 6, "per_layer": {"4": {"x": 1}, "5": {}}}, {("n_layer",): 3, ("per_layer",): {"2": {"x": 1}}}),
        ({"n_layer": 6, "kinds": [[["a", "b"], 3]]}, {("n_layer",): 3, ("kinds",): [[["b", "b", "a"], 1]]}),
        ({"text_config": {"n_layer": 6}}, {("text_config", "n_layer"): 3}),
        ({"sizes": [2, 6]}, {("sizes", 1): 3}),
        ({"kinds": list("aabbcc")}, {("kinds",): ["a", "b", "c"]}),
    ],
)
def test_what_a_configuration_says_of_layers_is_cut(plain, changes):
    assert changes in list(countings(plain, LIST))


@pytest.mark.parametrize(
    ("plain", "value"),
    [
        ({"first_dense": 3}, 1),  # layers 1, 3 and 4 stay, one of them below 3
        ({"shared_layers": 2}, 1),  # of the last two, one stays
        ({"block_types": ["a", "b", "b"]}, ["b", "a", "b"]),
        ({"sparse_step": 3}, 2),  # as far apart as the new layers 0 and 2
        ({"mlp_only_layers": []}, [0, 2]),
        ({"scale": 0.5}, 0.75),
    ],
)
def test_what_patterns_and_scales_may_become_is_proposed(plain, value):
    ((path, values),) = options(plain, LIST, [(0, 2)], [1.5])
    assert path == tuple(plain)
    assert value in values


class Window(torch.nn.Linear):
    def __init__(self, number, window, share=1.0):
        super().__init__(2, 2)
        self.layer_idx = number
        self.sliding_window = window
        self.share = share


WHOLE = [Window(0, None, 0.5), Window(1, 8, 0.25), Window(2, None, 0.125)]
REST = Rest("layers", 3, (NewLayer(0, 0), NewLayer(2, 2)), (frozenset(),) * 3, ())


@pytest.mark.parametrize(
    ("trial", "misfits"),
    [
        ([Window(0, None, 0.5), Window(1, None, 0.125)], [[], []]),
        ([Window(0, None, 0.5), Window(1, 8, 0.125)], [[], ["layers.1.sliding_window would be 8, not None"]]),
        ([Window(0, None, 0.5), Window(3, None, 0.125)], [[], ["layers.1.layer_idx would be 3, not 2"]]),
        ([Window(0, None, 0.5), torch.nn.Linear(2, 2)], [[], ["layers.1 would be of class Linear, not Window"]]),
    ],
)
def test_layers_of_equal_shapes_are_told_apart_by_their_attributes(trial, misfits):
    likeness = Likeness([looks(layer) for layer in WHOLE], REST)
    found = likeness.misfits([looks(layer) for layer in trial])
    assert [layer[:1] for layer in found] == misfits


def test_an_attribute_that_the_place_decides_is_known():
    likeness = Likeness([looks(layer) for layer in WHOLE], REST)
    assert likeness.positional(1, looks(Window(1, None, 0.125))) is None
    assert likeness.positional(1, looks(Window(1, None, 0.25))) == (
        "layers.1.share is another in every place: it would be 0.25, not 0.125"
    )


def test_a_table_over_layers_is_cut_to_the_parts_of_those_that_stay():
    table = torch.arange(12).view(2, 6)  # three layers, two columns each
    assert Origin("table", 1, 3, (0, 2)).taken(table).tolist() == [[0, 1, 4, 5], [6, 7, 10, 11]]
    assert Origin("table").taken(table) is table
