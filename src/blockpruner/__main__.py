"""The command line as `python -m blockpruner`."""

from blockpruner.cli import main

if __name__ == "__main__":
    main()
