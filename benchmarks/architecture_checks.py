"""What `architecture_sweep` checks on one model with this package at hand: removal, generation, checkpoints, mask tree.

Every figure is compared with something that shares no code with the package: weights set to zero in another copy of
the model, generation without a cache, plain forward passes. Whatever differs though nothing was raised is `wrong`.
"""

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import architecture_generation
import torch
import transformers
from architecture_reloads import Inputs, Model, close, difference, logits, outcome, told
from safetensors.torch import save_file
from torch import Tensor, nn

from blockpruner.anatomy.reading import Anatomy, Layer, Stack, read_anatomy
from blockpruner.blocks import Block, format_mask
from blockpruner.engine.objective import ModelObjective
from blockpruner.errors import BlockprunerError
from blockpruner.surgery.removal import prune_, skipped
from blockpruner.surgery.repack import repacked
from blockpruner.texts.examples import examples_of

AUTO_CLASSES = {"causal": "AutoModelForCausalLM", "masked": "AutoModelForMaskedLM", "seq2seq": "AutoModelForSeq2SeqLM"}
WINDOWS, WINDOW = 4, 24


@dataclass
class Findings:
    """What went wrong: wrong, comparisons that failed though nothing was raised; errors, what was raised, by check."""

    wrong: list[str] = field(default_factory=list)
    errors: dict[str, str] = field(default_factory=dict)

    @contextlib.contextmanager
    def raised(self, check: str) -> Iterator[None]:
        """Whatever the block raises is written down, not handed on."""
        try:
            yield
        except Exception as error:  # any kind of failure is a finding
            self.errors[check] = told(error)


def check(model: Model, reference: Model, head: str, inputs: dict[str, Tensor], scratch: Path) -> dict[str, Any]:
    """All columns of one model but those of other processes; their checkpoints and expected logits go to `scratch`."""
    findings = Findings()
    try:
        anatomy = read_anatomy(model)
    except BlockprunerError as error:
        return {"proved": False, "reason": told(error)}
    except Exception as error:  # a refusal says what to do; anything else is a bug
        return {"proved": False, "reason": f"bug: {told(error)}"}
    row: dict[str, Any] = {"proved": True, "blocks": counted(anatomy)}
    dense = logits(reference, inputs)
    unchanged(model, dense, inputs, "reading the anatomy", findings)
    row["removal"] = removals(model, reference, anatomy, inputs, findings)
    row["exact"] = not findings.errors and set(row["removal"].values()) <= {0.0, None}
    row["identity"] = all(is_identity(model, reference, stack, anatomy, inputs) for stack in anatomy.stacks)
    if model.can_generate():
        with findings.raised("generation"):
            row["generation"] = generations(model, anatomy, inputs, findings)
    cases = [dense_case(model, dense, scratch), *layer_cases(model, anatomy, inputs, scratch)]
    with findings.raised("block checkpoint"):
        cases += block_case(model, head, anatomy, inputs, scratch, row, findings)
    if model.can_generate() and not model.config.is_encoder_decoder:
        with findings.raised("mask tree"):
            row["mask_tree"] = mask_tree(model, anatomy, findings)
    unchanged(model, dense, inputs, "something of the above", findings)
    return {**row, "wrong": findings.wrong, "errors": findings.errors, "cases": cases}


def unchanged(model: Model, dense: Tensor, inputs: Inputs, what: str, findings: Findings) -> None:
    if difference(logits(model, inputs), dense) != 0.0:
        findings.wrong.append(f"{what} changed the model")


def counted(anatomy: Anatomy) -> dict[str, int]:
    """Number of blocks by stack and kind."""
    found: dict[str, int] = {}
    for block in anatomy.parts:
        name = f"{block.stack}.{block.kind}" if block.stack else block.kind
        found[name] = found.get(name, 0) + 1
    return found


# Removal against zeroed weights


def removals(
    model: Model, reference: Model, anatomy: Anatomy, inputs: Inputs, findings: Findings
) -> dict[str, float | str | None]:
    """Largest difference by kind, over each block alone and the first, second and last of its kind and stack."""
    worst: dict[str, float | None] = {"attention": None, "mlp": None, "other": None}
    groups: dict[tuple[str, str], list[Block]] = {}
    for block in anatomy.parts:
        groups.setdefault((block.stack, block.kind), []).append(block)
    for (_, kind), blocks in groups.items():
        column = kind if kind in ("attention", "mlp") else "other"
        sets = [{block} for block in blocks]
        if len(blocks) > 2:
            sets.append({blocks[0], blocks[1], blocks[-1]})
        for mask in sets:
            name = f"removal of {format_mask(mask)}"
            with findings.raised(name):
                gap = removal(model, reference, anatomy, mask, inputs, findings, name)
                worst[column] = max(gap, worst[column] or 0.0)
    return {column: str(gap) if gap == float("inf") else gap for column, gap in worst.items()}


def removal(
    model: Model,
    reference: Model,
    anatomy: Anatomy,
    mask: set[Block],
    inputs: Inputs,
    findings: Findings,
    name: str,
) -> float:
    """Difference between `model` without these blocks and `reference` with their weights at zero.

    A layer that loses its last block with this may be the identity instead: norms between layers go with it.
    """
    with skipped(model, mask, anatomy=anatomy):
        found = logits(model, inputs)
    with no_weights(reference, silenced(reference, anatomy, mask, inputs)):
        expected = logits(reference, inputs)
    gap = difference(found, expected)
    gone = [layer for _, layer in layers(anatomy) if blocks_of(layer) <= mask]
    if gap > 0 and gone:
        rest = mask - set().union(*map(blocks_of, gone))
        with no_weights(reference, silenced(reference, anatomy, rest, inputs)), passed_by(reference, gone):
            gap = min(gap, difference(found, logits(reference, inputs)))
    if not close(gap, expected):
        findings.wrong.append(f"{name}: off by {gap:.3g}")
    return gap


def is_identity(model: Model, reference: Model, stack: Stack, anatomy: Anatomy, inputs: Inputs) -> bool:
    """Whether a layer in the middle, all its blocks removed, hands its hidden states on as they came."""
    layer = stack.layers[len(stack.layers) // 2]
    try:
        with skipped(model, blocks_of(layer), anatomy=anatomy):
            found = logits(model, inputs)
    except Exception:  # is found, and told, by the other checks
        return False
    with passed_by(reference, [layer]):
        return torch.equal(found, logits(reference, inputs))


def silenced(reference: Model, anatomy: Anatomy, blocks: Iterable[Block], inputs: Inputs) -> list[str]:
    """Paths of the modules whose weights are zero without these blocks: all that leaves with them.

    Of a module that stays, since other layers use what it makes, only its last projection.
    """
    paths: list[str] = []
    for part in map(anatomy.parts.__getitem__, blocks):
        for path, spec in part.modules.items():
            paths.append(last_projection(reference, path, inputs) if spec.get("keep") else path)
        paths += part.idle
    return paths


def last_projection(reference: Model, path: str, inputs: Inputs) -> str:
    """The module at or below `path`, of those that own a matrix, that ends last in a forward pass."""
    ended: list[str] = []
    handles = [
        module.register_forward_hook(lambda *_, name=name: ended.append(name))
        for name, module in reference.named_modules()
        if f"{name}.".startswith(f"{path}.") and any(p.ndim > 1 for p in module.parameters(recurse=False))
    ]
    try:
        logits(reference, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return ended[-1]


def layers(anatomy: Anatomy) -> list[tuple[Stack, Layer]]:
    return [(stack, layer) for stack in anatomy.stacks for layer in stack.layers]


def blocks_of(layer: Layer) -> set[Block]:
    return {part.block for part in layer.parts}


@contextlib.contextmanager
def no_weights(model: Model, paths: Iterable[str]) -> Iterator[None]:
    """While the block runs, matrices and biases of the modules at these paths are zero; norms and tables stay.

    Modules get parameters of their own for it, so that a weight that other modules share stays what it is there.
    """
    held: list[tuple[nn.Module, str, nn.Parameter]] = []
    for path in paths:
        for module in model.get_submodule(path).modules():
            if "norm" in type(module).__name__.lower() or isinstance(module, nn.Embedding):
                continue
            for name, value in module._parameters.items():
                if value is not None and (value.ndim > 1 or "bias" in name):
                    held.append((module, name, value))
    for module, name, value in held:
        module._parameters[name] = nn.Parameter(torch.zeros_like(value), requires_grad=False)
    try:
        yield
    finally:
        for module, name, value in held:
            module._parameters[name] = value


@contextlib.contextmanager
def passed_by(model: Model, gone: Iterable[Layer]) -> Iterator[None]:
    """While the block runs, these layers return their hidden states as they came."""

    def hook(hidden: int | str) -> Callable[..., Any]:
        def replace(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            stream = args[hidden] if isinstance(hidden, int) else kwargs[hidden]
            return stream if isinstance(output, Tensor) else type(output)((stream, *output[1:]))

        return replace

    handles = [
        model.get_submodule(layer.path).register_forward_hook(hook(layer.hidden), with_kwargs=True) for layer in gone
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# Generation with a cache against generation without


def generations(model: Model, anatomy: Anatomy, inputs: Inputs, findings: Findings) -> dict[str, dict[str, str]]:
    """Way of caching -> outcome `before` and `after` the first two and the last mixing blocks of every stack go."""
    mask = {block for stack in anatomy.stacks for block in first_and_last_mixing(stack)}
    before = architecture_generation.outcomes(model, inputs)
    with skipped(model, mask, anatomy=anatomy):
        after = architecture_generation.outcomes(model, inputs)
    for way, seen in after.items():
        if before[way] == "equal" and seen.startswith("differs"):
            findings.wrong.append(f"{way} cache without {format_mask(mask)}: {seen}")
    return {way: {"before": before[way], "after": after[way]} for way in before}


def first_and_last_mixing(stack: Stack) -> list[Block]:
    mixing = [[part.block for part in layer.parts if part.block.kind != "mlp"] for layer in stack.layers]
    filled = [blocks for blocks in mixing if blocks]
    return [block for blocks in {id(b): b for b in [*filled[:2], *filled[-1:]]}.values() for block in blocks]


# Checkpoints for other processes to open


def dense_case(model: Model, dense: Tensor, scratch: Path) -> dict[str, Any]:
    """The whole model, saved as it is: where transformers does not get this back, no other checkpoint can be equal."""
    case = {"name": "dense", "class": type(model).__name__, "folder": str(scratch / "dense")}
    try:
        model.save_pretrained(scratch / "dense")
    except Exception as error:
        return case | {"outcome": told(error)}
    save_file({"logits": dense}, scratch / "dense" / "expected")
    return case


def layer_cases(model: Model, anatomy: Anatomy, inputs: Inputs, scratch: Path) -> Iterator[dict[str, Any]]:
    """Stock checkpoints without one layer: of each stack the first, and one in the middle, of those on offer.

    Not on offer are layers that go on running when they are removed, since others need what they make.
    """
    for stack in anatomy.stacks:
        offered = [i for i, layer in enumerate(stack.layers) if layer.parts and not any(p.kept for p in layer.parts)]
        middle = min(offered, key=lambda index: abs(index - len(stack.layers) // 2), default=0)
        for index in sorted({*offered[:1], middle} if offered else ()):
            layer = stack.layers[index]
            name = f"layer {f'{stack.name}.' if stack.name else ''}{index}"
            mask = frozenset(blocks_of(layer))
            case: dict[str, Any] = {"name": name, "class": type(model).__name__, "folder": str(scratch / name)}
            try:
                with skipped(model, mask, anatomy=anatomy):
                    expected = logits(model, inputs)
                with repacked(model, anatomy, mask) as fits:
                    if fits:
                        model.save_pretrained(scratch / name)
            except Exception as error:
                yield case | {"outcome": told(error)}
                continue
            if fits:
                save_file({"logits": expected}, scratch / name / "expected")
            yield case if fits else case | {"outcome": f"no stock model: {fits.reason}"}


def block_case(
    model: Model,
    head: str,
    anatomy: Anatomy,
    inputs: Inputs,
    scratch: Path,
    row: dict[str, Any],
    findings: Findings,
) -> list[dict[str, Any]]:
    """A checkpoint without one block of each kind and stack, reloaded here, and for a process without this package."""
    groups: dict[tuple[str, str], list[Block]] = {}
    for block in anatomy.parts:
        groups.setdefault((block.stack, block.kind), []).append(block)
    middle = {(blocks[len(blocks) // 2 - (kind == "mlp")]) for (_, kind), blocks in groups.items()}
    with skipped(model, middle, anatomy=anatomy):
        expected = logits(model, inputs)
    folder = scratch / "blocks"
    prune_(copy.deepcopy(model), middle, anatomy=anatomy).save_pretrained(folder)
    save_file({"logits": expected}, folder / "expected")
    case = {"name": "blocks", "class": AUTO_CLASSES[head], "folder": str(folder), "remote": True}
    try:
        loaded, info = getattr(transformers, AUTO_CLASSES[head]).from_pretrained(folder, output_loading_info=True)
        row["registered"] = outcome(logits(loaded.eval(), inputs), expected, info)
    except Exception as error:
        row["registered"] = told(error)
    if row["registered"].startswith("differs"):
        findings.wrong.append(f"checkpoint without {format_mask(middle)}: {row['registered']}")
    return [case]


# The mask tree against plain forward passes


def mask_tree(model: Model, anatomy: Anatomy, findings: Findings) -> str:
    """`used`, or why the objective takes plain passes; its losses are compared with others in either case."""
    windows = torch.randint(16, 128, (WINDOWS, WINDOW), generator=torch.Generator().manual_seed(3))
    objective = ModelObjective(model, anatomy, examples_of(model, windows))
    blocks = list(anatomy.parts)
    masks = [frozenset[Block](), *(frozenset(blocks[start::3][:2]) for start in range(3)), frozenset(blocks[-2:])]
    masks = list(dict.fromkeys(masks))
    for mask, losses in zip(masks, objective.batch_losses(masks, 0), strict=True):
        with skipped(model, mask, anatomy=anatomy):
            scores = logits(model, {"input_ids": windows}, use_cache=False)[:, :-1].log_softmax(dim=-1)
        plain = -scores.gather(2, windows[:, 1:, None]).squeeze(2).double().mean(dim=1)
        gap = difference(torch.tensor(losses, dtype=torch.float64), plain)
        if not close(gap, plain):
            findings.wrong.append(f"loss without {format_mask(mask)}: off by {gap:.3g} nats")
    return "used" if not objective.fallback else f"plain: {objective.fallback}"
