"""What the rules of `zoo` do not give: fields of tiny configurations by model type, and inputs besides tokens."""

from typing import Any

import torch
from torch import Tensor

_SLIDING = ["sliding_attention", "sliding_attention", "full_attention"] * 2
_HYBRID = ["linear_attention", "linear_attention", "full_attention"] * 2
_GEMMA3N = {
    "intermediate_size": 48,
    "activation_sparsity_pattern": [0.5, 0.0] * 3,
    "layer_types": _SLIDING,
    "num_hidden_layers": 6,
    "num_kv_shared_layers": 2,
}
_GEMMA4 = {"layer_types": _SLIDING, "num_hidden_layers": 6, "num_kv_shared_layers": 2}
_ASSISTANT = {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
_GEMMA4_MOE = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 24}
_LLAMA4 = {
    "layer_types": [*["chunked_attention"] * 3, "full_attention"] * 2,
    "no_rope_layers": [1, 1, 1, 0] * 2,
    "moe_layers": [1, 3, 5, 7],
    "num_hidden_layers": 8,
}
_MAMBA_HEADS = {"mamba_n_heads": 4, "mamba_d_head": 16}
_MUSIC = {"num_codebooks": 1}
_DOTS3 = {
    "layer_types": ["indexed_attention", "indexed_attention", "sliding_attention"] * 2,
    "mlp_layer_types": ["dense", *["sparse"] * 5],
    "num_hidden_layers": 6,
    "head_dim": 12,
    "sliding_window": 8,
    "per_layer_config": {
        layer: {
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "head_dim": 12,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "qk_rope_head_dim": 4,
        }
        for layer in (2, 5)
    },
}
_EVERY_STEP = {"time_step_min": 1e-6}  # shorter steps are cut off when tokens come at once, not when one by one
_NEMOTRON_H = {**_EVERY_STEP, "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"] * 2}
_UNGROUPED = {"num_key_value_heads": 4}  # a checkpoint holds queries, keys and values in one, of one width
_QWEN4 = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
    "ple_layer_ids": [1, 4],
    "ple_embed_dim": 32,
    "heads_per_ngram": 2,
    "ngram_vocab_size_base": 64,
    "make_ngram_vocab_size_divisible_by": 8,
    "split_ngram_parts": 2,
    "hc_lowrank": 8,
    "eos_token_id": 2,
}
_VIBE = {"depths": [1, 1], "downsampling_ratios": [2], "num_filters": 4}
_DEBERTA = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "max_relative_positions": 16}

ROWS: dict[str, dict[str, Any]] = {
    "blt": {
        "use_cache": False,  # its own cache needs a field that its configuration lacks
        "encoder_hash_byte_group_vocab": 64,
        "encoder_config": {"hidden_size_global": 32},
        "decoder_config": {"hidden_size_global": 32},
        "local_attention_window_len": 8,
    },
    "bamba": {**_MAMBA_HEADS, "attn_layer_indices": [1, 3]},
    "codegen": {"rotary_dim": 4},
    "cohere_compass_text": {
        "layer_types": _SLIDING,
        "num_hidden_layers": 6,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]} for kind in set(_SLIDING)
        },
    },
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}, "ffn_config": {"moe_num_experts": 4, "moe_top_k": 2}},
    "deberta": _DEBERTA,
    "deberta-v2": {**_DEBERTA, "position_buckets": 8, "share_att_key": True, "norm_rel_ebd": "layer_norm"},
    "deepseek_v2": {"topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2},
    "dots1": {
        "layer_types": ["full_attention", "sliding_attention"] * 2,
        "n_shared_experts": 1,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
    },
    "dots3_note": {"text_config": _DOTS3},
    "dots3_note_text": _DOTS3,
    "encoder-decoder": {
        "encoder": {"model_type": "bert"},
        "decoder": {"model_type": "bert", "is_decoder": True, "add_cross_attention": True},
    },
    "esm": {"vocab_size": 128, "mask_token_id": 3, "pad_token_id": 0, "token_dropout": True},
    "esmc": {"num_key_value_heads": 4},
    "falcon_h1": {"mamba_d_ssm": 64, **_MAMBA_HEADS},
    "funnel": {"block_sizes": [2, 2], "num_decoder_layers": 2},
    "gemma3n_text": _GEMMA3N,
    "gemma3n": {"text_config": _GEMMA3N},
    "gemma4": {"text_config": {**_GEMMA4_MOE, "layer_types": _SLIDING, "num_hidden_layers": 6}},
    "gemma4_assistant": {"text_config": {"model_type": "gemma4_text", **_ASSISTANT}},
    "gemma4_text": _GEMMA4,
    "gemma4_unified": {"text_config": {**_GEMMA4_MOE, "layer_types": _SLIDING, "num_hidden_layers": 6}},
    "gemma4_unified_assistant": {"text_config": {"model_type": "gemma4_unified_text", **_ASSISTANT}},
    "gemma4_unified_text": _GEMMA4,
    "glm_moe_dsa": {"indexer_types": ["full", "full", "shared", "full", "shared", "shared"], "num_hidden_layers": 6},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {**_MAMBA_HEADS, "layer_types": _HYBRID, "num_hidden_layers": 6},
    "hrm_text": {"num_hidden_layers": 2},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "inkling2_text": {"unpadded_vocab_size": 128},
    "jamba": {"num_hidden_layers": 8, "attn_layer_period": 4, "attn_layer_offset": 2},
    "laguna": {"layer_types": _SLIDING, "num_attention_heads_per_layer": [4, 4, 2] * 2, "num_hidden_layers": 6},
    "lfm2": {"layer_types": ["conv", "conv", "full_attention"] * 2, "full_attn_idxs": [2, 5], "num_hidden_layers": 6},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention"] * 2, "num_hidden_layers": 6},
    "llama4": {"text_config": _LLAMA4},
    "llama4_text": _LLAMA4,
    "longcat_flash": {"head_dim": 4, "zero_expert_num": 2},
    "mamba2": {"head_dim": 16},
    "mellum": {"layer_types": _SLIDING, "num_hidden_layers": 6},
    "ministral": {"head_dim": 8},
    "mobilebert": {"hidden_size": 64, "true_hidden_size": 32, "intra_bottleneck_size": 32},
    "musicgen": {"decoder": _MUSIC},
    "musicgen_melody": {"decoder": _MUSIC},
    "nemo_speechlm": {
        "text_config": _NEMOTRON_H,
        "audio_config": {"asr_config": _UNGROUPED, "diarization_config": {"audio_config": _UNGROUPED}},
        "word_timestamp_config": _UNGROUPED,
    },
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": _NEMOTRON_H,
    "neomme": {"head_dim": 16},
    "nllb-moe": {"encoder_sparse_step": 2, "decoder_sparse_step": 2},
    "nystromformer": {"conv_kernel_size": 3, "num_landmarks": 4, "segment_means_seq_len": 16},
    "qwen2_moe": {"decoder_sparse_step": 2},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "recurrent_gemma": {"num_hidden_layers": 6},
    "reformer": {"axial_pos_embds_dim": [8, 24], "axial_pos_shape": [8, 8], "is_decoder": True},
    "masked/reformer": {"is_decoder": False},
    "switch_transformers": {"num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 2},
    "vibevoice_asr": {
        "acoustic_tokenizer_chunk_size": 128,
        "acoustic_tokenizer_encoder_config": _VIBE,
        "semantic_tokenizer_encoder_config": _VIBE,
    },
    "causal/xlm": {"causal": True},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 64, "attention_head_dim": 16, "num_hidden_layers": 6},
    "zamba2": _EVERY_STEP,
    "zaya": {"layer_types": ["hybrid", "hybrid_sliding"] * 2, "sliding_window": 8, "num_experts_per_tok": 1},
}


def more_inputs(config: Any, batch: int, tokens: int, generator: torch.Generator) -> dict[str, Tensor]:
    """What a forward pass of this model needs besides random tokens."""
    if config.model_type == "voxtral_realtime":  # hears all the time: so many frames of sound for each token
        shape = (batch, tokens * config.downsample_factor, config.audio_config.hidden_size)
        return {"encoder_inputs_embeds": torch.randn(shape, generator=generator)}
    return {}
