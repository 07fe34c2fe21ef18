"""Layers that scale what their blocks add: what is put in a gap has to be as much larger."""

import functools
from typing import Any

import pytest
import torch
from test_spans import examples, layers, states
from transformers import GraniteConfig, GraniteForCausalLM

from blockpruner.anatomy.reading import read_anatomy
from blockpruner.blocks import parse_mask
from blockpruner.recoveries import parse_recovery
from blockpruner.repairs.recovery import Bench
from blockpruner.surgery.gaps import repaired


@functools.cache
def scaled():
    """A model whose blocks add 0.22 of what their last projection gives, and much of it."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        config = GraniteConfig(
            vocab_size=128,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            residual_multiplier=0.22,
        )
        model = GraniteForCausalLM(config).eval()
        for parameter in model.parameters():
            parameter.mul_(3)
    return model, read_anatomy(model)


@pytest.mark.parametrize(
    ("method", "whole"),
    [
        ("linear:sinks=1", False),
        ("linear:target=dense,sinks=1", False),
        ("linear:target=dense,rank=4,sinks=1", False),
        ("bias:sinks=1", False),
        ("span:sinks=1", True),
    ],
)
def test_the_recorded_error_is_that_of_the_model_as_it_computes(method, whole):
    model, anatomy = scaled()
    mask = layers(anatomy, 1) if whole else parse_mask("mlp.1")
    text = examples(model)
    made: Any = parse_recovery(method).repair(Bench(model, anatomy, mask, text, text, force=True))
    repair, (record, *_) = made
    last = "model.layers.1"
    _, dense = states(model, text, last)
    with repaired(model, anatomy, mask):
        _, pruned = states(model, text, last)
    with repaired(model, anatomy, mask, repair):
        _, found = states(model, text, last)
    share = float((found - dense).square().sum() / (pruned - dense).square().sum())
    assert record.error == pytest.approx(share, rel=1e-3)
