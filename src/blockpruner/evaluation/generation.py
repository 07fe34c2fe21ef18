"""What a model writes: greedy continuations of held-out text, how they hold up, and small questions from the context.

Perplexity is taken on what people wrote, so it does not see a model that loops or loses the thread as soon as it reads
its own words. Here the model writes, and a *reference* (the dense model) reads what was written.
"""

import hashlib
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blockpruner.errors import InputError
from blockpruner.evaluation.probes import PROBES, Question, questions
from blockpruner.evaluation.writings import Writing, Written, agreed
from blockpruner.texts.calibration import Calibration
from blockpruner.texts.examples import question

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 8, 32, 48


def prompts_of(
    data: Calibration, tokenizer: PreTrainedTokenizerBase, count: int = PROMPTS, tokens: int = PROMPT_TOKENS
) -> tuple[str, ...]:
    """The beginnings of `count` windows, spread evenly over all of them, as text; fewer if there are fewer windows."""
    windows = data.windows
    chosen = (
        [number * len(windows) // count for number in range(count)] if len(windows) > count else range(len(windows))
    )
    found = [str(tokenizer.decode(windows[number][:tokens], skip_special_tokens=True)) for number in chosen]
    return tuple(text for text in (text.rstrip() for text in found) if text)


def check_writes(model: PreTrainedModel) -> None:
    """InputError if the model does not go on with a text."""
    if question(model) != "next token":
        raise InputError(
            f"{type(model).__name__} does not predict next tokens, so it has nothing to write",
            fix="leave out --generate, or give a decoder-only model",
        )


@torch.no_grad()
def write(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], tokens: int = NEW_TOKENS
) -> list[Writing]:
    """What `model` writes after each prompt: the most likely token, `tokens` times, with its cache.

    The end-of-text token is never chosen, so that all continuations have one length. Prompts of the same number of
    tokens go together, and no others, so that nothing is padded: not every architecture leaves padding out of account.
    """
    given = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    found: dict[int, Writing] = {}
    for length in sorted({len(ids) for ids in given}):
        rows = [row for row, ids in enumerate(given) if len(ids) == length]
        together = torch.tensor([given[row] for row in rows], device=model.device)
        whole = model.generate(
            together,
            attention_mask=torch.ones_like(together),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        )
        for row, ids in zip(rows, whole[:, length:].tolist(), strict=True):
            text = str(tokenizer.decode(ids, skip_special_tokens=True))
            found[row] = Writing(text=text, tokens=tuple(ids))
    return [found[row] for row in range(len(given))]


def read(model: Any, tokenizer: PreTrainedTokenizerBase, prompt: str, writing: Writing, foreign: bool) -> float:
    """The mean loss of `model` on the continuation after its prompt, in nats per token.

    foreign: written by a model with another tokenizer, so its text is read instead of its tokens.
    """
    before = tokenizer(prompt)["input_ids"]
    after = tokenizer(writing.text, add_special_tokens=False)["input_ids"] if foreign else list(writing.tokens)
    if not after:
        return 0.0
    return -float(_predictions(model, before, after).mean())


def ask(model: Any, tokenizer: PreTrainedTokenizerBase, asked: Question) -> bool:
    """Whether the greedy continuation of the question is its answer, found in one pass over both."""
    before = tokenizer(asked.prompt)["input_ids"]
    whole = tokenizer(asked.prompt + asked.answer)["input_ids"]
    start = min(agreed(before, whole), len(whole) - 1)
    return bool(_chosen(model, whole[:start], whole[start:]).all())


def written_by(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    name: str,
    computation: str,
    tokens: int = NEW_TOKENS,
    seed: int = 0,
) -> Written:
    """All that `model` writes and answers; its continuations are not yet read by a reference."""
    check_writes(model)
    answers = {probe: tuple(ask(model, tokenizer, one) for one in questions(probe, seed)) for probe in PROBES}
    return Written(
        name=name,
        dtype=str(model.dtype).removeprefix("torch."),
        computation=computation,
        tokenizer=_reading(tokenizer, prompts),
        writings=tuple(write(model, tokenizer, prompts, tokens)),
        answers=answers,
    )


def read_by(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], written: Written
) -> Written:
    """`written` with the loss of `model`, the reference, on every continuation."""
    foreign = written.tokenizer != _reading(tokenizer, prompts)
    pairs = zip(prompts, written.writings, strict=True)
    losses = [read(model, tokenizer, prompt, writing, foreign) for prompt, writing in pairs]
    found = zip(written.writings, losses, strict=True)
    return written.model_copy(update={"writings": tuple(w.model_copy(update={"loss": loss}) for w, loss in found)})


def _reading(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> str:
    """A digest (sha256, 16 hexadecimal digits) of the tokens of the prompts."""
    return hashlib.sha256(str([tokenizer(prompt)["input_ids"] for prompt in prompts]).encode()).hexdigest()[:16]


@torch.no_grad()
def _answer_logits(model: Any, before: Sequence[int], after: Sequence[int]) -> torch.Tensor:
    """The logits from which the tokens of `after` are predicted, [len(after), V]; if possible, no others are made."""
    ids = torch.tensor([[*before, *after]], device=model.device)
    places = torch.arange(len(before) - 1, ids.shape[1] - 1, device=model.device)
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        # Places and no number of last ones: a slice of states made the head 30 times slower in bfloat16 on a CPU.
        return model(input_ids=ids, use_cache=False, logits_to_keep=places).logits[0]
    return model(input_ids=ids, use_cache=False).logits[0, places]


def _predictions(model: Any, before: Sequence[int], after: Sequence[int]) -> torch.Tensor:
    """The log-probability of each token of `after` [len(after)]."""
    logits = _answer_logits(model, before, after)
    targets = torch.tensor(after, device=logits.device)
    return torch.stack([row.double().log_softmax(0)[target] for row, target in zip(logits, targets, strict=True)])


def _chosen(model: Any, before: Sequence[int], after: Sequence[int]) -> torch.Tensor:
    """Whether each token of `after` is the most likely one at its place [len(after)]."""
    return _answer_logits(model, before, after).argmax(dim=1).cpu() == torch.tensor(after)
