"""Whether a checkpoint that was just written computes, in a fresh process, what it should."""

import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from blockpruner.errors import CheckFailedError
from blockpruner.surgery import reloading

_ROUNDINGS = 1.5  # two ways to round the same numbers are about as far from the exact ones: 1 would be the same
_log = logging.getLogger("blockpruner")


def reload_difference(
    folder: Path,
    auto_class: str,
    inputs: dict[str, Tensor],
    truth: Tensor,
    model: PreTrainedModel,
    *,
    remote: bool,
    cached: bool = False,
    others: Sequence[str] = (),
) -> float:
    """The largest difference between `truth`, what `model` made of `inputs`, and what the checkpoint makes of them.

    folder: opened by `auto_class` of transformers in a fresh process; remote: with the code beside the weights;
    cached: `truth` goes on with the logits of `reloading.generated`; others: forms to try if this one fails.

    As a rule they are the same bits. Where other kernels are at work there they differ by rounding: in float32 up to
    1e-4 of the largest logit is allowed (1e-4 where none is above 1). In 16 bits up to 2e-3 of it is; beyond, rounding
    is measured: the checkpoint is loaded once more, in float32, for twice its memory, and `truth` may be _ROUNDINGS
    times as far from that as its own logits in 16 bits are (root mean squares). CheckFailedError if it does not load,
    or differs by more.
    """
    options = [*(["remote"] if remote else []), *(["cached"] if cached else [])]
    instead = f"try {' or '.join(f'--form {form}' for form in others)}, and report" if others else "report"
    fix = f"nothing was kept; {instead} this message"
    reload = partial(_logits, folder, auto_class, inputs, str(model.device), options, fix)
    found = reload("auto")
    difference = float((found - truth).abs().max())
    narrow = model.dtype.itemsize < 4
    if difference <= (2e-3 if narrow else 1e-4) * max(1.0, float(truth.abs().max())):
        return difference
    if narrow:
        try:
            exact = reload("float32")
        except CheckFailedError as error:
            raise CheckFailedError(
                f"logits of the reloaded checkpoint differ by up to {difference:.3g}; whether that is rounding is not "
                f"known, for in float32 {error.what}",
                fix="nothing was kept; free some memory, or save in float32 (--dtype float32)",
            ) from error
        ours, theirs = (float((logits - exact).square().mean().sqrt()) for logits in (truth, found))
        if ours <= _ROUNDINGS * theirs:
            way = f"root mean squares from float32: {theirs:.3g}, and {ours:.3g} here"
            _log.warning("the reloaded checkpoint rounds otherwise, by up to %.3g (%s)", difference, way)
            return difference
    raise CheckFailedError(
        f"the reloaded checkpoint computes something else: logits differ by up to {difference:.3g}",
        fix=fix,
    )


def _logits(
    folder: Path, auto_class: str, inputs: dict[str, Tensor], device: str, options: list[str], fix: str, dtype: str
) -> Tensor:
    with tempfile.TemporaryDirectory() as scratch:
        given, made = Path(scratch, "inputs.safetensors"), Path(scratch, "outputs.safetensors")
        save_file({name: tensor.cpu().contiguous() for name, tensor in inputs.items()}, given)
        command = [sys.executable, "-P", reloading.__file__, str(folder), auto_class, str(given)]
        command += [str(made), device, dtype, *options]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(Path(scratch, "modules"))}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            reason = done.stderr.strip().splitlines()[-1:] or ["no message"]
            raise CheckFailedError(f"the checkpoint does not load or run in a fresh process: {reason[0]}", fix=fix)
        return load_file(made)["logits"].float()
