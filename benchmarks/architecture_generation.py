"""Generation with a cache against generation without, as the architecture sweep looks at it."""

import torch
from architecture_reloads import Inputs, Model, close, difference, logits, told
from torch import Tensor

PROMPT, NEW_TOKENS, LEFT_PADDING = 10, 5, 3


def outcomes(model: Model, inputs: Inputs) -> dict[str, str]:
    """Way of caching -> `equal`, `differs by ...`, or what was raised."""
    decoder = ["dynamic", "static", "left padding", "decode loop"]
    return {way: seen(model, way, inputs) for way in (["dynamic"] if model.config.is_encoder_decoder else decoder)}


def seen(model: Model, way: str, inputs: Inputs) -> str:
    try:
        found, expected = decoded(model, inputs) if way == "decode loop" else generated(model, way, inputs)
    except Exception as error:  # what a cache cannot do is a finding too
        return told(error)
    gap = difference(found, expected)
    return "equal" if close(gap, expected) else f"differs by {gap:.3g}"


@torch.no_grad()
def generated(model: Model, way: str, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Logits of greedy generation with and without a cache, the prompts of unequal lengths for `left padding`."""
    ids = inputs["input_ids"][:, :PROMPT].clone()
    attention = torch.ones_like(ids)
    if way == "left padding":
        ids[0, :LEFT_PADDING] = attention[0, :LEFT_PADDING] = 0
    extra = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask", "decoder_input_ids")}
    options = {
        "max_new_tokens": NEW_TOKENS,
        "min_new_tokens": NEW_TOKENS,
        "do_sample": False,
        "num_beams": 1,
        "guidance_scale": 1,  # none
        "return_dict_in_generate": True,
        "output_logits": True,
        "pad_token_id": 0,
        "disable_compile": True,
    }
    cached = {"cache_implementation": "static"} if way == "static" else {}
    runs = [
        model.generate(ids, attention_mask=attention, use_cache=use_cache, **extra, **options, **more)
        for use_cache, more in ((True, cached), (False, {}))
    ]
    tokens = [torch.stack(run.logits) for run in runs]
    if not torch.equal(runs[0].sequences, runs[1].sequences):
        tokens[0] = torch.full_like(tokens[1], float("inf"))
    return tokens[0], tokens[1]


@torch.no_grad()
def decoded(model: Model, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Logits of the given tokens one by one with a cache, positions left to the model, and of all of them at once."""
    ids = inputs["input_ids"]
    expected = logits(model, {"input_ids": ids}, use_cache=False)
    output = model(input_ids=ids[:, :PROMPT], use_cache=True)
    steps = [output.logits]
    for place in range(PROMPT, ids.shape[1]):
        output = model(input_ids=ids[:, place : place + 1], past_key_values=output.past_key_values, use_cache=True)
        steps.append(output.logits)
    return torch.cat(steps, dim=1).float(), expected
