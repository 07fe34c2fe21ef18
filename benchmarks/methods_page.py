"""docs/methods.md and the tables of criteria and recoveries in the README, made from the classes themselves.

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
    "recoveries": "`recover --method`. n: number of places where blocks were removed.",
    "recipes": "`run RECIPE --model MODEL`: what a paper did, by name.",
    "moves": "`--moves`: what is removed together.",
    "targets": "`--target`: when enough is removed.",
}
IN_README = ("criteria", "recoveries")


def main() -> None:
    shelves = catalogue()
    PAGE.write_text(page(shelves), encoding="utf-8")
    text = README.read_text(encoding="utf-8")
    for name in IN_README:
        text = block(name).sub(lambda _, rows=shelves[name]: short(rows), text)
    README.write_text(text, encoding="utf-8")


def block(name: str) -> re.Pattern[str]:
    """Where the README has the table of a shelf."""
    return re.compile(
        rf"(?<=<!-- {name}: made by benchmarks/methods_page.py -->\n).*?(?=<!-- end of {name} -->)", re.DOTALL
    )


def page(shelves: dict[str, Rows]) -> str:
    """The whole page: a table for every shelf."""
    parts = [
        "# Methods\n\nMade by `python benchmarks/methods_page.py` from the classes; `blockpruner list` says the same."
    ]
    parts += [
        f"## {title.capitalize()}\n\n{INTRO[title]}\n\n{markdown(rows).strip()}" for title, rows in shelves.items()
    ]
    return "\n\n".join(parts) + "\n"


def short(rows: Rows) -> str:
    """The columns that fit a README."""
    return markdown([{key: row[key] for key in ("name", "title", "needs", "passes")} for row in rows])


if __name__ == "__main__":
    main()
