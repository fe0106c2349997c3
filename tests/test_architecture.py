"""The house rules: which package may import which, what a plug-in looks like, and that nothing heavy loads early.

The order of the packages, lowest first, stands in docs/architecture.md, and is read from there.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import dynlora_cli
from dynlora_cli import plugins

PACKAGE = Path(dynlora_cli.__file__).parent
REPOSITORY = Path(__file__).parent.parent
ORDER_OF_PACKAGES = REPOSITORY / "docs" / "architecture.md"
# A recipe is checked, a path looked up and a page written by these alone.
LIGHT = {"__init__", "errors", "text", "plugins", "files", "runs", "config"}
FRONT = {"cli", "__main__"}
HEAVY = {"torch", "transformers", "datasets", "accelerate", "bitsandbytes"}
LONGEST_FILE, FULLEST_FOLDER = 400, 25

# Files that look at the environment, and for what. Anything else a person may want to set is a key or an option.
READS_ENVIRONMENT = {
    "cli.app": "OMP_WAIT_POLICY, which it sets, where nobody has",
    "cli.train": "RANK, which tells one process of several from the others",
    "cli.views.console": "TERM, which says what the terminal can do",
    "commands.doctor": "what decides how the libraries below us behave, to show it",
    "execution.cores": "OMP_NUM_THREADS, which it sets where a container allows fewer cores than it shows",
    "execution.launch": "all of it, to hand it on; RANK, which tells one process of several from the others",
    "execution.elastic": "what torchrun sets: the job, its restarts, where its processes meet",
    "execution.lost": "RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, which torch.distributed finds processes by",
    "data.sources": "HF_HUB_OFFLINE, to word an error",
    "data.builtin": "XDG_CACHE_HOME, where caches go",
    "data.rows.cache": "DYNLORA_CACHE and XDG_CACHE_HOME, where rows are kept; DYNLORA_CACHE_GB, how many",
    "data.rows.team": "all of it, to hand it on",
}

MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if "assets" not in path.parts
}
PLUG_INS = [
    name
    for name in MODULES
    if name.rpartition(".")[0] in plugins.FOLDERS.values() and name.rpartition(".")[2] != "__init__"
]


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


@cache
def floors() -> dict[str, int]:
    """The floor of every package and lone file, 0 for the lowest."""
    page = ORDER_OF_PACKAGES.read_text(encoding="utf-8")
    order = page.partition("```text\n")[2].partition("```")[0]
    return {name: floor for floor, line in enumerate(order.splitlines()) for name in line.split("  ")[0].split(", ")}


def package(module: str) -> str:
    return module.partition(".")[0]


@cache
def imports(module: str) -> frozenset[str]:
    """Our own modules that a module imports anywhere in it, for type checking too: to know a type is to depend on it."""
    found: set[str] = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} line {node.lineno}: write imports in full"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            ours, _, inner = name.partition(".")
            if ours == "dynlora_cli":
                # `from dynlora_cli.training.loop import fit` is the module loop, `from dynlora_cli.training import loop` too
                found.add(
                    next(m for m in (inner, f"{inner}.__init__", inner.rpartition(".")[0], "__init__") if m in MODULES)
                )
    return frozenset(found)


def at_module_level(node: ast.AST) -> Iterator[ast.stmt]:
    """Statements that run when a module is imported; what only the type checker reads is left out."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        if isinstance(child, ast.stmt):
            yield child
        yield from at_module_level(child)


def outside_packages(statements: Iterator[ast.AST]) -> set[str]:
    """Top-level names of what is imported by some statements."""
    found: set[str] = set()
    for node in statements:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module).split(".")[0])
    return found


# -- imports ---------------------------------------------------------------------------------------------------------


def test_the_rules_see_the_imports():
    assert {"lora.svd_basis", "pruning.select"} <= imports("pruning.control")
    assert {"commands.train", "config.load", "launch"} - imports("cli.train") == {"launch"}
    assert "cli.app" in imports("cli.__init__")
    assert "torch" in outside_packages(at_module_level(tree("lora.layer")))
    assert "config.recipe" in imports("training.run")
    assert "transformers" not in outside_packages(at_module_level(tree("data.load")))


def test_every_package_has_a_floor():
    assert set(floors()) == {package(module) for module in MODULES}, f"say in {ORDER_OF_PACKAGES} where it belongs"


def test_imports_point_down():
    order = floors()
    crossing = [(m, other) for m in MODULES for other in imports(m) if package(m) != package(other)]
    upward = [f"{m} -> {other}" for m, other in crossing if order[package(other)] >= order[package(m)]]
    assert not upward, f"move what both need below them: {upward}"


def test_imports_have_no_circles():
    order = TopologicalSorter({module: imports(module) - {module} for module in MODULES}).static_order()
    assert set(MODULES) <= set(order)  # a circle raises CycleError, which names it


def test_commands_do_not_import_each_other():
    commands = {module for module in MODULES if package(module) == "commands"}
    for command in commands:
        assert not imports(command) & commands, f"{command}: what two commands need belongs below them"


def test_plug_ins_are_reached_by_name_only():
    importers = [module for module in MODULES if imports(module) & set(PLUG_INS)]
    assert not importers, f"use plugins.load, so that one new file is enough: {importers}"


def test_only_the_views_import_rich():
    users = {module for module in MODULES if "rich" in outside_packages(ast.walk(tree(module)))}
    assert users
    assert all(module.startswith("cli.views.") for module in users), users


def test_heavy_libraries_stay_where_they_are_needed():
    for module in MODULES:
        anywhere, early = outside_packages(ast.walk(tree(module))), outside_packages(at_module_level(tree(module)))
        if package(module) in LIGHT:
            assert not anywhere & HEAVY, f"{module} is used before a recipe is known to be right: it must stay light"
        if package(module) in FRONT or module.endswith("__init__"):
            assert not early & HEAVY, f"{module}: import it inside the function that needs it"
        slowest = {"bitsandbytes", "datasets"}  # each takes seconds, and most runs need neither
        assert not early & slowest, f"{module}: import it inside the function that needs it"


# -- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["dynlora_cli", "tests", "scripts"])
def test_no_file_is_too_long(folder: str):
    lengths = {path: len(path.read_text("utf-8").splitlines()) for path in (REPOSITORY / folder).rglob("*.py")}
    too_long = {path.name: lines for path, lines in lengths.items() if lines > LONGEST_FILE}
    assert not too_long, f"over {LONGEST_FILE} lines: split by what changes together"


def test_functions_fit_a_screen():
    functions = [
        (node.end_lineno - node.lineno + 1, f"{module}.{node.name}")
        for module in MODULES
        for node in ast.walk(tree(module))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno
    ]
    lengths = sorted(length for length, _ in functions)
    assert lengths[len(lengths) // 2] <= 8
    assert lengths[len(lengths) * 9 // 10] <= 28
    assert not [name for length, name in functions if length > 60]


def test_no_folder_is_too_full():
    folders = [*PACKAGE.rglob("__init__.py"), *(REPOSITORY / "tests").rglob("conftest.py")]
    for folder in {path.parent for path in folders}:
        assert len(list(folder.glob("*.py"))) <= FULLEST_FOLDER, f"{folder}: make two rooms of it"


def test_every_package_says_what_it_is_for():
    for module in MODULES:
        assert ast.get_docstring(tree(module)) or module == "__init__", f"{module} has no docstring"


def test_what_the_page_says_is_there():
    rows = re.findall(r"\| `dynlora_cli/([\w/]+)\.py` \| `(\w+)` \|", ORDER_OF_PACKAGES.read_text(encoding="utf-8"))
    assert len(rows) > 20
    for path, name in rows:
        defined = {getattr(node, "name", None) for node in tree(path.replace("/", ".")).body}
        assert name in defined, f"{ORDER_OF_PACKAGES.name} says that {name} is in {path}"


def test_the_page_says_where_each_plug_in_goes():
    page = ORDER_OF_PACKAGES.read_text(encoding="utf-8")
    row = r"\| `dynlora_cli/([\w/]+)/` \| `dynlora_cli/([\w/]+)\.py` \| \[example\]\(extending/(\w+)\.md\) \|"
    rows = re.findall(row, page)
    assert {folder.replace("/", ".") for folder, _, _ in rows} == set(plugins.FOLDERS.values())
    assert {contract.replace("/", ".") for _, contract, _ in rows} <= set(MODULES)
    index = (ORDER_OF_PACKAGES.parent / "extending" / "index.md").read_text(encoding="utf-8")
    assert {tutorial for _, _, tutorial in rows} == set(re.findall(r"\((\w+)\.md\):", index)) == set(plugins.FOLDERS)


def test_the_environment_is_read_in_few_places():
    def reads(node: ast.AST) -> bool:
        names = {"environ", "environb", "getenv"}
        return (isinstance(node, ast.Attribute) and node.attr in names) or (
            isinstance(node, ast.alias) and node.name in names
        )

    readers = {module for module in MODULES if any(map(reads, ast.walk(tree(module))))}
    assert readers == set(READS_ENVIRONMENT), "name the file and the variable in READS_ENVIRONMENT, or make it a key"


# What people choose from; the others are described in the file that says what they must hold.
CHOICES = tuple(
    plugins.FOLDERS[kind] for kind in ("variants", "policies", "formats", "methods", "exporters", "routers")
)


@pytest.mark.parametrize("module", [name for name in PLUG_INS if name.startswith(CHOICES)])
def test_a_plug_in_explains_itself(module: str):
    first, *lines = (ast.get_docstring(tree(module)) or "").splitlines()
    headings = [line.rstrip(":") for line in lines if line and not line.startswith(" ")]
    assert first.endswith("."), "the docstring opens with a sentence"
    assert headings[:2] == ["What it does", "When to use it"]
    assert headings[2:] in (["Reference"], ["Columns", "Reference"], ["Options", "Reference"])


# -- start-up --------------------------------------------------------------------------------------------------------

# Runs the command line in a fresh process and reports, on stdout, its exit code and the heavy modules it loaded.
PROBE = f"""
import contextlib, json, sys
from dynlora_cli.cli import main
code = 0
with contextlib.redirect_stdout(sys.stderr):
    try:
        main(sys.argv[1:])
    except SystemExit as end:
        code = end.code
heavy = {HEAVY!r} | ({{"pydantic"}} if sys.argv[1:] == ["--help"] else set())
print(json.dumps([code, sorted(heavy & sys.modules.keys())]))
"""


def fresh(*arguments: str) -> tuple[int, list[str], str]:
    """Exit code, heavy modules loaded, and what a person sees."""
    done = subprocess.run([sys.executable, "-c", PROBE, *arguments], capture_output=True, text=True, check=True)
    code, loaded = json.loads(done.stdout)
    return code, loaded, done.stderr


@pytest.fixture
def wrong_recipe(tmp_path: Path) -> Path:
    path = tmp_path / "wrong.yaml"
    path.write_text("model: builtin:tiny\ndataset: rows.jsonl\nrank:\n  budgett: 8\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["train", "--help"], ["schema"], []], ids=" ".join)
def test_help_loads_nothing_heavy(arguments: list[str]):
    code, loaded, shown = fresh(*arguments)
    assert (code or 0, loaded) == (0 if arguments else 2, [])
    assert "dynlora" in shown


def test_a_wrong_recipe_is_answered_before_anything_heavy_loads(wrong_recipe: Path):
    code, loaded, shown = fresh("train", str(wrong_recipe))
    assert (code, loaded) == (2, [])
    assert "wrong.yaml:4" in shown
    assert "did you mean 'budget'?" in shown


def test_a_wrong_recipe_is_answered_at_once(wrong_recipe: Path):
    """Processor time, least of three: what other programs do does not count in it."""

    def seconds(*arguments: str) -> float:
        import resource

        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *arguments], capture_output=True, check=False)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    bare = min(seconds("-c", "import typer") for _ in range(3))
    answer = min(seconds("-m", "dynlora_cli", "train", str(wrong_recipe)) for _ in range(3))
    assert answer - bare < max(1.0, 4 * bare)


def test_names_of_test_files_are_unique():
    """pytest imports them by their bare names, so the second of two would not be run."""
    names = [path.name for path in (REPOSITORY / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
