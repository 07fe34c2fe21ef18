"""Save a model without its removed blocks, and do not say done before a fresh process has loaded it and agreed.

Three forms, the first that fits is taken: *stock* (what is left are whole layers: any runtime loads it), *stand-ins*
(everything else; needs `import blockpruner` or `trust_remote_code=True`), *zeroed* (on request: the blocks stay as
zeros, nothing is saved, every runtime computes the pruned model).
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blockpruner.anatomy.parts import Anatomy
from blockpruner.anatomy.probing import MISFIT, evaluating, example_inputs
from blockpruner.artifacts import check_new_folder, new_folder
from blockpruner.blocks import Block, Mask
from blockpruner.errors import CheckFailedError, InputError, is_out_of_memory
from blockpruner.standin import autos, unpruned
from blockpruner.surgery import reloading
from blockpruner.surgery.agreement import reload_difference
from blockpruner.surgery.gaps import UNREPAIRED, Repair, repaired, reweighted
from blockpruner.surgery.removal import prune_, silenced
from blockpruner.surgery.repack import Fit, repacked

Form = Literal["stock", "stand-ins", "zeroed"]
FORMS: tuple[Form, ...] = get_args(Form)
_CLOSE = 0.05  # of the largest logit: farther apart, generation with a cache is no truth to compare with
_log = logging.getLogger("blockpruner")


@dataclass(frozen=True)
class Saved:
    """What was written: the form, the parameters it has, its bytes of weights, and the largest difference of logits.

    difference: max |logit(reloaded) - logit(dense model whose blocks add nothing)| on 2 x 16 random tokens, and on a
    few after them with the cache, where that model generates with one; with replacements, of the model that has them in
    the blocks' place.
    """

    folder: Path
    form: Form
    parameters: int
    weight_bytes: int
    difference: float


def save_pruned(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    anatomy: Anatomy,
    mask: Mask,
    out: Path,
    *,
    form: Form | None = None,
    source: Path | None = None,
    extra_files: dict[str, bytes] | None = None,
    repair: Repair = UNREPAIRED,
    card: Callable[[Form, int, str], str] | None = None,
) -> Saved:
    """Write `model` without the blocks of `mask` to the new folder `out`, reloaded and compared.

    The model is only borrowed for the stock and zeroed forms; for stand-ins its blocks are removed for good.
    form: None takes stock where it fits, else stand-ins; source: the folder the model came from, never written into;
    extra_files: name -> bytes, put beside the weights (the plan); repair: of a recovery; what it puts in the blocks'
    places needs stand-ins, what it makes of other weights goes with every form; card: makes
    README.md of the form that was written, its parameters and the Auto class that loads it.
    InputError when `out` exists or `form` does not fit; CheckFailedError, and no folder, when the reload disagrees.
    Cost: one forward pass of 2 x 16 tokens here, twice three of generation, one load and about the same in the fresh
    process.
    """
    check_new_folder(out, sources=(source,) if source else ())
    anatomy.outline.check(mask, "the plan")
    base = unpruned(type(model))
    makers = _makers(base)
    form = _asked(form, pruned=base is not type(model), replaced=bool(repair.replacements))
    inputs = example_inputs(model, seed=1)
    truth, cached = _truth(model, anatomy, mask, repair, inputs)
    alone = repair is not UNREPAIRED or base is not type(model)  # then no other form can be asked for
    for number, tried in enumerate(forms := _forms(model, anatomy, mask, form)):
        try:
            with new_folder(out) as folder, reweighted(model, repair.weights):
                _write(model, anatomy, mask, folder, tried, repair)
                if tokenizer is not None:
                    tokenizer.save_pretrained(folder)
                parameters = _parameters(anatomy, mask, tried, repair)
                readme = {"README.md": card(tried, parameters, makers[0]).encode()} if card else {}
                for name, data in {**(extra_files or {}), **readme}.items():
                    (folder / name).write_bytes(data)
                difference = reload_difference(
                    *(folder, makers[0], inputs, truth, model),
                    remote=tried == "stand-ins",
                    cached=cached,
                    others=[] if alone else [other for other in FORMS[1:] if other != tried],
                )
                size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        except CheckFailedError as error:
            if number + 1 == len(forms):
                raise
            _log.warning("no %s form: %s", tried, error.what)
        else:
            return Saved(out, tried, parameters, size, difference)
    raise AssertionError("the last form returns or raises")


def _makers(base: type[PreTrainedModel]) -> list[str]:
    """The Auto classes that load the model; InputError if there is none."""
    found = _auto_classes(base)
    if not found:
        raise InputError(
            f"{base.__name__} belongs to no Auto class of transformers", fix="load it through an Auto class"
        )
    return found


def _asked(form: Form | None, *, pruned: bool, replaced: bool) -> Form | None:
    """The form that is asked for, which replacements decide; InputError if it cannot be had."""
    if pruned and form not in (None, "stand-ins"):
        raise InputError(f"the model was pruned before, so it has no {form} form", fix="prune the dense model instead")
    if replaced and form not in (None, "stand-ins"):
        raise InputError(f"replacements of removed blocks have no {form} form", fix="leave out --form")
    return "stand-ins" if replaced else form


def _parameters(anatomy: Anatomy, mask: Mask, form: Form, repair: Repair) -> int:
    gone = frozenset[Block]() if form == "zeroed" else mask
    return anatomy.total_parameters - anatomy.outline.removed_parameters(gone) + repair.added_parameters


def _auto_classes(model: type[PreTrainedModel]) -> list[str]:
    """Names of the Auto classes that make `model`, a class of transformers, of its configuration."""
    found = []
    for auto in autos():
        made = auto._model_mapping.get(model.config_class, ())
        if model.__name__ in [c.__name__ for c in (made if isinstance(made, (list, tuple)) else (made,))]:
            found.append(auto.__name__)
    return found


def _forms(model: PreTrainedModel, anatomy: Anatomy, mask: Mask, form: Form | None) -> list[Form]:
    """The forms to try, in order: the one asked for, or stock where it fits and then stand-ins."""
    gone = [
        layer for stack in anatomy.stacks for layer in stack.layers if mask.issuperset(p.block for p in layer.parts)
    ]
    if form == "zeroed" and (more := [layer.path for layer in gone if layer.parts and not layer.identity]):
        raise InputError(
            f"zeros cannot say that {more[0]} is gone: it also has norms or scales on the residual stream",
            fix="leave one block in that layer, or choose another form",
        )
    if form in ("zeroed", "stand-ins"):
        return [form]
    fit = Fit("it was pruned before")
    if unpruned(type(model)) is type(model):
        with repacked(model, anatomy, mask) as fit:
            pass
    if form == "stock" and not fit:
        raise InputError(
            f"what this plan leaves has no stock form: {fit.reason}",
            fix="search with --moves layer or --moves stock, or leave out --form",
        )
    stock, stand_ins = FORMS[0], FORMS[1]
    return [stock] if form == stock else [stock, stand_ins] if fit else [stand_ins]


def _truth(
    model: PreTrainedModel, anatomy: Anatomy, mask: Mask, repair: Repair, inputs: dict[str, Tensor]
) -> tuple[Tensor, bool]:
    """What the checkpoint must compute, by another way than it does, unless something stands in the blocks' places."""
    if repair.replacements:
        with repaired(model, anatomy, mask, repair):
            return _output(model, inputs)
    with reweighted(model, repair.weights), silenced(model, anatomy, mask):
        return _output(model, inputs)


def _write(model: PreTrainedModel, anatomy: Anatomy, mask: Mask, folder: Path, form: Form, repair: Repair) -> None:
    if form == "stand-ins":
        prune_(model, mask, anatomy=anatomy, repair=repair)
        model.save_pretrained(folder)
        return
    with silenced(model, anatomy, mask) if form == "zeroed" else repacked(model, anatomy, mask):
        model.save_pretrained(folder)


def _output(model: PreTrainedModel, inputs: dict[str, Tensor]) -> tuple[Tensor, bool]:
    """The logits of `inputs`, and of what is generated after them if that works; and whether it does."""
    with evaluating(model), torch.no_grad():
        logits = reloading.first_output(model(**inputs)).float().cpu()
        after = _generated(model, inputs)
    return (logits, False) if after is None else (torch.cat([logits, after], dim=1), True)


def _generated(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor | None:
    """Logits of generation with the cache; None where they are not, within _CLOSE of the largest, those without it."""
    if not model.can_generate():
        return None
    try:
        cached, plain = (reloading.generated(model, inputs, use_cache=use).float().cpu() for use in (True, False))
    except MISFIT as error:
        if is_out_of_memory(error):
            raise
        return None
    same = cached.shape == plain.shape and float((cached - plain).abs().max()) <= _CLOSE * float(plain.abs().max())
    return cached if same else None
