"""Models that stay in their files: the same bits as in memory, each layer's weights read once, and no memory taken."""

import copy
import functools
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from labs import SIGNS, made
from safetensors.torch import load_file, save_file
from tiny import token_ids
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

from blockpruner.anatomy.reading import read_anatomy
from blockpruner.blocks import parse_mask
from blockpruner.criteria import parse_criterion
from blockpruner.engine.objective import ModelObjective
from blockpruner.engine.spilling import Spill
from blockpruner.errors import InputError, MachineError
from blockpruner.importance.criterion import Lab
from blockpruner.loading import lending
from blockpruner.loading.lending import at_hand, lends
from blockpruner.loading.models import load
from blockpruner.loading.streaming import load_streamed
from blockpruner.objectives.kl import KL
from blockpruner.objectives.loss import Loss
from blockpruner.searching.evaluations import Evaluations
from blockpruner.searching.moves import GRANULARITIES
from blockpruner.texts.examples import examples_of

DENSE = frozenset()
T5 = "seq2seq/t5"
ENTRIES = ("causal/gemma3_text", "causal/mixtral", "causal/gpt_neox", "causal/mamba", "masked/bert")
LLAMA = "causal/llama"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Gives the folder with the weights of a tiny model, by its name, in a dtype."""

    @functools.cache
    def save(name, dtype=torch.float32):
        folder = tmp_path_factory.mktemp("saved")
        copy.deepcopy(made(name)[0]).to(dtype).save_pretrained(folder)
        return folder

    return save


def streamed(folder, dtype="stored", device="cpu"):
    return load_streamed(str(folder), dtype=dtype, device=device).model


def masks_of(anatomy):
    blocks = anatomy.outline.blocks
    return [DENSE, *(frozenset([block]) for block in blocks[:4]), frozenset(blocks[1:4]), frozenset(blocks)]


def windows_of(model, rows, tokens=12):
    return examples_of(model, zoo.inputs(model, rows, tokens, seed=1)["input_ids"], SIGNS)


def losses(model, anatomy, measure=None, memory=None):
    """The losses of some masks on each of three micro-batches, by both; and the objective."""
    examples = windows_of(model, 5)
    found = ModelObjective(model, anatomy, examples, measure or Loss(), batch_tokens=2 * examples.tokens, memory=memory)
    assert found.batches == 3
    masks = masks_of(anatomy)
    asked = {2: masks, 0: masks[:4], 1: masks[3:]}
    return {(batch, mask): values for batch, mask, values in found.losses(asked)}, found


@pytest.mark.parametrize("entry", ENTRIES)
def test_losses_of_a_streamed_model_are_those_in_memory_bit_for_bit(entry, saved):
    whole = load(str(saved(entry)), dtype="bfloat16", device="cpu").model
    model = streamed(saved(entry), "bfloat16")
    assert lends(model)
    anatomy = made(entry)[1]
    assert losses(model, anatomy, memory=0)[0] == losses(whole, anatomy)[0]


@pytest.mark.parametrize("entry", ["causal/llama", "causal/mixtral"])
def test_in_the_dtype_of_the_files_nothing_is_lent(entry, saved):
    whole, model = load(str(saved(entry)), dtype="stored", device="cpu").model, streamed(saved(entry))
    assert not lends(model)
    anatomy = read_anatomy(model)
    assert anatomy == read_anatomy(whole)
    assert losses(model, anatomy, memory=2**30)[0] == losses(whole, anatomy)[0]


def test_weights_stored_in_half_precision_are_streamed_in_full(saved):
    folder = saved("causal/gemma3_text", torch.bfloat16)
    whole, model = load(str(folder), dtype="float32", device="cpu").model, streamed(folder, "float32")
    assert lends(model)
    assert model.dtype == torch.float32
    anatomy = read_anatomy(model)
    assert anatomy == read_anatomy(whole)
    assert losses(model, anatomy, memory=0)[0] == losses(whole, anatomy)[0]


def test_measures_that_compare_with_the_whole_model_stream_too(saved):
    model, anatomy = streamed(saved(LLAMA)), made(LLAMA)[1]
    assert losses(model, anatomy, KL(), memory=3000)[0] == losses(model, anatomy, KL())[0]


def test_a_model_that_the_mask_tree_is_not_for_streams_by_plain_passes(saved):
    whole, model = load(str(saved(T5)), dtype="bfloat16", device="cpu").model, streamed(saved(T5), "bfloat16")
    anatomy = made(T5)[1]
    found = [ModelObjective(each, anatomy, windows_of(each, 1), memory=0) for each in (whole, model)]
    assert found[1].fallback
    values = [list(each.losses({0: [DENSE, parse_mask("decoder.mlp.1")]})) for each in found]
    assert values[0] == values[1]


def test_each_layer_has_its_weights_made_once_for_all_that_is_asked(saved, monkeypatch):
    model, anatomy = streamed(saved(LLAMA), "bfloat16"), made(LLAMA)[1]
    found = ModelObjective(model, anatomy, windows_of(model, 5), batch_tokens=24, memory=0)
    takers = []
    take = lending._Lender.take

    def watched(self, *given):
        if not self._kept:
            takers.append(self)
        take(self, *given)

    monkeypatch.setattr(lending._Lender, "take", watched)
    layers = [model.get_submodule(layer.path) for layer in anatomy.stacks[0].layers]
    list(found.losses(dict.fromkeys(range(3), masks_of(anatomy))))
    assert takers == [lending._lenders[layer] for layer in layers]


def test_weights_are_given_back_also_after_an_exception(saved):
    model = streamed(saved(LLAMA), "bfloat16")
    before = {name: (id(p), p.data_ptr(), p.dtype) for name, p in model.named_parameters()}
    layer = model.model.layers[1]

    def fail(*_):
        assert layer.mlp.up_proj.weight.dtype == torch.bfloat16
        raise KeyError

    handle = layer.mlp.register_forward_hook(fail)
    for call in (lambda: model(token_ids()), lambda: _at_hand(layer, fail)):
        with pytest.raises(KeyError):
            call()
        assert {name: (id(p), p.data_ptr(), p.dtype) for name, p in model.named_parameters()} == before
    handle.remove()
    assert layer.mlp.up_proj.weight.dtype == torch.float32
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_weights_that_cannot_all_be_lent_all_stay_at_home_and_can_be_lent_later(error, saved, monkeypatch):
    model = streamed(saved(LLAMA), "bfloat16")
    layer = model.model.layers[1]
    before = {name: (p.data_ptr(), p.dtype) for name, p in layer.named_parameters()}
    third, to = list(layer.parameters())[2].data_ptr(), torch.Tensor.to

    def full(self, *given, **more):
        if self.data_ptr() == third:
            raise error
        return to(self, *given, **more)

    for call in (lambda: _at_hand(layer, lambda: None), lambda: model(token_ids())):
        with monkeypatch.context() as patched:
            patched.setattr(torch.Tensor, "to", full)
            with pytest.raises(error):
                call()
        assert {name: (p.data_ptr(), p.dtype) for name, p in layer.named_parameters()} == before
        with at_hand(layer):
            assert layer.mlp.up_proj.weight.dtype == torch.bfloat16
        assert {name: (p.data_ptr(), p.dtype) for name, p in layer.named_parameters()} == before


def test_a_call_that_ctrl_c_ends_keeps_nothing_lent_when_the_engine_is_done_with_the_layer(saved):
    model = streamed(saved(LLAMA), "bfloat16")
    layer = model.model.layers[1]

    def interrupt(*_):
        raise KeyboardInterrupt

    layer.mlp.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt), at_hand(layer):
        model(token_ids())
    assert layer.mlp.up_proj.weight.dtype == torch.float32


def _at_hand(layer, then):
    with at_hand(layer), at_hand(layer):
        then()


def test_a_layer_in_memory_is_at_hand_anyway():
    layer = made(LLAMA)[0].model.layers[0]
    with at_hand(layer):
        assert layer.mlp.up_proj.weight.dtype == torch.float32


@pytest.mark.parametrize("name", ["cosine", "angular", "update-norm", "relative-magnitude", "leave-one-out", "shapley"])
def test_criteria_of_forward_passes_find_on_a_streamed_model_what_they_find_in_memory(name, saved):
    def scores(model):
        objective = ModelObjective(model, anatomy, windows_of(model, 2), memory=memory)
        lab = Lab(model, anatomy, objective.examples, Evaluations(objective))
        kind = parse_criterion("shapley:permutations=2" if name == "shapley" else name)
        return kind.scores(lab, list(GRANULARITIES["block"](anatomy.outline, DENSE)))

    whole, model = load(str(saved(LLAMA)), dtype="bfloat16", device="cpu").model, streamed(saved(LLAMA), "bfloat16")
    anatomy, memory = made(LLAMA)[1], None
    expected = scores(whole)
    memory = 0
    assert scores(model) == expected


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_a_spill_gives_back_what_it_was_given_whatever_fits(data):
    with Spill[int](data.draw(st.sampled_from([None, 0, 64, 200]))) as spill:
        _used_at_random(spill, data)


def _used_at_random(spill, data):
    held = {}
    for key in range(data.draw(st.integers(1, 20))):
        dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.bool]))
        tensor = torch.randn(data.draw(st.integers(0, 9)), 4).to(dtype).t()
        spill.put(key, tensor)
        held[key] = tensor
        if held and data.draw(st.booleans()):
            gone = data.draw(st.sampled_from(sorted(held)))
            assert torch.equal(spill.get(gone), held[gone])
            assert torch.equal(spill.pop(gone), held.pop(gone))
            assert gone not in spill
    assert all(key in spill and torch.equal(spill.pop(key), tensor) for key, tensor in held.items())


def test_a_spill_stays_within_its_memory_and_uses_its_file_again(tmp_path):
    with Spill[int](100, tmp_path) as spill:
        for turn in range(50):
            for key in range(4):
                spill.put(key, torch.full((10,), float(turn)))
            assert [float(spill.pop(key)[0]) for key in range(4)] == [turn] * 4
        assert spill.ledger.spilled == 50 * 2 * 40
        assert spill._end == 2 * 40
        assert not list(tmp_path.iterdir())  # no name, so nothing is left behind, not by a kill either


def test_a_full_disk_is_said(monkeypatch, tmp_path):
    class Full:
        def seek(self, _):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("blockpruner.engine.spilling.tempfile.TemporaryFile", lambda **_: Full())
    with pytest.raises(MachineError, match="No space left"):
        Spill[int](0, tmp_path).put(0, torch.ones(3))


def rewritten(folder, into, change):
    """A copy of the checkpoint with its tensors changed in place."""
    for file in folder.iterdir():
        Path(into, file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, Path(into, "model.safetensors"), {"format": "pt"})
    return into


NORM, PROJECTION = "model.layers.1.input_layernorm.weight", "model.layers.2.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "dtype", "reason"),
    [
        (lambda t: t.pop(NORM), "stored", "layers.1.input_layernorm.weight: not in the weights"),
        (lambda t: t[PROJECTION][0].fill_(float("nan")), "stored", "up_proj.weight holds NaN"),
        (lambda t: t[PROJECTION][0].fill_(1e30), "float16", "up_proj.weight holds NaN or infinite numbers, .*float16"),
    ],
)
def test_a_streamed_checkpoint_is_read_as_strictly(change, dtype, reason, saved, tmp_path):
    with pytest.raises(InputError, match=reason):
        streamed(rewritten(saved(LLAMA), tmp_path, change), dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_stored_in_several_dtypes_are_each_read_from_their_own(dtype, saved, tmp_path):
    folder = rewritten(saved(LLAMA), tmp_path, lambda t: t.update({NORM: t[NORM].half()}))
    whole, model = load(str(folder), dtype=dtype, device="cpu").model, streamed(folder, dtype)
    assert torch.equal(model(token_ids()).logits, whole(token_ids()).logits)


def test_a_model_without_layers_to_stream_is_refused(saved, monkeypatch):
    monkeypatch.setattr("blockpruner.loading.streaming.LEAST_SHARE", 1.0)
    with pytest.raises(InputError, match="no list of layers"):
        streamed(saved(LLAMA))


def test_a_streamed_model_needs_accelerate(saved, monkeypatch):
    monkeypatch.setattr("blockpruner.loading.streaming.is_accelerate_available", lambda: False)
    with pytest.raises(MachineError, match="accelerate"):
        streamed(saved(LLAMA))


MEASURED = """
import re, sys
import torch
from blockpruner.loading.streaming import load_streamed

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) << 10

torch.set_num_threads(1)
load_streamed(sys.argv[1], dtype="stored", device="cpu")  # what libraries take for themselves at first use
before = anonymous()
models = [load_streamed(sys.argv[1], dtype="stored", device="cpu").model for _ in range(8)]
with torch.inference_mode():
    models[-1](torch.arange(8)[None])
print(anonymous() - before, sum(p.nbytes for model in models for p in model.parameters()))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks /proc")
def test_the_weights_of_a_streamed_model_take_no_memory_of_their_own(tmp_path):
    size: Any = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8, "vocab_size": 64}
    experts: Any = {"num_experts": 4, "moe_intermediate_size": 2048, "shared_expert_intermediate_size": 64}
    with torch.device("meta"):
        model: Any = Qwen2MoeForCausalLM(Qwen2MoeConfig(**size, **experts, num_key_value_heads=8))
    model.to(torch.bfloat16).to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(0.01)
    model.save_pretrained(tmp_path)
    done = subprocess.run([sys.executable, "-c", MEASURED, str(tmp_path)], capture_output=True, text=True, check=True)
    taken, weights = map(int, done.stdout.split())
    assert weights > 300 * 2**20
    # What stays is a tensor or two being put together, and what the allocator has not given back, however many models.
    assert taken < 0.4 * weights


TEXT = ("--tokens", 96, "--window", 16, "--dtype", "float32", "--device", "cpu")


def test_search_score_and_prune_stream_on_the_command_line(run, checkpoint, prose):
    text, stream = ("--calibration", prose, *TEXT, "--json"), ("--stream", "--memory", "10KiB")
    searched, scored = [], []
    for number, way in enumerate(((), stream)):
        search = ("search", checkpoint, "--target", "blocks=2", "--search", "exhaustive", "--run", f"run{number}")
        searched.append(run(*search, *text, *way))
        score = ("score", checkpoint, "--criterion", "cosine", "--run", f"scores{number}")
        scored.append(run(*score, *text, *way))
    for code, out, err in (*searched, *scored):
        assert (code, json.loads(out)) == (0, json.loads((searched if "steps" in out else scored)[0][1])), err
    code, out, err = run(
        "prune", checkpoint, "--plan", "run1/plan.json", "--out", "out", "--form", "stand-ins", *stream[:1], "--json"
    )
    assert code == 0, err
    assert json.loads(out)["difference"] < 1e-5  # products of one token round otherwise with weights as files have them
    kept, whole = load_file("out/model.safetensors"), load_file(Path(checkpoint, "model.safetensors"))
    assert 0 < len(kept) < len(whole)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in kept.items())


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--memory", "1GiB"), "--memory is for runs with --stream"),
        (("--stream", "--memory", "much"), "'much' is no size"),
        (("--stream", "--criterion", "taylor"), "needs backward passes"),
        (("--stream", "--allow-pickle"), "no pickles"),
    ],
)
def test_what_does_not_stream_is_refused_with_the_reason(words, reason, run, checkpoint, prose):
    given = words if "--criterion" in words else ("--criterion", "cosine", *words)
    code, _, err = run("score", checkpoint, "--calibration", prose, *TEXT, *given)
    assert code == 2
    assert re.search(reason, err)


def test_pruning_a_streamed_model_converts_nothing(run, checkpoint, tmp_path):
    Path("plan.json").write_text("{}")
    code, _, err = run("prune", checkpoint, "--plan", "plan.json", "--out", "out", "--stream", "--dtype", "bfloat16")
    assert code == 2
    assert "as they are in the files" in err
    assert not Path("out").exists()
