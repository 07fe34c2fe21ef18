"""What a search takes in memory when the model stays in its files, and that its losses are those in memory.

    OMP_NUM_THREADS=1 python benchmarks/stream.py --json experiments/stream.json

Makes a Llama of 24 equal layers with random weights, 3.5 GB in bfloat16, shard by shard, in the folder of temporary
files (TMPDIR), and removes it at the end. The same step of `blockpruner search`, with a few candidates, runs on it in
one process after the other: `in_memory` as ever, and `streamed` with --stream --memory 512MiB. Of each the peak of
anonymous memory (RssAnon of /proc, sampled every 10 ms; pages of mapped files are not in it) from its start to its
end, Python and torch included, whose own share is given as `bare_anonymous_bytes`. Losses are compared number by
number, as the journals have them. Needs Linux.
"""

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from search_cost import commit, write

LAYERS, HIDDEN, INNER, VOCABULARY = 24, 2048, 8192, 32000
OPEN = (8, 16)  # the layers whose blocks are candidates
COMMAND = "OMP_NUM_THREADS=1 python benchmarks/stream.py --json experiments/stream.json"
SEARCH = "-m blockpruner search --target blocks=1 --search exhaustive --calibration builtin --tokens 256 --window 128"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", default="bfloat16,float32", help="the first is the one of the files")
    parser.add_argument("--json", type=Path, help="where the figures go, besides standard output")
    options = parser.parse_args()
    begun = commit()
    with tempfile.TemporaryDirectory(prefix="blockpruner-benchmark-") as scratch:
        model = Path(scratch, "model")
        made = make_model(model)
        found = {dtype: compared(model, Path(scratch), dtype) for dtype in options.dtypes.split(",")}
    first, *others = found
    figures = {
        **made,
        "memory_option": "512MiB",
        "bare_anonymous_bytes": peak_of([sys.executable, "-c", "import blockpruner.planning, time; time.sleep(0.2)"]),
        "dtype": first,
        **found[first],
        "share": found[first]["peak_anonymous_bytes"] / made["model_bytes"],
        "in other dtypes": {dtype: found[dtype] for dtype in others},
        "command": COMMAND,
        "commit": begun,
    }
    print(json.dumps(figures, indent=2))
    if options.json:
        write(options.json, figures)


def make_model(folder: Path) -> dict[str, Any]:
    """A checkpoint with random weights, a file for each layer, so that never more than one is held."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder.mkdir()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=16,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    files: dict[str, list[str]] = {}
    for name in shapes:
        layer = re.search(r"layers\.(\d+)\.", name)
        files.setdefault(f"model-{layer[1] if layer else name}.safetensors", []).append(name)
    generator = torch.Generator().manual_seed(0)
    sizes: dict[str, int] = {}
    for file, names in files.items():
        tensors = {name: drawn(shapes[name], generator) for name in names}
        sizes |= {name: tensor.nbytes for name, tensor in tensors.items()}
        save_file(tensors, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, names in files.items() for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    ends = sum(size for name, size in sizes.items() if "layers." not in name)
    total = sum(sizes.values())
    return {"layers": LAYERS, "model_bytes": total, "share_of_embedding_and_head": ends / total}


def drawn(shape: Any, generator: Any) -> Any:
    """Weights of ordinary size; the random numbers of one row serve several."""
    import torch

    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    rows = torch.randn(min(shape[0], 256), shape[1], generator=generator) / math.sqrt(shape[1])
    repeated = rows.repeat(-(-shape[0] // len(rows)), 1)[: shape[0]]
    signs = torch.randint(0, 2, (shape[0], 1), generator=generator) * 2 - 1
    return (repeated * signs).to(torch.bfloat16)


def compared(model: Path, scratch: Path, dtype: str) -> dict[str, Any]:
    """Both ways: peaks, seconds, and how far the losses are apart."""
    losses: dict[str, dict[str, list[float]]] = {}
    found: dict[str, Any] = {}
    for way, flags in (("in_memory", []), ("streamed", ["--stream", "--memory", "512MiB"])):
        run = scratch / f"{way}-{dtype}"
        protected = ",".join(str(layer) for layer in range(LAYERS) if layer not in OPEN)
        asked = [str(model), "--protect", protected, "--dtype", dtype, "--device", "cpu", "--run", str(run)]
        words = SEARCH.split()
        begun = time.perf_counter()
        peak = peak_of([sys.executable, *words[:3], *asked, *words[3:], *flags])
        found[way] = {"peak_anonymous_bytes": peak, "seconds": round(time.perf_counter() - begun, 1)}
        records = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
        losses[way] = {f"{r['mask']} {r['batch']}": r["losses"] for r in records if "mask" in r}
    plain, streamed = losses["in_memory"], losses["streamed"]
    assert plain.keys() == streamed.keys(), "the searches asked for different masks"
    pairs = [pair for key in plain for pair in zip(plain[key], streamed[key], strict=True)]
    return {
        "peak_anonymous_bytes": found["streamed"]["peak_anonymous_bytes"],
        "max_loss_difference": max(abs(a - b) for a, b in pairs),
        "losses_compared": len(pairs),
        "streamed_seconds": found["streamed"]["seconds"],
        "in_memory_seconds": found["in_memory"]["seconds"],
        "in_memory_peak_anonymous_bytes": found["in_memory"]["peak_anonymous_bytes"],
    }


def peak_of(command: list[str]) -> int:
    """The most anonymous memory that a command, run to its end, was seen to have."""
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said)
        peak, status = 0, Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            now = re.search(r"RssAnon:\s+(\d+) kB", status.read_text())
            peak = max(peak, int(now[1]) << 10 if now else 0)
            time.sleep(0.01)
        if process.returncode:
            said.seek(0)
            raise SystemExit(f"{' '.join(command)}\n{said.read()}")
    return peak


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
