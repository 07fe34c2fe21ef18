"""Tiny random models that see: a vision tower, a projector and a text tower of four layers, and inputs with an image.

Images are 8 x 8 pixels in four tokens, drawn at random; the two sequences of a batch see different ones, at different
places where the model allows it. Weights are perturbed as those of `zoo`.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText
from zoo import FIRST_ORDINARY, HIDDEN, VOCABULARY, LanguageModel, perturb

IMAGE, START, END, VIDEO = 5, 6, 7, 8  # token ids
SIDE, TOKENS = 8, 4  # of one image: pixels a side, tokens

_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    **_SPECIAL,
}
_VISION = {
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": SIDE,
}
_SECTIONS = {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [2, 1, 1]}  # half a head of 8: time, y, x
_QWEN = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
_QWEN_VISION = {"depth": 2, "num_heads": 4, "patch_size": 2, "spatial_merge_size": 2, "temporal_patch_size": 2}


@dataclass(frozen=True)
class Tower:
    """One model that sees.

    options: of its configuration; text: path of its text tower; pixels: shape of the pixels of one image;
    types: the argument that says which tokens are of an image, if any, and what it says of those and of the others;
    grid: patches of one image in time, height and width, where the model wants to be told; first: images come first.
    """

    options: dict[str, Any]
    text: str
    pixels: tuple[int, ...] = (1, 3, SIDE, SIDE)
    types: tuple[str, int, int] | None = None
    grid: tuple[int, int, int] | None = None
    first: bool = False


TOWERS = {
    "llava": Tower(
        {
            "text_config": {**_TEXT, "model_type": "llama"},
            "vision_config": {**_VISION, "model_type": "clip_vision_model", "patch_size": 4, "projection_dim": HIDDEN},
            "image_token_index": IMAGE,
            "image_seq_length": TOKENS,
        },
        text="model.language_model",
    ),
    "qwen2_vl": Tower(
        {
            "text_config": {**_TEXT, "rope_parameters": _SECTIONS},
            "vision_config": {**_QWEN_VISION, "embed_dim": HIDDEN, "hidden_size": HIDDEN},
            **_QWEN,
        },
        text="model.language_model",
        pixels=(4 * TOKENS, 3 * 2 * 2 * 2),
        types=("mm_token_type_ids", 1, 0),
        grid=(1, 4, 4),
    ),
    "qwen3_vl": Tower(
        {
            "text_config": {**_TEXT, "head_dim": 8, "rope_parameters": {**_SECTIONS, "mrope_interleaved": True}},
            "vision_config": {
                **_QWEN_VISION,
                "hidden_size": HIDDEN,
                "out_hidden_size": HIDDEN,
                "intermediate_size": 48,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0, 1],
            },
            **_QWEN,
        },
        text="model.language_model",
        pixels=(4 * TOKENS, 3 * 2 * 2 * 2),
        types=("mm_token_type_ids", 1, 0),
        grid=(1, 4, 4),
    ),
    "gemma3": Tower(
        {
            "text_config": {
                **_TEXT,
                "head_dim": 8,
                "query_pre_attn_scalar": 8,
                "sliding_window": 8,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            "vision_config": {
                **_VISION,
                "model_type": "siglip_vision_model",
                "patch_size": 2,
                "vision_use_head": False,
            },
            "mm_tokens_per_image": TOKENS,
            "image_token_index": IMAGE,
            "boi_token_index": START,
            "eoi_token_index": END,
        },
        text="model.language_model",
        types=("token_type_ids", 1, 0),
    ),
    # Everything up to the end of the prompt is of type 0 and sees all of it; what is generated is of type 1.
    "paligemma": Tower(
        {
            "text_config": {**_TEXT, "model_type": "gemma", "head_dim": 8},
            "vision_config": {
                **_VISION,
                "model_type": "siglip_vision_model",
                "patch_size": 4,
                "vision_use_head": False,
            },
            "image_token_index": IMAGE,
            "projection_dim": HIDDEN,
            "hidden_size": HIDDEN,
            "vocab_size": VOCABULARY,
        },
        text="model.language_model",
        types=("token_type_ids", 0, 1),
        first=True,
    ),
}


def build(name: str, seed: int = 0) -> LanguageModel:
    """The tiny model of this name, float32, eval mode; equal seeds, equal weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = AutoConfig.for_model(name, **TOWERS[name].options)
        model: Any = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    perturb(model, seed)
    model.generation_config.eos_token_id = None
    return model.eval()


def inputs(name: str, tokens: int = 16, *, padded: bool = False, seed: int = 0) -> dict[str, Tensor]:
    """Two sequences of this many tokens, each with an image of its own; padded: the second begins with two pads."""
    tower, generator = TOWERS[name], torch.Generator().manual_seed(seed)
    ids = torch.randint(FIRST_ORDINARY, VOCABULARY, (2, tokens), generator=generator)
    seen = torch.ones_like(ids)
    if padded:
        ids[1, :2], seen[1, :2] = 0, 0
    for row in (0, 1):
        start = 2 * row * padded if tower.first else 3 + 2 * row
        ids[row, start : start + TOKENS] = IMAGE
        if not tower.first:
            ids[row, start - 1], ids[row, start + TOKENS] = START, END
    pixels = torch.randn(2 * tower.pixels[0], *tower.pixels[1:], generator=generator)
    given = {"input_ids": ids, "attention_mask": seen, "pixel_values": pixels}
    if tower.types is not None:
        argument, of_images, of_others = tower.types
        given[argument] = torch.where(ids == IMAGE, of_images, of_others)
    if tower.grid is not None:
        given["image_grid_thw"] = torch.tensor([tower.grid] * 2)
    return given


@functools.cache
def shared(name: str) -> LanguageModel:
    """The model of this name that all tests share; none of them may change it."""
    return build(name)
