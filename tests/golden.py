"""The blocks of the families that must work, written by hand: an oracle that does not share the anatomy's eyes.

Read in transformers' modelling files, in what each layer's `forward` adds to what; nothing here was computed. Keys are
those of `zoo`; of `towers`, as `tower/...`; of `VARIANTS`, with a remark. The depths and patterns of layers are those
of the tiny models.
"""

from dataclasses import dataclass
from typing import Any

from blockpruner.blocks import Kind

# Numbers that an attention keeps per token in the cache, keys and values together: every head of the tiny models is 8
# wide, of 4 heads or of 2 shared ones.
GROUPED, FULL = 2 * 2 * 8, 2 * 4 * 8
LATENT = 8 + 4  # multi-head latent attention: the compressed keys and values, and one rotary key


@dataclass(frozen=True)
class Row:
    """One block, in paths below its layer.

    path: the outermost module that holds nothing but this block, whose output is what joins the stream; idle: outermost
    modules that are needed for this block only; cached: numbers kept per token; kept: the module goes on running
    without its contribution, since other layers use what else it makes.
    """

    kind: Kind
    path: str
    idle: tuple[str, ...] = ()
    cached: int = 0
    kept: bool = False


@dataclass(frozen=True)
class Layer:
    """One layer: its blocks in the order they run.

    shared: modules that several blocks need, and nothing else; outside: modules with parameters that are no block's,
    and leave with the whole layer or not at all: norms on the stream itself, mixers of several streams, what a block
    that is kept still needs.
    """

    rows: tuple[Row, ...]
    shared: tuple[str, ...] = ()
    outside: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stack:
    """One stack: its name (empty where there is only one), the path of its list of layers, and each layer."""

    name: str
    path: str
    layers: tuple[Layer, ...]


Golden = tuple[Stack, ...]
Layers = tuple[Layer, ...]


def attention(path: str, *idle: str, cached: int = GROUPED, kept: bool = False) -> Row:
    return Row("attention", path, idle, cached, kept)


def mlp(path: str, *idle: str) -> Row:
    return Row("mlp", path, idle)


def mixer(path: str, *idle: str, cached: int = 0) -> Row:
    return Row("mixer", path, idle, cached)


def cross(path: str, *idle: str, cached: int = FULL) -> Row:
    return Row("cross_attention", path, idle, cached)


def of(*rows: Row, shared: tuple[str, ...] = (), outside: tuple[str, ...] = ()) -> Layers:
    """One layer, as a tuple, so that patterns are sums and products: `2 * (2 * SLIDING + FULL)`."""
    return (Layer(rows, shared, outside),)


def one(path: str, layers: Layers) -> Golden:
    return (Stack("", path, layers),)


def two(encoder: str, encoding: Layers, decoder: str, decoding: Layers) -> Golden:
    return Stack("encoder", encoder, encoding), Stack("decoder", decoder, decoding)


# Norms before the branches: the layer of Llama, and what differs from it in names only.


def llama(cached: int = GROUPED) -> Layers:
    return of(attention("self_attn", "input_layernorm", cached=cached), mlp("mlp", "post_attention_layernorm"))


def before(mixing: Row, channel: str, norm: str) -> Layers:
    return of(mixing, mlp(channel, norm))


LLAMA = llama()
LINEAR = before(mixer("linear_attn", "input_layernorm"), "mlp", "post_attention_layernorm")
NEOX = before(attention("attention", "input_layernorm", cached=FULL), "mlp", "post_attention_layernorm")
BLOOM = before(attention("self_attention", "input_layernorm", cached=FULL), "mlp", "post_attention_layernorm")
GPT2 = before(attention("attn", "ln_1", cached=FULL), "mlp", "ln_2")
JAMBA_ATTENTION = before(attention("self_attn", "input_layernorm"), "feed_forward", "pre_ff_layernorm")
JAMBA_MAMBA = before(mixer("mamba", "input_layernorm"), "feed_forward", "pre_ff_layernorm")
LFM2_ATTENTION = before(attention("self_attn", "operator_norm"), "feed_forward", "ffn_norm")
LFM2_CONVOLUTION = before(mixer("conv", "operator_norm"), "feed_forward", "ffn_norm")

# Norms after the branches, before they are added; with and without norms before them.

OLMO2 = before(attention("self_attn", "post_attention_layernorm"), "mlp", "post_feedforward_layernorm")
GEMMA2 = of(
    attention("self_attn", "input_layernorm", "post_attention_layernorm"),
    mlp("mlp", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
)
GLM4 = of(
    attention("self_attn", "input_layernorm", "post_self_attn_layernorm"),
    mlp("mlp", "post_attention_layernorm", "post_mlp_layernorm"),
)


def gemma4(cached: int = GROUPED, *, kept: bool = False) -> Layers:
    """As Gemma 2, and then a third branch: a gate that the token's own per-layer input goes through."""
    idle = () if kept else ("input_layernorm", "post_attention_layernorm")
    return of(
        attention("self_attn", *idle, cached=cached, kept=kept),
        mlp("mlp", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
        mlp("per_layer_projection", "per_layer_input_gate", "post_per_layer_input_norm"),
        outside=("input_layernorm", "post_attention_layernorm") if kept else (),
    )


def gemma4_moe(cached: int = GROUPED) -> Layers:
    """As Gemma 2, with routed experts beside the mlp: each is normalised before and after, and then their sum."""
    return of(
        attention("self_attn", "input_layernorm", "post_attention_layernorm", cached=cached),
        mlp("mlp", "pre_feedforward_layernorm", "post_feedforward_layernorm_1"),
        mlp("experts", "router", "pre_feedforward_layernorm_2", "post_feedforward_layernorm_2"),
        shared=("post_feedforward_layernorm",),
    )


def gemma3n(cached: int = GROUPED, *, kept: bool = False) -> Layers:
    """Four streams, mixed by altup; laurel reads the norm of attention too; per-layer inputs go to the other three."""
    mixing = ("input_layernorm", "altup", "laurel")
    per_layer = ("per_layer_input_gate", "per_layer_projection", "post_per_layer_input_norm")
    idle = () if kept else ("post_attention_layernorm",)
    return of(
        attention("self_attn", *idle, cached=cached, kept=kept),
        mlp("mlp", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
        outside=(*mixing, *per_layer, *(("post_attention_layernorm",) if kept else ())),
    )


# Branches that read the stream side by side, through one norm.

PHI = of(attention("self_attn"), mlp("mlp"), shared=("input_layernorm",))
GPTJ = of(attention("attn", cached=FULL), mlp("mlp"), shared=("ln_1",))
FALCON_H1 = of(
    mixer("mamba"), attention("self_attn"), mlp("feed_forward", "pre_ff_layernorm"), shared=("input_layernorm",)
)


def falcon(cached: int) -> Layers:
    return of(attention("self_attention", cached=cached), mlp("mlp"), shared=("input_layernorm",))


def granite_shared(mixing: Row) -> Layers:
    return of(mixing, mlp("block_sparse_moe"), mlp("shared_mlp"), shared=("post_attention_layernorm",))


# One block per layer. Those that are called `mixer` stand in a layer that reads the type of its norm's weight.


def alone(mixing: Row) -> Layers:
    return of(mixing, shared=("norm",))


MAMBA = NEMOTRON_MAMBA = alone(mixer("mixer"))
NEMOTRON_ATTENTION, NEMOTRON_MLP = alone(attention("mixer")), alone(mlp("mixer"))
ZAMBA2_MAMBA = of(mixer("mamba", "input_layernorm"))
# The shared transformer is not added to the stream: mamba reads the sum of the two, and what mamba makes is added.
ZAMBA2_HYBRID = of(mixer("mamba_decoder", "linear", "shared_transformer", cached=2 * 2 * 16))

# Norms on the stream itself, after the addition: no block's, they go with the whole layer only.

BERT = of(
    attention("attention.output.dense", "attention.self", cached=0),
    mlp("output.dense", "intermediate"),
    outside=("attention.output.LayerNorm", "output.LayerNorm"),
)
DISTILBERT = of(attention("attention", cached=0), mlp("ffn"), outside=("sa_layer_norm", "output_layer_norm"))
BART_ENCODER = of(
    attention("self_attn", cached=0), mlp("fc2", "fc1"), outside=("self_attn_layer_norm", "final_layer_norm")
)
BART_DECODER = of(
    attention("self_attn", cached=FULL),
    cross("encoder_attn"),
    mlp("fc2", "fc1"),
    outside=("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"),
)

# Encoders and decoders with norms before the branches.

MODERNBERT_FIRST = of(attention("attn", cached=0), mlp("mlp", "mlp_norm"))  # the embeddings are normalised already
MODERNBERT = of(attention("attn", "attn_norm", cached=0), mlp("mlp", "mlp_norm"))
MBART_ENCODER = of(attention("self_attn", "self_attn_layer_norm", cached=0), mlp("fc2", "fc1", "final_layer_norm"))
MBART_DECODER = of(
    attention("self_attn", "self_attn_layer_norm", cached=FULL),
    cross("encoder_attn", "encoder_attn_layer_norm"),
    mlp("fc2", "fc1", "final_layer_norm"),
)
# Norm and addition are inside the module. In the first layers of T5 it makes the table of positions of all layers.
T5_ENCODER = of(attention("layer.0", cached=0), mlp("layer.1"))
T5_ENCODER_FIRST = of(attention("layer.0", cached=0, kept=True), mlp("layer.1"))
T5_DECODER = of(attention("layer.0", cached=FULL), cross("layer.1"), mlp("layer.2"))
T5_DECODER_FIRST = of(attention("layer.0", cached=FULL, kept=True), cross("layer.1"), mlp("layer.2"))
T5 = two("encoder.block", T5_ENCODER_FIRST + 3 * T5_ENCODER, "decoder.block", T5_DECODER_FIRST + 3 * T5_DECODER)
BART = two("model.encoder.layers", 4 * BART_ENCODER, "model.decoder.layers", 4 * BART_DECODER)
MBART = two("model.encoder.layers", 4 * MBART_ENCODER, "model.decoder.layers", 4 * MBART_DECODER)

# Builds of a family that differ in structure: fields of the configuration, by what follows the key of the family.
VARIANTS: dict[str, dict[str, Any]] = {
    "causal/opt (350m)": {"do_layer_norm_before": False},
    "causal/stablelm (2-12b)": {"use_parallel_residual": True},
    "causal/gpt_neox (serial)": {"use_parallel_residual": False},
    "causal/falcon (rw)": {
        "parallel_attn": False,
        "multi_query": False,
        "num_kv_heads": 4,
        "alibi": True,
        "bias": True,
    },
    "causal/falcon (40b)": {"new_decoder_architecture": True},
    "causal/falcon (11b)": {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1},
    "causal/granitemoehybrid (dense)": {"num_local_experts": 0, "num_experts_per_tok": 0},
    "causal/gemma4_text (26b-a4b)": {
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 24,
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
    },
}

GOLDEN: dict[str, Golden] = {
    "causal/llama": one("model.layers", 4 * LLAMA),
    "causal/llama4_text": one(
        "model.layers",
        8 * before(attention("self_attn", "input_layernorm"), "feed_forward", "post_attention_layernorm"),
    ),
    "causal/mistral": one("model.layers", 4 * LLAMA),
    "causal/mixtral": one("model.layers", 4 * LLAMA),
    "causal/ministral": one("model.layers", 4 * LLAMA),
    "causal/ministral3": one("model.layers", 4 * LLAMA),
    "causal/qwen2": one("model.layers", 4 * LLAMA),
    "causal/qwen2_moe": one("model.layers", 4 * LLAMA),
    "causal/qwen3": one("model.layers", 4 * LLAMA),
    "causal/qwen3_moe": one("model.layers", 4 * LLAMA),
    "causal/qwen3_next": one("model.layers", 2 * (2 * LINEAR + LLAMA)),
    "causal/qwen3_5_text": one("model.layers", 2 * (2 * LINEAR + LLAMA)),
    "causal/qwen3_5_moe_text": one("model.layers", 2 * (2 * LINEAR + LLAMA)),
    "causal/gemma": one("model.layers", 4 * LLAMA),
    "causal/gemma2": one("model.layers", 4 * GEMMA2),
    "causal/gemma3_text": one("model.layers", 6 * GEMMA2),
    # Of six layers the last two use keys and values of layers 3 (sliding) and 2 (full).
    "causal/gemma3n_text": one("model.layers", 2 * gemma3n() + 2 * gemma3n(kept=True) + 2 * gemma3n(cached=0)),
    "causal/gemma4_text": one(
        "model.layers",
        2 * gemma4() + gemma4(cached=2 * 2 * 512, kept=True) + gemma4(kept=True) + 2 * gemma4(cached=0),
    ),
    "causal/phi": one("model.layers", 4 * PHI),
    "causal/phi3": one("model.layers", 4 * LLAMA),
    "causal/phimoe": one("model.layers", 4 * LLAMA),
    "causal/phi4_multimodal": one("model.layers", 4 * LLAMA),
    # Its norms have no parameters.
    "causal/olmo": one("model.layers", 4 * of(attention("self_attn"), mlp("mlp"))),
    "causal/olmo2": one("model.layers", 4 * OLMO2),
    "causal/olmo3": one("model.layers", 6 * OLMO2),
    "causal/olmoe": one("model.layers", 4 * LLAMA),
    "causal/olmo_hybrid": one("model.layers", 2 * (2 * LINEAR + OLMO2)),
    "causal/falcon": one("transformer.h", 4 * falcon(2 * 1 * 8)),
    "causal/falcon_h1": one("model.layers", 4 * FALCON_H1),
    "causal/gpt2": one("transformer.h", 4 * GPT2),
    "causal/gpt_neo": one("transformer.h", 4 * GPT2),
    "causal/gptj": one("transformer.h", 4 * GPTJ),
    "causal/gpt_neox": one("gpt_neox.layers", 4 * NEOX),
    "causal/gpt_oss": one("model.layers", 4 * LLAMA),
    "causal/opt": one(
        "model.decoder.layers",
        4 * of(attention("self_attn", "self_attn_layer_norm", cached=FULL), mlp("fc2", "fc1", "final_layer_norm")),
    ),
    "causal/bloom": one("transformer.h", 4 * BLOOM),
    "causal/mpt": one("transformer.blocks", 4 * before(attention("attn", "norm_1", cached=FULL), "ffn", "norm_2")),
    "causal/cohere": one("model.layers", 4 * PHI),
    "causal/cohere2": one("model.layers", 6 * PHI),
    "causal/deepseek_v2": one("model.layers", 4 * llama(LATENT)),
    "causal/deepseek_v3": one("model.layers", 4 * llama(LATENT)),
    "causal/glm": one("model.layers", 4 * LLAMA),
    "causal/glm4": one("model.layers", 4 * GLM4),
    "causal/glm4_moe": one("model.layers", 4 * LLAMA),
    "causal/granite": one("model.layers", 4 * LLAMA),
    "causal/granitemoe": one(
        "model.layers",
        4 * before(attention("self_attn", "input_layernorm"), "block_sparse_moe", "post_attention_layernorm"),
    ),
    "causal/granitemoeshared": one("model.layers", 4 * granite_shared(attention("self_attn", "input_layernorm"))),
    "causal/granitemoehybrid": one(
        "model.layers",
        2
        * (
            2 * granite_shared(mixer("mamba", "input_layernorm"))
            + granite_shared(attention("self_attn", "input_layernorm"))
        ),
    ),
    "causal/smollm3": one("model.layers", 6 * LLAMA),
    "causal/starcoder2": one("model.layers", 4 * LLAMA),
    "causal/stablelm": one("model.layers", 4 * LLAMA),
    "causal/nemotron": one("model.layers", 4 * LLAMA),
    "causal/nemotron_h": one("model.layers", 2 * (NEMOTRON_MAMBA + NEMOTRON_MLP + NEMOTRON_ATTENTION + NEMOTRON_MLP)),
    "causal/mamba": one("backbone.layers", 4 * MAMBA),
    "causal/mamba2": one("backbone.layers", 4 * MAMBA),
    "causal/jamba": one("model.layers", 2 * (2 * JAMBA_MAMBA + JAMBA_ATTENTION + JAMBA_MAMBA)),
    "causal/zamba2": one("model.layers", 2 * (2 * ZAMBA2_MAMBA + ZAMBA2_HYBRID)),
    "causal/lfm2": one("model.layers", 2 * (2 * LFM2_CONVOLUTION + LFM2_ATTENTION)),
    "causal/lfm2_moe": one("model.layers", 2 * (2 * LFM2_CONVOLUTION + LFM2_ATTENTION)),
    "causal/minicpm3": one("model.layers", 4 * llama(LATENT)),
    "causal/ernie4_5": one("model.layers", 4 * LLAMA),
    "causal/ernie4_5_moe": one("model.layers", 4 * LLAMA),
    "causal/hunyuan_v1_dense": one("model.layers", 4 * LLAMA),
    "causal/hunyuan_v1_moe": one("model.layers", 4 * LLAMA),
    "causal/exaone4": one("model.layers", 6 * OLMO2),
    "causal/seed_oss": one("model.layers", 4 * LLAMA),
    "causal/apertus": one(
        "model.layers", 4 * before(attention("self_attn", "attention_layernorm"), "mlp", "feedforward_layernorm")
    ),
    "masked/bert": one("bert.encoder.layer", 4 * BERT),
    "masked/roberta": one("roberta.encoder.layer", 4 * BERT),
    "masked/distilbert": one("distilbert.transformer.layer", 4 * DISTILBERT),
    "masked/deberta-v2": one("deberta.encoder.layer", 4 * BERT),
    "masked/electra": one("electra.encoder.layer", 4 * BERT),
    "masked/modernbert": one("model.layers", MODERNBERT_FIRST + 5 * MODERNBERT),
    "seq2seq/t5": T5,
    "seq2seq/mt5": T5,
    # Every layer has a table of positions of its own.
    "seq2seq/umt5": two("encoder.block", 4 * T5_ENCODER, "decoder.block", 4 * T5_DECODER),
    "seq2seq/bart": BART,
    "seq2seq/mbart": MBART,
    "seq2seq/marian": BART,
    "seq2seq/pegasus": MBART,
    "causal/opt (350m)": one(
        "model.decoder.layers",
        4
        * of(
            attention("self_attn", cached=FULL),
            mlp("fc2", "fc1"),
            outside=("self_attn_layer_norm", "final_layer_norm"),
        ),
    ),
    "causal/stablelm (2-12b)": one("model.layers", 4 * PHI),
    "causal/gpt_neox (serial)": one("gpt_neox.layers", 4 * NEOX),
    "causal/falcon (rw)": one("transformer.h", 4 * BLOOM),
    # Its key/value heads are spread to all before they are cached.
    "causal/falcon (40b)": one(
        "transformer.h", 4 * of(attention("self_attention", "ln_attn", cached=FULL), mlp("mlp", "ln_mlp"))
    ),
    "causal/falcon (11b)": one("transformer.h", 4 * falcon(FULL)),
    "causal/granitemoehybrid (dense)": one(
        "model.layers",
        2
        * (
            2 * before(mixer("mamba", "input_layernorm"), "shared_mlp", "post_attention_layernorm")
            + before(attention("self_attn", "input_layernorm"), "shared_mlp", "post_attention_layernorm")
        ),
    ),
    "causal/gemma4_text (26b-a4b)": one("model.layers", 2 * (2 * gemma4_moe() + gemma4_moe(cached=2 * 2 * 512))),
    "tower/llava": one("model.language_model.layers", 4 * LLAMA),
    "tower/qwen2_vl": one("model.language_model.layers", 4 * LLAMA),
    "tower/qwen3_vl": one("model.language_model.layers", 4 * LLAMA),
    "tower/gemma3": one("model.language_model.layers", 4 * GEMMA2),
    "tower/paligemma": one("model.language_model.layers", 4 * LLAMA),
}
