"""What reading an anatomy does with models made to deceive it, and that it leaves no trace in any model."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import zoo
from tiny import FAMILIES, anatomy_of, shared
from torch import nn
from transformers.cache_utils import Cache

from blockpruner.anatomy import reading as anatomy
from blockpruner.anatomy.probing import nulled
from blockpruner.anatomy.reading import read_anatomy
from blockpruner.blocks import Block
from blockpruner.errors import UnsupportedModelError
from blockpruner.surgery.removal import skipped


def planted(layer_class: type[nn.Module], path: str = "model.layers.2"):
    """A llama with one module turned into a subclass of its class."""
    model = FAMILIES["llama"]()
    model.get_submodule(path).__class__ = layer_class
    return model


def of(path: str) -> Any:
    """The class of this module of a llama."""
    return type(shared("llama").get_submodule(path))


class Scaling(of("model.layers.0")):
    def forward(self, hidden_states, **kwargs):
        return 1.5 * super().forward(hidden_states, **kwargs)


class Shifting(of("model.layers.0")):
    shift = 0.25

    def forward(self, hidden_states, **kwargs):
        return super().forward(hidden_states, **kwargs) + self.shift


class Mixing(of("model.layers.0")):
    by = 1

    def forward(self, hidden_states, **kwargs):
        return super().forward(hidden_states, **kwargs).roll(self.by, dims=1)


class Stopping(of("model.layers.0")):
    """Lets its stream through one of its projections."""

    def forward(self, hidden_states, **kwargs):
        return super().forward(self.self_attn.o_proj(hidden_states), **kwargs)


class Nameless(of("model.layers.0")):
    """Half of its mlp is done by hand."""

    def forward(self, hidden_states, **kwargs):
        mixed = hidden_states + self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)[0]
        return mixed + self.mlp(mixed) + mixed @ self.mlp.down_proj.weight @ self.mlp.gate_proj.weight


class HiddenBias(of("model.layers.0.mlp")):
    bias = 0.25

    def forward(self, x):
        return super().forward(x) + self.bias


class Pinned(of("model.layers.0.input_layernorm")):
    pin = 0.25

    def forward(self, hidden_states):
        return super().forward(hidden_states) + self.pin


class Telling(of("model.layers.0.self_attn")):
    """Leaves a note that the attention of the next layer reads."""

    notes: tuple[torch.Tensor, ...] = ()

    def forward(self, *args, **kwargs):
        output, weights = super().forward(*args, **kwargs)
        Telling.notes = (kwargs["hidden_states"].mean(),)
        return output, weights


class Listening(of("model.layers.0.self_attn")):
    def forward(self, *args, **kwargs):
        output, weights = super().forward(*args, **kwargs)
        note = Telling.notes[0] if Telling.notes else 0.0
        Telling.notes = ()
        return output * (1 + note), weights


@pytest.mark.parametrize(
    ("plant", "path", "reason"),
    [
        (Mixing, "model.layers.2", "with all its projections at zero it still mixes tokens"),
        (Stopping, "model.layers.2", "no stand-ins leave what it does with its projections at zero"),
        (Nameless, "model.layers.2", "no stand-ins leave what it does with its projections at zero"),
    ],
)
def test_a_layer_that_is_more_than_its_blocks_is_refused_by_name_and_reason(plant, path, reason):
    model = planted(plant, path)
    with pytest.raises(UnsupportedModelError) as refused:
        read_anatomy(model)
    layer = type(model.get_submodule("model.layers.2")).__name__
    assert refused.value.what.startswith(f"model.layers.2 ({layer}): {reason}")


@pytest.mark.parametrize("plant", [Scaling, Shifting])
def test_what_a_layer_does_to_its_stream_stays_while_it_has_a_block(plant):
    model = planted(plant)
    anatomy, ids, zeroed = read_anatomy(model), torch.arange(3, 19).view(2, 8), copy.deepcopy(model)
    assert [layer.identity for layer in anatomy.stacks[0].layers] == [True, True, False, True]
    zeroed.model.layers[2].mlp.down_proj.weight.data.zero_()
    with torch.no_grad(), skipped(model, ["mlp.2"], anatomy=anatomy):
        assert torch.equal(model(ids).logits, zeroed(ids).logits)
    with torch.no_grad(), skipped(model, ["attention.2", "mlp.2"], anatomy=anatomy):
        del zeroed.model.layers[2]
        assert torch.equal(model(ids).logits, zeroed(ids).logits)


def test_of_a_module_that_adds_more_than_its_weights_give_the_rest_stays():
    assert read_anatomy(planted(HiddenBias, "model.layers.2.mlp")).parts[Block("mlp", 2)].path.endswith("mlp.down_proj")


class Sandwich(of("model.layers.0")):
    """Its first norm stands behind the attention, so that what the norm adds reaches the stream."""

    def forward(self, hidden_states, **kwargs):
        branch = self.input_layernorm(self.self_attn(hidden_states=hidden_states, **kwargs)[0])
        hidden_states = hidden_states + branch
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


def test_a_norm_is_idle_only_where_what_it_adds_does_not_reach_the_stream():
    model = planted(Pinned, "model.layers.2.input_layernorm")
    assert read_anatomy(model).parts[Block("attention", 2)].idle.keys() == {"model.layers.2.input_layernorm"}
    model.model.layers[2].__class__ = Sandwich
    assert read_anatomy(model).parts[Block("attention", 2)].idle == {}


def test_layers_that_look_alike_are_proved_each_by_itself():
    model = FAMILIES["llama"]()
    for layer in model.model.layers:
        layer.__class__ = Mixing
        layer.by = 0
    assert read_anatomy(model) == anatomy_of("llama")
    model.model.layers[2].by = 1
    with pytest.raises(UnsupportedModelError, match=r"layers\.2 \(Mixing\): .* it still mixes tokens"):
        read_anatomy(model)


def test_what_idles_is_proved_for_each_layer_by_itself():
    model = FAMILIES["llama"]()
    for layer in model.model.layers:
        layer.__class__, layer.input_layernorm.__class__ = Sandwich, Pinned
        layer.input_layernorm.pin = 0.0
    assert read_anatomy(model).parts[Block("attention", 2)].idle.keys() == {"model.layers.2.input_layernorm"}
    model.model.layers[2].input_layernorm.pin = 0.25
    with pytest.raises(UnsupportedModelError, match=r"layers\.2 \(Sandwich\): leaving out input_layernorm changes"):
        read_anatomy(model)


def test_blocks_that_talk_past_the_stream_go_on_talking_when_they_are_removed():
    model = planted(Telling, "model.layers.1.self_attn")
    assert not read_anatomy(model).outline.kept, "nobody listens"
    model.model.layers[2].self_attn.__class__ = Listening
    anatomy = read_anatomy(model)
    assert {str(block) for block in anatomy.outline.kept} == {"attention.1"}
    zeroed, ids = copy.deepcopy(model), torch.arange(3, 19).view(2, 8)
    for removed in (["attention.1"], ["attention.1", "mlp.1"], ["attention.0", "attention.1", "attention.3"]):
        for index in (int(block[-1]) for block in removed if block.startswith("attention")):
            zeroed.model.layers[index].self_attn.o_proj.weight.data.zero_()
        if "mlp.1" in removed:
            zeroed.model.layers[1].mlp.down_proj.weight.data.zero_()
        with torch.no_grad(), skipped(model, removed, anatomy=anatomy):
            found = model(ids).logits
        with torch.no_grad():
            assert torch.equal(found, zeroed(ids).logits)
        zeroed = copy.deepcopy(model)


def test_a_block_that_does_nothing_is_still_found():
    model = FAMILIES["llama"]()
    with torch.no_grad():
        model.get_submodule("model.layers.1.self_attn.o_proj").weight.zero_()
        model.get_submodule("model.layers.3.mlp.down_proj").weight.zero_()
        model.get_submodule("model.layers.2.input_layernorm").weight.fill_(1)
    assert read_anatomy(model) == anatomy_of("llama")


class Gated(of("model.layers.0")):
    """Branches behind gates that training opens from zero; the gates belong to no branch."""

    def forward(self, hidden_states, **kwargs):
        branch, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + self.gates[0] * branch
        return hidden_states + self.gates[1] * self.mlp(self.post_attention_layernorm(hidden_states))


@pytest.mark.parametrize("opened", [0.0, 0.7])
def test_branches_behind_gates_that_start_at_zero_are_found(opened):
    model = FAMILIES["llama"]()
    for layer in model.model.layers:
        layer.__class__ = Gated
        layer.gates = nn.Parameter(torch.full((2,), opened))
    anatomy = read_anatomy(model)
    expected = anatomy_of("llama").outline
    assert anatomy.outline.parameters == expected.parameters
    assert anatomy.outline.total_parameters == expected.total_parameters + 4 * 2
    assert not anatomy.outline.serial, "two gates in one layer do not go apart into two layers"


# What reading leaves behind.


def footprint(model: nn.Module):
    """All that reading an anatomy could change, values and identities alike."""
    tensors = {n: (id(t), t.data_ptr(), t.clone()) for n, t in (*model.named_parameters(), *model.named_buffers())}
    hooks = [
        list(getattr(module, name))
        for module in model.modules()
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_with_kwargs")
    ]
    modules = [(name, id(module), type(module), module.training) for name, module in model.named_modules()]
    return tensors, hooks, modules, Cache.update


def assert_untouched(before, model: nn.Module) -> None:
    tensors, *rest = before
    tensors_now, *rest_now = footprint(model)
    assert rest_now == rest
    assert tensors_now.keys() == tensors.keys()
    for name, (identity, pointer, value) in tensors.items():
        assert tensors_now[name][:2] == (identity, pointer)
        assert torch.equal(tensors_now[name][2], value)


@pytest.mark.parametrize("family", ["llama", "phi", "opt", "bloom", "qwen2-moe"])
@pytest.mark.parametrize("training", [False, True])
def test_reading_leaves_the_model_as_it_was(family, training):
    model = FAMILIES[family]().train(training)
    model.get_submodule(f"{anatomy_of(family).stacks[0].path}.1").train(not training)
    before = footprint(model)
    assert read_anatomy(model) == anatomy_of(family)
    assert_untouched(before, model)


class CacheBreaker(of("model.layers.0.self_attn")):
    def forward(self, *args, past_key_values=None, **kwargs):
        if past_key_values is not None:
            raise LookupError("not with a cache")
        return super().forward(*args, **kwargs)


@pytest.mark.parametrize(
    ("plant", "path", "error"),
    [
        (Mixing, "model.layers.2", UnsupportedModelError),
        (Stopping, "model.layers.2", UnsupportedModelError),
        (CacheBreaker, "model.layers.2.self_attn", LookupError),
    ],
)
def test_a_reading_that_fails_leaves_the_model_as_it_was(plant, path, error):
    model = planted(plant, path).train()
    before = footprint(model)
    with pytest.raises(error):
        read_anatomy(model)
    assert_untouched(before, model)


# What is found wrongly is not believed: lies planted between finding and proving.


def lying(monkeypatch, change):
    """Have every layer's dissection changed before it is proved."""
    honest = anatomy.dissect

    def dissect(layer, use):
        found = honest(layer, use)
        return replace(found, branches=tuple(change(branch) for branch in found.branches))

    monkeypatch.setattr(anatomy, "dissect", dissect)


def handing_through(branch):
    """A stand-in that returns its input where it has to return zeros."""
    ((path, spec),) = branch.modules.items()
    output = spec["output"]
    turned = {"tuple": ["input", *output["tuple"][1:]]} if isinstance(output, dict) else "input"
    return replace(branch, modules={path: {**spec, "output": turned}})


def idle_too_soon(branch):
    """A norm that others read counts as idle."""
    spec = {"input": 0, "output": "input"}
    return replace(branch, idle={**branch.idle, "post_attention_layernorm": spec}) if branch.kind != "mlp" else branch


def for_another(branch):
    """The weights of one branch are taken for those of another."""
    return replace(branch, outlets=("mlp.down_proj.weight",))


@pytest.mark.parametrize(
    ("lie", "reason"),
    [
        (handing_through, "leaving out input_layernorm changes the layer without its attention"),
        (idle_too_soon, "leaving out .* changes the layer without its attention"),
        (for_another, r"without self_attn it differs by .* from the same with mlp\.down_proj\.weight at zero"),
    ],
)
def test_a_wrong_stand_in_is_refused(monkeypatch, lie, reason):
    lying(monkeypatch, lie)
    with pytest.raises(UnsupportedModelError, match=rf"^model\.layers\.0 \(LlamaDecoderLayer\): {reason}"):
        read_anatomy(FAMILIES["llama"]())


def test_a_branch_that_was_missed_is_refused(monkeypatch):
    honest = anatomy.dissect
    monkeypatch.setattr(
        anatomy, "dissect", lambda layer, use: replace(honest(layer, use), branches=honest(layer, use).branches[:1])
    )
    with pytest.raises(UnsupportedModelError, match="with all blocks silent it does more than with their projections"):
        read_anatomy(FAMILIES["llama"]())


# What random weights hide and trained ones have.


@pytest.mark.parametrize(("model_type", "name"), [("gemma4_text", "layer_scalar"), ("gpt_oss", "self_attn.sinks")])
def test_scales_of_layers_and_sinks_of_attention_are_no_part_of_the_rest(model_type, name):
    model = zoo.build(f"causal/{model_type}")
    with torch.no_grad():
        for layer in model.model.layers:
            owner, _, last = name.rpartition(".")
            getattr(layer.get_submodule(owner), last).fill_(0.7)
    found, zeroed, ids = read_anatomy(model), copy.deepcopy(model), torch.arange(20, 52).view(2, 16)
    assert {layer.identity for layer in found.stacks[0].layers} == {model_type != "gemma4_text"}
    (mlp,) = [part for part in found.parts.values() if str(part.block) == "mlp.1"]
    with torch.no_grad(), nulled(zeroed, mlp.outlets), skipped(model, ["mlp.1"], anatomy=found):
        assert torch.equal(model(ids).logits, zeroed(ids).logits)
    gone = [block for block in found.outline.blocks if block.layer == 1]
    before = {}
    zeroed.model.layers[1].register_forward_pre_hook(lambda _, args, kwargs: before.update(x=args[0]), with_kwargs=True)
    zeroed.model.layers[1].register_forward_hook(lambda *_: before["x"])
    with torch.no_grad(), skipped(model, gone, anatomy=found):
        assert torch.equal(model(ids).logits, zeroed(ids).logits)
