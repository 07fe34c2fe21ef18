"""A pruned model that is trained, and the dense one it comes from: the same modules, blocks put out and back in.

So a teacher costs no second copy. Both are used from their two ends, through the layers to the last state and from some
positions of that to logits, so that the logits of all positions never exist at once.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from blockpruner.anatomy.parts import Anatomy, Layer
from blockpruner.anatomy.probing import Enough, first_tensor, replaced, without_cache
from blockpruner.blocks import Mask
from blockpruner.standin import stand_in_for
from blockpruner.surgery.gaps import UNREPAIRED, Repair, repaired
from blockpruner.texts.examples import Examples


@dataclass(frozen=True)
class Pupil:
    """A dense model, and the one without `mask`, with `repair` and with other `modules` by path: the same weights."""

    model: PreTrainedModel
    anatomy: Anatomy
    mask: Mask
    repair: Repair = UNREPAIRED
    modules: Mapping[str, nn.Module] = field(default_factory=dict[str, nn.Module])

    @contextlib.contextmanager
    def pruned(self) -> Iterator[Callable[[], contextlib.AbstractContextManager[None]]]:
        """While the block runs, the model is the pruned one; yields what gives the dense weights back for a moment."""
        own = [(self.model.get_parameter(name), value) for name, value in self.repair.weights.items()]
        dense = [(parameter, parameter.data) for parameter, _ in own]

        @contextlib.contextmanager
        def whole() -> Iterator[None]:
            try:
                for parameter, data in dense:
                    parameter.data = data
                yield
            finally:
                for parameter, data in own:
                    parameter.data = data

        with repaired(self.model, self.anatomy, self.mask, self.repair), replaced(self.model, self.modules):
            yield whole

    def train(self, on: bool) -> None:
        """Switch the dropout of `modules`; the model's own is always off."""
        for module in self.modules.values():
            module.train(on)


States = dict[str, Tensor]  # the stream behind layers, by the path of the layer


class Ends:
    """The two ends of a model: through its layers to the last state, and from that to logits.

    Of several stacks the decoder's is the last.
    """

    def __init__(self, model: PreTrainedModel, anatomy: Anatomy) -> None:
        self.model = model
        decoders = [stack for stack in anatomy.stacks if stack.name.startswith("decoder")]
        self.layers: tuple[Layer, ...] = (decoders or anatomy.stacks)[-1].layers
        every = [layer for stack in anatomy.stacks for layer in stack.layers]
        self.through = {layer.path: stand_in_for(model.get_submodule(layer.path), layer.through) for layer in every}
        self.extra = without_cache(model)

    def body(self, part: Examples, also: Sequence[str] = (), until: str | None = None) -> tuple[Tensor, States]:
        """The state behind the last layer [rows, tokens, hidden], and those behind the layers at the paths `also`.

        until: the path of the layer to stop behind, instead of the last.
        """
        found: list[Tensor] = []

        def last(_: nn.Module, __: object, output: Any) -> None:
            found.append(_tensor(output))
            raise Enough

        with watched(self.model, also) as states, contextlib.suppress(Enough):
            handle = self.model.get_submodule(until or self.layers[-1].path).register_forward_hook(last)
            try:
                self.model(**part.inputs, **self.extra)
            finally:
                handle.remove()
        return found[0], states

    def logits(self, state: Tensor, part: Examples, at: Tensor) -> Tensor:
        """What the model's norm and head make of the last state at the positions `at`, [rows, positions, hidden]."""
        first, length = self.layers[0], part.targets.shape[1]

        def put(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            changed = tuple(state if place == first.hidden else value for place, value in enumerate(args))
            return changed, {name: state if name == first.hidden else value for name, value in kwargs.items()}

        inputs = {k: v[:, at] if v.shape[1:2] == (length,) else v for k, v in part.inputs.items()}
        handle = self.through[first.path].register_forward_pre_hook(put, with_kwargs=True)
        try:
            with replaced(self.model, self.through):
                return self.model(**inputs, **self.extra).logits
        finally:
            handle.remove()


@contextlib.contextmanager
def watched(model: nn.Module, paths: Sequence[str]) -> Iterator[States]:
    """While the block runs, the stream behind the layers at these paths is kept."""
    states: States = {}
    with contextlib.ExitStack() as hooks:
        for path in paths:

            def keep(_: nn.Module, __: object, output: Any, path: str = path) -> None:
                states[path] = _tensor(output).clone()  # some layers go on to change it in place

            hooks.callback(model.get_submodule(path).register_forward_hook(keep).remove)
        yield states


def _tensor(output: Any) -> Tensor:
    found = first_tensor(output)
    assert found is not None  # read_anatomy has seen it
    return found
