"""Run as a script in a fresh process: load a checkpoint as its users will and write down the logits it gives.

    python -P reloading.py CHECKPOINT AUTO_CLASS INPUTS.safetensors OUTPUTS.safetensors DEVICE DTYPE [remote]

It knows transformers only, never this package. With `remote` the file that ships beside the weights is run, as with
`trust_remote_code=True`; without, no code of the checkpoint is. DTYPE is `auto`, as it is stored, or `float32`. Exit 1
with the reason when tensors are missing, unexpected or of another shape.
"""

import sys
from collections.abc import Mapping

import torch
import transformers
from safetensors.torch import load_file, save_file


def main(
    checkpoint: str, auto_class: str, inputs: str, outputs: str, device: str, dtype: str, remote: str = ""
) -> None:
    given = load_file(inputs, device)
    model, info = getattr(transformers, auto_class).from_pretrained(
        checkpoint,
        dtype=dtype,
        trust_remote_code=remote == "remote",
        local_files_only=True,
        output_loading_info=True,
    )
    for name in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[name]:
            sys.exit(f"{name}: {', '.join(map(str, list(info[name])[:5]))}")
    with torch.no_grad():
        result = model.eval().to(device)(**given)
    save_file({"logits": first_output(result).contiguous().cpu()}, outputs)


def first_output(result: Mapping[str | int, torch.Tensor]) -> torch.Tensor:
    """The logits of a model with a head, the last hidden state of one without."""
    return result["logits"] if "logits" in result else result[0]


if __name__ == "__main__":
    main(*sys.argv[1:])
