"""Methods are named and given options in one way everywhere."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import pytest

from blockpruner.errors import InputError
from blockpruner.registry import format_method, lookup, parse_method
from blockpruner.searches import SEARCHES, parse_search
from blockpruner.searches.beam import Beam
from blockpruner.searches.evolution import Evolution
from blockpruner.searches.exhaustive import Exhaustive
from blockpruner.searches.greedy import Greedy
from blockpruner.searches.random import Random


@dataclass(frozen=True)
class Bake:
    title: ClassVar[str] = "not an option"

    minutes: int = 30
    heat: float = 180.0
    fan: bool = False
    rack: Literal["low", "high"] = "low"
    trays: Literal[1, 2] = 1
    seed: int = 0


@dataclass(frozen=True)
class Steam:
    """Has no options."""


METHODS = {"bake": Bake, "steam": Steam}


def parse(text, **shared):
    return parse_method(text, METHODS, "method", **shared)


def test_a_bare_name_takes_every_default():
    assert parse("bake") == parse(" bake: ") == Bake()


def test_options_get_the_types_of_their_fields():
    assert parse("bake: minutes=45, heat=2e2,fan=true,rack=high") == Bake(45, 200.0, True, "high")


def test_shared_options_reach_methods_that_have_them_and_yield_to_the_text():
    assert parse("bake", seed=7) == Bake(seed=7)
    assert parse("bake:seed=3", seed=7) == Bake(seed=3)
    assert parse("steam", seed=7) == Steam()


@pytest.mark.parametrize("method", [Bake(), Bake(1, 0.1, True, "high", 2, -5), Steam()])
def test_a_method_is_written_as_it_is_read_defaults_too(method):
    assert parse(format_method(method, METHODS)) == method
    assert format_method(Bake(), METHODS) == "bake:minutes=30,heat=180.0,fan=False,rack=low,trays=1,seed=0"


def test_a_method_from_elsewhere_goes_by_its_class():
    assert format_method(Bake(), {}).startswith("Bake:minutes=30")


@pytest.mark.parametrize(
    ("text", "said", "advice"),
    [
        ("bakke", "'bakke' is not a known method", "did you mean 'bake'? choose one of: bake, steam"),
        ("grill", "'grill' is not a known method", "choose one of: bake, steam"),
        ("bake:minute=3", "no option 'minute'", "did you mean 'minutes'? options of bake: minutes, heat"),
        ("steam:minutes=3", "no option 'minutes'", "options of steam: none"),
        ("bake:title=x", "no option 'title'", "minutes"),
        ("bake:minutes=soon", "bake:minutes=soon: Input should be a valid integer", "value of that kind"),
        ("bake:heat=nan", "bake:heat=nan: Input should be a finite number", "value of that kind"),
        ("bake:rack=middle", "'low' or 'high'", "value of that kind"),
        ("bake:trays=3", "should be 1 or 2", "value of that kind"),
        ("bake:fan", "'fan' is not key=value", "bake:key=value"),
        ("bake:minutes=1,minutes=2", "'minutes' twice", "once"),
    ],
)
def test_what_cannot_be_parsed_is_named_with_the_right_names_beside_it(text, said, advice):
    with pytest.raises(InputError) as error:
        parse(text)
    assert said in error.value.what
    assert advice in error.value.fix


def test_lookup_serves_plain_tables_too():
    assert lookup("a", {"a": 1}, "letter") == 1


def test_the_runs_seed_reaches_random_unless_it_has_its_own():
    assert parse_search("random", seed=4) == Random(4)
    assert parse_search("random:seed=9", seed=4) == Random(9)
    assert format_method(Random(9), SEARCHES) == "random:seed=9"


def test_where_weights_are_streamed_races_take_few_looks_unless_they_are_told():
    assert parse_search("greedy", streamed=True) == Greedy(growth=4.0)
    assert parse_search("greedy:growth=2", streamed=True) == Greedy(growth=2.0)
    assert parse_search("greedy") == Greedy(growth=1.25)
    assert parse_search("beam:race=true", streamed=True) == Beam(race=True, growth=4.0)
    assert parse_search("beam", streamed=True) == Beam()  # which does not race
    assert parse_search("evolution:race=true", streamed=True) == Evolution(race=True, growth=4.0)
    assert parse_search("exhaustive", streamed=True) == Exhaustive()


def test_a_misspelt_search_gets_a_suggestion():
    with pytest.raises(InputError) as error:
        parse_search("exhaustiv")
    assert "did you mean 'exhaustive'" in error.value.fix
