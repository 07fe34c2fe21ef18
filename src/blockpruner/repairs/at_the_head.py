"""Lessons on the states that reach the head, the dense model's and the pruned one's: the models' own heads do not run.

Both models have the same head, so where vocabularies are large a loss of the states can do with less than all logits.
"""

import contextlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from blockpruner.anatomy.probing import Enough, without_cache
from blockpruner.errors import InputError, UnsupportedModelError
from blockpruner.repairs.pupil import Pupil
from blockpruner.repairs.teaching import Predictions
from blockpruner.texts.examples import IGNORED, Examples

SAMPLE = 2048  # tokens of text that means over tokens are taken of, whole windows


class AtTheHead(Predictions):
    """A loss of the states before the head, summed over predicted tokens; judged as all others are, by predictions.

    text: that means over tokens are taken of, its first SAMPLE tokens.
    """

    def __init__(self, pupil: Pupil, text: Examples) -> None:
        super().__init__(pupil)
        self.head = head_of(pupil.model)  # what has none is refused at once
        own = {id(parameter) for parameter in self.head.parameters()}
        if own & {id(pupil.model.get_parameter(name)) for name in pupil.repair.weights}:
            raise InputError(
                "a method before this one has trained the head, and states can be compared under one head only",
                fix="use loss=kl, without vocabulary",
            )
        self.sample = text.part(0, max(1, min(len(text), SAMPLE // text.tokens)))

    def prepare(self) -> None:
        """Make what the loss needs of the dense model; the model is whole."""
        raise NotImplementedError

    def far(self, own: Tensor, aim: Tensor) -> Tensor:
        """The loss, a sum over tokens: of the pruned model's states and the dense one's, both [tokens, hidden]."""
        raise NotImplementedError

    @property
    def at_once(self) -> int:
        """Tokens whose loss is computed at a time."""
        raise NotImplementedError

    def backward(self, part: Examples, scale: float) -> float:
        part = part.to(self.pupil.model.device)
        asked = part.targets != IGNORED
        with torch.inference_mode(False), torch.enable_grad():
            self.prepare()
            with torch.no_grad():
                aims = before_head(self.pupil.model, part)[asked]
            with self.pupil.pruned():  # on the way back too, where operations look at weights again
                own = before_head(self.pupil.model, part)[asked]
                slopes, total = list[Tensor](), 0.0
                for here, aim in zip(own.detach().split(self.at_once), aims.split(self.at_once), strict=True):
                    value = self.far(here.requires_grad_(), aim)
                    slopes.append(torch.autograd.grad(value * scale, here)[0])
                    total += float(value.detach())
                if own.requires_grad:
                    own.backward(torch.cat(slopes))
        return total

    def probe(self, examples: Examples, numbers: Mapping[str, nn.Parameter]) -> None:
        plain = Predictions(self.pupil)  # whether the parts that `judge` sees are those of the whole
        plain.probe(examples, numbers)
        self.whole = plain.whole


def head_of(model: PreTrainedModel) -> nn.Linear:
    """The linear map from states to logits; UnsupportedModelError where there is none."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise UnsupportedModelError(
            f"the head of {type(model).__name__} is no linear map of states to logits", fix="use loss=kl"
        )
    return head


def before_head(model: PreTrainedModel, part: Examples) -> Tensor:
    """The states that reach the head of the model as it is now, [rows, tokens, hidden]; the head does not run."""
    found: list[Tensor] = []

    def stop(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        found.append(args[0])
        raise Enough

    handle = head_of(model).register_forward_pre_hook(stop)
    try:
        with contextlib.suppress(Enough):
            model(**part.inputs, **without_cache(model))
    finally:
        handle.remove()
    if not found or found[0].shape[:2] != part.targets.shape:
        raise UnsupportedModelError(
            f"the head of {type(model).__name__} is not given one state for each token", fix="use loss=kl"
        )
    return found[0]
