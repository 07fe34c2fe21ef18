"""All weights of a pruned model trained on, as in pretraining."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from blockpruner.repairs.recovery import Bench, GapRecord, Trained

if TYPE_CHECKING:
    from blockpruner.surgery.gaps import Repair


@dataclass(frozen=True)
class Continued(Trained):
    """The model's own objective (next, masked or left-out tokens) on more text, over all weights.

    lr, beta2 and weight_decay are Shortened LLaMA's, which trained on 37 to 271 billion tokens, 512 windows a step.
    Memory: the model is only borrowed, so its trained weights are a second copy; over that the gradients, float32
    masters and AdamW's two moments.
    """

    beta2: float = 0.95
    weight_decay: float = 0.1

    title: ClassVar[str] = "Continued pretraining"
    source: ClassVar[str] = "Shortened LLaMA, Kim et al. 2024, arXiv 2402.02834"
    needs: ClassVar[str] = "backward passes, a second copy of the weights"
    whole: ClassVar[bool] = True
    passes: ClassVar[str] = "1 backward, 1 forward per epoch"

    def repair(self, bench: Bench) -> tuple["Repair", tuple[GapRecord, ...]]:
        from blockpruner.repairs.taught import Taught
        from blockpruner.repairs.tuning import train_weights

        return train_weights(bench, self, Taught("lm"))
