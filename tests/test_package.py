"""What a user gets: the public names, a wheel that is whole, and pruned checkpoints known to transformers."""

import ast
import itertools
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import blockpruner
from blockpruner import autoload

REPO = Path(__file__).parents[1]
PACKAGE = REPO / "src" / "blockpruner"


def run(code: str) -> None:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_importing_the_package_brings_nothing_but_the_standard_library():
    run(
        "import sys; before = set(sys.modules); import blockpruner\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names\n"
        "sys.exit(f'import blockpruner brings {new}' if new != {'blockpruner'} else 0)"
    )


@pytest.mark.parametrize("name", blockpruner.__all__)
def test_every_public_name_is_there_and_listed(name: str):
    assert getattr(blockpruner, name) is not None
    assert name in dir(blockpruner)


def test_type_checkers_are_told_the_same_homes_as_the_interpreter():
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    declared = {
        alias.name: node.module
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert declared == blockpruner._HOME
    assert set(blockpruner.__all__) == {*declared, "__version__"}


def test_no_public_name_is_also_a_module_which_would_take_its_place_once_imported():
    assert not set(blockpruner.__all__) & {path.stem for path in PACKAGE.iterdir()}


def test_every_package_that_is_imported_is_asked_for():
    """What is at hand only because something else brought it is missing where that is not installed."""
    project = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = [*project["dependencies"], *itertools.chain(*project["optional-dependencies"].values())]
    names = {re.split(r"[\[<>=]", requirement)[0].lower() for requirement in asked} | {"blockpruner"}
    homes, found = packages_distributions(), set[str]()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found |= {module.partition(".")[0] for module in modules}
    foreign = found - sys.stdlib_module_names - {"blockpruner"}
    missing = {name for name in foreign if not names & {h.lower().replace("_", "-") for h in homes.get(name, [name])}}
    assert missing == {"pydantic_core"}, "which is pydantic's other half"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = blockpruner.no_such_name  # pyright: ignore[reportAttributeAccessIssue]


def test_the_wheel_holds_every_file_of_the_package(tmp_path: Path):
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    result = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        shipped = {name for name in archive.namelist() if name.startswith("blockpruner/")}
    files = {path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert shipped == {path.relative_to(PACKAGE.parent).as_posix() for path in files}
    assert "blockpruner/py.typed" in shipped
    assert wheel.stat().st_size < 1_000_000


def test_transformers_learns_our_model_type_when_it_is_imported_after_us():
    run(
        "import sys, blockpruner\n"
        "assert 'transformers' not in sys.modules\n"
        "from transformers import CONFIG_MAPPING\n"
        "assert CONFIG_MAPPING['blockpruner'].__module__ == 'blockpruner.autoload'"
    )


def test_transformers_learns_our_model_type_when_it_is_there_before_us():
    from transformers import CONFIG_MAPPING

    autoload.install()
    assert CONFIG_MAPPING["blockpruner"] is autoload.LateConfig


def test_autoload_and_the_shipped_file_agree_on_the_model_type():
    from blockpruner import standin

    assert standin.MODEL_TYPE == autoload.MODEL_TYPE


def test_a_pruned_configuration_is_read_by_the_real_class():
    from blockpruner.standin import BlockprunerConfig

    with pytest.raises(ValueError, match="removed blocks") as ours:
        autoload.LateConfig.from_dict({"blockpruner": None})
    with pytest.raises(ValueError, match="removed blocks") as real:
        BlockprunerConfig.from_dict({"blockpruner": None})
    assert str(ours.value) == str(real.value)
