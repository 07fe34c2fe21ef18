"""The paired test held to its promises: false positives on simulated nulls, and power, by simulation.

    python benchmarks/paired_test.py --json experiments/evaluation.json

Items are pairs of right or wrong answers, of which a share is *discordant*: one model is right and the other wrong.
Under the null hypothesis a discordant item falls to either model alike. For power one model is better by 5 points: of
1,000 items 5 % more fall to it than to the other, whatever the discordance; the more of it, the harder to see.
"""

import argparse
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from search_cost import commit

from blockpruner.artifacts import read_json, write_json
from blockpruner.evaluation.paired import compare

NULLS, ITEMS, LEVEL = 2000, 1000, 0.01
GAIN = 0.05
DISCORDANCES = (0.10, 0.20, 0.30)
POWER_DRAWS = 1000
REAL_NULLS, REAL_ITEMS = 400, 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    shared = {
        "command": "python benchmarks/paired_test.py --json experiments/evaluation.json",
        "commit": commit(),
        "versions": {package: version(package) for package in ("numpy", "scipy", "blockpruner")},
        "level": LEVEL,
    }
    nulls = {f"discordance {share:.0%}": rejected(share, 0.0, NULLS, seed=1) for share in DISCORDANCES}
    power = {f"discordance {share:.0%}": rejected(share, GAIN, POWER_DRAWS, seed=2) for share in DISCORDANCES}
    null_test = {
        **shared,
        "test": "exact McNemar",
        "simulations": NULLS,
        "items": ITEMS,
        "false_positives": nulls["discordance 10%"],
        "by_discordance": nulls,
        "sign_flips": {"simulations": REAL_NULLS, "items": REAL_ITEMS, "false_positives_at_5_percent": real_nulls()},
    }
    found = {
        **shared,
        "test": "exact McNemar",
        "simulations": POWER_DRAWS,
        "items": ITEMS,
        "gain": GAIN,
        "discordance": 0.10,
        "power": power["discordance 10%"],
        "by_discordance": power,
    }
    print("false positives", nulls, null_test["sign_flips"])
    print("power", power)
    before: dict[str, Any] = read_json(options.json) if options.json.exists() else {}
    write_json(options.json, {**before, "null_test": null_test, "power": found})


def rejected(discordance: float, gain: float, draws: int, seed: int) -> float:
    """Share of simulated comparisons with a p-value at or below LEVEL."""
    draw = np.random.default_rng(seed)
    count = 0
    for _ in range(draws):
        side = draw.random(ITEMS)
        only_first, only_second = (discordance - gain) / 2, (discordance + gain) / 2
        reference = (side < only_first) | (side > 1 - (1 - discordance) / 2)
        contestant = ((side >= only_first) & (side < only_first + only_second)) | (side > 1 - (1 - discordance) / 2)
        count += compare(reference.astype(float).tolist(), contestant.astype(float).tolist()).p <= LEVEL
    return count / draws


def real_nulls() -> float:
    """Share of nulls of real-valued differences, with heavy tails, that the sign flips reject at 5 %."""
    draw = np.random.default_rng(3)
    gaps = draw.standard_t(3, size=(REAL_NULLS, REAL_ITEMS))
    return sum(compare([0.0] * REAL_ITEMS, row.tolist(), seed).p <= 0.05 for seed, row in enumerate(gaps)) / REAL_NULLS


if __name__ == "__main__":
    main()
