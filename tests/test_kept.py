"""What methods of a chain made is not made again when the chain goes on, and is of the same bits."""

from dataclasses import replace

import pytest
import zoo
from labs import SIGNS, made

from blockpruner.blocks import parse_mask
from blockpruner.errors import RunFolderError
from blockpruner.mending import forget
from blockpruner.recoveries import parse_chain, parse_recovery
from blockpruner.recoveries.linear import Linear
from blockpruner.recovering import recover
from blockpruner.repairs import tuning
from blockpruner.repairs.kept import keep, kept
from blockpruner.repairs.recovery import Bench
from blockpruner.texts.examples import examples_of

METHODS = [
    *("bias", "linear:rank=4,ridge=1", "linear:ridge=1", "span:ridge=1", "refit:ridge=1", "replaceme:ridge=1"),
    "linear:ridge=1,refit:ridge=1",
]


def bench_of(folder, seed=1) -> Bench:
    model, anatomy = made("causal/llama")
    texts = (
        examples_of(model, zoo.inputs(model, windows, 24, seed=seed + windows)["input_ids"], SIGNS)
        for windows in (12, 4)
    )
    return Bench(model, anatomy, parse_mask("attention.1+mlp.1+mlp.2"), *texts, force=True, folder=folder)


@pytest.mark.parametrize("chain", METHODS)
def test_a_repair_comes_back_with_the_same_bits_and_the_same_record(chain, tmp_path):
    bench = bench_of(tmp_path)
    *before, last = parse_chain(chain)
    for method in before:
        bench = replace(bench, start=method.repair(bench)[0])
    repair, gaps = last.repair(bench)
    assert kept(bench, chain) is None
    keep(bench, chain, (repair, gaps))
    found = kept(bench, chain)
    assert found is not None
    assert found[0].digest() == repair.digest()
    assert (found[0].spans, found[0].made_up, found[1]) == (repair.spans, repair.made_up, gaps)
    assert found[0].replacements.keys() == repair.replacements.keys()
    values = [*found[0].weights.values(), *(p for r in found[0].replacements.values() for p in r.parameters())]
    assert not any(value.requires_grad for value in values)


@pytest.mark.parametrize("change", ["method", "text", "mask", "start", "force"])
def test_what_was_made_for_something_else_is_refused(change, tmp_path):
    bench, method = bench_of(tmp_path), "linear:ridge=1"
    made_ = parse_recovery(method).repair(bench)
    keep(bench, method, made_)
    other = {
        "text": replace(bench, examples=bench_of(tmp_path, seed=7).examples),
        "mask": replace(bench, mask=parse_mask("mlp.1")),
        "start": replace(bench, start=made_[0]),
        "force": replace(bench, force=False),
    }
    with pytest.raises(RunFolderError, match="is of another recovery"):
        kept(other.get(change, bench), "linear:ridge=2" if change == "method" else method)


def test_a_chain_that_is_killed_in_its_training_does_not_fit_its_maps_again(tmp_path, monkeypatch):
    chain = parse_chain("linear:ridge=1,lora:rank=2,lr=0.01,batch=2,accumulate=1")
    bench = bench_of(None)
    words = (bench.model, bench.anatomy, bench.mask, chain, bench.examples, bench.held_out)
    whole, record = recover(*words, force=True)

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tuning, "train", killed)
        with pytest.raises(KeyboardInterrupt):
            recover(*words, force=True, folder=tmp_path / "run")
    assert (tmp_path / "run/1-linear/made").is_dir()
    monkeypatch.setattr(Linear, "repair", killed)
    again, said = recover(*words, force=True, folder=tmp_path / "run")
    assert again.digest() == whole.digest()
    assert said == record
    forget(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_nothing_is_kept_without_a_folder(tmp_path):
    bench = bench_of(None)
    keep(bench, "bias", parse_recovery("bias").repair(bench))
    assert kept(bench, "bias") is None
    assert not list(tmp_path.iterdir())
