"""Tiny random models of four families, saved, damaged, read again: what fits is read exactly, the rest is refused."""

import json
import logging
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.utils import are_progress_bars_disabled
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.utils import logging as transformers_logging

from blockpruner.errors import InputError, MachineError, UnsupportedModelError
from blockpruner.loading.gate import check_checkpoint
from blockpruner.loading.strict import auto_class, quietly, read_weights

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
}
FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=1)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=16, n_layer=3, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0)
    ),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=64, d_model=16, d_ff=32, d_kv=8, num_layers=3, num_heads=2)
    ),
    "bert": lambda: BertForMaskedLM(BertConfig(**SMALL)),
}
LAYERS = {"llama": "num_hidden_layers", "gpt2": "n_layer", "t5": "num_layers", "bert": "num_hidden_layers"}
VICTIM = {
    "llama": "model.layers.1.mlp.up_proj.weight",
    "gpt2": "transformer.h.1.mlp.c_fc.weight",
    "t5": "decoder.block.1.layer.1.EncDecAttention.q.weight",
    "bert": "bert.encoder.layer.1.intermediate.dense.weight",
}
on_each_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Family -> (folder, the model saved there)."""
    torch.manual_seed(0)
    models = {}
    for family, make in FAMILIES.items():
        folder, model = tmp_path_factory.mktemp(family), make()
        with quietly(folder):
            model.save_pretrained(folder)
        models[family] = folder, model
    return models


@pytest.fixture
def copy(saved, tmp_path):
    """Copies the folder of a family, to be damaged, and gives the tensors in it."""

    def make(family: str) -> tuple[Path, dict[str, torch.Tensor]]:
        folder = tmp_path / family
        shutil.copytree(saved[family][0], folder)
        return folder, load_file(folder / "model.safetensors")

    return make


def rewrite(folder: Path, tensors: dict[str, torch.Tensor] | None = None, **config: Any) -> None:
    if tensors is not None:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if config:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **config}))


def read(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(folder)
    return read_weights(folder, config, check_checkpoint(folder).values, source=folder, dtype=dtype)


@on_each_family
def test_a_complete_checkpoint_is_read_bit_for_bit_ready_for_inference(saved, family):
    folder, original = saved[family]
    model = read(folder)
    assert type(model) is type(original)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    expected = dict(original.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected.pop(name)), name
    assert not expected


@on_each_family
def test_a_missing_tensor_is_refused_by_name(copy, family):
    folder, tensors = copy(family)
    del tensors[VICTIM[family]]
    rewrite(folder, tensors)
    with pytest.raises(InputError, match=f"{VICTIM[family]}: not in the weights"):
        read(folder)


@on_each_family
@pytest.mark.parametrize("extra", ["surplus.weight", "model.layers.1.surplus", "encoder.block.0.surplus"])
def test_a_surplus_tensor_is_refused_by_name(copy, family, extra):
    folder, tensors = copy(family)
    rewrite(folder, {**tensors, extra: torch.zeros(2)})
    with pytest.raises(InputError, match=r"surplus.*: in the weights, but not in the model"):
        read(folder)


@on_each_family
def test_a_tensor_of_another_shape_is_refused_by_name(copy, family):
    folder, tensors = copy(family)
    rewrite(folder, {**tensors, VICTIM[family]: torch.zeros(3, 5)})
    with pytest.raises(InputError, match=f"{VICTIM[family]}: of another shape"):
        read(folder)


@on_each_family
@pytest.mark.parametrize(("layers", "trouble"), [(1, "but not in the model"), (2, "but not in the model")])
def test_fewer_layers_in_the_config_than_in_the_weights_are_refused(copy, family, layers, trouble):
    folder, _ = copy(family)
    rewrite(folder, None, **{LAYERS[family]: layers})
    with pytest.raises(InputError, match=trouble):
        read(folder)


@on_each_family
def test_more_layers_in_the_config_than_in_the_weights_are_refused(copy, family):
    folder, _ = copy(family)
    rewrite(folder, None, **{LAYERS[family]: 4})
    with pytest.raises(InputError, match="not in the weights, and nothing is filled with random"):
        read(folder)


@on_each_family
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_number_that_is_not_finite_is_refused_by_the_name_of_its_tensor(copy, family, value):
    folder, tensors = copy(family)
    tensors[VICTIM[family]].view(-1)[7] = value
    rewrite(folder, tensors)
    with pytest.raises(InputError, match=f"{VICTIM[family]} holds NaN or infinite"):
        read(folder)


def test_numbers_too_large_for_the_dtype_are_refused(copy):
    folder, tensors = copy("llama")
    rewrite(folder, {**tensors, VICTIM["llama"]: tensors[VICTIM["llama"]] * 1e9})
    assert read(folder, torch.bfloat16)
    with pytest.raises(InputError, match="read as float16"):
        read(folder, torch.float16)


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_of_any_float_type_is_read_in_the_type_asked_for(copy, stored, dtype):
    folder, tensors = copy("llama")
    tensors = {name: tensor.to(stored) for name, tensor in tensors.items()}
    rewrite(folder, tensors)
    parameters = dict(read(folder, dtype).named_parameters())
    assert {parameter.dtype for parameter in parameters.values()} == {dtype}
    assert torch.equal(parameters[VICTIM["llama"]], tensors[VICTIM["llama"]].to(dtype))


def test_tied_weights_are_read_as_one(saved):
    model = read(saved["gpt2"][0])
    assert model.get_parameter("lm_head.weight") is model.get_parameter("transformer.wte.weight")


def test_an_untied_head_that_is_missing_is_not_made_up(copy):
    folder, tensors = copy("llama")
    del tensors["lm_head.weight"]
    rewrite(folder, tensors)
    with pytest.raises(InputError, match=r"lm_head\.weight: not in the weights"):
        read(folder)


def test_an_encoder_without_a_head_is_read_as_the_base_model_it_is(tmp_path):
    BertModel(BertConfig(**SMALL)).save_pretrained(tmp_path)
    assert type(read(tmp_path)) is BertModel


def test_the_second_head_of_an_old_encoder_checkpoint_may_stay_behind(tmp_path):
    BertForPreTraining(BertConfig(**SMALL)).save_pretrained(tmp_path)
    rewrite(tmp_path, architectures=["BertForMaskedLM"])
    assert type(read(tmp_path)) is BertForMaskedLM


@on_each_family
def test_without_a_named_architecture_the_model_type_decides(copy, saved, family):
    folder, _ = copy(family)
    rewrite(folder, architectures=None)
    assert type(read(folder)) is type(saved[family][1])


def test_what_is_no_language_model_is_refused_by_name():
    class Alien(PreTrainedConfig):
        model_type = "alien"

    with pytest.raises(UnsupportedModelError, match="'alien' is not a language model"):
        auto_class(Alien())


def test_a_config_that_asks_for_far_more_than_the_weights_hold_is_refused_before_memory_is_taken(copy, monkeypatch):
    folder, _ = copy("llama")
    rewrite(folder, vocab_size=2**24, hidden_size=2**16)
    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", pytest.fail)
    with pytest.raises(InputError, match=r"describes a model of \d{13} numbers, its weights hold"):
        read(folder)


def test_a_missing_expert_is_refused_by_the_name_of_what_it_belongs_to(tmp_path):
    MixtralForCausalLM(MixtralConfig(**SMALL, num_key_value_heads=1, num_local_experts=4)).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.block_sparse_moe.experts.3.w1.weight"]
    rewrite(tmp_path, tensors)
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.experts\.gate_up_proj cannot be made"):
        read(tmp_path)


def test_what_transformers_raises_becomes_an_error_with_a_next_step():
    source = Path("model")
    for raised, expected in (
        (KeyError("x"), InputError),
        (ImportError("x"), MachineError),
        (MemoryError(), MachineError),
    ):
        with pytest.raises(expected, match="model") as caught, quietly(source):
            raise raised
        assert caught.value.__cause__ is raised
        assert caught.value.fix
    own = InputError("ours", fix="this")
    with pytest.raises(InputError) as caught, quietly(source):
        raise own
    assert caught.value is own


def test_an_interrupt_is_not_swallowed():
    with pytest.raises(KeyboardInterrupt), quietly(Path("model")):
        raise KeyboardInterrupt


def test_reading_prints_nothing(saved, capfd):
    for folder, _ in saved.values():
        read(folder)
    assert capfd.readouterr() == ("", "")


def test_while_quiet_nothing_is_printed(capsys):
    with quietly(Path("model")):
        sys.stdout.write("chatter")
        sys.stderr.write("chatter")
        warnings.warn("chatter", stacklevel=1)
        transformers_logging.get_logger("transformers.chatter").warning("chatter")
        assert not transformers_logging.is_progress_bar_enabled()
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("bars", [True, False])
@pytest.mark.parametrize("level", [logging.INFO, logging.ERROR])
def test_settings_are_put_back_also_after_an_error(bars, level):
    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    try:
        transformers_logging.set_verbosity(level)
        (transformers_logging.enable_progress_bar if bars else transformers_logging.disable_progress_bar)()
        streams, filters = (sys.stdout, sys.stderr), list(warnings.filters)
        with pytest.raises(InputError), quietly(Path("model")):
            raise ValueError
        assert transformers_logging.get_verbosity() == level
        assert transformers_logging.is_progress_bar_enabled() is bars
        assert are_progress_bars_disabled() is not bars
        assert (sys.stdout, sys.stderr) == streams
        assert list(warnings.filters) == filters
    finally:
        transformers_logging.set_verbosity(before[0])
        (transformers_logging.enable_progress_bar if before[1] else transformers_logging.disable_progress_bar)()
