"""docs/methods.md and the table of criteria in the README, made from the classes themselves.

python benchmarks/methods_page.py
"""

import re
from pathlib import Path

from blockpruner.catalogue import Rows, catalogue, markdown

REPO = Path(__file__).resolve().parents[1]
PAGE, README = REPO / "docs" / "methods.md", REPO / "README.md"
INTRO = {
    "criteria": "`score --criterion`; `search --criterion` for searches that rank. Higher = keep. m: number of moves.",
    "objectives": "`--objective`, for searches and for the criteria that are made of losses. Lower = better.",
    "searches": "`search --search`.",
    "recipes": "`run RECIPE --model MODEL`: what a paper did, by name.",
    "moves": "`--moves`: what is removed together.",
    "targets": "`--target`: when enough is removed.",
}
BLOCK = re.compile(r"(?<=<!-- criteria: made by benchmarks/methods_page.py -->\n).*?(?=<!-- end of criteria -->)", re.S)


def main() -> None:
    PAGE.write_text(page(catalogue()), encoding="utf-8")
    README.write_text(BLOCK.sub(lambda _: short(catalogue()["criteria"]), README.read_text("utf-8")), encoding="utf-8")


def page(shelves: dict[str, Rows]) -> str:
    """The whole page: a table for every shelf."""
    parts = [
        "# Methods\n\nMade by `python benchmarks/methods_page.py` from the classes; `blockpruner list` says the same."
    ]
    parts += [
        f"## {title.capitalize()}\n\n{INTRO[title]}\n\n{markdown(rows).strip()}" for title, rows in shelves.items()
    ]
    return "\n\n".join(parts) + "\n"


def short(criteria: Rows) -> str:
    """The columns that fit a README."""
    return markdown([{key: row[key] for key in ("name", "title", "needs", "passes")} for row in criteria])


if __name__ == "__main__":
    main()
