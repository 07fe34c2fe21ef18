"""The training loop: exact gradients in pieces, steps from (seed, step) alone, the best kept, kill and resume."""

import dataclasses
import itertools
import logging
import os
import signal
from typing import Any

import pytest
import torch
from labs import examples, made
from torch import nn

from blockpruner.anatomy.probing import accepts, asking, evaluating
from blockpruner.blocks import parse_mask
from blockpruner.errors import CheckFailedError, InputError, RunFolderError
from blockpruner.repairs import teaching, training
from blockpruner.repairs.courses import Course, Number, Trace, rates, windows_of_step
from blockpruner.repairs.pupil import Pupil
from blockpruner.repairs.recovery import Trained
from blockpruner.repairs.teaching import Predictions
from blockpruner.repairs.training import train
from blockpruner.standin import Replacement
from blockpruner.surgery.gaps import Repair, gaps
from blockpruner.surgery.removal import skipped
from blockpruner.texts.examples import IGNORED, Examples

QUICK = Trained(lr=0.05, batch=2, accumulate=2, epochs=2, evaluate_every=1)


def windows(count=8, seed=0) -> Examples:
    """Eight windows of four tokens."""
    ids = torch.randint(9, (count, 4), generator=torch.Generator().manual_seed(seed))
    return Examples("next token", {"input_ids": ids}, ids, (1,) * count)


class Line:
    """A toy to train: the nearest point to the mean token, with noise, and a loss of its own for held-out text."""

    def __init__(self, dtype=torch.float32, worst=99, shape=(3,)):
        self.point, self.noise, self.seen, self.worst = nn.Parameter(torch.zeros(shape, dtype=dtype)), False, [], worst

    def switch(self, on):
        self.noise = on

    def weigh(self, part):
        return float(part.targets.numel())

    def backward(self, part, scale):
        self.seen += part.inputs["input_ids"][:, 0].tolist()
        shift = torch.rand(3) * self.noise
        apart = (self.point - part.targets.flatten()[:, None].float() - shift).square().sum()
        (apart * scale).backward()
        return float(apart.detach())

    def judge(self, part):
        with torch.no_grad():
            apart = (self.point - part.targets.flatten()[:, None].float()).square().sum()
        return float(apart), self.weigh(part)


def course(line, options=QUICK, **more) -> Course:
    numbers = {"point": Number(line.point, line.point.data)}
    given: Any = {"identity": "toy", "noise": line.switch} | more
    return Course(options, numbers, line, line.judge, windows(), windows(2, seed=1), **given)


def test_every_epoch_sees_every_window_once_in_an_order_of_its_own():
    options = Trained(batch=2, accumulate=2, epochs=3, seed=5)
    order = [windows_of_step(options, windows(), step) for step in range(options.steps(8, 4))]
    epochs = [[*one, *other] for one, other in zip(order[::2], order[1::2], strict=True)]
    assert all(sorted(epoch) == list(range(8)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert order == [windows_of_step(options, windows(), step) for step in range(6)]
    assert order != [windows_of_step(dataclasses.replace(options, seed=6), windows(), step) for step in range(6)]


def test_tokens_say_how_much_is_trained_on_whatever_text_there_is():
    options = Trained(tokens=20, batch=2, accumulate=1)
    assert (options.windows(8, 4), options.steps(8, 4)) == (5, 3)
    assert [len(windows_of_step(options, windows(), step)) for step in range(3)] == [2, 2, 1]
    assert "3 steps, 20 tokens forward and backward" in options.effort(8, 4, 16)


def test_the_step_size_rises_falls_and_is_never_zero():
    rate = [rates(Trained(lr=2.0, warmup=5, schedule="cosine"), 100)(step) for step in range(100)]
    assert rate[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    assert rate[4:] == sorted(rate[4:], reverse=True)
    assert 0 < rate[-1] < 0.01
    assert rates(Trained(lr=2.0), 2)(0) > 0, "two steps have no room for a warm-up"
    assert rates(Trained(lr=2.0, warmup=0, schedule="constant"), 9)(8) == 2.0


def plain(line, options=QUICK):
    """The same training without any of the machinery, in float32."""
    decay = options.weight_decay if line.point.ndim > 1 else 0.0
    optimizer = torch.optim.AdamW([line.point], lr=1.0, betas=(0.9, options.beta2), weight_decay=decay)
    text, steps = windows(), options.steps(8, 4)
    for step in range(steps):
        chosen = text.targets[windows_of_step(options, text, step)].float()
        loss = (line.point - chosen.flatten()[:, None]).square().sum() / chosen.numel()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([line.point], options.clip)
        optimizer.param_groups[0]["lr"] = rates(options, steps)(step)
        optimizer.step()
    return line.point.detach()


@pytest.mark.parametrize("shape", [(3,), (1, 3)])
def test_the_loop_is_adamw_on_the_mean_over_all_that_a_step_predicts_and_lets_matrices_alone_decay(shape):
    options = dataclasses.replace(QUICK, weight_decay=0.9, beta2=0.95)
    line = Line(shape=shape)
    trace = train(course(line, options, noise=lambda on: None))
    torch.testing.assert_close(line.point.detach(), plain(Line(shape=shape), options))
    assert trace.step == 4
    assert [look.step for look in trace.curve] == [0, 1, 2, 3, 4]


def test_passes_add_up_to_the_same_step():
    points = []
    for batch, accumulate in ((4, 1), (1, 4), (2, 2)):
        line = Line()
        train(course(line, dataclasses.replace(QUICK, batch=batch, accumulate=accumulate), noise=lambda on: None))
        points.append(line.point.detach())
    torch.testing.assert_close(points[0], points[1])
    torch.testing.assert_close(points[0], points[2])


def test_small_steps_are_summed_in_float32_where_the_model_is_narrower():
    points = {}
    for masters in ("float32", "stored"):
        line = Line(torch.bfloat16)
        line.point.data.fill_(100.0)
        options = Trained(lr=0.1, batch=1, accumulate=1, warmup=0, schedule="constant", patience=0, masters=masters)
        train(course(line, options))
        points[masters] = float(line.point.detach()[0])
    assert points["stored"] == 100, "a step of a tenth is less than half of what bfloat16 tells apart there"
    assert points["float32"] < 100


def test_the_best_numbers_by_held_out_text_are_kept(tmp_path):
    for folder in (None, tmp_path):
        line = Line()
        losses = iter([9.0, 5.0, 3.0, 4.0, 4.5])
        judged: dict[float, Any] = {}

        def judge(part, losses=losses, judged=judged, line=line):
            judged[loss := next(losses)] = line.point.detach().clone()
            return loss, 1.0

        trace = train(dataclasses.replace(course(line, folder=folder), judge=judge))
        assert trace.best() == 2
        assert torch.equal(line.point.detach(), judged[3.0])


def test_training_ends_when_held_out_text_is_no_longer_better_off():
    line = Line()
    losses = itertools.chain([3.0, 2.0], itertools.repeat(4.0))
    options = dataclasses.replace(QUICK, epochs=20, patience=2)
    trace = train(dataclasses.replace(course(line, options), judge=lambda _: (next(losses), 1.0)))
    assert (trace.step, trace.best()) == (3, 1)
    losses = itertools.chain([3.0], itertools.repeat(4.0))
    assert train(dataclasses.replace(course(Line(), options), judge=lambda _: (next(losses), 1.0))).best() == 0


def test_what_only_gets_worse_is_taken_where_that_is_forced():
    losses = iter([1.0, 4.0, 2.0, 3.0, 5.0])
    options = dataclasses.replace(QUICK, patience=0)
    trace = train(dataclasses.replace(course(Line(), options, force=True), judge=lambda _: (next(losses), 1.0)))
    assert (trace.best(), trace.best(force=True)) == (0, 2)


def test_what_was_trained_for_nothing_is_found_by_force_afterwards(tmp_path):
    losses = [1.0, 4.0, 2.0, 3.0, 5.0]
    options = dataclasses.replace(QUICK, patience=0)

    def trained(folder, force):
        line, told = Line(), iter(losses)
        trace = train(
            dataclasses.replace(course(line, options, force=force, folder=folder), judge=lambda _: (next(told), 1.0))
        )
        return line, trace

    forced, trace = trained(tmp_path / "forced", force=True)
    _, plain = trained(tmp_path / "plain", force=False)
    assert (plain.best(), trace.best(force=True)) == (0, 2)
    again, resumed = trained(tmp_path / "plain", force=True)
    assert resumed == trace
    assert not again.seen
    assert torch.equal(again.point, forced.point)


def test_a_loss_that_is_not_finite_is_an_error_and_one_held_out_is_not_the_best():
    line = Line()
    broken = dataclasses.replace(course(line), lesson=Broken(line))
    with pytest.raises(CheckFailedError, match="not finite at step 0"):
        train(broken)
    losses = iter([2.0, float("nan"), 1.0, float("inf"), float("nan")])
    trace = train(dataclasses.replace(course(Line()), judge=lambda _: (next(losses), 1.0)))
    assert trace.best() == 2
    assert trace.curve[1].loss is None


class Broken(Line):
    def __init__(self, line):
        super().__init__()
        self.point = line.point

    def backward(self, part, scale):
        return super().backward(part, scale) * float("nan")


def test_killed_after_any_step_it_ends_in_the_same_bits(tmp_path):
    options = dataclasses.replace(QUICK, epochs=4, evaluate_every=2, patience=0)
    line = Line()
    whole = train(course(line, options, folder=tmp_path / "whole"))
    for count in range(1, 8):
        folder = tmp_path / str(count)
        (folder / ".step-000000002.left").mkdir(parents=True)  # by one that was killed while it wrote
        killed(course(Line(), options, folder=folder), count)
        again = Line()
        assert train(course(again, options, folder=folder)) == whole
        assert torch.equal(again.point, line.point)
        done = sorted(path.name for path in folder.glob("step-*"))
        assert len(done) <= 2
        assert done[-1] == "step-000000008"
        assert not list(folder.glob(".step-*"))
    alone = Line()
    train(course(alone, options))
    assert torch.equal(alone.point, line.point), "without a folder the same"


def killed(begun: Course, count: int) -> None:
    """Run it in a process that is killed once so many steps are done."""
    child = os.fork()
    if not child:
        begun = dataclasses.replace(
            begun, report=lambda done, *_: done == count and os.kill(os.getpid(), signal.SIGKILL)
        )
        train(begun)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status == signal.SIGKILL


def test_a_training_that_is_done_is_not_done_again(tmp_path):
    first, second = Line(), Line()
    trace = train(course(first, folder=tmp_path))
    assert train(course(second, folder=tmp_path)) == trace
    assert not second.seen
    assert torch.equal(first.point, second.point)


def test_a_folder_of_another_training_is_refused(tmp_path):
    train(course(Line(), folder=tmp_path))
    for other in (
        course(Line(), dataclasses.replace(QUICK, lr=0.04), folder=tmp_path),
        dataclasses.replace(course(Line(), folder=tmp_path), examples=windows(8, seed=3)),
        course(Line(), folder=tmp_path, identity="another model"),
    ):
        with pytest.raises(RunFolderError, match="is of another training"):
            train(other)


def test_noise_leaves_the_caller_s_own_random_numbers_alone():
    torch.manual_seed(7)
    expected = torch.rand(2)
    torch.manual_seed(7)
    train(course(Line()))
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize("option", ["lr", "batch", "accumulate", "epochs", "patience", "clip", "beta2"])
def test_options_out_of_bounds_are_refused(option):
    with pytest.raises(InputError, match=option):
        dataclasses.replace(QUICK, **{option: -1})


def gradients(pupil: Pupil, numbers: dict[str, nn.Parameter], run) -> tuple[float, dict[str, torch.Tensor]]:
    with evaluating(pupil.model), asking(pupil.model, list(numbers.values())):
        value = run()
        return value, {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in numbers.items()}


def whole_loss(pupil: Pupil, text: Examples, loss: str, temperature: float, hidden: float) -> float:
    """The same loss by plain forward passes, with all logits of both models at once; goes backward."""
    model: Any = pupil.model
    more: Any = {"output_hidden_states": bool(hidden)} | ({"use_cache": False} if accepts(model, "use_cache") else {})
    asked = text.targets != IGNORED
    with torch.no_grad():
        dense = model(**text.inputs, **more)
    with pupil.pruned():
        found = model(**text.inputs, **more)
        if loss == "lm":
            value = nn.functional.cross_entropy(found.logits[asked], text.targets[asked], reduction="sum")
        else:
            p, q = ((out.logits[asked] / temperature).log_softmax(-1) for out in (dense, found))
            value = temperature**2 * (p.exp() * (p - q)).sum()
        if hidden:
            # The last of these has the final norm behind it.
            pairs = list(zip(dense.hidden_states[1:-1], found.hidden_states[1:-1], strict=True))
            ratios = [((s - t).square().sum(-1) / t.square().sum(-1)).mean() for t, s in pairs]
            value = value + hidden * asked.sum() * torch.stack(ratios).mean()
        value.backward()
    return float(value.detach())


def check_exact(name, mask, monkeypatch, *, loss: Any = "lm", temperature=1.0, hidden=0.0, paths=None):
    model, anatomy = made(name)
    text = examples(model, 3, 16)
    pupil = Pupil(model, anatomy, parse_mask(mask))
    numbers = {n: p for n, p in model.named_parameters() if p.is_floating_point()}
    lesson: Any = Predictions(pupil, loss, temperature, hidden)
    lesson.paths = paths or lesson.paths
    monkeypatch.setattr(teaching, "LOGITS_AT_ONCE", 3 * 5 * 128)  # five positions at a time
    assert len(lesson._pieces(text)) > 1 or name.startswith(("masked", "seq2seq"))
    value, found = gradients(pupil, numbers, lambda: lesson.backward(text, 1.0))
    plain, truth = gradients(pupil, numbers, lambda: whole_loss(pupil, text, loss, temperature, hidden))
    assert value == pytest.approx(plain, rel=1e-5)
    for parameter in numbers:
        torch.testing.assert_close(found[parameter], truth[parameter], atol=1e-4, rtol=1e-3)
    return lesson, text


@pytest.mark.parametrize(
    ("name", "mask"),
    [
        ("causal/llama", "mlp.1+attention.2"),
        ("causal/llama", "attention.1+mlp.1"),
        ("causal/gemma2", "mlp.0"),
        ("causal/gpt2", "attention.3+mlp.3"),
        ("causal/falcon", "mlp.2"),
        ("causal/mixtral", "mlp.1"),
        ("causal/mamba", "mixer.1"),
        ("masked/bert", "attention.2+mlp.2"),
        ("seq2seq/t5", "encoder.mlp.1+decoder.cross_attention.2"),
    ],
)
def test_in_pieces_the_gradients_are_those_of_the_whole_pass(name, mask, monkeypatch):
    check_exact(name, mask, monkeypatch)
    check_exact(name, mask, monkeypatch, loss="kl", temperature=2.0)


def test_hidden_states_are_compared_layer_by_layer_with_the_original_numbers(monkeypatch):
    paths = [f"model.layers.{number}" for number in range(3)]
    check_exact("causal/llama", "mlp.1+attention.2", monkeypatch, loss="kl", hidden=0.7, paths=paths)
    model, anatomy = made("causal/llama")
    lesson = Predictions(Pupil(model, anatomy, parse_mask("attention.1+mlp.1+mlp.2")), "kl", hidden=1.0)
    assert lesson.paths == [f"model.layers.{number}" for number in (0, 2, 3)]


def test_the_held_out_loss_is_that_of_a_plain_forward_pass_of_the_pruned_model():
    for name in ("causal/llama", "masked/bert", "seq2seq/t5"):
        model, anatomy = made(name)
        text, block = examples(model, 3, 16), next(iter(anatomy.parts))
        lesson = Predictions(Pupil(model, anatomy, frozenset([block])))
        with torch.no_grad(), skipped(model, [block], anatomy=anatomy):
            logits = model(**text.inputs).logits
        asked = text.targets != IGNORED
        expected = nn.functional.cross_entropy(logits[asked], text.targets[asked], reduction="sum")
        assert lesson.judge(text) == pytest.approx(float(expected), rel=1e-5)
        lesson.whole = True
        assert lesson.judge(text) == pytest.approx(float(expected), rel=1e-5)


def test_where_pieces_are_not_the_truth_all_logits_are_held_and_that_is_said(monkeypatch, caplog):
    model, anatomy = made("causal/llama")
    pupil, text = Pupil(model, anatomy, parse_mask("mlp.1")), examples(model, 2, 12)
    numbers = dict(model.named_parameters())
    true = teaching.Ends.logits

    def off(self, state, part, at):
        return true(self, state.detach(), part, at) + 0 * state.sum()

    for wrong, said in ((off, "the gradient of"), (lambda *_: 1 / 0, None)):
        if said is None:

            def stops(*_):
                raise RuntimeError("no such thing")

            wrong, said = stops, "it stops with RuntimeError"
        monkeypatch.setattr(teaching.Ends, "logits", wrong)
        lesson = Predictions(pupil, "kl")
        with caplog.at_level(logging.WARNING), evaluating(model), asking(model, list(numbers.values())):
            lesson.probe(text, numbers)
        assert lesson.whole
        assert said in caplog.text
        value, found = gradients(pupil, numbers, lambda lesson=lesson: lesson.backward(text, 0.5))
        plain, truth = gradients(pupil, numbers, lambda: whole_loss(pupil, text, "kl", 1.0, 0.0))
        assert value == pytest.approx(plain, rel=1e-5)
        for name in numbers:
            torch.testing.assert_close(2 * found[name], truth[name], atol=1e-4, rtol=1e-3)


def test_the_teacher_is_the_dense_model_whatever_the_pruned_one_has_become():
    model, anatomy = made("causal/llama")
    mask, text = parse_mask("mlp.1"), examples(model, 2, 12)
    dense = {name: p.detach().clone() for name, p in model.named_parameters()}
    (gap,) = gaps(anatomy, mask)
    other = {"lm_head.weight": model.lm_head.weight.data * 1.5, "model.norm.weight": model.model.norm.weight.data * 0.5}
    pupil = Pupil(model, anatomy, mask, Repair({gap.path: Replacement("bias", 0, 32)}, other))
    lesson = Predictions(pupil, "kl")
    numbers = dict(model.named_parameters())
    value, _ = gradients(pupil, numbers, lambda: lesson.backward(text, 1.0))
    assert value == pytest.approx(
        gradients(pupil, numbers, lambda: whole_loss(pupil, text, "kl", 1.0, 0.0))[0], rel=1e-5
    )
    assert all(torch.equal(p, dense[name]) for name, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())


def test_a_checkpoint_says_what_it_is_of(tmp_path):
    trace = train(course(Line(), folder=tmp_path))
    newest = max(tmp_path.glob("step-*"))
    assert Trace.load(newest / "trace.json") == trace
    assert {path.name for path in newest.iterdir()} == {
        *("masters.safetensors", "exp_avg.safetensors", "exp_avg_sq.safetensors", "step.safetensors", "trace.json")
    }
    assert training.MOMENTS == ("exp_avg", "exp_avg_sq", "step")
