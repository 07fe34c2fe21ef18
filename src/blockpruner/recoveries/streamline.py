"""The layers beside gaps trained to do what is gone as well."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from blockpruner.repairs.recovery import Bench, GapRecord, Trained

if TYPE_CHECKING:
    from blockpruner.surgery.gaps import Repair


@dataclass(frozen=True)
class Streamline(Trained):
    """|s - t|^2 / |t|^2, mean over tokens and layers, over the weights of the layers that make up for others.

    s is the pruned model's stream, t the dense model's, behind the last layer that such a layer stands for. A layer
    that lost a block stands for itself, one before a run of layers that are gone for that run too, and where a stack
    begins with a run, the first layer behind it for itself. So a run of layers becomes one trained layer, and a single
    block is made up for by the rest of its layer. No head runs but for looks at the held-out loss.

    LLM-Streamline begins with the first layer of one run, which here is the layer before those that a plan removes,
    and takes |s - t|^2, in which a few tokens of very large norm outweigh all others.
    Memory: a second copy of those layers, gradients, float32 masters and AdamW's two moments of them, and what the
    layers from the first of them to the last keep for the way back.
    """

    title: ClassVar[str] = "Trained layers beside the gaps"
    source: ClassVar[str] = "after LLM-Streamline, Chen et al. 2024, arXiv 2403.19135"
    needs: ClassVar[str] = "backward passes, a second copy of the layers beside gaps"
    passes: ClassVar[str] = "1 backward, 2 forward per epoch, without the head"
    teacher: ClassVar[bool] = True

    @property
    def copies(self) -> str:
        return "a second copy of the layers beside gaps and AdamW's state of them"

    def numbers(self, bench: Bench) -> int:
        from blockpruner.repairs.streamlining import parameters, places

        return sum(p.numel() for p in parameters(bench, places(bench.anatomy, bench.mask)).values())

    def repair(self, bench: Bench) -> tuple["Repair", tuple[GapRecord, ...]]:
        from blockpruner.repairs.streamlining import train_layers

        return train_layers(bench, self)
