"""What a shell gets: results on stdout, all else on stderr, exit codes, and a next step for every mistake."""

import ast
import inspect
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main

from blockpruner import cli, command, demo, exits, planning, recipe
from blockpruner.artifacts import run_folder, write_json
from blockpruner.commands import finding, telling
from blockpruner.console import say
from blockpruner.criteria import CRITERIA
from blockpruner.errors import CheckFailedError
from blockpruner.evaluation.quality import Evaluation
from blockpruner.loading import models
from blockpruner.loading.models import load
from blockpruner.objectives import OBJECTIVES
from blockpruner.options import Loading
from blockpruner.plan import Plan
from blockpruner.searches import SEARCHES
from blockpruner.subject import open_subject
from blockpruner.surgery import checkpoint as checkpoints

APP: Any = typer.main.get_command(cli.app)
FLOAT32 = ("--dtype", "float32", "--device", "cpu")


@pytest.fixture(scope="module")
def subject(checkpoint):
    return open_subject(load(str(checkpoint), dtype="float32", device="cpu"))


@pytest.fixture
def opened(monkeypatch, subject, checkpoint):
    """Spares the loading, of which the tests of `models` and `anatomy` have more to say."""
    for verbs in (command, *cli.VERBS):
        monkeypatch.setattr(verbs, "opened", lambda *_: say("loading") or subject, raising=False)


@pytest.fixture
def search(run, checkpoint, prose):
    """Runs `search` with the options of a small one, and those given beside or instead."""

    def call(*flags, **options):
        named = {"target": "blocks=2", "calibration": prose, "tokens": 96, "window": 16, "run": "found"}
        named |= {"dtype": "float32", "device": "cpu", **options}
        words = [word for name, value in named.items() if value is not None for word in (f"--{name}", value)]
        return run("search", checkpoint, *words, *flags)

    return call


@pytest.fixture(scope="module")
def plan_file(subject, prose, tmp_path_factory):
    """The plan of attention.2 and one more block."""
    task = planning.prepare(subject, target="blocks=2", calibration=str(prose), tokens=96, window=16)
    planning.find_plan(task, tmp_path_factory.mktemp("plan"))
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    planning.find_plan(task).save(path)
    return path


def test_all_tokens_of_a_text_can_be_asked_for(search, opened, prose):
    plan = json.loads(search("--json", tokens="all", target="blocks=1", run="all").out)
    assert plan["calibration"]["tokens"] > 96


def test_the_run_folder_of_a_search_cannot_lie_in_the_model(search, checkpoint):
    before = sorted(Path(checkpoint).iterdir())
    done = search(run=Path(checkpoint, "run"))
    assert done.code == 2
    assert "lies in the source model" in done.err
    assert sorted(Path(checkpoint).iterdir()) == before


def test_inspect_lists_every_block(run, checkpoint):
    done = run("inspect", checkpoint, *FLOAT32)
    assert done.code == 0
    for layer in range(4):
        assert f"model.layers.{layer}.self_attn" in done.out
        assert f"model.layers.{layer}.mlp" in done.out
    assert "8 blocks, all proved" in done.out
    assert "Key/value cache: 512 bytes per token in float32" in done.out
    assert "model.layers: an mlp and the next attention, removed together, leave a stock model" in done.out
    assert "A recovery can fold a map into 8 of 8 blocks (replaceme).\n" in done.out
    assert done.err == f"loading {checkpoint}\n"


def test_inspect_as_json_has_all_of_it(run, opened, subject, checkpoint):
    value = json.loads(run("inspect", checkpoint, "--json").out)
    assert value["model"] == subject.identity.model_dump()
    assert value["dtype"] == "float32"
    assert value["stacks"] == [{"name": "", "path": "model.layers", "layers": 4, "serial": True}]
    assert [entry["block"] for entry in value["blocks"]] == list(map(str, subject.anatomy.parts))
    attention = value["blocks"][2]
    assert attention["path"] == "model.layers.1.self_attn"
    assert attention["leaves_with_it"] == ["model.layers.1.input_layernorm"]
    assert attention["parameters"] == 2 * 32 * 32 + 2 * 32 * 16 + 32
    assert attention["cache_bytes_per_token"] == 128
    assert 0 < attention["compute_share"] < value["blocks"][3]["compute_share"] < 1
    assert isinstance(attention["kind_known_by"], str)
    assert [entry["fold_obstacle"] for entry in value["blocks"]] == [None] * 8


def test_search_prints_the_plan_says_the_price_and_the_next_command(search, checkpoint):
    done = search()
    assert done.code == 0
    assert "price: 16 evaluations of 6 windows x 16 tokens; about " in done.err
    assert "(dense)" in done.out
    assert "attention.2" in done.out
    assert "next best behind by" in done.out
    said = done.err.splitlines()
    assert said[-3].startswith("spent: ")
    assert "1.00 of the head-tokens that were said; " in said[-3]
    assert said[-2] == "plan: found/plan.json (the target is reached)"
    assert said[-1] == f"next: blockpruner prune {checkpoint} --plan found/plan.json --out found/model"
    assert {path.name for path in Path("found").iterdir()} == {".lock", "journal.jsonl", "plan.json", "price.json"}


def test_the_price_of_a_search_that_a_loss_ends_is_an_upper_bound(search, opened):
    done = search("--dry-run", "--target", "loss=+0.01")
    assert done.code == 0
    assert "price: at most " in done.err


def test_the_next_command_opens_the_model_as_this_one_did(search, checkpoint):
    done = search("--allow-pickle", "--allow-remote-code", "--search", "exhaustive", "--recovery", "bias")
    again = f"{checkpoint} --allow-remote-code --allow-pickle"
    assert f"next: blockpruner prune {again} --plan found/plan.json --out found/model" in done.err
    assert f"or: blockpruner recover found/plan.json --dense {again} --method bias --calibration" in done.err
    assert Loading(revision="main", device="cpu").again() == ["--revision", "main"]


def test_search_as_json_is_the_plan_and_nothing_else(search, opened):
    done = search("--json")
    assert json.loads(done.out) == json.loads(Path("found/plan.json").read_text())


@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_a_dry_run_says_the_price_and_writes_nothing(search, opened, flags):
    done = search("--dry-run", *flags)
    assert done.code == 0
    assert "price: 16 evaluations" in done.err
    assert not list(Path.cwd().iterdir())
    if flags:
        price = json.loads(done.out)
        assert price.pop("seconds") >= 0
        assert price["evaluations"] == 16
        assert price["work"]["head_tokens"] == 16 * 6 * 15
        assert price["traffic"]["spilled"] == 0
        assert price["memory"] > 0
        assert price["passes"] == 0, "greedy ranks nothing"
    else:
        assert done.out == ""


def test_prune_writes_a_checkpoint_with_its_plan_that_evaluate_sets_beside_the_model(run, checkpoint, prose, plan_file):
    whole: Any = Plan.load(plan_file)
    done = run("prune", checkpoint, "--plan", plan_file, "--first", 1, "--out", "cut")
    assert done.code == 0
    total = whole.model.parameters
    assert f"cut: stand-ins checkpoint, {total - 3104:,} of {total:,} parameters (-5.4%)" in done.out
    assert "reloaded in a fresh process: logits differ by at most " in done.out
    assert Plan.load(Path("cut/plan.json")).steps == whole.steps[:1]

    words = ("evaluate", checkpoint, "cut", "--data", prose, "--tokens", 96, "--window", 16, *FLOAT32)
    table = run(*words)
    assert table.code == 0
    assert "cut writes: '" in table.out
    assert f"{checkpoint} writes: '" in table.out
    assert "different tokens" not in table.out
    done = run(*words, "--prompt", "", "--json", "--run", "results")
    value = json.loads(done.out)
    assert value == json.loads(Path("results/evaluation.json").read_text())
    dense, cut = value["contestants"]
    assert (dense["name"], cut["name"]) == (str(checkpoint), "cut")
    assert dense["loss"]["value"] == pytest.approx(whole.dense_loss.value, abs=1e-6)
    assert cut["loss"]["value"] == pytest.approx(whole.steps[0].loss.value, abs=1e-6)
    assert (dense["parameters"], cut["parameters"]) == (total, total - 3104)
    assert (dense["cache_bytes"], cut["cache_bytes"]) == (512, 384)
    assert (dense["sample"], cut["sample"]) == (None, None)


def test_prune_as_json_says_form_parameters_and_difference(run, checkpoint, plan_file, monkeypatch):
    monkeypatch.setattr(checkpoints, "reload_difference", lambda *_, **__: 0.25)
    done = run("prune", checkpoint, "--plan", plan_file, "--out", "zeros", "--zeroed", "--json")
    value = json.loads(done.out)
    size = value.pop("weight_bytes")
    assert size > 4 * value["parameters"]
    whole: Any = Plan.load(plan_file)
    assert value == {
        "folder": "zeros",
        "form": "zeroed",
        "parameters": whole.model.parameters,
        "difference": 0.25,
    }
    assert Plan.load(Path("zeros/plan.json")) == whole


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_prune_keeps_the_dtype_that_is_stored(run, subject, tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(checkpoints, "reload_difference", lambda *_, **__: 0.0)
    stored = load(str(subject.folder), dtype=dtype, device="cpu")
    stored.model.save_pretrained(tmp_path / "stored")
    write_json(tmp_path / "plan.json", {"format": "blockpruner.plan", "version": 1, "steps": [{"remove": ["mlp.1"]}]})
    done = run("prune", tmp_path / "stored", "--plan", tmp_path / "plan.json", "--out", "cut")
    assert done.code == 0
    assert json.loads(Path("cut/config.json").read_text())["dtype"] == dtype


def test_demo_does_the_whole_job_and_fails_where_random_is_as_good(run, checkpoint, prose, monkeypatch):
    monkeypatch.setattr(demo, "load", lambda _name, dtype: load(str(checkpoint), dtype=dtype, device="cpu"))
    changes = {"CALIBRATION": str(prose), "HELD_BACK": str(prose), "WINDOW": 16, "SEARCH_TOKENS": 96}
    changes |= {"EVALUATION_TOKENS": 480, "BLOCKS": 3, "RANDOM_PLANS": 12}
    for name, value in changes.items():
        monkeypatch.setattr(demo, name, value)
    done = run("demo", "--run", "demo", "--dtype", "float32")
    assert done.code == 0, done.err
    assert {path.name for path in Path("demo").iterdir()} >= {"journal.jsonl", "plan.json", "evaluation.json", "model"}
    assert "nats less than the mean of 12 random removals of as many blocks (at least " in done.out
    evaluation = Evaluation.load(Path("demo/evaluation.json"))
    contestants = {entry.name: entry for entry in evaluation.contestants}
    assert list(contestants) == ["dense", "pruned", *(f"random {seed}" for seed in range(12))]
    assert all(entry.removed.count("+") == 2 for entry in evaluation.contestants[1:])
    again = run("demo", "--run", "demo", "--dtype", "float32")
    assert again.code == 0, again.err
    assert Evaluation.load(Path("demo/evaluation.json")) == evaluation

    worst = max(evaluation.contestants, key=lambda entry: entry.loss.value)
    others = [entry for name, entry in contestants.items() if name != "pruned"]
    with pytest.raises(CheckFailedError, match="not more than 3 standard errors"):
        demo._check(Evaluation.of([worst.model_copy(update={"name": "pruned"}), *others], evaluation.data))


def test_list_says_what_can_be_asked_for(run):
    done = run("list")
    assert done.code == 0
    for name in ("exhaustive", "random", "attention", "stock", "greedy", "params=-25%", "shapley"):
        assert name in done.out
    value = json.loads(run("list", "--json").out)
    names = {shelf: [row["name"] for row in rows] for shelf, rows in value.items()}
    assert (names["objectives"], names["criteria"]) == (list(OBJECTIVES), list(CRITERIA))
    assert names["searches"] == list(SEARCHES)
    assert names["recipes"] == recipe.names()
    assert set(names["moves"]) == {"block", "attention", "mlp", "layer", "stock", "span=N"}


def test_the_version_is_that_of_the_package(run):
    from importlib.metadata import version

    assert run("--version").out == version("blockpruner") + "\n"


@pytest.mark.parametrize("name", APP.commands)
def test_help_ends_with_an_example_whose_options_there_are(run, name):
    done = run(name, "--help")
    assert done.code == 0
    command = APP.commands[name]
    example = command.epilog.removeprefix("Example: ")
    assert example in " ".join(done.out.split())
    program, verb, *words = shlex.split(example)
    assert (program, verb) == ("blockpruner", name)
    assert not command.make_context(name, words).args
    for parameter in command.params:
        assert getattr(parameter, "help", None), f"{name}: {parameter.name} has no help"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("search", "--search", "gredy"), "'gredy' is not a known search"),
        (("search", "--search", "greedy:foo=1"), "the search 'greedy' has no option 'foo'"),
        (("search", "--criterion", "cosin"), "'cosin' is not a known criterion"),
        (("search", "--criterion", "no.json"), "cannot read no.json"),
        (("search", "--objective", "los"), "'los' is not a known objective"),
        (("search", "--moves", "blok"), "'blok' is not a known kind of move"),
        (("search", "--tokens", "abc"), "--tokens abc is no number of tokens"),
        (("search", "--tokens", "0"), "--tokens 0 is no number of tokens"),
        (("search", "--bos", "wat"), "'wat' is no BOS policy"),
        (("search", "--device-spec", "l5"), "l5"),
        (("score", "--objective", "los"), "'los' is not a known objective"),
        (("score", "--moves", "blok"), "'blok' is not a known kind of move"),
        (("score", "--removed", "blok"), "blok"),
        (("score", "--bos", "wat"), "'wat' is no BOS policy"),
        (("explain", "--bos", "wat"), "'wat' is no BOS policy"),
        (("explain", "--tokens", "0"), "--tokens 0 is no number of tokens"),
        (("explain", "--criteria", "cosin"), "'cosin' is not a known criterion"),
        (("recover", "--bos", "wat"), "'wat' is no BOS policy"),
        (("evaluate", "--bos", "wat"), "'wat' is no BOS policy"),
        (("pareto", "--tokens", "0"), "--tokens 0 is no number of tokens"),
        (("pareto", "--plot", "x.nope"), "x.nope would be a PNG\n  next: name it so: x.png"),
    ],
    ids=" ".join,
)
def test_what_is_wrong_whatever_the_model_is_said_before_it_is_loaded(run, words, said):
    verb, *options = words
    text = ("--calibration", "builtin")
    plan = Path("plan.json")
    write_json(plan, {"format": "blockpruner.plan", "version": 1, "steps": []})
    begun = {
        "search": ("model", "--target", "blocks=1", *text),
        "score": ("model", "--criterion", "deepest", *text),
        "explain": (plan, "--model", "model"),
        "recover": (plan, "--dense", "model", "--method", "bias", "--out", "out", *text),
        "evaluate": ("model", "--data", "builtin"),
        "pareto": (plan, "--model", "model"),
    }
    done = run(verb, *begun[verb], *options)
    assert done.code == 2
    assert done.err.startswith("error: ")
    assert said in done.err


def test_a_command_that_is_misspelt_is_guessed(run):
    done = run("serch")
    assert done.code == 2
    assert "Did you mean 'search'" in done.err


@pytest.mark.parametrize(
    ("options", "what", "fix"),
    [
        ({"moves": "atention"}, "'atention' is not a known kind of move", "did you mean 'attention'?"),
        ({"search": "gready"}, "'gready' is not a known search", "did you mean 'greedy'?"),
        ({"search": "randon"}, "'randon' is not a known search", "did you mean 'random'?"),
        ({"search": "random:sed=1"}, "'random' has no option 'sed'", "did you mean 'seed'?"),
        ({"objective": "los"}, "'los' is not a known objective", "did you mean 'loss'?"),
        ({"target": "6"}, "'6' is not a target", "write blocks=6, layers=3, params=-25%"),
        ({"target": "params=25%"}, "'params=25%' is not a target", "write blocks=6, layers=3 or params=-25%"),
        ({"target": "blocks=0"}, "'blocks=0' is not a target", "above zero"),
        ({"target": "blocks=9"}, "blocks=9 is more than there is", "ask for blocks=8 or less"),
        ({"target": "layers=1"}, "layers=1 counts moves of whole layers", "use --moves layer or --moves stock"),
        ({"protect": "4"}, "'4' is not a layer of this model", "name layers 0 to 3"),
        ({"bos": "first"}, "'first' is no BOS policy", "use auto, stream, window or none"),
        (
            {"window": "65"},
            "windows of 65 tokens are longer than the model's context of 64",
            "choose --window 64 or less",
        ),
        ({"tokens": "100000"}, "prose.txt is too short", "ask for fewer or shorter windows"),
        ({"calibration": "alpacca"}, "'alpacca' is no source of text", "alpaca, wikitext2 or builtin"),
        ({"split": "test"}, "prose.txt has no split to choose", "leave the split 'test' out"),
        ({"window": "1"}, "'--window'", "blockpruner search -h"),
        ({"tokens": "many"}, "--tokens many is no number of tokens", "a whole number above 0, or all"),
        ({"target": None}, "'--target'", "blockpruner search -h"),
    ],
    ids=lambda value: ",".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_a_wrong_option_of_search_is_named_with_what_to_do(search, opened, options, what, fix):
    done = search(**options)
    assert done.code == 2
    assert what in done.err
    assert fix in done.err
    assert done.out == ""
    assert not list(Path.cwd().iterdir())


@pytest.mark.parametrize(
    ("options", "code", "what", "fix"),
    [
        (("--dtype", "float8"), 2, "'float8' is no dtype", "give auto, stored, float32, bfloat16, float16"),
        (("--device", "gpu"), 2, "'gpu' is no device", "give auto, cpu, cuda or mps"),
        (("--device", "cuda:7"), 4, "this machine has no 'cuda:7'", "give auto or cpu"),
    ],
)
def test_a_dtype_or_device_that_is_not_there_is_named(run, checkpoint, options, code, what, fix):
    done = run("inspect", checkpoint, *options)
    assert done.code == code
    assert what in done.err
    assert fix in done.err


def test_a_model_that_is_not_there_is_named(run, monkeypatch):
    done = run("inspect", "no/such/folder")
    assert done.code == 2
    assert "there is no model 'no/such/folder'\n  next: give a folder, a .gguf file, a hub name, or `demo`" in done.err


@pytest.fixture
def prune(run, opened, checkpoint):
    """Runs `prune` with a plan of the given steps."""

    def call(*options, steps=("mlp.1", "attention.3"), out="cut", **entries):
        plan = {"format": "blockpruner.plan", "version": 1, "steps": [{"remove": [name]} for name in steps], **entries}
        write_json(Path("plan.json"), plan)
        return run("prune", checkpoint, "--plan", "plan.json", "--out", out, *options)

    return call


def refused(done, what, fix):
    assert done.code == 2
    assert done.out == ""
    assert what in done.err
    assert fix in done.err
    assert not Path("cut").exists()


def test_a_plan_that_cannot_be_used_is_refused(prune, run, checkpoint):
    refused(run("prune", checkpoint, "--plan", "gone.json", "--out", "cut"), "gone.json is not a file", "`blockpruner")
    refused(prune(steps=["mlp.7"]), "plan.json names blocks this model does not have: mlp.7", "layers 0 to 3")
    refused(prune(steps=["mlp.1", "mlp.1"]), "mlp.1 is removed twice", "next: ")
    refused(prune(version=99), "plan.json is blockpruner.plan version 99", "pip install --upgrade")
    refused(prune("--first", 3), "the first 3 steps were asked for, and the plan has 2", "ask for 1 to 2")
    refused(prune("--first", 0), "the first 0 steps", "ask for 1 to 2")
    refused(prune("--first", 1, nested=False), "are no plan", "use the whole plan")
    other = {"name": "other", "model_type": "llama", "parameters": 5, "fingerprint": "ab" * 32}
    refused(prune(model=other), "plan.json was made for other (llama, 5 parameters", "search again for this model")


def test_a_place_or_form_that_cannot_be_is_refused(prune, checkpoint):
    refused(prune("--form", "stok"), "'stok' is not a known form of checkpoint", "did you mean 'stock'?")
    refused(prune("--form", "stock"), "what this plan leaves has no stock form", "--moves stock")
    refused(prune(out=checkpoint / "cut"), "lies in the source model", "write to a folder outside the source")
    refused(prune(out="."), ". already exists", "name a new folder")
    assert not (checkpoint / "cut").exists()


def test_a_run_folder_in_use_or_begun_otherwise_is_exit_code_5(search, opened):
    with run_folder(Path("found")):
        busy = search()
    assert busy.code == 5
    assert f"found is in use by process {os.getpid()} on " in busy.err
    assert search().code == 0
    other = search(seed=1)
    assert other.code == 5
    assert "seed: 0 -> 1" in other.err
    assert "go back to those inputs, or name another run folder" in other.err


def test_a_bug_of_ours_keeps_its_traceback_in_a_file(run, monkeypatch, tmp_path):
    monkeypatch.setattr(exits.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(telling, "print_json", lambda _: {}["boom"])
    done = run("list", "--json")
    assert done.code == 1
    (file,) = tmp_path.glob("blockpruner-*.txt")
    assert done.err == f"error: a bug in blockpruner; the traceback is in {file}\n  next: report it with that file\n"
    kept = file.read_text().splitlines()
    assert kept[0] == "blockpruner list --json"
    assert kept[-1] == "KeyError: 'boom'"


def test_a_full_disk_under_the_results_is_the_machines_fault_and_not_a_bug():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "blockpruner", "list"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.stderr.startswith("error: No space left on device\n  next: free space")
    assert done.stderr.count("\n") == 2
    assert done.returncode == 4


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("CUDA out of memory."), RuntimeError("can't allocate memory: you tried")]
)
def test_too_little_memory_is_the_machines_fault_and_not_a_bug(run, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(models, "load", fail)
    done = run("inspect", "demo")
    assert done.code == 4
    assert done.err.endswith(
        "error: not enough memory\n  next: use a smaller --window, --dtype bfloat16, or a smaller model\n"
    )


def test_ctrl_c_says_the_command_to_go_on_with(run, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(finding, "opened", fail)
    done = run("inspect", "my model")
    assert done.code == 130
    assert done.err == "interrupted\nresume with: blockpruner inspect 'my model'\n"


def test_a_reader_that_has_seen_enough_is_no_error():
    for words in (["list"], ["list", "--json"]):
        command = [sys.executable, "-m", "blockpruner", *words]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout
            assert process.stderr
            process.stdout.close()
            assert process.stderr.read() == ""
        assert process.returncode == 0


QUICK = """
import sys
from blockpruner.cli import main
for words in (["--help"], ["search", "--help"], ["--version"], ["list"]):
    sys.argv[1:] = words
    try:
        main()
    except SystemExit as ended:
        assert not ended.code, words
    heavy = {"torch", "transformers", "numpy", "huggingface_hub"} | ({"rich"} if words != ["list"] else set())
    assert heavy.isdisjoint(sys.modules), words
"""


def test_help_version_and_list_are_quick_because_they_import_nothing_heavy():
    done = subprocess.run([sys.executable, "-c", QUICK], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_verb_imports_torch_only_when_it_runs():
    light = {"command", "console", "errors", "exits", "options"}
    for verbs in cli.VERBS:
        tree = ast.parse(inspect.getsource(verbs))
        imported = {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
        ours = {name.removeprefix("blockpruner.") for name in imported if name and name.startswith("blockpruner")}
        assert ours <= light, verbs
