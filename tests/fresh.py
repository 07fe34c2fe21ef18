"""Fresh Python processes that load checkpoints as their users would, with this package or without it.

    python -P fresh.py WAY RESULTS.safetensors NAME=FOLDER...

WAY: `stock` (no code of the checkpoint, and this package cannot be imported), `remote` (the same with
trust_remote_code=True), `import first` and `import later` (this package before or after transformers).
"""

import os
import subprocess
import sys
import textwrap
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any


class Absent(MetaPathFinder):
    """Makes this package look as if it was not installed."""

    def find_spec(self, fullname, path, target=None):
        if fullname.partition(".")[0] == "blockpruner":
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)
        return None


def load_checkpoints(way: str, folders: dict[str, Path], scratch: Path):
    """name -> what a fresh process makes of the checkpoint: logits, those of generation `cached` and `plain`; `saved`.

    `saved` is the folder where the process has saved it again, from a model that it had saved and loaded once more.
    """
    from safetensors.torch import load_file

    made = scratch / "results.safetensors"
    done = _run([__file__, way, str(made), *(f"{name}={folder}" for name, folder in folders.items())], scratch)
    assert done.returncode == 0, done.stderr[-3000:]
    results: dict[str, dict] = {name: {"saved": scratch / name / "twice"} for name in folders}
    for key, tensor in load_file(made).items():
        name, _, what = key.rpartition("/")
        results[name][what] = tensor
    return results


def run_script(script: str, *arguments: object, scratch: Path, blocked: bool = True) -> subprocess.CompletedProcess:
    """Run `script` in a fresh process; `blocked`: this package cannot be imported there."""
    block = "import sys, fresh\nsys.meta_path.insert(0, fresh.Absent())\n" if blocked else ""
    return _run(["-c", block + textwrap.dedent(script), *map(str, arguments)], scratch)


def _run(command: list[str], scratch: Path) -> subprocess.CompletedProcess:
    places = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(scratch / "modules"),
        "PYTHONPATH": os.pathsep.join(filter(None, places)),
    }
    return subprocess.run(
        [sys.executable, "-P", *command], env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )


def main(way: str, made: str, *checkpoints: str) -> None:
    if way in ("stock", "remote"):
        sys.meta_path.insert(0, Absent())
    if way == "import first":
        import blockpruner
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    if way == "import later":
        import blockpruner  # noqa: F401
    torch.set_num_threads(1)  # fastest for tiny models
    results = {}
    for checkpoint in checkpoints:
        name, _, folder = checkpoint.partition("=")
        for again in ("once", "twice"):
            loader: Any = AutoModelForCausalLM
            model, info = loader.from_pretrained(folder, trust_remote_code=way == "remote", output_loading_info=True)
            assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), (name, info)
            folder = Path(made).parent / name / again
            model.save_pretrained(folder)
        results |= {f"{name}/{what}": tensor for what, tensor in computed(model).items()}
    if way in ("stock", "remote"):
        assert "blockpruner" not in sys.modules
    save_file(results, made)


def computed(model) -> dict:
    """Logits of some random tokens; logits along greedy generation from left-padded prompts, with and without cache."""
    import torch

    ids = torch.randint(3, model.config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(11))
    attention = torch.ones_like(ids[:, :12])
    attention[0, :3] = 0
    options = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with torch.no_grad():
        found = {"logits": model.eval()(ids).logits}
        for what, use_cache in (("cached", True), ("plain", False)):
            made = model.generate(ids[:, :12], attention_mask=attention, use_cache=use_cache, **options)
            found[what] = torch.stack(made.logits)
    return {what: tensor.float().contiguous() for what, tensor in found.items()}


if __name__ == "__main__":
    main(*sys.argv[1:])
