"""One tiny random model for every entry of three mappings of transformers: causal, masked and encoder-decoder.

Sizes follow from field names, by the rules at the end; what no rule gives is in `zoo_rows`, one row per model type.
Nothing of blockpruner is imported here: the sweep forks its children from a process that has never seen it.
"""

import functools
import inspect
import itertools
import re
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging
from zoo_rows import ROWS, more_inputs

logging.set_verbosity_error()
torch.set_num_threads(1)  # on work this small, threads wait for each other longer than they compute

Head = Literal["causal", "masked", "seq2seq"]
HEADS: tuple[Head, ...] = get_args(Head)
MAPPINGS = {
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "masked": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "seq2seq": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
}
LanguageModel = Any  # a PreTrainedModel; type checkers know neither its forward nor its modules

VOCABULARY = 128
FIRST_ORDINARY = 16  # token ids below are special ones, and are in no input
LAYERS = 4  # of models whose layers are all of one kind
HIDDEN = 32
NOISE = 0.2
DECAY_TABLES = {"slope_rate", "query_decay", "key_decay", "diagonal_decay"}


@dataclass(frozen=True, order=True)
class Entry:
    """One entry of a mapping; as text `causal/llama`."""

    head: Head
    model_type: str

    def __str__(self) -> str:
        return f"{self.head}/{self.model_type}"

    @classmethod
    def parse(cls, text: str) -> "Entry":
        """The entry of this text; KeyError if the mappings of this transformers have none."""
        return {str(entry): entry for entry in entries()}[text]


@functools.cache
def entries() -> list[Entry]:
    """Every entry of the three mappings of the transformers at hand."""
    return [Entry(head, model_type) for head in HEADS for model_type in MAPPINGS[head]]


def model_class(entry: Entry) -> Any:
    """The class of transformers that the mapping names."""
    name = MAPPINGS[entry.head][entry.model_type]
    return getattr(transformers, name if isinstance(name, str) else name[0])


def build(entry: Entry | str, seed: int = 0) -> LanguageModel:
    """The tiny model of this entry, float32, eval mode, all that it saves perturbed; equal seeds, equal weights."""
    entry = Entry.parse(entry) if isinstance(entry, str) else entry
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = model_class(entry)._from_config(config_of(entry), dtype=torch.float32)
    perturb(model, seed)
    if (generation := getattr(model, "generation_config", None)) is not None:
        generation.eos_token_id = generation.forced_eos_token_id = None  # random weights would end a text at any moment
        if model.config.is_encoder_decoder and generation.decoder_start_token_id is None:
            generation.decoder_start_token_id = SPECIAL["decoder_start_token_id"]
    return model.eval()


def inputs(model: LanguageModel, batch: int = 2, tokens: int = 16, seed: int = 0) -> dict[str, Tensor]:
    """What one forward pass takes: random tokens, no padding, no cache; for an encoder-decoder the same for both."""
    generator = torch.Generator().manual_seed(seed)

    def ids() -> Tensor:
        return torch.randint(FIRST_ORDINARY, VOCABULARY, (batch, tokens), generator=generator)

    given = {"input_ids": ids()}
    given["attention_mask"] = torch.ones_like(given["input_ids"])
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = ids()
    return given | more_inputs(model.config, batch, tokens, generator)


def perturb(model: torch.nn.Module, seed: int) -> None:
    """Add noise to every floating-point tensor that a checkpoint of `model` holds, so that nothing is zero or one.

    What a checkpoint leaves out (fixed tables of positions) stays, since every reload computes it anew; so do tables of
    decay, which also say what comes before what. Variances stay positive.
    """
    generator = torch.Generator().manual_seed(seed)
    unsaved = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_save", None) or ()]
    with torch.no_grad():
        for name, value in model.state_dict().items():
            kept = name.rpartition(".")[2] in DECAY_TABLES or any(pattern.search(name) for pattern in unsaved)
            if kept or not value.is_floating_point():
                continue
            value.add_(torch.randn(value.shape, generator=generator), alpha=NOISE)
            if name.endswith("running_var"):
                value.abs_()


def config_of(entry: Entry) -> PreTrainedConfig:
    """The tiny configuration of this entry."""
    row = ROWS.get(entry.model_type, {}) | ROWS.get(str(entry), {})
    config = shrunk(CONFIG_MAPPING[entry.model_type], row, decoder=entry.head == "causal")
    wanted = model_class(entry).config_class
    if isinstance(config, wanted):
        return config
    return next((part for part in vars(config).values() if isinstance(part, wanted)), config)


def shrunk(kind: type[PreTrainedConfig], row: Mapping[str, Any], *, decoder: bool) -> PreTrainedConfig:
    """A configuration of this class by the rules, with the fields of `row` as they are.

    row: field -> value; of a configuration inside, a mapping of the same kind, whose `model_type` names its class
    where there is none by default.
    """
    made: dict[str, Any] = {}
    for name, part in row.items():
        if isinstance(part, Mapping) and "model_type" in part:
            own = {key: value for key, value in part.items() if key != "model_type"}
            made[name] = shrunk(CONFIG_MAPPING[part["model_type"]], own, decoder=False)
    default = kind(**made)
    fields = {name: held(default, name) for name in inspect.signature(kind).parameters}
    layers = chosen_layers(fields, row)
    small: dict[str, Any] = dict(made)
    for name, value in fields.items():
        if name in made:
            continue
        if isinstance(value, PreTrainedConfig):
            small[name] = shrunk(type(value), row.get(name, {}), decoder=decoder and "encoder" not in name)
        elif (found := by_rule(name, value, layers)) is not None:
            small[name] = found
    if "kv_lora_rank" in fields and "num_key_value_heads" in small:
        small["num_key_value_heads"] = small["num_attention_heads"]  # keys and values are compressed, not shared
    if decoder and "is_decoder" in fields:
        small["is_decoder"] = True
    plain = {name: value for name, value in row.items() if not isinstance(fields.get(name), PreTrainedConfig)}
    return kind(**{**small, **plain})


def held(config: PreTrainedConfig, name: str) -> Any:
    """What this field holds; None where there is none of this name."""
    return vars(config).get(config.attribute_map.get(name, name))


@dataclass(frozen=True)
class Chosen:
    """Which layers of the default configuration the tiny one keeps; before: how many the default has."""

    before: int
    indices: tuple[int, ...]


def chosen_layers(fields: Mapping[str, Any], row: Mapping[str, Any]) -> Chosen:
    """The first layers that show two runs of each kind of layer, with no more than two layers of each run.

    Of one kind are layers with equal entries in all lists that have an entry per layer; a kind that has one run only
    has one here too.
    """
    before = next((fields[name] for name in COUNTS if type(fields.get(name)) is int), 0)
    wanted = next((row[name] for name in COUNTS if name in row), 0)
    lists = [v for v in fields.values() if isinstance(v, (list, tuple)) and len(v) == before]
    if not lists:
        return Chosen(before, tuple(range(wanted or LAYERS)))
    kinds = [tuple(str(v[index]) for v in lists) for index in range(before)]
    runs = [list(run) for _, run in itertools.groupby(range(before), key=kinds.__getitem__)]
    missing = Counter({kind: min(2, sum(kinds[run[0]] == kind for run in runs)) for kind in kinds})
    chosen: list[int] = []
    for run in runs:
        if missing.total() == 0:
            break
        chosen += run[:2]
        missing -= Counter([kinds[run[0]]])
    rest = [index for index in range(before) if index not in chosen]
    lacking = max(0, (wanted or LAYERS) - len(chosen))
    return Chosen(before, tuple(sorted(chosen + rest[:lacking])[: wanted or None]))


def by_rule(name: str, value: Any, layers: Chosen) -> Any:
    """The tiny value of this field; None where it stays as it is."""
    if isinstance(value, (list, tuple)):
        return list_by_rule(name, value, layers)
    if type(value) is not int:
        return None
    if name in COUNTS:
        return len(layers.indices)
    if name in SIZES:
        return SIZES[name]
    if name.endswith(("_token_id", "_token_index")):
        # Any id of its own, out of the way of those below and of the ordinary ones.
        return SPECIAL.get(name, value if 3 <= value < FIRST_ORDINARY else 3 + zlib.crc32(name.encode()) % 13)
    return HIDDEN if value > 2 * HIDDEN and name.endswith(WIDTHS) else None


def list_by_rule(name: str, value: Sequence[Any], layers: Chosen) -> list[Any] | None:
    """One entry per layer: those of the chosen layers; numbers of layers: their new numbers."""
    if len(value) == layers.before:
        return [value[index] for index in layers.indices]
    if ("layer" in name or name.endswith("_idxs")) and value and all(type(entry) is int for entry in value):
        return [new for new, old in enumerate(layers.indices) if old in value]
    return None


COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_blocks")
WIDTHS = ("_size", "_dim", "_width", "_channels", "_rank")
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
_NAMES = {
    # the residual stream, and what is as wide
    HIDDEN: "hidden_size d_model n_embd dim emb_dim embed_dim embedding_size embedding_dim d_latents "
    "word_embed_proj_dim",
    # inside feed-forward blocks, experts, shared experts: each another width
    48: "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff d_inner n_inner dim_ff dff ffn_hidden_size "
    "hidden_dim feed_forward_size mlp_dim dense_intermediate_size intermediate_size_mlp",
    24: "moe_intermediate_size expert_ffn_hidden_size shared_experts_intermediate_size",
    40: "shared_expert_intermediate_size moe_shared_expert_intermediate_size shared_intermediate_size",
    # counts: layers, heads, experts, groups
    4: "encoder_layers num_encoder_layers num_decoder_layers depth num_attention_heads n_head n_heads num_heads "
    "encoder_attention_heads decoder_attention_heads attention_heads num_encoder_attention_heads "
    "num_decoder_attention_heads swa_num_attention_heads index_n_heads linear_num_value_heads linear_num_heads "
    "mamba_n_heads mamba_num_heads n_mamba_heads num_experts num_local_experts n_routed_experts moe_num_experts "
    "time_step_rank mamba_dt_rank qk_rope_head_dim",
    2: "num_key_value_heads num_kv_heads kv_n_heads swa_num_key_value_heads linear_num_key_heads num_experts_per_tok "
    "num_experts_per_token moe_k moe_topk moe_top_k top_k_experts n_group n_groups",
    1: "topk_group first_k_dense_replace num_dense_layers",
    # one head, one state, one window: windows are shorter than the inputs, so that they matter
    8: "head_dim d_kv dim_head d_head swa_head_dim v_head_dim qk_nope_head_dim index_head_dim linear_head_dim "
    "linear_key_head_dim linear_value_head_dim state_size mamba_d_state ssm_state_size chunk_size mamba_chunk_size "
    "sliding_window sliding_window_size attention_window attention_window_size attention_chunk_size local_attention "
    "window_size index_topk hidden_size_per_layer_input laurel_rank q_lora_rank kv_lora_rank",
    12: "qk_head_dim",
    16: "mamba_head_dim mamba_d_head mamba_headdim",
    64: "max_position_embeddings n_positions n_ctx max_seq_len max_source_positions max_target_positions "
    "context_length max_encoder_position_embeddings max_decoder_position_embeddings model_max_length",
    VOCABULARY: "vocab_size src_vocab_size tgt_vocab_size decoder_vocab_size vocab_size_per_layer_input",
}
SIZES = {name: size for size, names in _NAMES.items() for name in names.split()}
