"""The states before and after moves, against plain passes of the model that lacks the blocks which come later."""

import functools
import gc
import math
import weakref
from typing import Any

import pytest
import torch
import zoo

from blockpruner.anatomy.probing import accepts, first_tensor, recorded
from blockpruner.anatomy.reading import read_anatomy
from blockpruner.blocks import Move, parse_mask
from blockpruner.errors import InputError
from blockpruner.importance import streams
from blockpruner.importance.criterion import Lab
from blockpruner.importance.streams import _Reader, passes, scores_by_state
from blockpruner.searching.evaluations import Notes
from blockpruner.searching.moves import GRANULARITIES
from blockpruner.surgery.removal import skipped
from blockpruner.texts.examples import IGNORED, Examples

DENSE = frozenset()
NO_EVALUATIONS: Any = None  # states are compared without a loss
# serial, learned positions, parallel, sandwich norms, experts, mixers, several streams per token, keys and values
# shared between layers, tokens before sequences, norms on the stream, encoder-decoders
ENTRIES = [
    *("causal/llama", "causal/gpt2", "causal/falcon", "causal/gemma2", "causal/mixtral", "causal/mamba"),
    *("causal/bamba", "causal/deepseek_v4", "causal/gemma3n_text"),
    *("masked/bert", "seq2seq/t5", "seq2seq/fsmt"),
]


@functools.cache
def model_of(entry):
    return zoo.build(entry)


@functools.cache
def anatomy_of(entry):
    return read_anatomy(model_of(entry))


def inputs_of(entry, rows=3, tokens=12):
    return zoo.inputs(model_of(entry), batch=rows, tokens=tokens, seed=7)


def lab_of(entry, mask=DENSE, rows=3, lengths=None, **more):
    inputs = inputs_of(entry, rows)
    unused = torch.zeros(rows, 1, dtype=torch.long)
    examples = Examples("states", inputs, unused, lengths or (1,) * rows)
    return Lab(model_of(entry), anatomy_of(entry), examples, evaluations=NO_EVALUATIONS, mask=mask, **more)


def moves_of(entry, granularity, mask=DENSE):
    return GRANULARITIES[granularity](anatomy_of(entry).outline, mask)


def spans(entry, length, mask=DENSE):
    """Moves of so many layers that follow each other in one stack, without the blocks of `mask`."""
    layers = anatomy_of(entry).outline.layers()
    found = []
    for stack, first in layers:
        if (stack, first + length - 1) in layers:
            blocks = [block for number in range(first, first + length) for block in layers[stack, number]]
            found.append(Move.of(*(block for block in blocks if block not in mask)))
    return found


def states_of(lab, moves):
    """What the engine shows of each move, before and after, [rows, tokens, ..., hidden]; in the order they end."""
    seen = []

    def compare(before, after):
        seen.append((before.clone(), after.clone()))
        return before[..., 0]

    reader = _Reader(lab, tuple(moves), compare)
    reader.units(lab.examples)
    rows = len(seen) // len(reader.found)
    each = [zip(*seen[start : start + rows], strict=True) for start in range(0, len(seen), rows)]
    return {move: [torch.cat(states) for states in pair] for move, pair in zip(reader.found, each, strict=True)}


def plain_state(entry, mask, layer, without, *, output):
    """Input or output of one layer in a plain pass of the model without `mask` and `without`."""
    model = model_of(entry)
    extra = {"use_cache": False} if accepts(model, "use_cache") else {}
    taken = []

    def take(_, args, kwargs):
        taken.append((dict(enumerate(args)) | kwargs)[layer.hidden].clone())

    with torch.no_grad(), skipped(model, mask | without, anatomy=anatomy_of(entry)):
        module = model.get_submodule(layer.path)
        handle = module.register_forward_pre_hook(take, with_kwargs=True)
        with recorded({"layer": module}) as calls:
            model(**inputs_of(entry), **extra)
        handle.remove()
    state = first_tensor(calls["layer"][0].output) if output else taken[0]
    return in_rows(entry, state)


def in_rows(entry, state):
    """[rows, tokens, ..., hidden]; these have another order."""
    if entry == "seq2seq/fsmt":
        return state.transpose(0, 1)
    return state.permute(1, 2, 0, 3) if entry == "causal/gemma3n_text" else state


def plain_states(entry, mask, move):
    """The states before and after `move`, each from a pass of its own, by the words of `streams`."""
    anatomy = anatomy_of(entry)
    order = [block for block in anatomy.outline.blocks if block in move.blocks]
    found = []
    for block, ran in ((order[0], 0), (order[-1], 1)):
        layer = next(la for st in anatomy.stacks for la in st.layers if block in {part.block for part in la.parts})
        left = [part.block for part in layer.parts if part.block not in mask]
        count = left.index(block) + ran
        later = frozenset(left[count:])
        if count == 0:
            found.append(plain_state(entry, mask, layer, DENSE, output=False))
        else:
            found.append(plain_state(entry, mask, layer, later, output=True))
    return found


def assert_as_plain(entry, moves, mask=DENSE):
    found = states_of(lab_of(entry, mask), moves)
    assert set(found) == set(moves)
    for move, states in found.items():
        for state, plain in zip(states, plain_states(entry, mask, move), strict=True):
            assert torch.equal(state, plain.float()), move


@pytest.mark.parametrize("entry", ENTRIES)
def test_states_before_and_after_every_block_are_those_of_plain_passes(entry):
    assert_as_plain(entry, moves_of(entry, "block"))


@pytest.mark.parametrize("entry", [entry for entry in ENTRIES if entry != "causal/deepseek_v4"])
def test_states_of_layers_and_spans_and_stock_moves_are_those_of_plain_passes(entry):
    assert_as_plain(entry, [*moves_of(entry, "stock"), *spans(entry, 2), *spans(entry, 3)])


MASKS = {
    "causal/llama": "attention.1+attention.2+mlp.2",
    "causal/falcon": "mlp.1+attention.2+mlp.2",
    "causal/bamba": "mixer.0+mlp.1",
    "masked/bert": "attention.0+attention.2+mlp.2",
    "seq2seq/t5": "decoder.cross_attention.1+encoder.mlp.0+encoder.attention.2+encoder.mlp.2",
}


@pytest.mark.parametrize("entry", MASKS)
def test_states_without_a_mask_are_those_of_the_model_without_it(entry):
    mask = parse_mask(MASKS[entry])
    assert_as_plain(entry, [*moves_of(entry, "block", mask), *moves_of(entry, "stock", mask)], mask)
    assert_as_plain(entry, spans(entry, 3, mask), mask)


@pytest.mark.parametrize("entry", ENTRIES)
def test_the_model_computes_what_it_computes_when_nobody_watches(entry):
    model, inputs = model_of(entry), inputs_of(entry)
    extra = {"use_cache": False} if accepts(model, "use_cache") else {}
    reader = _Reader(lab_of(entry), moves_of(entry, "block"), lambda before, _: before[..., 0])
    reader.moves = (*reader.moves, Move.of(*anatomy_of(entry).outline.blocks))  # never ends, so that nothing stops
    with torch.no_grad():
        expected = model(**inputs, **extra)
        with reader._watching(reader.lab.examples):
            watched = model(**inputs, **extra)
    assert reader.found
    for name, value in expected.items():
        assert not isinstance(value, torch.Tensor) or torch.equal(watched[name], value)


def test_no_logits_are_made_and_no_layer_runs_after_the_last_state():
    model, ran = model_of("causal/llama"), []

    def note(name):
        def hook(_module, _args, output):
            stream: Any = first_tensor(output)
            ran.append((name, len(stream)))

        return hook

    handles = [model.lm_head.register_forward_hook(note("head"))]
    handles += [layer.register_forward_hook(note(number)) for number, layer in enumerate(model.model.layers)]
    sizes(lab_of("causal/llama"), moves_of("causal/llama", "layer")[:3])
    for handle in handles:
        handle.remove()
    shapes = [(place, 5) for place in (0, 1, 2, 3, "head")]  # seen on a few random tokens
    assert ran == [*shapes, (0, 3), (1, 3), (2, 3)]


def size(before, after):
    return (after - before).norm(dim=-1)


def sizes(lab, moves, compare=size, name="size", unit="lengths") -> Any:
    return scores_by_state(lab, moves, compare, name=name, unit=unit)


def test_layers_that_write_over_their_input_are_read_right(monkeypatch):
    entry = "causal/llama"
    moves = [*moves_of(entry, "block"), *spans(entry, 2)]
    expected = states_of(lab_of(entry), moves)
    for layer in model_of(entry).model.layers:

        def in_place(hidden_states, *args, forward=layer.forward, **kwargs):
            return hidden_states.copy_(forward(hidden_states, *args, **kwargs))

        monkeypatch.setattr(layer, "forward", in_place)
    for move, states in states_of(lab_of(entry), moves).items():
        assert all(map(torch.equal, states, expected[move]))


def test_hooks_stand_ins_and_modes_are_put_back_also_after_an_exception():
    model = zoo.build("causal/llama").train()
    lab = lab_of("causal/llama", parse_mask("attention.1"))
    lab = Lab(model, lab.anatomy, lab.examples, evaluations=NO_EVALUATIONS, mask=lab.mask)
    kinds = [type(module) for module in model.modules()]

    def fail(*_):
        raise RuntimeError("nothing compares")

    with pytest.raises(RuntimeError, match="nothing compares"):
        sizes(lab, moves_of("causal/llama", "block", lab.mask), fail, "f")
    assert [type(module) for module in model.modules()] == kinds
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("length", [1, 2, 3])
def test_only_states_that_a_move_still_needs_are_held(monkeypatch, length):
    entry = "causal/gemma3_text"
    seen, most = {}, []
    reached = _Reader._reached

    def alive():
        return sum(reference() is not None for reference in seen.values())

    def watch(self, *given):
        reached(self, *given)
        seen.update({id(state): weakref.ref(state) for state in self.held.values()})
        most.append(alive())

    monkeypatch.setattr(_Reader, "_reached", watch)
    moves = spans(entry, length)
    sizes(lab_of(entry), moves)
    gc.collect()
    assert alive() == 0
    assert max(most) == length


def test_moves_that_begin_at_one_place_hold_one_state(monkeypatch):
    entry = "causal/llama"
    moves = [*moves_of(entry, "layer"), *spans(entry, 2), *spans(entry, 3), *moves_of(entry, "block")]
    reader = _Reader(lab_of(entry), tuple(moves), size)
    held = []
    reached = reader._reached

    def watch(*given):
        reached(*given)
        held.append(len({id(state) for state in reader.held.values()}))

    monkeypatch.setattr(reader, "_reached", watch)
    reader.units(reader.lab.examples)
    assert max(held) <= 4  # of at most three layers before, and one inside the layer


@pytest.mark.parametrize("entry", ["causal/llama", "seq2seq/fsmt", "causal/gemma3n_text"])
def test_the_number_of_an_example_is_what_it_is_alone(entry):
    model, moves = model_of(entry), moves_of(entry, "block")
    together = states_of(lab_of(entry), moves)
    for row in range(3):
        inputs = {name: value[row : row + 1] for name, value in inputs_of(entry).items()}
        examples = Examples("states", inputs, torch.zeros(1, 1, dtype=torch.long), (1,))
        alone = states_of(Lab(model, anatomy_of(entry), examples, evaluations=NO_EVALUATIONS), moves)
        for move, (before, after) in together.items():
            torch.testing.assert_close(alone[move][0][0], before[row], atol=1e-3, rtol=1e-4)
            torch.testing.assert_close(alone[move][1][0], after[row], atol=1e-3, rtol=1e-4)


def test_estimates_are_means_over_examples_with_their_standard_error():
    moves = moves_of("causal/llama", "block")
    scores = sizes(lab_of("causal/llama"), moves)
    assert list(scores) == list(moves)
    for move, (before, after) in states_of(lab_of("causal/llama"), moves).items():
        each = [float(size(b, a).mean()) for b, a in zip(before, after, strict=True)]
        mean = sum(each) / 3
        spread = math.sqrt(sum((value - mean) ** 2 for value in each) / 2 / 3)
        found = scores[move]
        assert (found.n, found.unit) == (3, "lengths")
        assert found.value == pytest.approx(mean, rel=1e-5)
        assert found.stderr == pytest.approx(spread, rel=1e-4)


def test_rows_of_one_example_are_meant_before_examples_are():
    moves = moves_of("causal/llama", "layer")
    rows = {move: size(*states).mean(1) for move, states in states_of(lab_of("causal/llama"), moves).items()}
    scores = sizes(lab_of("causal/llama", lengths=(2, 1)), moves)
    for move, row in rows.items():
        assert scores[move].n == 2
        assert scores[move].value == pytest.approx(float((row[:2].mean() + row[2]) / 2), rel=1e-5)


def test_the_padding_of_items_does_not_count():
    entry, moves = "causal/llama", moves_of("causal/llama", "block")
    texts = [inputs_of(entry)["input_ids"][row, :end] for row, end in enumerate((12, 5, 9))]
    ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    targets = torch.full_like(ids, IGNORED)
    for row, text in enumerate(texts):
        targets[row, len(text) - 3 : len(text) - 1] = text[-2:]
    items = Examples("choices", {"input_ids": ids}, targets, (2, 1), (0, 0))
    alone = [Examples("states", {"input_ids": text[None]}, targets[:1], (1,)) for text in texts]
    for compare in (size, lambda before, after: size(before, after)[:, -1:]):
        labs = [Lab(model_of(entry), anatomy_of(entry), some, NO_EVALUATIONS) for some in (items, *alone)]
        whole, *each = [sizes(lab, moves, compare) for lab in labs]
        for move, found in whole.items():
            first, second, third = (one[move].value for one in each)
            assert found.value == pytest.approx(((first + second) / 2 + third) / 2, rel=1e-4)
            assert found.n == 2


def test_micro_batches_do_not_matter_and_progress_is_told(monkeypatch):
    told = []
    lab = lab_of("causal/gpt2", progress=lambda *given: told.append(given))
    moves = moves_of("causal/gpt2", "block")
    whole = sizes(lab, moves)
    assert told == [(0, 1, "size"), (1, 1, "size")]
    monkeypatch.setattr(streams, "BATCH_TOKENS", 12)
    told.clear()
    pieces = sizes(lab_of("causal/gpt2", progress=lab.progress), moves)
    assert told == [(number, 3, "size") for number in range(4)]
    for move in moves:
        assert pieces[move].value == pytest.approx(whole[move].value, rel=1e-5)
        assert pieces[move].stderr == pytest.approx(whole[move].stderr, rel=1e-3)


def test_what_is_noted_is_not_computed_again(monkeypatch):
    monkeypatch.setattr(streams, "BATCH_TOKENS", 12)
    notes, moves = Notes(), moves_of("causal/llama", "block")
    scores = sizes(lab_of("causal/llama", notes=notes), moves)

    def fail(*_):
        raise AssertionError("computed again")

    assert sizes(lab_of("causal/llama", notes=notes), moves, fail, "size") == scores
    mask = parse_mask("mlp.3")
    for other in (
        {"moves": moves[1:]},
        {"name": "other"},
        {"lab": lab_of("causal/llama", mask, notes=notes), "moves": moves_of("causal/llama", "block", mask)},
    ):
        given: Any = {"lab": lab_of("causal/llama", notes=notes), "moves": moves, "name": "size"} | other
        with pytest.raises(AssertionError, match="computed again"):
            sizes(compare=fail, **given)


def test_a_move_that_meets_no_finite_number_has_no_score_also_from_a_note():
    moves, notes = moves_of("causal/llama", "layer"), Notes()

    def broken(before, after):
        found = size(before, after)
        return torch.where(found == found.max(), math.nan, found)

    lab = lab_of("causal/llama", notes=notes)
    assert sizes(lab, moves, broken, "b") == dict.fromkeys(moves)
    assert sizes(lab, moves, size, "b") == dict.fromkeys(moves)


def test_no_moves_have_no_scores():
    assert sizes(lab_of("causal/llama"), []) == {}


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        ("causal/llama", "attention.0+attention.1"),
        ("causal/llama", "attention.0+mlp.0+attention.2+mlp.2"),
        ("seq2seq/t5", "encoder.mlp.3+decoder.attention.0"),
    ],
)
def test_a_move_that_is_no_run_of_blocks_is_refused_by_name(entry, text):
    move = Move.parse(text)
    for ask in (lambda lab: sizes(lab, [move]), lambda lab: passes(lab, [move])):
        with pytest.raises(InputError, match=text.split("+")[0].replace(".", r"\.")):
            ask(lab_of(entry))


def test_a_move_over_blocks_that_are_gone_is_a_run():
    mask = parse_mask("mlp.0")
    assert_as_plain("causal/llama", [Move.parse("attention.0+attention.1")], mask)


@pytest.mark.parametrize(
    ("entry", "granularity", "expected"),
    [
        ("causal/llama", "layer", 1),
        ("causal/llama", "block", 1.5),
        ("causal/llama", "attention", 1.5),
        ("causal/mamba", "block", 1),
        ("seq2seq/t5", "block", 1 + (4 * 1 + 4 * (1 + 2)) / 20),
    ],
)
def test_the_cost_is_one_pass_and_the_blocks_that_run_twice(entry, granularity, expected):
    assert passes(lab_of(entry), moves_of(entry, granularity)) == pytest.approx(expected)
