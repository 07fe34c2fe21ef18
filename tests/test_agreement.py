"""Rounding in 16 bits is told from a checkpoint that computes something else."""

import pytest
import torch
from tiny import tiny

from blockpruner.anatomy.probing import example_inputs
from blockpruner.errors import CheckFailedError
from blockpruner.surgery.agreement import reload_difference


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A bfloat16 model of large weights, in a folder, with its logits there and in float32."""
    model = tiny("llama", hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    model = model.to(torch.bfloat16)
    folder = tmp_path_factory.mktemp("saved") / "model"
    model.save_pretrained(folder)
    inputs = example_inputs(model, seed=1)
    with torch.no_grad():
        narrow = model(**inputs).logits.float()
        exact = model.float()(**inputs).logits
    model.to(torch.bfloat16)
    return folder, model, inputs, narrow, exact


def difference(saved, truth):
    folder, model, inputs, *_ = saved
    return reload_difference(folder, "AutoModelForCausalLM", inputs, truth, model, remote=False)


def test_logits_as_far_from_float32_as_the_checkpoints_own_are_the_same_numbers_rounded_otherwise(saved, caplog):
    narrow, exact = saved[3:]
    truth = 2 * exact - narrow  # as far on the other side
    assert difference(saved, truth) > 2e-3 * float(truth.abs().max())
    assert "rounds otherwise" in caplog.text


def test_logits_further_from_float32_than_rounding_brings_them_are_of_another_model(saved):
    narrow, exact = saved[3:]
    with pytest.raises(CheckFailedError, match="computes something else: logits differ by up to"):
        difference(saved, exact + 2 * (exact - narrow))
