"""All weights of a pruned model trained to predict what the dense one predicts."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from blockpruner.repairs.recovery import Bench, GapRecord, Trained, check_taught

if TYPE_CHECKING:
    from blockpruner.surgery.gaps import Repair


@dataclass(frozen=True)
class Distill(Trained):
    """T^2 KL(p || q), with p and q the dense and the pruned model's predictions at temperature T, over all weights.

    loss: `kl`; or `fisher`, that to second order at temperature 1 and without logits (`repairs.fisher`), where the head
    stays as it is. hidden: weight of a second term: how far the stream behind each layer that has a block left is from
    that behind the same layer of the dense model, |s - t|^2 / |t|^2, mean over tokens and layers. Layers keep their
    numbers when blocks are removed, so this is the original layer map. vocabulary: tokens from which `kl` is estimated,
    drawn anew for each pass (`repairs.sampled_divergence`), where the head stays as it is; 0 for all.

    Memory: the dense model stays as the teacher, so there is a second copy of the weights, and over it the gradients,
    float32 masters and AdamW's two moments.
    """

    lr: float = 1e-5
    loss: Literal["kl", "fisher"] = "kl"
    temperature: float = 1.0
    hidden: float = 0.0
    vocabulary: int = 0

    title: ClassVar[str] = "Distillation"
    source: ClassVar[str] = "Hinton et al. 2015, arXiv 1503.02531; hidden states as in TinyBERT"
    needs: ClassVar[str] = "backward passes, a second copy of the weights"
    whole: ClassVar[bool] = True
    passes: ClassVar[str] = "1 backward, 2 forward per epoch"
    teacher: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_taught(self.loss, self.temperature, self.hidden, self.vocabulary)

    def repair(self, bench: Bench) -> tuple["Repair", tuple[GapRecord, ...]]:
        from blockpruner.repairs.taught import Taught
        from blockpruner.repairs.tuning import train_weights

        return train_weights(bench, self, Taught(self.loss, self.temperature, self.hidden, self.vocabulary))
