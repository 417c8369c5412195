"""README and CONTRIBUTING say of the files what the files are, and import what may be imported."""

import ast
import re
from pathlib import Path

import pytest

from ahriuwu_cli.models.sizes import SIZES
from ahriuwu_cli.printing import CONTROLS

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "ahriuwu_cli"
MODULES = sorted(p for p in PACKAGE.rglob("*.py") if p.name not in ("__main__.py", "__init__.py"))
ORDER = ("diffusion.tau", "diffusion", "rollout", "world", "evaluation", "training", "commands", "cli")
UPWARDS = {  # that CONTRIBUTING names
    ("evaluation.cells", "training.checkpoint"),
    ("evaluation.standard", "training.finite"),
    ("evaluation.standard", "training.losses"),
}


def floor_plan() -> dict[str, str]:
    """What README's list of files says of every path."""
    text = (ROOT / "README.md").read_text().split("## The files")[1].split("```")[1]
    said, folders = {}, {}
    for line in text.strip().splitlines():
        indent, name, words = re.fullmatch(r"( *)(\S+) *(.*)", line).groups()
        depth = len(indent) // 2
        folders[depth] = folders.get(depth - 1, "") + name
        said[folders[depth]] = words
    return said


def first_sentence(module: Path) -> str:
    paragraph = " ".join(ast.get_docstring(ast.parse(module.read_text())).split("\n\n")[0].split())
    return re.split(r"(?<=[.?!])(?<!eq\.)\s+(?=[A-Z`])", paragraph)[0].removesuffix(".")


def test_the_list_of_files_has_every_module_with_the_first_sentence_of_its_own():
    said = {path: words for path, words in floor_plan().items() if path.startswith("ahriuwu_cli/")}
    folders = [p for p in PACKAGE.iterdir() if (p / "__init__.py").exists()]
    expected = {p.relative_to(ROOT).as_posix(): first_sentence(p) for p in MODULES}
    expected |= {f"{p.relative_to(ROOT).as_posix()}/": first_sentence(p / "__init__.py") for p in folders}
    assert said.pop("ahriuwu_cli/") == ""
    assert {path: said.get(path) for path in expected} == expected
    assert not set(said) - set(expected)


def test_the_list_of_files_has_every_script_and_every_page():
    said = floor_plan()
    files = [*(ROOT / "scripts").glob("*.py"), *(ROOT / "scripts").glob("*.sh"), *(ROOT / "docs").glob("*.md")]
    there = {p.relative_to(ROOT).as_posix() for p in files}
    assert {path for path in said if path.startswith(("scripts/", "docs/")) and path != "scripts/"} == there


def imported(module: Path) -> set[str]:
    """The modules of ours that a module names anywhere in it, without the package's name."""
    names = set()
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    ours = {name.removeprefix("ahriuwu_cli.") for name in names if name.startswith("ahriuwu_cli.")}
    return {name for name in ours if (PACKAGE / f"{name.replace('.', '/')}.py").exists()}


def layer(name: str) -> int | None:
    return next((i for i, part in enumerate(ORDER) if name == part or name.startswith(f"{part}.")), None)


def test_imports_point_one_way_but_for_three_that_are_named():
    upwards = set()
    for module in MODULES:
        name = module.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".")
        for other in imported(module):
            if None not in (layer(name), layer(other)) and layer(other) > layer(name):
                upwards.add((name, other))
    assert upwards == UPWARDS
    said = (ROOT / "CONTRIBUTING.md").read_text()
    assert all(f"`{other}`" in said and f"`{name.split('.')[1]}.py`" in said for name, other in UPWARDS)


def test_no_help_text_sends_what_printing_keeps_from_the_terminal():
    for module in [*PACKAGE.rglob("*.py"), *(ROOT / "scripts").glob("*.py")]:
        for node in ast.walk(ast.parse(module.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                assert not re.search(f"[{CONTROLS}]", ast.get_docstring(node, clean=False) or ""), (module, node)


@pytest.mark.parametrize("size", SIZES)
def test_the_plan_to_scale_has_its_tables_for_every_size(size):
    tables = (ROOT / "docs" / "scaling.md").read_text().split("everything below this line -->")[1]
    assert re.findall("^## (.*?) *(?:[(,]|on)", tables, re.MULTILINE) == [
        "FLOPs",
        "Memory of a training step",
        "One rollout",
        "Training",
    ]
    assert tables.count(f"| {size}, 16 x 64 |") >= 3


def test_the_scripts_for_gpus_are_shown_with_a_folder_each_that_no_other_line_fills():
    text = (ROOT / "README.md").read_text()
    scripts = re.findall(r"scripts/train_\w+\.sh data/\w+ (\S+)", text)
    others = re.findall(r"--out (runs/\S+)", text)
    assert len(scripts) == 3
    assert len({*scripts, *others}) == len(scripts) + len(others)
