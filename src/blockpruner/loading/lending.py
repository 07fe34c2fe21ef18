"""Who hands over a layer's weights: nobody where a model is in memory; else they are there while the layer runs.

A model that is streamed lies in its files, mapped into memory by the kernel. Where it computes in that dtype on the
CPU, this is all: pages are read when a layer wants them and dropped when memory is wanted, and nothing is lent. On
another device, or in another dtype, each layer has its weights made when it is called and given back when it returns;
`at_hand` keeps them for several calls in a row.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class _Lender:
    """Lends one layer its weights; whoever asks while they are lent shares them.

    Who has asked gives back, also where it was refused, as torch's hooks have it; what cannot be lent whole stays.
    """

    def __init__(self, module: nn.Module, device: torch.device, dtypes: Mapping[str, torch.dtype]) -> None:
        self._parameters = [(parameter, dtypes[name]) for name, parameter in module.named_parameters()]
        self._device = device
        self._kept: list[tuple[nn.Parameter, Tensor]] = []
        self.users = 0

    def take(self, *_: Any) -> None:
        self.users += 1
        if self._kept:
            return
        try:
            for parameter, dtype in self._parameters:
                self._kept.append((parameter, parameter.data))
                parameter.data = parameter.data.to(self._device, dtype)
        except BaseException as error:
            self._return()
            self.users -= not isinstance(error, Exception)  # of Ctrl-C torch tells no hook
            raise

    def give_back(self, *_: Any) -> None:
        self.leave(self.users - 1)

    def leave(self, users: int) -> None:
        """So many are left who asked."""
        self.users = users
        if not users:
            self._return()

    def _return(self) -> None:
        while self._kept:
            parameter, data = self._kept.pop()
            parameter.data = data


_lenders: WeakKeyDictionary[nn.Module, _Lender] = WeakKeyDictionary()


def lend(
    model: PreTrainedModel, layers: Iterable[str], device: torch.device, dtypes: Mapping[str, torch.dtype]
) -> None:
    """Have the layers at these paths below `model` work with weights of `dtypes`, by name, on `device`.

    Where they are that already nothing is lent; where not, they are made for each call, and stay what they are
    elsewhere. All else in the model moves to `device` now.
    """
    lent = {path: model.get_submodule(path) for path in layers}
    stay = {id(parameter) for module in lent.values() for parameter in module.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in stay:
            parameter.data = parameter.data.to(device)
    for name, buffer in list(model.named_buffers()):
        path, _, last = name.rpartition(".")
        model.get_submodule(path)._buffers[last] = buffer.to(device)
    for path, module in lent.items():
        own = {name: dtypes[f"{path}.{name}"] for name, _ in module.named_parameters()}
        if device.type == "cpu" and all(p.dtype == own[name] for name, p in module.named_parameters()):
            continue
        lender = _lenders[module] = _Lender(module, device, own)
        module.register_forward_pre_hook(lender.take)
        module.register_forward_hook(lender.give_back, always_call=True)


@contextlib.contextmanager
def at_hand(module: nn.Module) -> Iterator[None]:
    """While the block runs, the weights of a layer are where it computes, made once for all of its calls."""
    lender = _lenders.get(module)
    if lender is None:
        yield
        return
    users = lender.users
    try:
        lender.take()
        yield
    finally:
        lender.leave(users)  # also where Ctrl-C has ended a call


def lends(model: nn.Module) -> bool:
    """Whether the weights of some layer of `model` are lent to it."""
    return any(module in _lenders for module in model.modules())
