"""How well the loss over a short list of tokens tells what a move does to the loss over all of them.

    python benchmarks/shortlist.py --data "$BLOCKPRUNER_DATA" --json experiments/shortlist.json

A short list has the k most frequent tokens of C4 documents 40 to 199, and for each position its target: its loss is
logsumexp over these less the target's logit, for k rows of the head instead of all. On documents 0 to 39, in pieces of
128 positions, the difference of the loss between each candidate and the first is set beside that of the short loss:
`correlation` r over pieces. Used as a control variate, the short loss leaves 1 - r^2 of the variance (`left`) to exact
losses on fewer pieces, for `share` of the head's work.
"""

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from search_cost import commit, write
from torch import Tensor

from blockpruner.anatomy.probing import vocabulary_size
from blockpruner.data import read_data
from blockpruner.loading.models import load
from blockpruner.metrics import token_losses
from blockpruner.objectives.loss import Loss
from blockpruner.subject import Subject, open_subject
from blockpruner.surgery.removal import skipped

C4, PIECE = "text/c4_demo.jsonl", 128
COMMAND = 'python benchmarks/shortlist.py --data "$BLOCKPRUNER_DATA" --json experiments/shortlist.json'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with text/")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--candidates", default="attention.17,attention.16,attention.7,attention.9,mlp.13,mlp.6")
    parser.add_argument("--sizes", default="1024,4096,8192")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--json", type=Path, help="where the figures go, besides standard output")
    options = parser.parse_args()
    begun = commit()
    subject = open_subject(load(options.model, dtype="bfloat16"))
    assert subject.tokenizer is not None
    lines = (options.data / C4).read_text(encoding="utf-8").splitlines()[40:200]
    texts = [json.loads(line)["text"] for line in lines]
    common = Counter(
        token for text in texts for token in subject.tokenizer(text, add_special_tokens=False)["input_ids"]
    )
    lists = {
        size: torch.tensor([token for token, _ in common.most_common(size)])
        for size in map(int, options.sizes.split(","))
    }
    data = read_data(subject, f"{options.data / C4}[0:40]", Loss(), tokens=options.tokens, window=2 * PIECE)
    windows = data.examples.inputs["input_ids"]
    first, *others = options.candidates.split(",")
    whole, short = losses(subject, first, windows, lists)
    rows: dict[str, Any] = {}
    for name in others:
        mine, brief = losses(subject, name, windows, lists)
        apart = pieces(mine - whole)
        rows[name] = {
            "difference": float(apart.mean()),
            "spread": float(apart.std()),
            "lists": {size: told(apart, pieces(brief[size] - short[size])) for size in lists},
        }
        print(json.dumps({name: rows[name]}), flush=True)
    figures = {
        "first": first,
        "candidates": rows,
        "share": {size: len(tokens) / vocabulary_size(subject.model) for size, tokens in lists.items()},
        "pieces": windows.numel() // PIECE,
        "model": subject.identity.model_dump(mode="json"),
        "command": COMMAND,
        "commit": begun,
    }
    if options.json:
        write(options.json, figures)


@torch.no_grad()
def losses(
    subject: Subject, removed: str, windows: Tensor, lists: dict[int, Tensor]
) -> tuple[Tensor, dict[int, Tensor]]:
    """The loss of every position without a block, and the same by each short list: [windows, positions]."""
    exact, brief = list[Tensor](), {size: list[Tensor]() for size in lists}
    with skipped(subject.model, [removed], anatomy=subject.anatomy):
        for window in windows:
            logits = subject.model(input_ids=window[None], use_cache=False).logits[0, :-1].float()
            targets = window[1:]
            right = logits.gather(1, targets[:, None])[:, 0]
            exact.append(token_losses(logits, targets))
            for size, tokens in lists.items():
                beside = torch.where(torch.isin(targets, tokens), torch.tensor(-torch.inf), right)
                brief[size].append(torch.logaddexp(logits[:, tokens].logsumexp(1), beside) - right)
    return torch.stack(exact), {size: torch.stack(found) for size, found in brief.items()}


def pieces(values: Tensor) -> Tensor:
    """Means over the pieces of each window, the last of which lacks one position."""
    return torch.stack([piece.mean(dim=1) for piece in values.split(PIECE, dim=1)]).flatten()


def told(apart: Tensor, brief: Tensor) -> dict[str, float]:
    correlation = float(torch.corrcoef(torch.stack([apart, brief]))[0, 1])
    return {"correlation": round(correlation, 4), "left": round(1 - correlation**2, 4)}


if __name__ == "__main__":
    main()
