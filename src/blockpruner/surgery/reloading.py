"""Run as a script in a fresh process: load a checkpoint as its users will and write down the logits it gives.

    python -P reloading.py CHECKPOINT AUTO_CLASS INPUTS.safetensors OUTPUTS.safetensors DEVICE DTYPE [remote] [cached]

It knows transformers only, never this package. With `remote` the file that ships beside the weights is run, as with
`trust_remote_code=True`; without, no code of the checkpoint is. With `cached` some tokens are generated too, with the
cache. DTYPE is `auto`, as it is stored, or `float32`. Exit 1 with the reason when tensors are missing, unexpected or of
another shape.
"""

import sys
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

NEW = 3  # tokens: one from the prompt, two from what the cache holds


def main(checkpoint: str, auto_class: str, inputs: str, outputs: str, device: str, dtype: str, *options: str) -> None:
    given = load_file(inputs, device)
    model, info = getattr(transformers, auto_class).from_pretrained(
        checkpoint,
        dtype=dtype,
        trust_remote_code="remote" in options,
        local_files_only=True,
        output_loading_info=True,
    )
    for name in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[name]:
            sys.exit(f"{name}: {', '.join(map(str, list(info[name])[:5]))}")
    model.eval().to(device)
    with torch.no_grad():
        made = [first_output(model(**given)), *([generated(model, given)] if "cached" in options else [])]
    save_file({"logits": torch.cat(made, dim=1).cpu()}, outputs)


def generated(model: Any, inputs: Mapping[str, torch.Tensor], *, use_cache: bool = True) -> torch.Tensor:
    """Logits of NEW tokens that `model` writes after `inputs`, [sequences, NEW, vocabulary].

    Whatever they say, each new token is the prompt's last one, so that rounding decides nothing.
    """
    last = int(inputs["input_ids"][0, -1])
    start = {"decoder_start_token_id": 0} if model.config.is_encoder_decoder else {}
    made = model.generate(
        **inputs,
        **start,
        max_new_tokens=NEW,
        do_sample=False,
        num_beams=1,
        use_cache=use_cache,
        pad_token_id=0,
        prefix_allowed_tokens_fn=lambda *_: [last],
        return_dict_in_generate=True,
        output_logits=True,
    )
    return torch.stack(made.logits, dim=1)


def first_output(result: Mapping[str | int, torch.Tensor]) -> torch.Tensor:
    """The logits of a model with a head, the last hidden state of one without."""
    return result["logits"] if "logits" in result else result[0]


if __name__ == "__main__":
    main(*sys.argv[1:])
