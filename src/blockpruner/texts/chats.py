"""Chats as text: what a model's own chat template makes of the messages of a record.

A record's messages are a list of objects with `role` and `content`, or with `from` and `value` as ShareGPT has them,
whose `human` is the user and `gpt` the assistant. Templates come with checkpoints and are programs: transformers runs
them in a sandbox without access to Python.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from blockpruner.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, str]
Render = Callable[[Sequence[Message]], str]

_ROLES = {"human": "user", "gpt": "assistant"}
_OTHER_TEXT = "name a column that holds text with --column"


class Chat(str):
    """A document as a chat template makes it: special tokens in it are tokens, not text."""


def no_template(messages: Sequence[Message]) -> str:
    """The `Render` of those who have no tokenizer."""
    raise InputError("a chat is formatted by a model's template, and there is none", fix=_OTHER_TEXT)


def template_of(tokenizer: "PreTrainedTokenizerBase") -> Render:
    """The chat template of a tokenizer, without the beginning-of-sequence token it puts first: where that stands is a
    policy of `calibration`. InputError, when it is used, for tokenizers without one, and for chats that it refuses."""

    def render(messages: Sequence[Message]) -> str:
        if not hasattr(tokenizer, "is_fast") or not tokenizer.chat_template:
            raise InputError("the model's tokenizer has no chat template", fix=_OTHER_TEXT)
        try:
            found = tokenizer.apply_chat_template([dict(each) for each in messages], tokenize=False)
        except Exception as error:  # templates are programs, and raise whatever they like
            raise InputError(f"the chat template refuses it: {error}", fix="mend that record") from error
        assert isinstance(found, str)
        return found.removeprefix(str(tokenizer.bos_token or ""))

    return render


def chat(value: Sequence[Any], where: str, render: Render) -> Chat:
    """The text of one list of messages; InputError, naming `where`, if it is none or cannot be formatted."""
    messages = [_message(each, f"{where}, message {number}") for number, each in enumerate(value)]
    if not messages:
        raise InputError(f"{where} holds no message", fix="leave that record out")
    try:
        return Chat(render(messages))
    except InputError as error:
        raise InputError(f"{where}: {error.what}", fix=error.fix) from error


def _message(value: Any, where: str) -> Message:
    match value:
        case {"role": str(role), "content": str(content)} | {"from": str(role), "value": str(content)}:
            return {"role": _ROLES.get(role, role), "content": content}
        case _:
            pass
    raise InputError(
        f"{where} is not a role and its content, both as text",
        fix='give messages like {"role": "user", "content": "..."}, or another --column',
    )
