"""What several test files build on."""

import os
import random
import signal
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from blockpruner import cli

torch.set_num_threads(1)  # on work this small, threads wait for each other longer than they compute
# A shell has its background jobs ignore it, and what they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

Said = namedtuple("Said", ["code", "out", "err"])

SAMPLE = (
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.\n\nA block is one residual branch of a layer; "
    "a layer is one repeated unit of a stack. 1 + 2 = 3, said the naïve cat.\n"
)


@pytest.fixture(scope="session")
def make_tokenizer():
    """Makes small byte-level BPE tokenizers; `bos`: `added` before every text, `known` but not added, or `none`."""

    def make(bos="added"):
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=["<bos>", "<eos>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator([SAMPLE], trainer)
        if bos == "added":
            backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
        names = {"eos_token": "<eos>"} | ({} if bos == "none" else {"bos_token": "<bos>"})
        return PreTrainedTokenizerFast(tokenizer_object=backend, **names)

    return make


@pytest.fixture(scope="session")
def tokenizer(make_tokenizer):
    """A small byte-level tokenizer that puts `<bos>` (0) before every text; its `<eos>` is 1."""
    return make_tokenizer()


@pytest.fixture(scope="session")
def prose(tmp_path_factory):
    """A text file with some 3,000 tokens of `tokenizer`."""
    words, draw = SAMPLE.split(), random.Random(0)
    path = tmp_path_factory.mktemp("prose") / "prose.txt"
    path.write_text("".join(f"{' '.join(draw.choices(words, k=12))}.\n" for _ in range(100)), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, tokenizer, prose):
    """A folder with a tiny Llama that has learned `prose`, with its attention.2 held at zero, and `tokenizer`."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = LlamaForCausalLM(config)
    useless = model.model.layers[2].self_attn.o_proj.weight.requires_grad_(False).zero_()
    stream = torch.tensor(tokenizer(prose.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"])
    windows = torch.nn.functional.pad(stream[: 32 * 15].view(32, 15), (1, 0), value=config.bos_token_id)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p is not useless], lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        model(windows, labels=windows).loss.backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("checkpoints") / "planted"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data_folder():
    """The folder of real texts that measurements use; tests that need it are skipped where it is not."""
    folder = Path(os.environ.get("BLOCKPRUNER_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no data folder at {folder}; name one in BLOCKPRUNER_DATA")
    return folder


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Runs a command in this process, in an empty folder; gives its exit code and what it printed in both ways."""
    monkeypatch.setattr(cli, "catch_signals", lambda: None)
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["blockpruner", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        assert "Traceback" not in captured.out + captured.err
        return Said(ended.value.code or 0, captured.out, captured.err)

    return call
