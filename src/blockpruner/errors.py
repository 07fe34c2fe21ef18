"""The few exceptions of blockpruner: each names the thing, the reason and the next step, and carries its exit code."""

import re


class BlockprunerError(Exception):
    """Base of all expected failures; `exit_code` is what the command line returns.

    what: names the thing and the reason, one sentence; fix: the next step, an imperative sentence.
    """

    exit_code = 1

    def __init__(self, what: str, *, fix: str) -> None:
        super().__init__(what, fix)
        self.what = what
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.what}\n  next: {self.fix}"


class InputError(BlockprunerError):
    """A file, a name, an option or a model that cannot be used as given (exit 2)."""

    exit_code = 2


class UnsupportedModelError(InputError):
    """The anatomy of this model could not be proved, so nothing of it may be removed (exit 2)."""


class CheckFailedError(BlockprunerError):
    """Something was done, looked at again, and is not what it should be (exit 3)."""

    exit_code = 3


class MachineError(BlockprunerError):
    """The machine lacks something: disk, memory, an optional package (exit 4)."""

    exit_code = 4


class RunFolderError(BlockprunerError):
    """The run folder is held by another process, or was begun with other inputs (exit 5)."""

    exit_code = 5


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory ran out; torch raises plain RuntimeErrors for it on the CPU."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text


def system_error(error: BaseException) -> int | None:
    """The number of what the system refused, if that is what `error` is; libraries in Rust have it in their text."""
    if isinstance(error, OSError):
        return error.errno
    said = None if isinstance(error, BlockprunerError) else re.search(r"\(os error (\d{1,4})\)", str(error))
    return int(said[1]) if said else None


def missing_extra(package: str, extra: str, purpose: str) -> MachineError:
    """The error for an optional package that is not installed; says the install command."""
    return MachineError(
        f"{purpose} needs the package {package!r}, which is not installed",
        fix=f"pip install 'blockpruner[{extra}]'",
    )
