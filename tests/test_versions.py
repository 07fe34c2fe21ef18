"""Forty architectures from end to end, on the oldest transformers that is supported and on the newest.

`make oldest` runs this file with the oldest, `make test` with the newest: blocks found, removed exactly, cached
generation equal to uncached, and a checkpoint without blocks that reloads.
"""

import copy
import functools

import pytest
import torch
import zoo
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM, PreTrainedModel

from blockpruner.anatomy.parts import Anatomy
from blockpruner.anatomy.reading import read_anatomy
from blockpruner.blocks import Block, Mask
from blockpruner.surgery.removal import prune_, silenced, skipped

AUTO_CLASSES = {"causal": AutoModelForCausalLM, "masked": AutoModelForMaskedLM, "seq2seq": AutoModelForSeq2SeqLM}
CAUSAL = """llama mistral mixtral qwen2 qwen2_moe qwen3 qwen3_moe qwen3_next gemma gemma2 gemma3_text phi phi3 olmo
olmo2 olmo3 falcon gpt2 gpt_neo gptj gpt_neox gpt_oss opt bloom mpt cohere cohere2 glm4 granite smollm3 starcoder2
stablelm mamba jamba lfm2 ernie4_5 apertus"""
OTHERS = ("masked/bert", "seq2seq/t5", "seq2seq/bart")
ARCHITECTURES = (*(f"causal/{name}" for name in CAUSAL.split()), *OTHERS)

on_each = pytest.mark.parametrize("architecture", ARCHITECTURES)


@functools.lru_cache(maxsize=1)
def read(architecture: str) -> tuple[zoo.LanguageModel, Anatomy]:
    model = zoo.build(architecture)
    return model, read_anatomy(model)


def masks(anatomy: Anatomy) -> list[Mask]:
    """All mixing blocks of three layers, the first two among them; an mlp; and both."""
    blocks = [block for block in anatomy.outline.blocks if block.stack in ("", "decoder")]
    depth = 1 + max(block.layer for block in blocks)
    mixing = frozenset(block for block in blocks if block.kind != "mlp" and block.layer in (0, 1, depth - 1))
    mlps = frozenset(block for block in blocks if block.kind == "mlp" and block.layer == 1)
    return [mixing, mlps or mixing, mixing | mlps]


def test_there_are_forty():
    assert len(set(ARCHITECTURES)) == 40
    assert set(ARCHITECTURES) <= {str(entry) for entry in zoo.entries()}


@on_each
def test_removal_is_exact(architecture):
    model, anatomy = read(architecture)
    inputs = zoo.inputs(model)
    dense = copy.deepcopy(model)
    for mask in masks(anatomy):
        with torch.no_grad(), skipped(model, mask, anatomy=anatomy), silenced(dense, anatomy, mask):
            assert torch.equal(model(**inputs).logits, dense(**inputs).logits)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, dense(**inputs).logits)


def generated(model: zoo.LanguageModel, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedily chosen tokens after left-padded prompts, and the logits they were chosen by."""
    inputs = zoo.inputs(model)
    if "decoder_input_ids" not in inputs:
        inputs["input_ids"][0, :4], inputs["attention_mask"][0, :4] = 0, 0
    settings = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with torch.no_grad():
        found = model.generate(**inputs, **settings | options, pad_token_id=0, eos_token_id=None)
    return found.sequences, torch.stack(found.logits)


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if not name.startswith("masked")])
def test_generation_with_a_cache_is_generation_without(architecture):
    model, anatomy = read(architecture)
    with skipped(model, masks(anatomy)[0], anatomy=anatomy):
        (found, by), (expected, wanted) = generated(model, use_cache=True), generated(model, use_cache=False)
    assert torch.equal(found, expected)
    assert float((by - wanted).abs().max()) < 1e-4 * float(wanted.abs().max())


@on_each
def test_a_checkpoint_without_blocks_reloads(architecture, tmp_path):
    model, anatomy = read(architecture)
    inputs = zoo.inputs(model)
    pruned: PreTrainedModel = prune_(copy.deepcopy(model), masks(anatomy)[2], anatomy=anatomy)
    pruned.save_pretrained(tmp_path)
    again, info = AUTO_CLASSES[zoo.Entry.parse(architecture).head].from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        assert torch.equal(again.eval()(**inputs).logits, pruned(**inputs).logits)


def test_a_block_is_named_as_everywhere():
    assert Block("attention", 0) in read("causal/llama")[1].parts
