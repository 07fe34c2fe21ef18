"""Checkpoints: the form that fits, what a process without this package makes of them, and that nothing half is kept."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import fresh
import pytest
import torch
import zoo
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, anatomy_of, shared, tiny
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from blockpruner.anatomy.reading import read_anatomy
from blockpruner.blocks import parse_mask
from blockpruner.errors import CheckFailedError, InputError
from blockpruner.surgery import checkpoint
from blockpruner.surgery.checkpoint import save_pruned
from blockpruner.surgery.removal import prune_, skipped

WHOLE_LAYER = "attention.1+mlp.1"
PAIRED = "mlp.1+attention.2"  # attention.1 and mlp.2 make one ordinary layer
SCATTERED = "attention.0+mlp.2"


@dataclass(frozen=True)
class Case:
    """One checkpoint of the matrix: the blocks that go, the form that is asked for, and the form that must come out."""

    family: str
    removed: str
    asked: str | None
    form: str

    @property
    def name(self):
        return f"{self.family} {self.removed} {self.asked}"


MATRIX = [
    *(Case(f, WHOLE_LAYER, None, "stock") for f in ("llama", "gemma3", "gpt2", "bloom", "opt", "phi")),
    Case("qwen2-moe", "attention.0+mlp.0+attention.1+mlp.1", None, "stock"),
    Case("gemma3", "attention.0+mlp.0+attention.2+mlp.2+attention.5+mlp.5", None, "stock"),
    *(Case(f, PAIRED, None, "stock") for f in ("llama", "gemma3", "gpt2", "bloom", "opt")),
    Case("gemma3", "mlp.2+attention.3", None, "stock"),
    Case("llama", "mlp.0+attention.2+attention.3+mlp.3", None, "stand-ins"),
    Case("llama", "mlp.0+attention.1+mlp.2+attention.3", "stock", "stock"),
    *(Case(f, PAIRED, None, "stand-ins") for f in ("phi", "qwen2-moe")),
    Case("llama", WHOLE_LAYER, "stand-ins", "stand-ins"),
    Case("llama", "dense", None, "stock"),
    *(Case(f, SCATTERED, "zeroed", "zeroed") for f in ("llama", "gemma3", "qwen2-moe", "gpt2", "bloom", "opt", "phi")),
]


@contextlib.contextmanager
def unchecked():
    """Leaves out the reload in a process for each checkpoint; the tests load many of them in one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "reload_difference", lambda *_args, **_options: 0.0)
        yield


def save(family, removed, out, **options):
    return save_pruned(FAMILIES[family](), None, anatomy_of(family), parse_mask(removed), out, **options)


@pytest.fixture(scope="module")
def matrix(tmp_path_factory):
    """name -> what was saved, for every case."""
    with unchecked():
        home = tmp_path_factory.mktemp("matrix")
        return {
            case.name: save(case.family, case.removed, home / str(i), form=case.asked) for i, case in enumerate(MATRIX)
        }


@pytest.fixture(scope="module")
def reloaded(matrix, tmp_path_factory):
    """name -> what a process with nothing but transformers computes with the checkpoint."""
    folders = {name: saved.folder for name, saved in matrix.items() if saved.form != "stand-ins"}
    return fresh.load_checkpoints("stock", folders, tmp_path_factory.mktemp("stock"))


@pytest.mark.parametrize("case", MATRIX, ids=lambda case: case.name)
def test_the_first_form_that_fits_is_taken_and_counted(matrix, case):
    saved = matrix[case.name]
    assert saved.form == case.form
    files = list(saved.folder.glob("*.safetensors"))
    assert saved.weight_bytes == sum(file.stat().st_size for file in files)
    model = FAMILIES[case.family]()
    if case.form != "zeroed":
        prune_(model, parse_mask(case.removed), anatomy=anatomy_of(case.family))
    assert saved.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert (saved.folder / "standin.py").exists() == (case.form == "stand-ins")


@pytest.mark.parametrize("case", [case for case in MATRIX if case.form != "stand-ins"], ids=lambda case: case.name)
def test_plain_transformers_computes_the_pruned_model(reloaded, case):
    found = reloaded[case.name]
    model = shared(case.family)
    with skipped(model, parse_mask(case.removed), anatomy=anatomy_of(case.family)):
        expected = fresh.computed(model)
    assert float((found["logits"] - expected["logits"]).abs().max()) < 1e-4
    assert float((found["plain"] - expected["plain"]).abs().max()) < 1e-4
    assert float((found["cached"] - found["plain"]).abs().max()) < 1e-4


@pytest.mark.parametrize(
    ("removed", "expected"),
    [
        (WHOLE_LAYER, "s f s s f"),
        (PAIRED, "s s s s f"),
        ("mlp.2+attention.3", "s s f s f"),
        ("attention.0+mlp.0+attention.2+mlp.2+attention.5+mlp.5", "s s s"),
    ],
)
def test_a_new_layer_has_the_type_of_its_attention(matrix, removed, expected):
    config = json.loads((matrix[f"gemma3 {removed} None"].folder / "config.json").read_text())
    assert [kind[0] for kind in config["layer_types"]] == expected.split()
    assert config["num_hidden_layers"] == len(expected.split())
    assert config["model_type"] == "gemma3_text"
    assert "auto_map" not in config


@pytest.mark.parametrize(
    ("family", "removed"), [("llama", SCATTERED), ("phi", PAIRED), ("llama", "mlp.1+attention.1+attention.2")]
)
def test_the_stock_form_is_refused_where_no_whole_layers_are_left(tmp_path, family, removed):
    with pytest.raises(
        InputError, match=r"what this plan leaves has no stock form: .*(is left without|alone is no layer)"
    ):
        save(family, removed, tmp_path / "out", form="stock")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("removed", [WHOLE_LAYER, PAIRED])
def test_the_model_is_only_borrowed_for_a_stock_or_zeroed_checkpoint(tmp_path, removed):
    model = FAMILIES["gemma3"]()
    model.save_pretrained(tmp_path / "dense")  # every save notes the class and the dtype in the configuration
    config, modules = model.config.to_dict(), list(model.named_modules())
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with unchecked():
        for form in ("stock", "zeroed"):
            save_pruned(model, None, anatomy_of("gemma3"), parse_mask(removed), tmp_path / form, form=form)
    assert model.config.to_dict() == config
    assert [(path, id(module)) for path, module in model.named_modules()] == [(p, id(m)) for p, m in modules]
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_tied_weights_are_saved_once(matrix):
    names = [name for file in matrix[f"gemma3 {PAIRED} None"].folder.glob("*.safetensors") for name in load_file(file)]
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names


@pytest.mark.parametrize(
    ("family", "removed", "form", "dtype"),
    [("gemma3", PAIRED, "stock", torch.bfloat16), ("qwen2-moe", SCATTERED, "stand-ins", torch.float32)],
)
def test_what_is_saved_was_reloaded_and_compared(tmp_path, tokenizer, family, removed, form, dtype):
    FAMILIES[family]().save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=dtype).eval()
    out = tmp_path / "new" / "out"
    extra = {"plan.json": b"{}\n"}
    saved = save_pruned(model, tokenizer, read_anatomy(model), parse_mask(removed), out, extra_files=extra)
    assert (saved.folder, saved.form, saved.difference) == (out, form, 0.0)
    assert (out / "plan.json").read_bytes() == b"{}\n"
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert all(tensor.dtype == dtype for file in out.glob("*.safetensors") for tensor in load_file(file).values())
    again = AutoTokenizer.from_pretrained(out, trust_remote_code=False)
    assert again("the lazy dog").input_ids == tokenizer("the lazy dog").input_ids


def drop_one(tensors):
    del tensors["model.layers.1.mlp.up_proj.weight"]


def double_one(tensors):
    tensors["model.layers.1.mlp.up_proj.weight"] *= 2


def nudge_one(tensors):
    tensors["model.norm.weight"] += 1e-2


def swap_two(tensors):
    names = ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.gate_proj.weight")
    tensors[names[0]], tensors[names[1]] = tensors[names[1]], tensors[names[0]]


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("removed", "tamper", "reason"),
    [
        (
            SCATTERED,
            drop_one,
            "load or run in a fresh process: missing_keys: model.layers.1.mlp.up_proj.weight",
        ),
        (WHOLE_LAYER, double_one, "logits differ by up to"),
        pytest.param(WHOLE_LAYER, drop_one, "missing_keys", marks=SLOW),
        pytest.param(SCATTERED, double_one, "logits differ", marks=SLOW),
        pytest.param(WHOLE_LAYER, nudge_one, "logits differ", marks=SLOW),
        pytest.param(PAIRED, swap_two, "logits differ", marks=SLOW),
    ],
)
def test_a_checkpoint_that_was_changed_before_the_check_is_not_kept(monkeypatch, tmp_path, removed, tamper, reason):
    compare = checkpoint.reload_difference

    def tampered(folder, *args, **options):
        (file,) = folder.glob("*.safetensors")
        tensors = load_file(file)
        tamper(tensors)
        save_file(tensors, file, metadata={"format": "pt"})
        return compare(folder, *args, **options)

    monkeypatch.setattr(checkpoint, "reload_difference", tampered)
    with pytest.raises(CheckFailedError, match=reason):
        save("llama", removed, tmp_path / "out", form="stand-ins" if removed == SCATTERED else "stock")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_save_leaves_nothing(monkeypatch, tmp_path, error):
    def interrupted(*_args, **_options):
        raise error

    monkeypatch.setattr(checkpoint, "reload_difference", interrupted)
    with pytest.raises(BaseException, match=r"cannot write|^$"):
        save("llama", SCATTERED, tmp_path / "out")
    assert not any(tmp_path.iterdir())


KILLED_WHILE_SAVING = """
import sys, time
from pathlib import Path
from tiny import FAMILIES, anatomy_of
from blockpruner.surgery import checkpoint
from blockpruner.blocks import parse_mask

def wait(folder, *_, **__):
    print("written", flush=True)
    time.sleep(600)

checkpoint.reload_difference = wait
mask = parse_mask("attention.0+mlp.2")
checkpoint.save_pruned(FAMILIES["llama"](), None, anatomy_of("llama"), mask, Path(sys.argv[1]))
"""


def test_a_killed_save_leaves_no_folder_of_that_name(tmp_path):
    out = tmp_path / "out"
    places = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", KILLED_WHILE_SAVING, str(out)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(places), "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    with process:
        assert process.stdout
        assert process.stdout.readline() == b"written\n"
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not out.exists()
    with unchecked():
        assert save("llama", SCATTERED, out).folder == out


def test_an_existing_folder_and_a_place_in_the_source_are_refused(tmp_path):
    source = tmp_path / "source"
    shared("llama").save_pretrained(source)
    before = sorted((path, path.stat().st_mtime_ns) for path in source.rglob("*"))
    (tmp_path / "link").symlink_to(source)
    for out, reason in (
        (source, "already exists"),
        (source / "sub" / "out", "lies in the source model"),
        (tmp_path / "link" / "out", "lies in the source model"),
        (tmp_path / "link", "symbolic link"),
    ):
        with pytest.raises(InputError, match=reason):
            save("llama", SCATTERED, out, source=source)
    assert sorted((path, path.stat().st_mtime_ns) for path in source.rglob("*")) == before


def test_blocks_that_the_model_does_not_have_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"attention\.9"):
        save("llama", "attention.9", tmp_path / "out")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("form", ["stock", "zeroed"])
def test_a_model_that_was_pruned_before_has_only_the_stand_in_form(tmp_path, form):
    model = prune_(FAMILIES["llama"](), ["attention.1"], anatomy=anatomy_of("llama"))
    anatomy = read_anatomy(model)
    with pytest.raises(InputError, match="pruned before"):
        save_pruned(model, None, anatomy, parse_mask("mlp.1"), tmp_path / "out", form=form)
    with unchecked():
        assert save_pruned(model, None, anatomy, parse_mask("attention.3+mlp.3"), tmp_path / "out").form == "stand-ins"


def test_where_the_stock_form_computes_something_else_stand_ins_are_taken(tmp_path, caplog):
    # A layer that moves up computes something else.
    model = tiny("gpt2", n_embd=32, n_layer=4, n_head=4, n_positions=64, scale_attn_by_inverse_layer_idx=True)
    saved = save_pruned(model, None, read_anatomy(model), parse_mask("attention.1+mlp.1"), tmp_path / "out")
    assert saved.form == "stand-ins"
    assert saved.difference < 1e-4
    assert "no stock form" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_where_the_stock_form_cannot_generate_with_its_cache_stand_ins_are_taken(tmp_path, caplog):
    # T5 of transformers makes the decoder's cache as long as the encoder.
    model = zoo.build("seq2seq/t5")
    mask = parse_mask("encoder.attention.1+encoder.mlp.1")
    saved = save_pruned(model, None, read_anatomy(model), mask, tmp_path / "out")
    assert saved.form == "stand-ins"
    assert "no stock form: the checkpoint does not load or run in a fresh process: IndexError" in caplog.text
    made = AutoModelForSeq2SeqLM.from_pretrained(saved.folder)
    made.generate(torch.full((1, 8), 20), max_new_tokens=3, decoder_start_token_id=0)


@pytest.mark.parametrize(("form", "others"), [("stand-ins", "try --form zeroed,"), ("zeroed", "try --form stand-ins,")])
def test_the_form_that_failed_is_not_the_one_to_try_next(monkeypatch, tmp_path, form, others):
    compare = checkpoint.reload_difference

    def elsewhere(folder, auto, inputs, truth, *args, **options):
        return compare(folder, auto, inputs, truth + 1, *args, **options)

    monkeypatch.setattr(checkpoint, "reload_difference", elsewhere)
    with pytest.raises(CheckFailedError, match=f"next: nothing was kept; {others} and report"):
        save("llama", SCATTERED, tmp_path / "out", form=form)
