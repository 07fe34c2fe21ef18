"""How far losses over a part of the vocabulary are from those over all of it, where a search compares them.

    python benchmarks/sampled_loss.py --data "$BLOCKPRUNER_DATA" --json experiments/sampled_loss.json

At some steps along one path of removals, moves that compete for the next one are compared with the move that the path
takes, on C4: `difference`, of the loss, in nats per token; `error`, of that difference when both losses come from the
same drawn tokens; `left`, the variance of that error over positions beside that of the difference itself: how much more
text would bring the same certainty. Each size is drawn several times; `share` is its part of the head's work.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from search_cost import commit, write
from torch import Tensor

from blockpruner.anatomy.probing import evaluating, without_cache
from blockpruner.blocks import Block, Mask
from blockpruner.data import read_data
from blockpruner.engine.head import Head, proved_head
from blockpruner.loading.models import load
from blockpruner.objectives.loss import Loss
from blockpruner.objectives.sampled_loss import SampledLoss
from blockpruner.subject import Subject, open_subject
from blockpruner.surgery.removal import skipped

C4 = "text/c4_demo.jsonl[0:40]"
PATH = "attention.17,attention.16,attention.7,attention.9,mlp.9,mlp.8,attention.8,mlp.7,mlp.6"
BESIDE = {  # after so many removals of the path: what competes with its next one, the last ones from afar
    0: "attention.16,attention.7,mlp.9,mlp.15,attention.2",
    4: "mlp.8,attention.8,mlp.7,attention.12,mlp.2",
    8: "attention.10,mlp.14,mlp.15,mlp.10,attention.1",
}
COMMAND = 'python benchmarks/sampled_loss.py --data "$BLOCKPRUNER_DATA" --json experiments/sampled_loss.json'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with text/")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--sizes", default="4096,16384,65536")
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--json", type=Path, help="where the figures go, besides standard output")
    options = parser.parse_args()
    begun, sizes = commit(), list(map(int, options.sizes.split(",")))
    subject = open_subject(load(options.model, dtype=options.dtype))
    data = read_data(subject, f"{options.data / C4}", Loss(), tokens=options.tokens, window=256)
    windows, path = data.examples.inputs["input_ids"], list(map(Block.parse, PATH.split(",")))
    with evaluating(subject.model):
        head = plain_head(subject, windows[:1])
        thought = head.probabilities(states(subject, head, frozenset(), windows))
        heads = {
            (size, seed): head.sampled(*SampledLoss(size, seed).draw(thought))
            for size in sizes
            for seed in range(options.draws)
        }
        rows: dict[str, Any] = {}
        for step, names in BESIDE.items():
            gone = path[:step]
            taken = losses(subject, head, heads, frozenset([*gone, path[step]]), windows)
            for name in names.split(","):
                other = losses(subject, head, heads, frozenset([*gone, Block.parse(name)]), windows)
                rows[f"{name} instead of {path[step]}, step {step + 1}"] = row = compared(taken, other, sizes)
                print(name, json.dumps(row), flush=True)
    figures = {
        "candidates": rows,
        "share": {size: size / len(head.linear.weight) for size in sizes},
        "draws": options.draws,
        "positions": int(data.examples.targets.numel()),
        "model": subject.identity.model_dump(mode="json"),
        "dtype": options.dtype,
        "command": COMMAND,
        "commit": begun,
    }
    if options.json:
        write(options.json, figures)


@torch.no_grad()
def plain_head(subject: Subject, windows: Tensor) -> Head:
    head = proved_head(subject.model, lambda: subject.model(windows, **without_cache(subject.model)).logits, windows)
    assert head is not None
    return head


@torch.no_grad()
def states(subject: Subject, head: Head, mask: Mask, windows: Tensor) -> Tensor:
    """What the head is given for each position that has a next token: [positions, width]."""
    with skipped(subject.model, mask, anatomy=subject.anatomy), head.left_out(subject.model):
        rows = [subject.model(row[None], **without_cache(subject.model)).logits[0, :-1] for row in windows]
    return torch.cat(rows)


def losses(
    subject: Subject, head: Head, heads: Mapping[tuple[int, int], Head], mask: Mask, windows: Tensor
) -> dict[tuple[int, int] | None, Tensor]:
    """The loss of each position over the whole vocabulary (None), and over each part."""
    found, targets = states(subject, head, mask, windows), windows[:, 1:].flatten()
    return {key: each.token_losses(found, targets).double() for key, each in {None: head, **heads}.items()}


def compared(
    taken: dict[tuple[int, int] | None, Tensor], other: dict[tuple[int, int] | None, Tensor], sizes: list[int]
) -> dict[str, Any]:
    apart = other[None] - taken[None]
    row: dict[str, Any] = {"difference": float(apart.mean()), "loss": float(other[None].mean())}
    for size in sizes:
        errors = [other[key] - taken[key] - apart for key in taken if key and key[0] == size]
        left = sum(float(error.var()) for error in errors) / len(errors) / float(apart.var())
        row[str(size)] = {"error": [round(float(error.mean()), 5) for error in errors], "left": round(left, 4)}
    return row


if __name__ == "__main__":
    main()
