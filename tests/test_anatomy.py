"""The anatomy of every architecture against what its modelling file says."""

import copy
from dataclasses import dataclass

import pytest
import torch
from tiny import FAMILIES, HIDDEN, anatomy_of, shared, tiny, token_ids
from transformers import AutoConfig, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from blockpruner.anatomy.reading import read_anatomy
from blockpruner.blocks import Block, Kind
from blockpruner.errors import UnsupportedModelError
from blockpruner.surgery.removal import prune_, skipped

# (kind, module whose output joins the stream, what idles without it): read in transformers' modelling files.
Row = tuple[Kind, str, tuple[str, ...]]
LLAMA: tuple[Row, ...] = (
    ("attention", "self_attn", ("input_layernorm",)),
    ("mlp", "mlp", ("post_attention_layernorm",)),
)
GEMMA: tuple[Row, ...] = (
    ("attention", "self_attn", ("input_layernorm", "post_attention_layernorm")),
    ("mlp", "mlp", ("pre_feedforward_layernorm", "post_feedforward_layernorm")),
)
NEOX: tuple[Row, ...] = (
    ("attention", "attention", ("input_layernorm",)),
    ("mlp", "mlp", ("post_attention_layernorm",)),
)


@dataclass(frozen=True)
class Golden:
    """layers: path of the stack; rows: the blocks of each layer; shared: what idles without all of them.

    serial: attention, then an mlp that reads its result, no parameter besides, all layers alike;
    cached: key/value heads times their width, per layer.
    """

    layers: str
    rows: tuple[Row, ...]
    cached: int
    shared: tuple[str, ...] = ()
    serial: bool = True
    depth: int = 4


GOLDEN = {
    "llama": Golden("model.layers", LLAMA, cached=2 * 8),
    "mistral": Golden("model.layers", LLAMA, cached=2 * 8),
    "qwen2": Golden("model.layers", LLAMA, cached=2 * 8),
    "qwen3": Golden("model.layers", LLAMA, cached=2 * 16),
    "gemma2": Golden("model.layers", GEMMA, cached=2 * 8),
    "gemma3": Golden("model.layers", GEMMA, cached=2 * 8, depth=6),
    "phi": Golden(
        "model.layers",
        (("attention", "self_attn", ()), ("mlp", "mlp", ())),
        cached=4 * 8,
        shared=("input_layernorm",),
        serial=False,
    ),
    "olmo2": Golden(
        "model.layers",
        (("attention", "self_attn", ("post_attention_layernorm",)), ("mlp", "mlp", ("post_feedforward_layernorm",))),
        cached=2 * 8,
    ),
    "falcon": Golden(
        "transformer.h",
        (("attention", "self_attention", ()), ("mlp", "mlp", ())),
        cached=1 * 8,
        shared=("input_layernorm",),
        serial=False,
    ),
    # Falcon's new architecture groups key/value heads in the weights, and spreads them before they are cached.
    "falcon-new": Golden(
        "transformer.h",
        (("attention", "self_attention", ("ln_attn",)), ("mlp", "mlp", ("ln_mlp",))),
        cached=4 * 8,
        serial=False,
    ),
    "falcon-serial": Golden(
        "transformer.h",
        (("attention", "self_attention", ("input_layernorm",)), ("mlp", "mlp", ("post_attention_layernorm",))),
        cached=4 * 8,
    ),
    "gpt2": Golden("transformer.h", (("attention", "attn", ("ln_1",)), ("mlp", "mlp", ("ln_2",))), cached=4 * 8),
    "neox": Golden("gpt_neox.layers", NEOX, cached=4 * 8, serial=False),
    "neox-serial": Golden("gpt_neox.layers", NEOX, cached=4 * 8),
    "opt": Golden(
        "model.decoder.layers",
        (("attention", "self_attn", ("self_attn_layer_norm",)), ("mlp", "fc2", ("fc1", "final_layer_norm"))),
        cached=4 * 8,
    ),
    "bloom": Golden(
        "transformer.h",
        (("attention", "self_attention", ("input_layernorm",)), ("mlp", "mlp", ("post_attention_layernorm",))),
        cached=4 * 8,
    ),
    "mixtral": Golden("model.layers", LLAMA, cached=2 * 8),
    "qwen2-moe": Golden("model.layers", LLAMA, cached=2 * 8, serial=False),
}

on_each_family = pytest.mark.parametrize("family", FAMILIES)


def test_every_family_has_a_golden_row():
    assert GOLDEN.keys() == FAMILIES.keys()


@on_each_family
def test_blocks_are_where_the_modelling_file_has_them_in_the_order_they_run(family):
    golden, anatomy = GOLDEN[family], anatomy_of(family)
    (stack,) = anatomy.stacks
    assert (stack.name, stack.path, len(stack.layers)) == ("", golden.layers, golden.depth)
    for index, layer in enumerate(stack.layers):
        base = f"{golden.layers}.{index}"
        assert layer.path == base
        assert [(part.block, part.path, set(part.idle)) for part in layer.parts] == [
            (Block(kind, index), f"{base}.{module}", {f"{base}.{name}" for name in idle})
            for kind, module, idle in golden.rows
        ]
        norms = [shared(family).get_submodule(f"{base}.{name}") for name in golden.shared]
        assert layer.shared == sum(p.numel() for module in norms for p in module.parameters())
    assert [str(block) for block in anatomy.outline.blocks[:3]] == ["attention.0", "mlp.0", "attention.1"]


@on_each_family
def test_a_stack_is_serial_where_halves_of_two_layers_make_a_layer(family):
    assert anatomy_of(family).outline.serial == (frozenset([""]) if GOLDEN[family].serial else frozenset())


@on_each_family
def test_every_parameter_belongs_to_one_block_or_to_the_rest(family):
    model, golden, outline = shared(family), GOLDEN[family], anatomy_of(family).outline
    outside = sum(p.numel() for name, p in model.named_parameters() if not name.startswith(f"{golden.layers}."))
    norms = sum(
        p.numel()
        for index in range(golden.depth)
        for name in golden.shared
        for p in model.get_submodule(f"{golden.layers}.{index}.{name}").parameters()
    )
    assert outline.total_parameters == sum(p.numel() for p in model.parameters())
    assert outline.total_parameters == sum(outline.parameters.values()) + norms + outside


def test_parameters_of_a_llama_block_are_its_matrices_and_its_norm():
    outline = anatomy_of("llama").outline
    hidden, heads, groups, width, inner = HIDDEN, 4, 2, 8, 48
    attention = hidden * width * (2 * heads + 2 * groups) + hidden
    mlp = 3 * hidden * inner + hidden
    assert {b: n for b, n in outline.parameters.items() if b.kind == "attention"} == {
        Block("attention", layer): attention for layer in range(4)
    }
    assert {b: n for b, n in outline.parameters.items() if b.kind == "mlp"} == {
        Block("mlp", layer): mlp for layer in range(4)
    }


def test_sparse_layers_count_all_their_experts():
    sizes = anatomy_of("qwen2-moe").outline.parameters
    dense = 3 * HIDDEN * 48 + HIDDEN
    router, experts, common = 4 * HIDDEN, 4 * 3 * HIDDEN * 24, 3 * HIDDEN * 40 + HIDDEN
    assert [sizes[Block("mlp", layer)] for layer in range(4)] == [dense, router + experts + common + HIDDEN] * 2


@on_each_family
def test_cache_bytes_are_two_times_heads_times_width_times_four(family):
    for part in anatomy_of(family).parts.values():
        assert part.cache_bytes == (2 * GOLDEN[family].cached * 4 if part.block.kind == "attention" else 0)


@on_each_family
def test_shares_of_compute_are_what_the_matrices_promise(family):
    model, parts = shared(family), anatomy_of(family).parts
    shares = {block: part.compute for block, part in parts.items()}
    assert all(share is not None and 0 < share < 1 for share in shares.values())
    head = model.get_output_embeddings().weight.numel()
    projections = sum(p.numel() for p in model.get_submodule(parts[Block("mlp", 0)].path).parameters() if p.ndim == 2)
    if family not in ("mixtral", "opt"):  # their mlp is not, or not only, made of plain matrices in one module
        whole = head / (1 - sum(share or 0 for share in shares.values()))
        assert shares[Block("mlp", 0)] == pytest.approx(projections / whole, rel=1e-2)


def test_routed_experts_cost_what_the_chosen_ones_cost():
    parts = anatomy_of("mixtral").parts
    head, router, chosen = 128 * HIDDEN, 4 * HIDDEN, 2 * 3 * HIDDEN * 48
    whole = head / (1 - sum(part.compute or 0 for part in parts.values()))
    assert parts[Block("mlp", 0)].compute == pytest.approx((router + chosen) / whole, rel=1e-3)


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi", "bloom", "mixtral"])
def test_the_proof_holds_in_half_precision(family):
    found = read_anatomy(FAMILIES[family]().to(torch.bfloat16))
    same = {block: (part.modules, part.idle, part.parameters) for block, part in anatomy_of(family).parts.items()}
    assert {block: (part.modules, part.idle, part.parameters) for block, part in found.parts.items()} == same


# Models that have been pruned, and models of another build.


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi", "falcon-new", "opt", "bloom", "qwen2-moe"])
def test_a_pruned_model_can_be_read_and_pruned_again(family):
    golden, outline = GOLDEN[family], anatomy_of(family).outline
    first, second = Block("attention", 1), Block("mlp", golden.depth - 1)
    model = prune_(FAMILIES[family](), [first], anatomy=anatomy_of(family))
    read = read_anatomy(model)
    assert read.outline.blocks == tuple(block for block in outline.blocks if block != first)
    assert read.outline.total_parameters == outline.total_parameters - outline.parameters[first]
    prune_(model, [second], anatomy=read)
    assert read_anatomy(model).outline.blocks == tuple(b for b in outline.blocks if b not in (first, second))
    inputs = torch.arange(3, 19).view(2, 8)
    with torch.no_grad(), skipped(shared(family), [first, second], anatomy=anatomy_of(family)) as reference:
        assert torch.equal(model(inputs).logits, reference(inputs).logits)


def test_a_layer_without_blocks_has_no_parts():
    model = prune_(FAMILIES["phi"](), ["attention.2", "mlp.2"], anatomy=anatomy_of("phi"))
    layers = read_anatomy(model).stacks[0].layers
    assert [len(layer.parts) for layer in layers] == [2, 2, 0, 2]
    assert layers[2].shared == 0


SMALL_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
SMALL_ENCODER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}


def build(auto, model_type: str, **options):
    config = AutoConfig.for_model(model_type, vocab_size=128, pad_token_id=0, **options)
    return auto.from_config(config).eval()


def test_blocks_of_an_encoder_decoder_are_named_by_stack():
    anatomy = read_anatomy(build(AutoModelForSeq2SeqLM, "t5", **SMALL_T5))
    assert [str(block) for block in anatomy.outline.layers()["decoder", 1]] == [
        "decoder.attention.1",
        "decoder.cross_attention.1",
        "decoder.mlp.1",
    ]
    assert [stack.path for stack in anatomy.stacks] == ["encoder.block", "decoder.block"]


def test_a_layer_that_owns_the_table_of_positions_keeps_it():
    model = build(AutoModelForSeq2SeqLM, "t5", **SMALL_T5)
    anatomy = read_anatomy(model)
    assert {str(block) for block in anatomy.outline.kept} == {"encoder.attention.0", "decoder.attention.0"}
    assert {anatomy.outline.parameters[block] for block in anatomy.outline.kept} == {0}
    inputs = {"input_ids": token_ids(2, 16), "decoder_input_ids": token_ids(2, 12)}
    expected = copy.deepcopy(model)
    with torch.no_grad():
        expected.encoder.block[0].layer[0].SelfAttention.o.weight.zero_()
        for removed in (["encoder.attention.0"], ["encoder.attention.0", "encoder.mlp.0"]):
            if len(removed) == 2:
                expected.encoder.block[0].layer[1].DenseReluDense.wo.weight.zero_()
            with skipped(model, removed, anatomy=anatomy):
                assert torch.equal(model(**inputs).logits, expected(**inputs).logits)


def test_norms_on_the_stream_stay_with_the_layer_and_leave_with_its_last_block():
    model = build(AutoModelForMaskedLM, "bert", **SMALL_ENCODER)
    anatomy, ids, zeroed = read_anatomy(model), token_ids(2, 16), copy.deepcopy(model)
    layer = anatomy.stacks[0].layers[1]
    assert [(part.path, sorted(part.idle)) for part in layer.parts] == [
        ("bert.encoder.layer.1.attention.output.dense", ["bert.encoder.layer.1.attention.self"]),
        ("bert.encoder.layer.1.output.dense", ["bert.encoder.layer.1.intermediate"]),
    ]
    assert (layer.identity, layer.shared) == (False, 4 * HIDDEN)
    dense = zeroed.bert.encoder.layer[1].attention.output.dense
    with torch.no_grad(), skipped(model, ["attention.1"], anatomy=anatomy):
        dense.weight.zero_()
        dense.bias.zero_()
        assert torch.equal(model(ids).logits, zeroed(ids).logits)
    with torch.no_grad(), skipped(model, ["attention.1", "mlp.1"], anatomy=anatomy):
        del zeroed.bert.encoder.layer[1]
        assert torch.equal(model(ids).logits, zeroed(ids).logits)


def test_an_encoder_with_norms_before_its_blocks_is_proved():
    anatomy = read_anatomy(build(AutoModelForMaskedLM, "modernbert", **SMALL_ENCODER))
    assert [part.path for part in anatomy.stacks[0].layers[3].parts] == ["model.layers.3.attn", "model.layers.3.mlp"]
    assert {part.cache_bytes for part in anatomy.parts.values()} == {0}


def test_layers_that_share_one_module_are_refused_with_what_was_seen():
    albert = build(AutoModelForMaskedLM, "albert", **SMALL_ENCODER, embedding_size=16)
    with pytest.raises(
        UnsupportedModelError, match=r"each run once .* \(AlbertLayerGroup x 1, each called up to 4 times\)"
    ):
        read_anatomy(albert)


def test_layers_that_normalise_after_the_addition_are_not_serial():
    options = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_hidden_layers": 2}
    anatomy = read_anatomy(tiny("opt", **options, num_attention_heads=4, do_layer_norm_before=False))
    assert [(part.path, list(part.idle)) for part in anatomy.stacks[0].layers[1].parts] == [
        ("model.decoder.layers.1.self_attn", []),
        ("model.decoder.layers.1.fc2", ["model.decoder.layers.1.fc1"]),
    ]
    assert not anatomy.outline.serial


def test_compute_is_none_where_torch_cannot_count_it():
    model = tiny(
        "dbrx",
        d_model=32,
        n_heads=4,
        n_layers=2,
        max_seq_len=64,
        ffn_config={"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
        attn_config={"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
    )
    assert {part.compute for part in read_anatomy(model).parts.values()} == {None}
