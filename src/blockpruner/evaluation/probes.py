"""Small questions that a language model answers from its context alone: copying, looking up, adding.

They need no download and no knowledge of the world, are the same in every run of one seed, and fail early when a model
is damaged where perplexity does not look: a copied list, a looked-up number and a sum allow one answer.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

WORDS = (
    "apple river stone window garden silver mountain paper candle bridge yellow music winter doctor "
    "kitchen island bottle market flower engine summer letter forest planet button castle copper dragon"
)
QUESTIONS = 12  # per probe
FLOOR = 0.5  # where the reference has a smaller share right, the probe says nothing about others


@dataclass(frozen=True)
class Question:
    """prompt: without the last blank; answer: with the blank before it, one right continuation."""

    prompt: str
    answer: str


def copying(draw: random.Random) -> Question:
    """A list of 8 random words that stands there twice, and is begun a third time."""
    words = draw.sample(WORDS.split(), 8)
    line = " ".join(words)
    return Question(f"{line}\n{line}\n{' '.join(words[:2])}", f" {' '.join(words[2:])}")


def retrieval(draw: random.Random) -> Question:
    """The number of one of 6 words, all told in the context; guessing among those numbers is right 1 time in 6."""
    words = draw.sample(WORDS.split(), 6)
    numbers = draw.sample(range(10, 100), 6)
    told = "".join(f"The {word} has number {number}.\n" for word, number in zip(words, numbers, strict=True))
    asked = draw.randrange(6)
    return Question(f"{told}The {words[asked]} has number", f" {numbers[asked]}")


def arithmetic(draw: random.Random) -> Question:
    """A sum of two digits below 10, after 4 such sums."""
    sums = [(a, draw.randrange(1, 10 - a)) for a in (draw.randrange(1, 9) for _ in range(5))]
    *shown, (a, b) = sums
    return Question("".join(f"{x} + {y} = {x + y}\n" for x, y in shown) + f"{a} + {b} =", f" {a + b}")


PROBES: dict[str, Callable[[random.Random], Question]] = {
    "copying": copying,
    "retrieval": retrieval,
    "arithmetic": arithmetic,
}


def questions(probe: str, seed: int = 0, count: int = QUESTIONS) -> list[Question]:
    """`count` questions of one probe; each depends on (seed, probe, its number) alone."""
    return [PROBES[probe](random.Random(f"{seed} {probe} {number}")) for number in range(count)]
