"""Take blocks out of a model: for a while (`skipped`), or for good (`prune_`)."""

import contextlib
import copy
from collections.abc import Iterable, Iterator

from transformers import PreTrainedModel

from blockpruner.anatomy.parts import Anatomy, Spec
from blockpruner.anatomy.probing import nulled, stood_in
from blockpruner.anatomy.reading import read_anatomy
from blockpruner.blocks import Block, Mask
from blockpruner.errors import InputError
from blockpruner.loading.models import identify
from blockpruner.plan import Plan
from blockpruner.standin import adopt, place
from blockpruner.surgery.gaps import UNREPAIRED, Repair, attach, with_replacements

Removal = Plan | Iterable[Block | str]


def blocks_of(model: PreTrainedModel, anatomy: Anatomy, blocks: Removal) -> list[Block]:
    """The blocks that a plan for `model`, or a list of blocks as such or as text, names; InputError for another."""
    if isinstance(blocks, Plan):
        blocks.check(anatomy.outline, identify(model, str(model.name_or_path)), "the plan")
        return sorted(blocks.mask(), key=lambda block: block.order)
    if isinstance(blocks, str):
        raise InputError(f"{blocks!r} is text", fix='give a list, as in ["attention.3"], or Plan.read of a file')
    found = [block if isinstance(block, Block) else Block.parse(block) for block in blocks]
    if len(set(found)) != len(found):
        raise InputError("a block is named twice", fix="name every block to remove once")
    return found


@contextlib.contextmanager
def skipped(model: PreTrainedModel, blocks: Removal, *, anatomy: Anatomy | None = None) -> Iterator[PreTrainedModel]:
    """While the block runs, `model` works without `blocks`; it is always restored, also after an exception.

    blocks: a plan for this model, or blocks as such or as text (`"attention.3"`); anatomy: pass it when there is one,
    since reading it costs a few short passes.
    Logits, generation with any cache, gradients and hooks work as on the whole model.
    """
    anatomy = anatomy or read_anatomy(model)
    with stood_in(model, anatomy.stand_ins(blocks_of(model, anatomy, blocks))):
        yield model


@contextlib.contextmanager
def silenced(model: PreTrainedModel, anatomy: Anatomy, mask: Mask) -> Iterator[None]:
    """While the block runs, the blocks of `mask` are in place and add nothing: the slow truth that removal must equal.

    The last projections of a block are zero; a layer without blocks runs, and returns its input.
    """
    outlets: list[str] = []
    muffled: dict[str, Spec] = {}
    for stack in anatomy.stacks:
        for layer in stack.layers:
            gone = [part for part in layer.parts if part.block in mask]
            if gone and len(gone) == len(layer.parts) and not (layer.identity or layer.shell):  # all it does leaves
                muffled[layer.path] = {**layer.through, "keep": True}
            else:
                outlets += [name for part in gone for name in part.outlets]
    with nulled(model, outlets), stood_in(model, muffled):
        yield


def prune_(
    model: PreTrainedModel,
    blocks: Removal,
    *,
    anatomy: Anatomy | None = None,
    repair: Repair = UNREPAIRED,
) -> PreTrainedModel:
    """Remove `blocks` from `model` for good, in place; returns the same model.

    repair: what a recovery puts in their places, or makes of the weights that are left.

    The blocks' memory is freed, with the norms and projections that only they needed. `save_pretrained` then writes a
    checkpoint that reloads with the blocks missing (after `import blockpruner`, or with `trust_remote_code=True`);
    `blockpruner.surgery.checkpoint` knows better forms. A model pruned before can be pruned further.
    """
    anatomy = anatomy or read_anatomy(model)
    found = blocks_of(model, anatomy, blocks)
    specs = with_replacements(anatomy.stand_ins(found), repair)
    for name, value in repair.weights.items():
        model.get_parameter(name).data = value.clone()
    if found:
        place(model, specs)
        for path, replacement in repair.replacements.items():
            attach(model, path, copy.deepcopy(replacement))
        adopt(model, [str(block) for block in sorted(found, key=lambda b: b.order)], specs)
    return model
