"""The command line: one subcommand per verb, in `commands/`. Results go to stdout, everything else to stderr.

Exit codes are in `exits`.
"""

import logging
import os
import sys

from blockpruner.command import app
from blockpruner.commands import explaining, finding, making, telling, weighing
from blockpruner.exits import catch_signals

VERBS = (finding, making, telling, explaining, weighing)  # registered with the app when they are imported


def main() -> None:
    """Entry point of the console script."""
    catch_signals()
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    app()
