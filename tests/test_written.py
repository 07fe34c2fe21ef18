"""Text that the dense model writes itself for a training, beside drawing token by token without a cache."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from labs import examples, made
from safetensors.torch import load_file

from blockpruner.blocks import parse_mask
from blockpruner.errors import InputError, RunFolderError
from blockpruner.mending import forget
from blockpruner.recoveries import parse_chain
from blockpruner.recoveries.lora import Lora
from blockpruner.recovering import recover
from blockpruner.repairs import written
from blockpruner.repairs.courses import order_of, windows_of_step
from blockpruner.repairs.recovery import Bench
from blockpruner.repairs.written import FILE, ORDER, PROMPT, with_written
from blockpruner.texts.examples import IGNORED

LENGTH = 40


@pytest.fixture
def bench(tmp_path):
    model, anatomy = made("causal/llama")
    mask = parse_mask("mlp.1")
    text = examples(model, 10, LENGTH)
    return Bench(model, anatomy, mask, text.part(0, 8), text.part(8, 10), folder=tmp_path)


def tokens(text) -> torch.Tensor:
    return text.inputs["input_ids"]


def training(share, seed=0, **more) -> Any:
    return Lora(written=share, seed=seed, **more)


def changed(bench, text) -> list[int]:
    return (tokens(text) != tokens(bench.examples)).any(dim=1).nonzero()[:, 0].tolist()


@torch.no_grad()
def drawn_plainly(model, begun, length, seed):
    """One token after the other from the whole context, no end of text."""
    torch.manual_seed(seed)
    ids = begun
    while ids.shape[1] < length:
        scores = model(input_ids=ids, use_cache=False).logits[:, -1].float()
        eos = model.generation_config.eos_token_id
        if eos is not None:
            scores[:, eos] = -torch.inf
        ids = torch.cat([ids, torch.multinomial(scores.softmax(-1), 1)], dim=1)
    return ids


def test_windows_go_on_as_tokens_drawn_one_by_one_from_the_whole_context_do(bench, monkeypatch):
    monkeypatch.setattr(written, "AT_ONCE", 3 * LENGTH)
    text = with_written(bench, training(0.5, 1))
    rows = changed(bench, text)
    assert len(rows) == 4
    seen = order_of(training(0.5, 1), 8, 0)
    order = seen[torch.randperm(8, generator=torch.Generator().manual_seed(1_000_003 + ORDER))[:4]]
    assert sorted(order.tolist()) == rows
    for start in range(0, 4, 3):
        own = order[start : start + 3]
        plain = drawn_plainly(bench.model, tokens(bench.examples)[own, :PROMPT], LENGTH, 1_000_003 + start)
        assert torch.equal(tokens(text)[own], plain)


def test_the_first_tokens_stay_and_what_is_to_be_predicted_is_what_was_written(bench):
    text = with_written(bench, training(1.0, 0))
    assert changed(bench, text) == list(range(8))
    assert torch.equal(tokens(text)[:, :PROMPT], tokens(bench.examples)[:, :PROMPT])
    assert torch.equal(text.targets[:, :-1], tokens(text)[:, 1:])
    assert (text.targets[:, -1] == IGNORED).all()
    assert torch.equal(tokens(bench.examples), tokens(replace(bench).examples)), "the bench's own text is left alone"


def test_only_windows_that_the_training_sees_are_written_and_early_ones_no_more_than_late_ones(bench):
    short = training(1.0, tokens=3 * LENGTH, batch=1, accumulate=1)
    seen = [windows_of_step(short, bench.examples, step)[0] for step in range(3)]
    assert changed(bench, with_written(bench, short)) == sorted(seen)
    assert short.price(bench).startswith("3 windows of 40 tokens written, ")
    long = Lora(written=0.5, batch=1, accumulate=1)
    many = replace(bench, examples=examples(bench.model, 64, 4), folder=None)
    rows = set(changed(many, with_written(many, long)))
    early = [windows_of_step(long, many.examples, step)[0] in rows for step in range(32)]
    assert 8 < sum(early) < 24


def test_a_model_that_would_draw_otherwise_by_its_settings_draws_from_all_tokens(bench, monkeypatch):
    whole = with_written(replace(bench, folder=None), training(1.0, 0))
    others = {"suppress_tokens": list(range(50)), "typical_p": 0.2, "no_repeat_ngram_size": 1, "guidance_scale": 2.0}
    others |= {"return_dict_in_generate": True, "num_return_sequences": 2}
    for name, value in others.items():
        monkeypatch.setattr(bench.model.generation_config, name, value, raising=False)
    for name, value in {"top_k": 1, "top_p": 0.1, "temperature": 0.01, "repetition_penalty": 9.0}.items():
        monkeypatch.setattr(bench.model.generation_config, name, value)
    assert torch.equal(tokens(with_written(replace(bench, folder=None), training(1.0, 0))), tokens(whole))


def test_nothing_outside_is_drawn_from_and_the_seed_decides(bench):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = with_written(replace(bench, folder=None), training(1.0, 0))
    assert torch.equal(torch.rand(3), expected)
    again, other = (with_written(replace(bench, folder=None), training(1.0, seed)) for seed in (0, 1))
    assert torch.equal(tokens(first), tokens(again))
    assert not torch.equal(tokens(first), tokens(other))


def test_killed_while_it_writes_it_goes_on_with_what_is_there(bench, monkeypatch):
    monkeypatch.setattr(written, "AT_ONCE", 2 * LENGTH)
    whole = with_written(replace(bench, folder=None), training(1.0, 0))
    begun: list[int] = []
    usual: Any = bench.model.generate

    def dying(ids, **options):
        if "output_logits" in options:  # the check before
            return usual(ids, **options)
        begun.append(len(ids))
        if len(begun) == 3:
            raise KeyboardInterrupt
        return usual(ids, **options)

    monkeypatch.setattr(bench.model, "generate", dying)
    with pytest.raises(KeyboardInterrupt):
        with_written(bench, training(1.0, 0))
    assert len(load_file(bench.folder / FILE)["tokens"]) == 4
    assert torch.equal(tokens(with_written(bench, training(1.0, 0))), tokens(whole))
    assert len(begun) == 5, "two batches, one that died, and the two that were missing"
    with_written(bench, training(1.0, 0))
    assert len(begun) == 5
    with pytest.raises(RunFolderError, match="another recovery"):
        with_written(bench, training(1.0, 1))


@pytest.mark.parametrize("name", ["masked/bert", "seq2seq/t5"])
def test_models_that_write_nothing_are_refused(name):
    model, anatomy = made(name)
    text: Any = SimpleNamespace(model=model, anatomy=anatomy, examples=examples(model, 4, 16), folder=None)
    with pytest.raises(InputError, match="writes no windows"):
        with_written(text, training(0.5, 0))


def test_a_model_whose_cache_predicts_otherwise_is_refused():
    model, anatomy = made("causal/rwkv")
    bench = Bench(model, anatomy, parse_mask("mlp.1"), examples(model, 4, LENGTH), examples(model, 2, LENGTH))
    with pytest.raises(InputError, match="other predictions with its cache"):
        with_written(bench, training(0.5, 0))


def test_a_training_sees_what_was_written_and_its_record_says_so(bench, monkeypatch):
    seen: list[torch.Tensor] = []
    usual: Any = with_written

    def watched(*given):
        seen.append(tokens(usual(*given)))
        return usual(*given)

    monkeypatch.setattr("blockpruner.recovering.with_written", watched)
    (closed, lora) = parse_chain("linear,lora:loss=kl,written=0.5,batch=2,accumulate=1,patience=0")
    chain = (closed, lora)
    _, record = recover(bench.model, bench.anatomy, bench.mask, chain, bench.examples, bench.held_out, force=True)
    assert len(seen) == 1
    assert len(changed(bench, SimpleNamespace(inputs={"input_ids": seen[0]}))) == 4
    assert record.steps[1].gaps[0].settings["written"] == 0.5
    assert lora.price(bench).startswith("4 windows of 40 tokens written, ")


def test_what_was_written_goes_with_the_checkpoints_once_a_model_is_saved(bench, tmp_path):
    run = tmp_path / "run"
    with_written(replace(bench, folder=run / "2-lora"), training(0.5))
    assert (run / "2-lora" / FILE).exists()
    forget(run)
    assert not run.exists()


def test_what_cannot_be_written_is_said_before_the_methods_that_come_first(bench, monkeypatch):
    ran: list[str] = []
    monkeypatch.setattr("blockpruner.recovering._made", lambda _bench, _method, name: ran.append(name))
    chain = parse_chain("linear,lora:written=0.01")
    with pytest.raises(InputError, match="is none"):
        recover(bench.model, bench.anatomy, bench.mask, chain, bench.examples, bench.held_out)
    assert not ran


@pytest.mark.parametrize("share", ["-0.1", "1.5", "nan"])
def test_a_share_is_from_0_to_1(share):
    with pytest.raises(InputError, match="written"):
        parse_chain(f"lora:written={share}")
