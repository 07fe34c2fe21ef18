"""Folders and headers that must be refused before a weight is read, and the honest ones that must pass."""

import contextlib
import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from transformers import CONFIG_MAPPING, PreTrainedConfig

from blockpruner.errors import BlockprunerError, InputError, UnsupportedModelError
from blockpruner.loading.gate import check_checkpoint, check_config, check_gguf

LLAMA = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 16, "vocab_size": 64, "num_attention_heads": 2}
SOURCE = Path("source")


def write_config(folder: Path, **changes: object) -> None:
    (folder / "config.json").write_text(json.dumps({**LLAMA, **changes}))


def write_index(folder: Path, table: object) -> None:
    (folder / "model.safetensors").unlink(missing_ok=True)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))


@pytest.fixture
def folder(tmp_path):
    """A small checkpoint of 20 numbers that passes."""
    path = tmp_path / "model"
    path.mkdir()
    write_config(path)
    save_file({"a": np.zeros((2, 8), np.float32), "b": np.zeros(4, np.float16)}, path / "model.safetensors")
    return path


def test_a_sound_checkpoint_passes_with_its_config_and_count_of_numbers(folder):
    checkpoint = check_checkpoint(folder)
    assert (checkpoint.folder, checkpoint.config, checkpoint.values) == (folder, LLAMA, 20)


def test_a_folder_may_be_named_through_a_link(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    assert check_checkpoint(tmp_path / "link").values == 20


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 1_000_000),
        ("num_hidden_layers", 0),
        ("num_hidden_layers", -1),
        ("num_hidden_layers", "2"),
        ("num_hidden_layers", 2.0),
        ("num_hidden_layers", True),
        ("num_hidden_layers", float("nan")),
        ("n_layer", 5000),
        ("decoder_layers", 10**9),
        ("hidden_size", 2**17 + 1),
        ("d_model", 0),
        ("vocab_size", 2**24 + 1),
        ("num_key_value_heads", -4),
        ("num_attention_heads", [2, 10**6]),
        ("num_local_experts", 10**6),
        ("intermediate_size", 2**40),
        ("max_position_embeddings", 2**60),
    ],
)
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_numbers_out_of_bounds_are_refused_by_name_at_any_depth(key, value, depth):
    config: dict = {key: value}
    for _ in range(depth):
        config = {"text_config": [config]} if depth == 2 else {"text_config": config}
    with pytest.raises(InputError, match=key):
        check_config({"model_type": "llama", **config}, SOURCE)


@pytest.mark.parametrize(
    "entry",
    [
        {"num_key_value_heads": None},
        {"num_attention_heads": [2, 4]},
        {"num_kv_shared_layers": 0},
        {"time_step_limit": [0.0, float("inf")]},
        {"attn_implementation": "sdpa"},
        {"text_config": {"_attn_implementation": None}},
        {"auto_map": {"AutoModel": "evil.Model"}},
    ],
)
def test_entries_of_honest_configs_pass(entry):
    config = {**LLAMA, **entry}
    assert check_config(config, SOURCE) is config


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("_attn_implementation_internal", "somebody/kernel"),
        ("_experts_implementation_internal", "eager"),
        ("trust_remote_code", True),
        ("configuration_files", ["config.99.0.0.json"]),
        ("transformers_weights", "other.safetensors"),
        ("fusion_config", {"patch_embeddings": True}),
        ("attn_implementation", "somebody/kernel"),
        ("_attn_implementation", {"": "somebody/kernel"}),
        ("experts_implementation", "somebody/kernel"),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_keys_that_steer_the_loading_are_refused_by_name(key, value, nested):
    entry = {"vision_config": {key: value}} if nested else {key: value}
    with pytest.raises(InputError, match=key):
        check_config({**LLAMA, **entry}, SOURCE)


@pytest.mark.parametrize("config", [None, [], "llama", 3])
def test_a_config_that_is_no_object_is_refused(config):
    with pytest.raises(InputError, match="no JSON object"):
        check_config(config, SOURCE)


@pytest.mark.parametrize("kind", [None, 3, ["llama"]])
def test_a_config_without_a_model_type_is_refused(kind):
    with pytest.raises(InputError, match="has no model_type"):
        check_config({"model_type": kind}, SOURCE)


def test_a_quantized_checkpoint_is_refused():
    with pytest.raises(InputError, match="quantized"):
        check_config({**LLAMA, "quantization_config": {"quant_method": "gptq"}}, SOURCE)


def test_a_model_type_nobody_knows_is_refused_by_name():
    with pytest.raises(UnsupportedModelError, match="'unheard-of'") as caught:
        check_config({"model_type": "unheard-of"}, SOURCE, allow_remote_code=True)
    assert "upgrade transformers" in caught.value.fix


def test_code_that_comes_with_a_checkpoint_needs_the_flag():
    config = {"model_type": "unheard-of", "auto_map": {"AutoModel": "code.Model"}}
    with pytest.raises(UnsupportedModelError) as caught:
        check_config(config, SOURCE)
    assert "--allow-remote-code" in caught.value.fix
    assert check_config(config, SOURCE, allow_remote_code=True) is config


def test_a_model_type_that_a_package_registered_is_known(monkeypatch):
    class Registered(PreTrainedConfig):
        model_type = "registered-by-a-test"

    monkeypatch.setitem(CONFIG_MAPPING._extra_content, Registered.model_type, Registered)
    assert check_config({"model_type": Registered.model_type}, SOURCE)


KEYS = ["model_type", "num_hidden_layers", "text_config", "auto_map", "_x_internal", "layers", "quantization_config"]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["llama", "gpt2", ""]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)


@given(VALUES)
def test_any_json_value_is_either_a_config_or_refused(value):
    with contextlib.suppress(BlockprunerError):
        assert check_config(value, SOURCE) is value


def test_a_folder_without_config_is_refused_and_a_gguf_file_in_it_pointed_out(tmp_path):
    (tmp_path / "weights.gguf").touch()
    with pytest.raises(InputError, match=r"no config\.json") as caught:
        check_checkpoint(tmp_path)
    assert str(tmp_path / "weights.gguf") in caught.value.fix


def test_an_adapter_is_refused_because_transformers_would_follow_it_elsewhere(folder):
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "somebody/model"}')
    with pytest.raises(InputError, match="adapter"):
        check_checkpoint(folder)


@pytest.mark.parametrize("text", ["{", "\xff", "[" * 100_000, ""])
def test_a_config_that_is_not_json_is_refused(folder, text):
    (folder / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match=r"config\.json"):
        check_checkpoint(folder)


def test_shards_named_by_an_index_pass(folder):
    save_file({"a": np.zeros(3)}, folder / "model-00001-of-00002.safetensors")
    save_file({"b": np.zeros(4)}, folder / "model-00002-of-00002.safetensors")
    write_index(folder, {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"})
    assert check_checkpoint(folder).values == 7


@pytest.mark.parametrize(
    "name",
    [
        "../secret.safetensors",
        "sub/x.safetensors",
        "..",
        "",
        ".x.safetensors",
        "x.bin",
        "config.json",
        "a\0.safetensors",
    ],
)
def test_an_index_that_names_anything_but_a_plain_file_is_refused(folder, name):
    save_file({"a": np.zeros(3)}, folder.parent / "secret.safetensors")
    write_index(folder, {"a": name})
    with pytest.raises(InputError, match="plain"):
        check_checkpoint(folder)


def test_an_index_that_names_an_absolute_path_is_refused(folder):
    save_file({"a": np.zeros(3)}, folder.parent / "secret.safetensors")
    write_index(folder, {"a": str(folder.parent / "secret.safetensors")})
    with pytest.raises(InputError, match="plain"):
        check_checkpoint(folder)


@pytest.mark.parametrize("table", [None, {}, [], {"a": 3}, {"a": None}])
def test_an_index_without_a_usable_table_is_refused(folder, table):
    write_index(folder, table)
    with pytest.raises(InputError, match="weight_map"):
        check_checkpoint(folder)


def test_a_missing_shard_is_named(folder):
    write_index(folder, {"a": "model-00001-of-00002.safetensors"})
    with pytest.raises(InputError, match=r"model-00001-of-00002\.safetensors, which is missing"):
        check_checkpoint(folder)


def test_a_tensor_that_is_in_the_index_only_is_named(folder):
    save_file({"a": np.zeros(3)}, folder / "shard.safetensors")
    write_index(folder, {"a": "shard.safetensors", "lost": "shard.safetensors"})
    with pytest.raises(InputError, match="lost is in the index"):
        check_checkpoint(folder)


def test_a_tensor_in_two_shards_is_named(folder):
    for name in ("one.safetensors", "two.safetensors"):
        save_file({"twice": np.zeros(3)}, folder / name)
    write_index(folder, {"twice": "one.safetensors", "other": "two.safetensors"})
    with pytest.raises(InputError, match="twice a second time"):
        check_checkpoint(folder)


HEADER = b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x01",
        struct.pack("<Q", 2**62) + HEADER,
        struct.pack("<Q", 10**9) + HEADER + bytes(16),
        struct.pack("<Q", len(HEADER)) + HEADER + bytes(15),
        struct.pack("<Q", len(HEADER)) + HEADER + bytes(17),
        struct.pack("<Q", len(HEADER)) + HEADER.replace(b"[0,16]", b"[0,99]") + bytes(16),
        struct.pack("<Q", len(HEADER)) + HEADER.replace(b"[4]", b"[5]") + bytes(16),
        struct.pack("<Q", len(HEADER)) + HEADER.replace(b"F32", b"F99") + bytes(16),
        struct.pack("<Q", 2) + b"[]",
    ],
)
def test_a_safetensors_file_with_a_false_header_is_refused_by_name(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=r"model\.safetensors is not a sound"):
        check_checkpoint(folder)


def test_a_link_that_leads_out_of_the_folder_is_refused(folder):
    save_file({"a": np.zeros(3)}, folder.parent / "secret.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("../secret.safetensors")
    with pytest.raises(InputError, match="leads out of the model folder"):
        check_checkpoint(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "anything"])
def test_a_pipe_is_refused_without_being_opened(folder, name):
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(InputError, match="not a regular file"):
        check_checkpoint(folder)


@pytest.mark.parametrize("target", ["nowhere", "loop.json"])
def test_a_link_to_nothing_or_to_itself_is_refused(folder, target):
    (folder / "loop.json").symlink_to(target)
    with pytest.raises(InputError, match=r"loop\.json|look through"):
        check_checkpoint(folder)


def hub_snapshot(folder: Path, blobs: Path) -> Path:
    """The files of `folder` as the hub's cache keeps them: a snapshot of links to `blobs`."""
    snapshot = folder.parent / "models--org--name" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    blobs.mkdir(parents=True, exist_ok=True)
    for number, file in enumerate(folder.iterdir()):
        (blobs / str(number)).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(os.path.relpath(blobs / str(number), snapshot))
    return snapshot


@pytest.mark.parametrize("blobs", ["models--org--name/blobs", "blobs/ab"])
def test_links_of_the_hub_cache_into_its_blobs_pass(folder, blobs):
    assert check_checkpoint(hub_snapshot(folder, folder.parent / blobs)).values == 20


def test_links_of_the_hub_cache_to_elsewhere_are_refused(folder):
    with pytest.raises(InputError, match="leads out"):
        check_checkpoint(hub_snapshot(folder, folder.parent / "models--org--other" / "blobs"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pkl"])
def test_pickles_are_refused_without_the_flag(folder, name):
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(InputError, match="pickles only") as caught:
        check_checkpoint(folder)
    assert "--allow-pickle" in caught.value.fix


def test_with_the_flag_pickles_pass_only_where_there_is_no_safetensors_file(folder):
    (folder / "pytorch_model.bin").write_bytes(b"never opened here")
    assert check_checkpoint(folder, allow_pickle=True).values == 20
    (folder / "model.safetensors").unlink()
    assert check_checkpoint(folder, allow_pickle=True).values is None


def test_the_index_of_pickles_is_held_to_the_same_rules(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "../x.bin"}}')
    with pytest.raises(InputError, match="plain"):
        check_checkpoint(folder, allow_pickle=True)


def test_a_folder_without_weights_is_refused(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"neither model\.safetensors nor"):
        check_checkpoint(folder, allow_pickle=True)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def gguf_bytes(tensors: int = 1, kind: int = 0, offset: int = 0) -> bytes:
    """A GGUF file of tensors of 8 float32 numbers."""
    metadata = [
        text("general.architecture") + struct.pack("<I", 8) + text("toy"),
        text("toy.count") + struct.pack("<II", 4, 7),
        text("toy.names") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("bc"),
        text("toy.sizes") + struct.pack("<IIQ3f", 9, 6, 3, 1, 2, 3),
    ]
    table = [text(f"tensor.{i}") + struct.pack("<IQQIQ", 2, 4, 2, kind, offset + 32 * i) for i in range(tensors)]
    header = b"GGUF" + struct.pack("<IQQ", 3, tensors, len(metadata)) + b"".join(metadata + table)
    return header + bytes(-len(header) % 32) + bytes(32 * tensors)


GGUF = gguf_bytes()
HANG = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("k") + struct.pack("<IIQ", 9, 0, 2**63)


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    pytest.importorskip("gguf", reason="the extra gguf is not installed")
    return tmp_path_factory.mktemp("gguf") / "model.gguf"


@pytest.mark.parametrize("tensors", [0, 1, 3])
def test_a_sound_gguf_file_passes_with_its_count_of_numbers(gguf_file, tensors):
    gguf_file.write_bytes(gguf_bytes(tensors))
    assert check_gguf(gguf_file) == 8 * tensors


def test_a_gguf_file_cut_anywhere_is_refused(gguf_file):
    for length in range(len(GGUF)):
        gguf_file.write_bytes(GGUF[:length])
        with pytest.raises(InputError):
            check_gguf(gguf_file)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (HANG, "array of 9223372036854775808 items"),
        (GGUF.replace(b"GGUF", b"GGML"), "mark of GGUF"),
        (GGUF.replace(b"GGUF\x03", b"GGUF\x01"), "mark of GGUF"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), "announces 1152921504606846976 tensors"),
        (gguf_bytes(kind=77), "type 77"),
        (gguf_bytes(kind=2), "type 2"),
        (gguf_bytes(offset=2**40), "past the end"),
        (GGUF.replace(text("toy.sizes"), text("toy.names")), "twice"),
        (GGUF.replace(struct.pack("<IIQ", 9, 6, 3), struct.pack("<IIQ", 9, 9, 3)), "type 9"),
    ],
)
def test_a_gguf_file_with_a_false_header_is_refused_with_the_reason(gguf_file, content, reason):
    gguf_file.write_bytes(content)
    with pytest.raises(InputError, match=reason):
        check_gguf(gguf_file)


@settings(deadline=2000)
@given(st.lists(st.tuples(st.integers(0, len(GGUF) - 33), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_gguf_header_with_any_bytes_changed_passes_or_is_refused(gguf_file, changes):
    content = bytearray(GGUF)
    for place, byte in changes:
        content[place] = byte
    gguf_file.write_bytes(content)
    with contextlib.suppress(InputError):
        assert check_gguf(gguf_file) <= 8 * len(content)
