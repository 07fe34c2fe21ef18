"""Losses of tokens from the last states alone: the head applied to a part of the vocabulary at a time.

With 262,144 tokens in a vocabulary, the logits of 256 positions are 134 MB in bfloat16 and twice that in float32; to
write them, and to read them again, takes longer than to compute them. A part of a mebibyte or so stays in the cache.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from blockpruner.anatomy.probing import replaced
from blockpruner.metrics import token_losses

_AT_ONCE = {"cpu": 2**18}  # logits that exist at a time: 1 MiB in float32, what a core's own cache holds
_ELSEWHERE = 2**24


@dataclass(frozen=True)
class Head:
    """The linear map from states to logits, at `path` in the model; its weights are read whenever they are used."""

    path: str
    linear: nn.Linear

    def left_out(self, model: nn.Module) -> AbstractContextManager[None]:
        """While the block runs, the model puts out what its head is given, instead of logits."""
        return replaced(model, {self.path: nn.Identity()})

    @torch.no_grad()
    def token_losses(self, states: Tensor, targets: Tensor) -> Tensor:
        """What `metrics.token_losses` finds of the logits of `states`, without those: nats, float32.

        loss[p] = logsumexp(z[p]) - z[p, target[p]], z = weight @ states[p] + bias in the dtype of the model, so that a
        logit is rounded as in the model; sums in float32. states: [positions, width]; targets: [positions]. One pass
        over the weight. Memory: _AT_ONCE logits.
        """
        weight, bias = self.linear.weight, self.linear.bias
        rows = _rows(states, len(weight))
        sums, right = _LogSumExp(states), torch.zeros(len(states), device=states.device)
        asked = _by_part(targets, rows, len(weight))
        for logits, (place, here) in zip(_logits(weight, bias, states, rows), asked, strict=True):
            right[here] = logits[place, here]
            sums.add(logits)
        return sums.value() - right

    @torch.no_grad()
    def probabilities(self, states: Tensor) -> Tensor:
        """The probability of each token of the vocabulary, added up over `states`: [vocabulary], float64, on the CPU.

        Two passes over the weight. Memory: _AT_ONCE logits.
        """
        weight, bias = self.linear.weight, self.linear.bias
        sums, rows = _LogSumExp(states), _rows(states, len(weight))
        for logits in _logits(weight, bias, states, rows):
            sums.add(logits)
        whole = sums.value()
        return torch.cat([(z - whole).exp_().sum(dim=1).cpu().double() for z in _logits(weight, bias, states, rows)])

    def sampled(self, tokens: Tensor, chances: Tensor) -> "SampledHead":
        """The head of these tokens alone, each of which was drawn with its chance; holds a copy of their weights."""
        weight, bias = self.linear.weight, self.linear.bias
        tokens, weights = tokens.to(weight.device), -chances.log().float().to(weight.device)
        part = weight.detach()[tokens], None if bias is None else bias.detach()[tokens]
        return SampledHead(self.path, self.linear, tokens, *part, weights)


@dataclass(frozen=True)
class SampledHead(Head):
    """A head that knows the logits of some tokens, and of each target.

    tokens: [n], in ascending order; weight: [n, width]; bias: [n]; all copies, for a model that does not change;
    log_weights: [n], what each token stands for: the logarithm of 1 / chance.
    """

    tokens: Tensor
    weight: Tensor
    bias: Tensor | None
    log_weights: Tensor

    @torch.no_grad()
    def token_losses(self, states: Tensor, targets: Tensor) -> Tensor:
        """loss[p] = logsumexp(z[p, target[p]], all others of the tokens' z[p] + log_weights) - z[p, target[p]].

        The target is known in any case and stands for itself alone, so that no loss is negative; else as the whole
        head's.
        """
        rows, sums = _rows(states, len(self.weight)), _LogSumExp(states)
        places = torch.searchsorted(self.tokens, targets).clamp(max=len(self.tokens) - 1)
        places = torch.where(self.tokens[places] == targets, places, len(self.tokens) + rows)  # nowhere
        asked, weights = _by_part(places, rows, len(self.tokens)), self.log_weights.split(rows)
        logits_of = _logits(self.weight, self.bias, states, rows)
        for logits, (place, here), weigh in zip(logits_of, asked, weights, strict=True):
            logits.add_(weigh[:, None])
            logits[place, here] = -torch.inf
            sums.add(logits)
        own, bias = self.linear.weight[targets], self.linear.bias
        right = (states.to(own.dtype).float() * own.float()).sum(dim=1)
        right = (right if bias is None else right + bias[targets].float()).to(own.dtype).float()
        return torch.logaddexp(sums.value(), right) - right


def _rows(states: Tensor, vocabulary: int) -> int:
    """Tokens of the vocabulary whose logits exist at a time."""
    return max(1, min(vocabulary, _AT_ONCE.get(states.device.type, _ELSEWHERE) // max(1, len(states))))


def _logits(weight: Tensor, bias: Tensor | None, states: Tensor, rows: int) -> Iterator[Tensor]:
    """Logits [some tokens, positions] in float32, `rows` tokens at a time, in one place that the caller may change."""
    columns = states.to(weight.dtype).T.contiguous()  # some models widen their logits, and now these
    found = columns.new_empty(rows, len(states))
    narrow = found.dtype != torch.float32
    wide = torch.empty_like(found, dtype=torch.float32) if narrow else found
    for start in range(0, len(weight), rows):
        some = weight[start : start + rows]
        place = found[: len(some)]
        if bias is None:
            logits = torch.mm(some, columns, out=place)
        else:
            logits = torch.addmm(bias[start : start + rows, None], some, columns, out=place)
        yield wide[: len(some)].copy_(logits) if narrow else logits


def _by_part(places: Tensor, rows: int, vocabulary: int) -> Iterator[tuple[Tensor, Tensor]]:
    """For each `rows` tokens of the vocabulary, which `places` [positions] lie there: where in it, and whose."""
    ordered, order = places.sort()
    bounds = torch.searchsorted(ordered, torch.arange(0, vocabulary + rows, rows, device=places.device)).tolist()
    for number, (start, stop) in enumerate(pairwise(bounds)):
        here = order[start:stop]
        yield places[here] - number * rows, here


class _LogSumExp:
    """log sum exp of logits that come a part of the vocabulary at a time, by position, in float32."""

    def __init__(self, states: Tensor) -> None:
        self._highest = torch.full((len(states),), torch.finfo(torch.float32).min, device=states.device)
        self._total = torch.zeros_like(self._highest)

    def add(self, logits: Tensor) -> None:
        """Add a part, [tokens, positions], which is used up by it."""
        above = torch.maximum(self._highest, logits.amax(dim=0))
        self._total = self._total * (self._highest - above).exp() + logits.sub_(above).exp_().sum(dim=0)
        self._highest = above

    def value(self) -> Tensor:
        return self._total.log() + self._highest


def proved_head(model: PreTrainedModel, outputs: Callable[[], Tensor], targets: Tensor) -> Head | None:
    """The head of `model`, if losses of its states are those of its logits, and None if that is not so.

    outputs: has the model make logits [rows, positions, vocabulary] of some states; targets: [rows, positions]. The
    head must be a plain linear layer that nobody hooks into, and give the logits bit for bit: a soft cap or a scale
    behind it would be left out.
    """
    head = _linear_head(model)
    if head is None:
        return None
    given: list[Any] = []
    handle = model.get_submodule(head.path).register_forward_hook(lambda _module, _args, output: given.append(output))
    try:
        logits = outputs()
    finally:
        handle.remove()
    if not given or given[-1].shape != logits.shape or not torch.equal(given[-1].float(), logits.float()):
        return None
    try:
        with head.left_out(model):
            found = head.token_losses(outputs().flatten(0, 1), targets.flatten())
    except (AttributeError, RuntimeError, TypeError):  # it is more to this model than a module that is called
        return None
    plain = token_losses(logits.flatten(0, 1), targets.flatten())
    return head if torch.allclose(found, plain, rtol=1e-4, atol=1e-4) else None


def _linear_head(model: PreTrainedModel) -> Head | None:
    module = model.get_output_embeddings()
    path = next((name for name, each in model.named_modules() if each is module), "") if module is not None else ""
    if not path or type(module) is not nn.Linear or module.weight.is_meta:
        return None
    own = getattr(module.forward, "__func__", None) is nn.Linear.forward  # else somebody has wrapped it
    return Head(path, module) if own and not (module._forward_pre_hooks or module._forward_hooks) else None
