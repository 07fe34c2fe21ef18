"""Tiny random language models of many architectures, made offline in milliseconds.

Weights are drawn so that nothing is zero or one by initialisation and every block matters. Layer patterns (sliding
windows, dense and sparse layers) occur twice over, so that the second period cannot pass for the first.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from blockpruner.anatomy.reading import Anatomy, read_anatomy

logging.set_verbosity_error()

LanguageModel = Any  # a PreTrainedModel that generates; type checkers know neither that nor its modules

HIDDEN = 32
HEADS = 4
VOCABULARY = 128
WINDOW = 8  # of the architectures with a sliding window

_COMMON = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
_ROTARY = {
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 64,
}
_GROUPED = {**_ROTARY, "num_key_value_heads": 2}
_GEMMA = {**_GROUPED, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": WINDOW}
_FALCON = {"hidden_size": HIDDEN, "num_hidden_layers": 4, "num_attention_heads": HEADS, "alibi": False}
_NEOX = {**_ROTARY, "rotary_pct": 0.5}
_GPT2 = {"n_embd": HIDDEN, "n_layer": 4, "n_head": HEADS, "n_positions": 64}
_OPT = {"hidden_size": HIDDEN, "word_embed_proj_dim": HIDDEN, "ffn_dim": 48, "num_hidden_layers": 4}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Add noise to every floating-point tensor that a checkpoint of `model` holds."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.add_(torch.randn(value.shape, generator=generator), alpha=0.2)


def tiny(model_type: str, seed: int = 0, **options: object) -> LanguageModel:
    """A causal language model of this transformers model type, float32, eval mode; equal arguments, equal weights."""
    config = AutoConfig.for_model(model_type, **_COMMON, **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomise(model, seed)
    return model.eval()


def _family(model_type: str, **options: object) -> Callable[[], LanguageModel]:
    return functools.partial(tiny, model_type, **options)


FAMILIES: dict[str, Callable[[], LanguageModel]] = {
    "llama": _family("llama", **_GROUPED),
    "mistral": _family("mistral", **_GROUPED, sliding_window=WINDOW),
    "qwen2": _family("qwen2", **_GROUPED),
    "qwen3": _family("qwen3", **_GROUPED, head_dim=16),
    "gemma2": _family("gemma2", **_GEMMA, layer_types=["sliding_attention", "full_attention"] * 2),
    "gemma3": _family(
        "gemma3_text",
        **{**_GEMMA, "num_hidden_layers": 6},
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
    ),
    "phi": _family("phi", **_ROTARY, partial_rotary_factor=0.5),
    "olmo2": _family("olmo2", **_GROUPED),
    "falcon": _family("falcon", **_FALCON, multi_query=True, parallel_attn=True),
    "falcon-new": _family("falcon", **_FALCON, new_decoder_architecture=True, num_kv_heads=2, bias=True),
    "falcon-serial": _family("falcon", **{**_FALCON, "alibi": True}, multi_query=False, parallel_attn=False, bias=True),
    "gpt2": _family("gpt2", **_GPT2),
    "neox": _family("gpt_neox", **_NEOX, use_parallel_residual=True),
    "neox-serial": _family("gpt_neox", **_NEOX, use_parallel_residual=False),
    "opt": _family("opt", **_OPT, num_attention_heads=HEADS, max_position_embeddings=64, do_layer_norm_before=True),
    "bloom": _family("bloom", hidden_size=HIDDEN, n_layer=4, n_head=HEADS),
    "mixtral": _family("mixtral", **_GROUPED, num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    "qwen2-moe": _family(
        "qwen2_moe", **_GROUPED, **_EXPERTS, shared_expert_intermediate_size=40, decoder_sparse_step=2
    ),
}


@functools.cache
def shared(family: str) -> LanguageModel:
    """The model of this family that all tests share; whoever changes one for good builds it with FAMILIES instead."""
    return FAMILIES[family]()


@functools.cache
def anatomy_of(family: str) -> Anatomy:
    """The anatomy of the shared model of this family."""
    return read_anatomy(shared(family))


def token_ids(batch: int = 2, length: int = 16, seed: int = 0) -> torch.Tensor:
    """Random token ids, none of them special."""
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))
