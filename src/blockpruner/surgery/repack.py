"""The ordinary, smaller model that has what is left of a model, with its weights."""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from blockpruner.anatomy.parts import Anatomy
from blockpruner.anatomy.probing import MISFIT, evaluating, example_inputs, first_tensor, replaced, stood_in
from blockpruner.blocks import Mask
from blockpruner.surgery.origins import Origin
from blockpruner.surgery.pairing import HalfLayers, Rest, Unfit, rests, untouched
from blockpruner.surgery.smaller import smaller

_log = logging.getLogger("blockpruner")


@dataclass(frozen=True)
class Fit:
    """Whether an ordinary model has what is left; `reason`: why there is none, empty if there is one."""

    reason: str = ""

    def __bool__(self) -> bool:
        return not self.reason


def smaller_model(model: PreTrainedModel, anatomy: Anatomy, mask: Mask) -> PreTrainedModel:
    """A stock model with fewer layers that computes what `model` does without `mask`; to be saved, not to be called.

    It shares its weights with `model`, which is left as it is; what a checkpoint does not hold has no values in it.
    Unfit, with the reason, where what is left is not whole layers, or no configuration describes these.
    That it computes the same is for a reload to prove: code can use the number of a layer in ways that do not show.
    """
    left = rests(anatomy, mask)
    if not any(rest.cut for rest in left):
        return model
    missed = [rest for rest in left if rest.needed]
    if missed and _works_without(model, anatomy, mask, left):
        left, missed = [rest.without_need() for rest in left], []
    for rest in missed:
        if any(block.layer > 0 for block in rest.needed) or rest.uses(0):
            raise Unfit(f"{rest.needed[0]} makes what other layers need")
    others = [untouched(path, len(list(model.get_submodule(path).children()))) for path in anatomy.left]
    made, origins = smaller(model, [*left, *others])
    for rest in missed:
        if not _hands_on(rest, origins):
            raise Unfit(f"{rest.needed[0]} makes what other layers need")
    tensors = _tensors(model)
    made.load_state_dict({name: origin.taken(tensors[origin.name]) for name, origin in origins.items()}, assign=True)
    for name in ("generation_config", "_weight_conversions"):  # how `model` generates, and which names its files have
        if name in vars(model):
            setattr(made, name, vars(model)[name])
    return made


def _works_without(model: PreTrainedModel, anatomy: Anatomy, mask: Mask, left: list[Rest]) -> bool:
    """Whether `model` computes the same with its lists of layers cut as with stand-ins, so that nothing is missed.

    A stand-in may have to let a layer run for no more than an attribute that somebody reads.
    """
    inputs = example_inputs(model)
    lists = {
        rest.path: nn.ModuleList(model.get_submodule(f"{rest.path}.{source}") for source in rest.sources())
        for rest in left
        if rest.cut and rest.sources() == rest.sources(mlp=True)
    }
    with evaluating(model), torch.no_grad():
        with stood_in(model, anatomy.stand_ins(mask)):
            expected = first_tensor(model(**inputs)[0])
        model(**{name: ids.flip(1) for name, ids in inputs.items()})  # what modules remember is of other tokens
        try:
            with replaced(model, lists):
                found = first_tensor(model(**inputs)[0])
        except MISFIT:
            return False
    return found is not None and expected is not None and torch.equal(found, expected)


def _hands_on(rest: Rest, origins: Mapping[str, Origin]) -> bool:
    """Whether the new first layer gets what the old one, which is gone, had and others lack."""
    first = f"{rest.path}.0."
    return any(name.startswith(first) and origin.name.startswith(first) for name, origin in origins.items())


def _tensors(model: PreTrainedModel) -> Mapping[str, Tensor]:
    """Everything that a checkpoint of `model` holds, by name; also what is kept outside the model to save memory."""
    tensors = model.state_dict()
    if not any(tensor.is_meta for tensor in tensors.values()):
        return tensors
    from accelerate.utils.modeling import get_state_dict_offloaded_model

    return get_state_dict_offloaded_model(model)


@contextlib.contextmanager
def repacked(model: PreTrainedModel, anatomy: Anatomy, mask: Mask) -> Iterator[Fit]:
    """While the block runs, `model` is the smaller stock model of `smaller_model`, fit to be saved.

    Where there is none, this yields what is false and says why, and `model` stays as it is.
    """
    try:
        made = smaller_model(model, anatomy, mask)
    except Unfit as error:
        if not isinstance(error, HalfLayers):
            _log.warning("no stock form: %s", error)
        yield Fit(str(error))
        return
    own = dict(vars(model))
    vars(model).update(vars(made))
    try:
        yield Fit()
    finally:
        vars(model).clear()
        vars(model).update(own)
