"""Cached generation equals uncached for every kind of cache, whatever is gone: states of convolutions and recurrences,
slots that two blocks share, caches with an encoder's keys beside the decoder's, caches of a model's own kind.

Uncached passes are the truth. The dense model is among what is tested: what transformers cannot do with it either is
listed by name. (Caches of plain decoders: `test_generation`.)
"""

import contextlib
import functools
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import EncoderDecoderCache

from blockpruner.anatomy.caches import CacheUse, cache_use, recording
from blockpruner.anatomy.probing import example_inputs, stood_in
from blockpruner.anatomy.reading import Anatomy, read_anatomy
from blockpruner.blocks import Block
from blockpruner.errors import UnsupportedModelError
from blockpruner.standin import StandIn

ENTRIES = {
    "causal/mamba": "states only",
    "causal/jamba": "slots of states, and slots of keys and values",
    "causal/falcon_h1": "states, keys and values in every slot, written by two blocks",
    "causal/inkling_text": "keys and values of a window, and two states, in every slot, written by one block",
    "causal/lfm2": "states that can be cut back, and keys and values",
    "causal/olmo_hybrid": "states whose presence is asked of the last slot, in older transformers",
    "causal/minimax": "states in a list of the model's own, beside the slots",
    "causal/recurrent_gemma": "states in the modules themselves",
    "causal/xlstm": "a class of the model's own; states are given to the block and taken from it",
    "causal/rwkv": "a list that is handed from block to block",
    "seq2seq/t5": "an encoder's keys and values beside the decoder's; a table of positions is handed on",
    "seq2seq/bart": "an encoder's keys and values beside the decoder's",
    "seq2seq/t5gemma": "the same with sliding windows",
    "seq2seq/t5gemma2": "the same, written by one block",
}
# What transformers cannot do with the dense model either.
_STATEFUL = "tokens cannot be taken out of a recurrent state"
_REORDER = "its states are not reordered, or cannot be"
CANNOT = {
    ("causal/mamba", "tokens looked up"): _STATEFUL,
    ("causal/jamba", "tokens looked up"): _STATEFUL,
    ("causal/falcon_h1", "tokens looked up"): _STATEFUL,
    ("causal/olmo_hybrid", "tokens looked up"): _STATEFUL,
    ("causal/recurrent_gemma", "tokens looked up"): _STATEFUL,
    ("causal/rwkv", "tokens looked up"): _STATEFUL,
    ("causal/xlstm", "tokens looked up"): _STATEFUL,
    ("causal/minimax", "tokens looked up"): _STATEFUL,
    ("causal/minimax", "beams"): _REORDER,
    ("causal/recurrent_gemma", "beams"): _REORDER,
    ("causal/rwkv", "beams"): _REORDER,
    ("causal/xlstm", "beams"): _REORDER,
    ("causal/recurrent_gemma", "one by one"): "it returns no cache",
    ("causal/recurrent_gemma", "in pieces"): "it returns no cache",
    ("causal/mamba", "in pieces"): "its plain implementation starts anew with each piece",
    ("causal/jamba", "in pieces"): "its plain implementation starts anew with each piece",
    ("causal/inkling_text", "generated with a static cache"): "its position bias is made for the tokens given only",
}
ONE_SEQUENCE = {"causal/rwkv": "with more, it multiplies the tokens of each with the states of all"}
TOLERANCE = 1e-4  # of the largest logit


@functools.cache
def model_of(entry: str) -> zoo.LanguageModel:
    model = zoo.build(entry)
    model.generation_config.decoder_start_token_id = 1
    model.generation_config.pad_token_id = 0
    return model


@functools.cache
def anatomy_of(entry: str) -> Anatomy:
    return read_anatomy(model_of(entry))


def mixers(entry: str) -> dict[str, list[Block]]:
    """The blocks whose modules can write to a cache, by kind."""
    found: dict[str, list[Block]] = {}
    for block in anatomy_of(entry).parts:
        if block.kind != "mlp" and block.stack != "encoder":
            found.setdefault(block.kind, []).append(block)
    return found


REMOVALS: dict[str, Callable[[str], list[Block]]] = {
    "nothing": lambda _: [],
    "the first of each kind": lambda entry: [blocks[0] for blocks in mixers(entry).values()],
    "the last of each kind": lambda entry: [blocks[-1] for blocks in mixers(entry).values()],
    "all of one kind": lambda entry: next(iter(mixers(entry).values())),
    "all": lambda entry: [block for blocks in mixers(entry).values() for block in blocks],
}


def removals(entry: str) -> list[str]:
    """Those that differ, for a model may have blocks of one kind only."""
    return list({tuple(blocks(entry)): removal for removal, blocks in REMOVALS.items()}.values())


@contextlib.contextmanager
def pruned(entry: str, removal: str) -> Iterator[zoo.LanguageModel]:
    with stood_in(model_of(entry), anatomy_of(entry).stand_ins(REMOVALS[removal](entry))), torch.no_grad():
        yield model_of(entry)


def tokens(batch: int, length: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(zoo.FIRST_ORDINARY, zoo.VOCABULARY, (batch, length), generator=generator)


SOURCE = tokens(3, 12, seed=1)
MASK = torch.ones_like(SOURCE)
for row, padding in enumerate((0, 5, 2)):
    SOURCE[row, :padding], MASK[row, :padding] = 0, 0


def prompt_of(model: zoo.LanguageModel, batch: int) -> dict[str, Tensor]:
    """Padded sequences: on the left of what is to be continued, on the right of what is to be encoded."""
    turn = (lambda t: t.flip(1)) if model.config.is_encoder_decoder else (lambda t: t)
    return {"input_ids": turn(SOURCE[:batch]), "attention_mask": turn(MASK[:batch])}


CACHES = ("past_key_values", "cache_params", "state")


def fed(model: zoo.LanguageModel, batch: int, counts: tuple[int, ...], cache: Any = None) -> tuple[Tensor, Tensor]:
    """Logits of the same tokens, given at once and without a cache, and given `counts` at a time with one."""
    ids, known, name = tokens(batch, sum(counts), seed=2), {}, "input_ids"
    if model.config.is_encoder_decoder:
        prompt, name = prompt_of(model, batch), "decoder_input_ids"
        known = {"attention_mask": prompt["attention_mask"], "encoder_outputs": model.get_encoder()(**prompt)}
    whole, pieces = model(**known, **{name: ids}, use_cache=False).logits, []
    given = {"past_key_values": cache} if cache is not None else {}
    for piece in ids.split(list(counts), dim=1):
        output = model(**known, **given, **{name: piece}, use_cache=True)
        given = {key: output[key] for key in CACHES if output.get(key) is not None}
        assert len(given) == 1
        pieces.append(output.logits)
    return torch.cat(pieces, dim=1), whole


def generated(model: zoo.LanguageModel, prompt: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    """Greedily chosen tokens, and the logits they were chosen by, with a cache and without one."""
    settings: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True}
    found = model.generate(**prompt, **settings, output_logits=True, use_cache=True, **options)
    truth = model.generate(**prompt, **settings, output_logits=True, use_cache=False)
    assert torch.equal(found.sequences, truth.sequences)
    return torch.stack(found.logits, dim=1), torch.stack(truth.logits, dim=1)


def beams(model: zoo.LanguageModel, batch: int) -> tuple[Tensor, Tensor]:
    options = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 5, "do_sample": False}
    found, truth = (model.generate(**prompt_of(model, batch), **options, use_cache=use) for use in (True, False))
    return found.float(), truth.float()


def looked_up(model: zoo.LanguageModel, _: int) -> tuple[Tensor, Tensor]:
    """Tokens copied from the prompt are tried, most are rejected, and have to be forgotten."""
    ids = tokens(1, 7, seed=3).repeat(1, 2)
    prompt = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    options = {"eos_token_id": 2}  # older transformers look for one in what was looked up
    return generated(model, prompt, prompt_lookup_num_tokens=3, **options)


WAYS: dict[str, Callable[[zoo.LanguageModel, int], tuple[Tensor, Tensor]]] = {
    "one by one": lambda model, batch: fed(model, batch, (7, 1, 1, 1, 1)),  # past the sliding windows of 8
    "in pieces": lambda model, batch: fed(model, batch, (5, 4, 1, 3)),
    "generated": lambda model, batch: generated(model, prompt_of(model, batch)),
    "generated with a static cache": lambda model, batch: generated(
        model, prompt_of(model, batch), cache_implementation="static"
    ),
    "beams": beams,
    "tokens looked up": looked_up,
}


def gap(found: Tensor, truth: Tensor) -> float:
    assert found.shape == truth.shape
    return float((found - truth).abs().max() / truth.abs().max())


@pytest.mark.parametrize(
    ("entry", "way"), [(entry, way) for entry in ENTRIES for way in WAYS if (entry, way) not in CANNOT]
)
def test_with_a_cache_all_is_as_without(entry, way):
    batch = 1 if entry in ONE_SEQUENCE else 2
    for removal in removals(entry):
        with pruned(entry, removal) as model:
            assert gap(*WAYS[way](model, batch)) < TOLERANCE, removal


@pytest.mark.parametrize("entry", ["causal/falcon_h1", "causal/inkling_text", "seq2seq/bart", "seq2seq/t5gemma2"])
def test_no_token_is_counted_twice_and_none_is_missing(entry):
    for removal in removals(entry):
        with pruned(entry, removal) as model:
            cache: Any = DynamicCache(config=model.config.get_text_config(decoder=True))
            given = EncoderDecoderCache(cache, DynamicCache()) if model.config.is_encoder_decoder else cache
            fed(model, 2, (5, 1, 4), given)
        assert {slot.get_seq_length() for slot in cache.layers} == {10}, removal


@pytest.mark.parametrize(
    ("entry", "way", "missing"),
    [
        ("causal/jamba", "generated", "cache"),
        ("causal/falcon_h1", "one by one", "cache"),
        ("seq2seq/bart", "generated", "cache"),
        ("causal/lfm2", "tokens looked up", "states"),
        ("causal/inkling_text", "tokens looked up", "states"),
    ],
)
def test_without_what_is_written_these_tests_fail(entry, way, missing):
    specs = anatomy_of(entry).stand_ins(REMOVALS["the first of each kind"](entry))
    silent = {path: {key: value for key, value in spec.items() if key != missing} for path, spec in specs.items()}
    with stood_in(model_of(entry), silent), torch.no_grad():
        try:
            found = gap(*WAYS[way](model_of(entry), 3))
        except (AssertionError, TypeError):
            return
        assert found > 100 * TOLERANCE


def test_a_list_of_states_that_is_not_handed_on_fails_these_tests():
    entry, last = "causal/rwkv", REMOVALS["the last of each kind"]("causal/rwkv")
    specs = anatomy_of(entry).stand_ins(last)
    ((path, spec),) = [(path, spec) for path, spec in specs.items() if spec["output"] == {"tuple": ["zeros", STATE]}]
    silent = {path: {**spec, "output": {"tuple": ["zeros", None]}}}
    with stood_in(model_of(entry), silent), torch.no_grad(), pytest.raises(AssertionError):
        generated(model_of(entry), {"input_ids": tokens(1, 5, seed=4)})


STATE = {"given": "state"}


def test_cross_attention_that_counted_as_the_decoders_own_would_fail_these_tests():
    entry, cross = "seq2seq/bart", Block("cross_attention", 0, "decoder")
    specs = anatomy_of(entry).stand_ins([cross])
    assert not any("cache" in spec for spec in specs.values())
    path = anatomy_of(entry).parts[cross].path
    wrong = {**specs, path: {**specs[path], "cache": [0]}}
    with stood_in(model_of(entry), wrong), torch.no_grad(), pytest.raises(RuntimeError, match="size of tensor"):
        fed(model_of(entry), 2, (5, 1, 4))


@pytest.mark.parametrize("entry", ["seq2seq/bart", "seq2seq/t5"])
def test_a_cache_with_empty_places_is_cut_repeated_and_chosen_from(entry):
    for removal in removals(entry):
        with pruned(entry, removal) as model:
            prompt, ids = prompt_of(model, 2), tokens(2, 8, seed=2)
            encoded = model.get_encoder()(**prompt)
            cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
            known = {"attention_mask": prompt["attention_mask"], "past_key_values": cache}
            model(**known, encoder_outputs=encoded, decoder_input_ids=ids)
            cache.crop(-3)
            cache.batch_repeat_interleave(2)
            cache.batch_select_indices(torch.tensor([3, 0, 1]))
            rows = torch.tensor([1, 0, 0])
            encoded = (encoded.last_hidden_state[rows],)
            known = {"attention_mask": prompt["attention_mask"][rows], "encoder_outputs": encoded}
            found = model(**known, past_key_values=cache, decoder_input_ids=ids[rows, 5:]).logits
            truth = model(**known, decoder_input_ids=ids[rows], use_cache=False).logits[:, 5:]
        assert gap(found, truth) < TOLERANCE, removal


def test_what_stands_in_for_a_state_does_not_grow():
    with pruned("causal/lfm2", "all") as model:
        cache: Any = DynamicCache(config=model.config)
        fed(model, 2, (5, 1, 4), cache)
    convolution, attention = cache.layers[0], cache.layers[2]
    assert convolution.conv_states[0].shape == (2, 1, 1)
    assert attention.keys.shape == attention.values.shape == (2, 1, 10, 1)


def test_memory_that_the_dense_model_reserved_serves_the_pruned_one():
    """Some versions of `generate` keep a static cache from call to call, its places in the shapes they had first."""
    model = model_of("causal/lfm2")
    cache = StaticCache(config=model.config, max_cache_len=12)
    with torch.no_grad():
        fed(model, 2, (5, 1), cache)
    cache.reset()
    with pruned("causal/lfm2", "the first of each kind"):
        assert gap(*fed(model, 2, (5, 1, 4), cache)) < TOLERANCE


def test_what_is_recorded_is_plain_json_and_says_who_wrote_how_much():
    model = model_of("causal/falcon_h1")
    watched = {path: model.get_submodule(path) for path in ("model.layers.2", LAYER_MAMBA, LAYER_ATTENTION)}
    use = cache_use(model, watched, example_inputs(model))
    layer = use.completed("model.layers.2", {"output": "input", "input": 0})
    assert layer == json.loads(json.dumps(layer)) == {"output": "input", "input": 0, "cache": [2], "states": [[2, 0]]}
    assert [write.kind for write in use.writes[LAYER_MAMBA]] == ["state"]
    (keys,) = use.writes[LAYER_ATTENTION]
    attention = model.get_submodule(LAYER_ATTENTION)
    assert keys.size == 4 * (attention.k_proj.out_features + attention.v_proj.out_features)
    assert use.bytes_per_token == {"model.layers.2": keys.size, LAYER_MAMBA: 0, LAYER_ATTENTION: keys.size}


LAYER_MAMBA, LAYER_ATTENTION = "model.layers.2.mamba", "model.layers.2.self_attn"


def test_a_module_that_stays_goes_on_writing_for_itself():
    use = cache_use(model_of("causal/mamba"), dict(model_of("causal/mamba").named_modules()), inputs_of("causal/mamba"))
    kept = {"output": "zeros", "input": 0, "keep": True}
    assert use.completed("backbone.layers.0.mixer", kept) == kept


def inputs_of(entry: str) -> dict[str, Tensor]:
    return example_inputs(model_of(entry))


def test_tokens_may_be_counted_by_the_first_dimension():
    entry = "seq2seq/fsmt"
    assert anatomy_of(entry).stand_ins([Block("attention", 1, "decoder")])[FSMT]["token_axis"] == 0
    with stood_in(model_of(entry), anatomy_of(entry).stand_ins([Block("attention", 1, "decoder")])), torch.no_grad():
        own: Any = DynamicCache()
        fed(model_of(entry), 3, (5, 1, 4), EncoderDecoderCache(own, DynamicCache()))
    assert own.layers[1].keys.shape == (3, 1, 10, 1)


FSMT = "model.decoder.layers.1.self_attn"


class OwnCache:
    """A cache as hybrid models of older transformers have: lists with a place for each layer."""

    def __init__(self) -> None:
        self.layer_types = ["mamba", "attention"]
        self.attention_layers = [1]
        self.key_cache: list[Any] = [None, None]
        self.value_cache: list[Any] = [None, None]
        self.conv_states: list[Any] = [None, None]
        self.recurrent_states: list[Any] = [None, None]

    def update(self, keys: Tensor, values: Tensor, layer_idx: int) -> None:
        for places, new in ((self.key_cache, keys), (self.value_cache, values)):
            places[layer_idx] = new if places[layer_idx] is None else torch.cat([places[layer_idx], new], dim=2)

    def get_seq_length(self) -> int:
        return 0 if self.key_cache[1] is None else self.key_cache[1].shape[2]


class Mixer(nn.Module):
    def forward(self, hidden: Tensor, cache_params: Any) -> Tensor:
        cache_params.conv_states[0] = hidden[:, -3:].transpose(1, 2)
        cache_params.recurrent_states[0] = hidden.sum(dim=1)
        return hidden


class Attention(nn.Module):
    def forward(self, hidden: Tensor, past_key_values: Any) -> Tensor:
        keys = hidden.unflatten(-1, (2, 4)).transpose(1, 2)
        past_key_values.update(keys, keys, 1)
        return hidden


def test_a_cache_of_the_models_own_kind_is_watched_and_kept_honest():
    hidden, watched = torch.randn(2, 5, 8), {"mixer": Mixer(), "attention": Attention()}
    with recording(watched) as recorder:
        for module in watched.values():
            module(hidden, OwnCache())
    use = CacheUse({path: tuple(made.values()) for path, made in recorder.writes.items()}, recorder.handed_on)
    assert use.bytes_per_token == {"mixer": 0, "attention": 2 * 8 * 4}
    spec = {"input": 0, "output": "zeros"}
    mixer, attention = (use.completed(path, spec) for path in watched)
    assert (mixer, attention) == ({**spec, "states": [[0, 0]]}, {**spec, "cache": [1]})
    cache: Any = OwnCache()
    for piece in hidden.split([3, 1, 1], dim=1):
        StandIn(mixer)(piece, cache_params=cache)
        StandIn(attention)(piece, past_key_values=cache)
    assert cache.get_seq_length() == 5
    assert cache.key_cache[1].shape == (2, 1, 5, 1)
    assert cache.key_cache[0] is None
    assert cache.conv_states[0].shape == cache.recurrent_states[0].shape == (2, 1, 1)


def test_what_only_generate_makes_a_model_write_is_seen_too():
    """An encoder of this architecture refuses the flag that asks its decoder for a cache."""
    model = model_of("seq2seq/switch_transformers")
    with pytest.raises(ValueError, match="use_cache"):
        model(**example_inputs(model), use_cache=True)
    path = "decoder.block.1.layer.0.SelfAttention"
    use = cache_use(model, {path: model.get_submodule(path)}, example_inputs(model))
    assert use.completed(path, {"input": 0, "output": "zeros"})["cache"] == [1]


class Uncacheable(nn.Module):
    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
        if use_cache:
            raise ValueError("no cache today")
        return input_ids

    def can_generate(self) -> bool:
        return False


def test_a_model_that_could_not_fill_a_cache_is_not_generated_from_with_one():
    model: Any = Uncacheable()
    use = cache_use(model, {"layer": model}, {"input_ids": torch.ones(2, 3)})
    blind = StandIn(use.completed("layer", {"input": 0, "output": "zeros"}))
    assert not blind(torch.ones(1, 2, 3)).any()
    with pytest.raises(NotImplementedError, match="use_cache=False"):
        blind(torch.ones(1, 2, 3), past_key_values=DynamicCache())


def test_keys_of_other_tokens_than_were_given_are_refused_by_name():
    class Summary(nn.Module):
        def forward(self, hidden: Tensor, past_key_values: Any) -> Tensor:
            keys = hidden[:, None, ::2]
            past_key_values.update(keys, keys, 0)
            return hidden

    module = Summary()
    with (
        recording({"layers.0.summary": module}),
        pytest.raises(UnsupportedModelError, match=r"layers\.0\.summary.*2 x 3"),
    ):
        module(torch.ones(2, 6, 4), DynamicCache())


def test_a_recording_leaves_no_trace():
    before = DynamicCache.update, DynamicCache.update_conv_state
    module = Attention()
    with pytest.raises(TypeError), recording({"attention": module}):
        module(torch.ones(1, 2, 8))
    assert (DynamicCache.update, DynamicCache.update_conv_state) == before
    assert not module._forward_pre_hooks
    assert not module._forward_hooks
