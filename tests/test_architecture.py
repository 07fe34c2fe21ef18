"""ARCHITECTURE.md is held to the disk, and the source to the rules that ARCHITECTURE.md states."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockpruner import _HOME

REPO = Path(__file__).parents[1]
PACKAGE = REPO / "src" / "blockpruner"
MAX_LINES = 400


def read_tree() -> dict[str, str]:
    """File -> its line of text, in the order of the fenced tree of ARCHITECTURE.md; folders end with a slash."""
    text = (REPO / "ARCHITECTURE.md").read_text(encoding="utf-8")
    fenced = re.search(r"^```\nsrc/blockpruner/\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert fenced, "ARCHITECTURE.md has no fenced block that begins with src/blockpruner/"
    tree: dict[str, str] = {}
    folders: list[str] = []
    for line in fenced[1].splitlines():
        match = re.fullmatch(r"((?:  )+)(\S+)  +(\S.*)", line)
        assert match, f"not a line of the tree (two blanks a level, name, two blanks or more, text): {line!r}"
        depth = len(match[1]) // 2 - 1
        path = "".join(folders[:depth]) + match[2]
        assert path not in tree, f"{path} stands twice in the tree"
        tree[path] = match[3]
        if path.endswith("/"):
            folders[depth:] = [match[2]]
    return tree


TREE = read_tree()
FILES = [path for path in TREE if not path.endswith("/")]


def module_name(file: str) -> str:
    return ".".join(("blockpruner", *Path(file).with_suffix("").parts)).removesuffix(".__init__")


MODULES = {module_name(file): file for file in FILES if file.endswith(".py")}
on_each_module = pytest.mark.parametrize(
    "file", sorted(p.relative_to(PACKAGE).as_posix() for p in PACKAGE.rglob("*.py"))
)


def parse(file: str) -> ast.Module:
    return ast.parse((PACKAGE / file).read_text(encoding="utf-8"), file)


def calls(file: str) -> Iterator[tuple[ast.Call, str]]:
    """Every call in `file`, with the called expression as text."""
    for node in ast.walk(parse(file)):
        if isinstance(node, ast.Call):
            yield node, ast.unparse(node.func)


def test_the_tree_names_every_file_of_the_package_and_no_other():
    found = {path.relative_to(PACKAGE) for path in PACKAGE.rglob("*") if path.is_file()}
    found = {path for path in found if path.suffix != ".toml"}  # recipes, which are data
    on_disk = {path.as_posix() for path in found if "__pycache__" not in path.parts}
    not_in_the_tree = sorted(on_disk - set(FILES))
    not_on_disk = sorted(set(FILES) - on_disk)
    assert not not_in_the_tree
    assert not not_on_disk


def project_files() -> list[Path]:
    """Every file that git tracks or would add, relative to the checkout."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [Path(name) for name in listed.stdout.split("\0") if name and (REPO / name).is_file()]


def test_every_top_level_folder_has_a_line():
    folders = {f"{path.parts[0]}/" for path in project_files() if len(path.parts) > 1}
    text = (REPO / "ARCHITECTURE.md").read_text(encoding="utf-8")
    unmentioned = sorted(folder for folder in folders if not re.search(rf"^{re.escape(folder)}", text, re.MULTILINE))
    assert not unmentioned


def imported_modules(file: str) -> Iterator[tuple[int, str]]:
    """Line and file of every module of this package that `file` imports, wherever in the file it does so."""
    for node in ast.walk(parse(file)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}, line {node.lineno}: a relative import"
            names = [source_of(str(node.module), alias.name) for alias in node.names]
        else:
            continue
        yield from ((node.lineno, MODULES[name]) for name in names if name in MODULES)


def source_of(module: str, name: str) -> str:
    """The module that `from module import name` reads: a submodule, the home of a public name, or `module` itself."""
    if f"{module}.{name}" in MODULES:
        return f"{module}.{name}"
    return _HOME.get(name, module) if module == "blockpruner" else module


@on_each_module
def test_a_module_imports_only_from_modules_above_it_in_the_tree(file: str):
    if file == "__init__.py":
        return  # it stands first, and names what is below without loading it: tests/test_package.py
    above = FILES[: FILES.index(file)] if file in FILES else FILES
    wrong = [f"line {line} imports {target}" for line, target in imported_modules(file) if target not in above]
    assert not wrong, f"{file} imports from itself or from below it in the tree of ARCHITECTURE.md"


def test_modules_marked_so_bring_no_torch():
    promised = [module for module, file in MODULES.items() if TREE[file].endswith("(no torch)")]
    assert "blockpruner.artifacts" in promised
    script = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "    if 'torch' in sys.modules: sys.exit(f'importing {name} brings torch')\n"
    )
    result = subprocess.run([sys.executable, "-c", script, *promised], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


WRITING_METHODS = {"save_pretrained", "to_csv", "to_json", "to_parquet", "tofile", "write_bytes", "write_text"}
WRITING_FUNCTIONS = {
    *("json.dump", "np.save", "np.savez", "numpy.save", "numpy.savez", "save_file", "save_model", "torch.save"),
    *("os.rename", "os.replace", "tempfile.mkstemp", "tempfile.NamedTemporaryFile"),
    *("shutil.copy", "shutil.copy2", "shutil.copyfile", "shutil.copytree", "shutil.move"),
}
WRITERS = {"artifacts.py", "journal.py"}
ALLOWED_WRITES = {
    ("surgery/agreement.py", "save_file"): "a scratch file for the process that reloads the checkpoint",
    ("surgery/checkpoint.py", "save_pretrained"): "into the folder that artifacts.new_folder made aside",
    ("surgery/checkpoint.py", "write_bytes"): "into the same folder",
    ("exits.py", "os.open"): "the null device, for what a closed pipe does not take",
    ("loading/ggufs.py", "save_pretrained"): "into the folder that artifacts.new_folder made aside",
    ("surgery/reloading.py", "save_file"): "a scratch file, the answer of that process",
}


def opens_for_writing(call: ast.Call, function: str) -> bool:
    if function == "os.open":
        return re.search("O_(WRONLY|RDWR|CREAT|APPEND|TRUNC)", ast.unparse(call)) is not None
    if function.rpartition(".")[2] not in ("open", "fdopen"):
        return False
    plain = function in ("open", "io.open", "os.fdopen", "gzip.open", "bz2.open", "lzma.open")  # else a method: no path
    given = [*call.args[int(plain) :][:1], *(keyword.value for keyword in call.keywords if keyword.arg == "mode")]
    modes = [mode.value if isinstance(mode, ast.Constant) else "w" if plain else "" for mode in given]
    return any(re.search("[wax+]", str(mode)) for mode in modes)


def writes(file: str) -> Iterator[tuple[int, str]]:
    """Line and name of every call in `file` that puts something on disk by itself."""
    for call, function in calls(file):
        owner, _, method = function.rpartition(".")
        if opens_for_writing(call, function) or function in WRITING_FUNCTIONS:
            yield call.lineno, function
        elif method in WRITING_METHODS and owner not in ("", "artifacts"):
            yield call.lineno, method


@on_each_module
def test_only_artifacts_and_journal_write_to_disk(file: str):
    found = [] if file in WRITERS else list(writes(file))
    wrong = [f"line {line}: {name}" for line, name in found if (file, name) not in ALLOWED_WRITES]
    assert not wrong, f"{file} writes to disk by itself; use the writers of artifacts.py"


def test_the_list_of_allowed_writes_has_no_dead_entry():
    found = {(file, name) for file in MODULES.values() for _, name in writes(file)}
    dead = sorted(ALLOWED_WRITES.keys() - found)
    assert not dead


CODE_IN_DATA = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
RUNS_ITS_OWN_CODE = "surgery/reloading.py"  # opens what this package has just written, with the file that it put there


@on_each_module
def test_nothing_turns_data_into_code(file: str):
    wrong = []
    for node in ast.walk(parse(file)):
        if isinstance(node, ast.Import):
            wrong += [alias.name for alias in node.names if alias.name.split(".")[0] in CODE_IN_DATA]
        elif isinstance(node, ast.ImportFrom) and node.module:
            wrong += [node.module] if node.module.split(".")[0] in CODE_IN_DATA else []
    for call, function in calls(file):
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        unsafe_load = function == "torch.load" and given.get("weights_only") != "True"
        remote_code = given.get("trust_remote_code") == "True" and file != RUNS_ITS_OWN_CODE
        if function in ("__import__", "compile", "eval", "exec", "yaml.load") or unsafe_load or remote_code:
            wrong.append(f"line {call.lineno}: {ast.unparse(call)}")
    assert not wrong, f"{file} may run code that comes with data"


@on_each_module
def test_a_module_stays_readable_in_one_sitting(file: str):
    assert len((PACKAGE / file).read_text(encoding="utf-8").splitlines()) <= MAX_LINES


def test_no_file_names_a_path_of_somebodys_machine():
    private = re.compile(rb"(?<![\w.])/(?:work|root|tmp|home|Users|mnt|opt)/")
    found = [
        f"{file}, line {number}"
        for file in project_files()
        for number, line in enumerate((REPO / file).read_bytes().splitlines(), start=1)
        if private.search(line)
    ]
    assert not found
