"""The one training loop: AdamW on some numbers or all, judged by held-out text, and resumed to the same bits.

Which windows a step sees, and its noise, depend on (seed, step) alone, so a checkpoint is the numbers, AdamW's two
moments of each, and the step. Sums are made in the masters: float32 copies of what the model computes with, where that
is narrower. Checkpoints are written at every look at the held-out text; of these the newest and the best stay, also
where none is as good as the beginning, so that what was trained can still be taken by force.
"""

import contextlib
import hashlib
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from blockpruner.artifacts import new_folder, write_bytes
from blockpruner.errors import CheckFailedError, RunFolderError
from blockpruner.repairs.courses import Course, Trace, rates, rows_of, windows_of_step
from blockpruner.repairs.recovery import Judged

MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # as AdamW calls them; none for what no gradient has reached yet


def train(course: Course) -> Trace:
    """Train, and leave the values at the best step; where that is 0, they are whatever came last.

    With a folder a killed training goes on from its last checkpoint, to the same bits on the same machine's CPU.
    Memory: the masters (where the values are not those), their gradients and two moments; without a folder, the best
    values so far as well. RunFolderError where the folder is of another training; CheckFailedError where the loss stops
    being finite.
    """
    return _Loop(course).run()


class _Loop:
    def __init__(self, course: Course) -> None:
        self.course, self.options = course, course.options
        self.steps = self.options.steps(len(course.examples), course.examples.tokens)
        self.rate = rates(self.options, self.steps)
        self.masters = {name: nn.Parameter(self._master(number.value)) for name, number in course.numbers.items()}
        matrices = [master for master in self.masters.values() if master.ndim > 1]
        others = [master for master in self.masters.values() if master.ndim < 2]  # gains and biases: not towards 0
        self.optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": self.options.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=self.options.lr,
            betas=(0.9, self.options.beta2),
        )
        self.kept: dict[str, Tensor] = {}  # the best values, where there is no folder
        self.trace = Trace(format=Trace.FORMAT, version=Trace.VERSION, identity=self._identity(), step=0, curve=())

    def _master(self, value: Tensor) -> Tensor:
        wide = torch.float32 if self.options.masters == "float32" else value.dtype
        return value.detach().to(torch.promote_types(wide, value.dtype))

    def run(self) -> Trace:
        self._resume()
        looks = self.options.looks(self.steps)
        if not self.trace.curve:
            self._look()
        while self.trace.step < self.steps and not self._tired():
            self._step(self.trace.step)
            self.trace = self.trace.model_copy(update={"step": self.trace.step + 1})
            if self.trace.step in looks:
                self._look()
            last = self.trace.curve[-1].loss
            said = "not finite" if last is None else f"{last:.4f}"
            self.course.report(self.trace.step, self.steps, f"training, held-out loss {said}")
        self._to_best()
        return self.trace

    def _step(self, step: int) -> None:
        """One step of AdamW along the gradient of the mean loss over all that its windows predict."""
        chosen = windows_of_step(self.options, self.course.examples, step)
        size = self.options.batch
        parts = [rows_of(self.course.examples, chosen[at : at + size]) for at in range(0, len(chosen), size)]
        whole = math.fsum(map(self.course.lesson.weigh, parts)) or 1.0
        self.optimizer.zero_grad()
        total = 0.0
        for number, part in enumerate(parts):
            with self._noise(step, number):
                total += self.course.lesson.backward(part, 1 / whole) / whole
            self._gather()
        if not math.isfinite(total):
            raise CheckFailedError(
                f"the loss is not finite at step {step} of the training",
                fix="take a smaller lr, or load the model in float32 (--dtype float32)",
            )
        if self.options.clip:
            nn.utils.clip_grad_norm_(list(self.masters.values()), self.options.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(step)
        self.optimizer.step()
        self._put()

    @contextlib.contextmanager
    def _noise(self, step: int, part: int) -> Iterator[None]:
        """While the block runs, dropout is on and drawn from (seed, step, part)."""
        device = next(iter(self.course.numbers.values())).value.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(((self.options.seed * 1_000_003 + step) * 4_099 + part) % 2**63)
            self.course.noise(True)
            try:
                yield
            finally:
                self.course.noise(False)

    def _gather(self) -> None:
        """Add the gradients of one pass to those of the masters.

        What nothing went through has zeros if it has moments, and else none, so that no weight decay touches it.
        """
        for name, (parameter, _) in self.course.numbers.items():
            gradient, parameter.grad = parameter.grad, None
            master = self.masters[name]
            if master.grad is None:
                still = torch.zeros_like(master) if self.optimizer.state.get(master) else None
                master.grad = still if gradient is None else gradient.to(master)
            elif gradient is not None:
                master.grad.add_(gradient.to(master))

    def _put(self) -> None:
        """Have the model compute with what the masters are now."""
        with torch.no_grad():
            for name, (_, value) in self.course.numbers.items():
                if value.data_ptr() != self.masters[name].data_ptr():
                    value.copy_(self.masters[name])

    def _look(self) -> None:
        """Judge the numbers by the held-out text, and keep them where they are the best, or all on disk."""
        parts = self.course.held_out.batches(self.course.held_out.tokens * self.options.batch)
        found = [self.course.judge(part) for part in parts]
        loss = math.fsum(value for value, _ in found) / (math.fsum(weight for _, weight in found) or 1.0)
        here = Judged(step=self.trace.step, loss=loss if math.isfinite(loss) else None)
        self.trace = self.trace.model_copy(update={"curve": (*self.trace.curve, here)})
        if not self.trace.step:
            return
        if self.course.folder is not None:
            self._save(self.course.folder)
        elif self.trace.best(self.course.force) == self.trace.step:
            self.kept = {name: master.detach().to("cpu", copy=True) for name, master in self.masters.items()}

    def _tired(self) -> bool:
        best = self.trace.best(self.course.force)
        since = [look for look in self.trace.curve if look.step > best]
        return bool(self.options.patience) and len(since) >= self.options.patience

    def _to_best(self) -> None:
        best = self.trace.best(self.course.force)
        if best in (0, self.trace.step):
            return
        folder = self.course.folder
        self._take(self.kept if folder is None else load_file(_place(folder, best) / "masters.safetensors"))

    def _take(self, values: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, master in self.masters.items():
                master.copy_(values[name])
        self._put()

    def _save(self, folder: Path) -> None:
        """A checkpoint, whole or not at all; then all go that are unfinished, or neither the newest nor the best."""
        with new_folder(_place(folder, self.trace.step)) as aside:
            write_bytes(aside / "masters.safetensors", save({name: m.detach() for name, m in self.masters.items()}))
            for moment in MOMENTS:
                states = {name: self.optimizer.state.get(master) for name, master in self.masters.items()}
                held = {name: state[moment] for name, state in states.items() if state}
                write_bytes(aside / f"{moment}.safetensors", save(held))
            self.trace.save(aside / "trace.json")
        stay = {_place(folder, self.trace.step), _place(folder, self.trace.best(force=True))}
        for old in (*folder.glob("step-*"), *folder.glob(".step-*")):
            if old not in stay:
                shutil.rmtree(old)

    def _resume(self) -> None:
        folder = self.course.folder
        found = sorted(folder.glob("step-*")) if folder else []
        if not found:
            return
        trace = Trace.load(found[-1] / "trace.json")
        if trace.identity != self.trace.identity:
            raise RunFolderError(
                f"{folder} is of another training (other options, text, plan, model or start)",
                fix="name another --run, or remove that folder",
            )
        self.trace = trace
        moments = {moment: load_file(found[-1] / f"{moment}.safetensors") for moment in MOMENTS}
        for name in moments["step"]:
            held = {moment: values[name].to(self.masters[name].device) for moment, values in moments.items()}
            self.optimizer.state[self.masters[name]] = held | {"step": moments["step"][name]}
        self._take(load_file(found[-1] / "masters.safetensors"))

    def _identity(self) -> str:
        course = self.course
        digest = hashlib.sha256(f"{Trace.VERSION} {course.identity} {self.options!r}".encode())
        digest.update(f" {course.examples.fingerprint} {course.held_out.fingerprint}".encode())
        for name, master in sorted(self.masters.items()):
            flat = master.detach().flatten()
            sample = flat[:: max(1, len(flat) // 64)][:64]
            digest.update(f" {name} {tuple(master.shape)} {sample.tolist()}".encode())
        return digest.hexdigest()


def _place(folder: Path, step: int) -> Path:
    return folder / f"step-{step:09d}"
