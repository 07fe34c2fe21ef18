"""Text that the dense model writes itself, in the place of some of the text that a pruned model is trained on.

On text that a closed form was fitted to, the pruned model is better already than on other text, and a training learns
little from it. So the dense model goes on from the first tokens of a window, each token drawn from its predictions at
temperature 1: there is new text to learn from, and none but the user's is needed.
Cost: one pass of the dense model over each token, one token after the other, with its cache. Memory: a cache of AT_ONCE
tokens, or of one window if that is longer, and the logits of one position of as many windows.
Source: sequence-level distillation, Kim and Rush 2016, arXiv 1606.07947; from the beginnings of text as in LLM-QAT, Liu
et al. 2023, arXiv 2305.17888.
"""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import GenerationConfig

from blockpruner.anatomy.probing import evaluating, without_cache
from blockpruner.artifacts import write_bytes
from blockpruner.errors import InputError, RunFolderError
from blockpruner.loading.models import computation
from blockpruner.repairs.courses import order_of
from blockpruner.repairs.recovery import Bench, Trained
from blockpruner.texts.examples import Examples

PROMPT = 16  # tokens that the dense model goes on from
AT_ONCE = 8192  # tokens whose cache is held
FILE = "written.safetensors"
ORDER = 999_983  # in the place of an epoch: whether a window is written has nothing to do with when it is seen
LOOK, APART = 16, 0.1  # tokens by which drawing is checked; total variation, of which rounding makes 0.03 in bfloat16


def windows_to_write(examples: Examples, options: Trained) -> Tensor:
    """The numbers of the windows that are written: a share of those that the training sees, drawn by its seed.

    InputError where nothing can be written.
    """
    held, length = len(examples), examples.tokens
    if examples.question != "next token" or length < 2:
        raise InputError(
            f"the dense model writes no windows of {length} tokens where it is asked for {examples.question}",
            fix="leave out written",
        )
    seen = order_of(options, held, 0)[: options.windows(held, length)]
    count = round(options.written * len(seen))
    if not count:
        raise InputError(f"written={options.written} of {len(seen)} windows is none", fix="leave it out, or give more")
    seed = (options.seed * 1_000_003 + ORDER) % 2**63
    return seen[torch.randperm(len(seen), generator=torch.Generator().manual_seed(seed))[:count]]


def with_written(bench: Bench, options: Trained) -> Examples:
    """The bench's examples, some of whose windows go on after their first tokens as the dense model has it.

    What was written is kept in the bench's folder, batch by batch, so that a killed run goes on with it. InputError for
    a model that does not predict next tokens, or others with its cache than without; RunFolderError where the folder
    has text of another model, seed or beginnings.
    """
    examples, seed = bench.examples, options.seed
    chosen = windows_to_write(examples, options)
    ids = examples.inputs["input_ids"].clone()
    length = ids.shape[1]
    begun = ids[chosen, : min(PROMPT, length // 2)]
    ends = bench.model.generation_config.eos_token_id
    told = f"{computation(bench.model)} {ends} {seed} {begun.tolist()} {ids.shape}"
    identity = hashlib.sha256(told.encode()).hexdigest()
    done = _kept(bench.folder, identity)
    at_once = max(1, AT_ONCE // length)
    if len(done) < len(chosen):
        _check_draws(bench, begun, min(LOOK, length - begun.shape[1]), seed)
    for start in range(len(done), len(chosen), at_once):
        bench.report(start, len(chosen), "the dense model writes windows")
        batch = begun[start : start + at_once]
        made = _generated(bench, batch, length - batch.shape[1], seed * 1_000_003 + start).cpu()
        done = torch.cat([done, made]) if len(done) else made
        if bench.folder is not None:
            write_bytes(bench.folder / FILE, save({"tokens": done}, {"identity": identity}))
    ids[chosen] = done.to(ids)
    targets = examples.targets.clone()
    targets[chosen, :-1] = ids[chosen, 1:]
    return replace(examples, inputs={**examples.inputs, "input_ids": ids}, targets=targets)


def _kept(folder: Path | None, identity: str) -> Tensor:
    """The windows that an earlier run has written."""
    if folder is None or not (folder / FILE).exists():
        return torch.empty(0, dtype=torch.long)
    with safe_open(folder / FILE, framework="pt") as file:
        if (file.metadata() or {}).get("identity") != identity:
            raise RunFolderError(
                f"{folder / FILE} is of another recovery (other text, model or seed)",
                fix="name another --run, or remove that folder",
            )
        return file.get_tensor("tokens")


def _check_draws(bench: Bench, begun: Tensor, new: int, seed: int) -> None:
    """InputError if what `new` tokens are drawn from with a cache is not what a pass over all of them predicts.

    Some architectures take a cached token for another one than it is. Where both are the same, only rounding differs.
    """
    try:
        made = _generated(bench, begun[:2], new, seed, return_dict_in_generate=True, output_logits=True)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise InputError(f"{type(bench.model).__name__} does not generate: {error}", fix="leave out written") from error
    cached = torch.stack(made.logits, dim=1).float().softmax(-1)
    model: Any = bench.model
    with torch.no_grad(), evaluating(model):
        whole = model(input_ids=made.sequences, **without_cache(model)).logits[:, -new - 1 : -1].float().softmax(-1)
    apart = float((cached - whole).abs().sum(-1).max() / 2)
    if not apart <= APART:
        raise InputError(
            f"{type(model).__name__} draws from other predictions with its cache than it makes without "
            f"(total variation {apart:.2g})",
            fix="leave out written",
        )


@torch.no_grad()
def _generated(bench: Bench, begun: Tensor, new: int, seed: int, **more: Any) -> Any:
    """What transformers generates: `new` tokens drawn from all predictions as they are, but no end of text."""
    model: Any = bench.model
    own, begun = model.generation_config, begun.to(model.device)
    # What a model's own settings have beside these (suppressed tokens, cut-offs) is no part of what it predicts.
    plain = GenerationConfig(eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id or 0, do_sample=True, top_k=0)
    with evaluating(model), torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed % 2**63)
        model.generation_config = plain
        try:
            return model.generate(
                begun, attention_mask=torch.ones_like(begun), max_new_tokens=new, min_new_tokens=new, **more
            )
        finally:
            model.generation_config = own
