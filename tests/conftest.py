"""What several test files build on."""

import os
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

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
def data_folder():
    """The folder of real texts that measurements use; tests that need it are skipped where it is not."""
    folder = Path(os.environ.get("BLOCKPRUNER_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no data folder at {folder}; name one in BLOCKPRUNER_DATA")
    return folder
