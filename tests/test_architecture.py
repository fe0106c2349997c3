"""The house rules: which file may import which, what a drawer's file looks like, and that nothing heavy loads early.

Layers, lowest first. A file may import files of its own layer and of layers below it, never above:

    8  the command line        imports a command inside the function that runs it
    7  one file per command    commands never import each other
    6  what commands share
    5  load the model, make batches
    4  the drawers             files never import each other; the spine reaches them by name, through drawers.load
    3  components and their files, rows and tokens; the contract of a drawer (its underscore files)
    2  recipe, report, console: no torch
    1  errors
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import dynlora_cli

PACKAGE = Path(dynlora_cli.__file__).parent
REPOSITORY = Path(__file__).parent.parent
DRAWERS = ("variants", "policies", "formats", "exporters")
# A line for each first letter: two people who add a file each do not meet.
SPINE = {
    8: """
        __main__
        cli cli_adapters cli_eval cli_start cli_support
    """,
    7: """
        doctor dry_run
        evaluate export
        inspect_adapter
        merge
        prune
        starter
        train
    """,
    6: """
        assemble
        combine compare compile_blocks cuda_graphs
        dequantize
        eval_report
        fold
        generation
        harness heal held_out
        linear_loss loop loss
        memory meter
        optimizer_step outputs
        peft_check posthoc probe pruned_folder
        rate_search resident
        sharding starts state survey
    """,
    5: """
        adapter_base attach
        batches
        data
        layout
        model
        patches
        stream
    """,
    3: """
        activations adapter adapter_keys adapter_reader allocation
        brake
        chat_mask chat_template chat_turns checkpoint columns components covariances
        directions dora
        examples experts
        fingerprint fused_linear
        gauge gradients heads
        hira
        lean_blocks lean_functions
        mlx_adapter
        optimizers
        peft_kinds peft_parameters peft_types pickles pool preflight
        rank relative row_files rows
        schedule shared_inputs splits stdlib_docs stretches
        targets template_limits tokens
        vocabulary
        weights
    """,
    2: """
        adapter_folder aliases
        budget
        console console_adapter console_eval console_plan console_start
        drawers
        foreign
        gates
        interrupt
        launch
        model_folder
        options output_place
        progress
        recipe recipe_problems recipe_settings recipe_types recipe_whole report report_card report_html report_log report_svg run_folder
        scores strict_json strict_yaml
        units
        whole_files
    """,
    1: """
        __init__
        errors
    """,
}
LAYERS = {name: layer for layer, names in SPINE.items() for name in names.split()}
HEAVY = {"torch", "transformers", "datasets", "accelerate", "bitsandbytes"}
LONGEST_FILE = 400

# Files that look at the environment, and for what. Anything else a person may want to set is a key or an option.
READS_ENVIRONMENT = {
    "cli": "RANK, which tells one process of several from the others; it sets OMP_WAIT_POLICY, where nobody has",
    "console": "TERM, which says what the terminal can do",
    "doctor": "what decides how the libraries below us behave, to show it",
    "launch": "all of it, to hand it on; RANK, which tells one process of several from the others",
    "rows": "HF_HUB_OFFLINE, to word an error",
    "stdlib_docs": "XDG_CACHE_HOME, where caches go",
}

MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if "assets" not in path.parts
}
DRAWER_FILES = [name for name in MODULES if name.split(".")[0] in DRAWERS and not name.split(".")[-1].startswith("_")]


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def layer(module: str) -> int:
    """The layer of a module; 0 where nobody has said yet."""
    first, *rest = module.split(".")
    if first in DRAWERS:
        return 3 if rest[-1].startswith("_") else 4
    return LAYERS.get(module, 0)


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
            package, _, inner = name.partition(".")
            if package == "dynlora_cli":
                # `from dynlora_cli.loop import fit` is the module loop, `from dynlora_cli import loop` too
                found.add(inner if inner in MODULES else inner.rpartition(".")[0] or "__init__")
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
    assert {"components", "gauge", "recipe"} <= imports("rank")
    assert {"train", "recipe", "__init__"} <= imports("cli")
    assert "torch" in outside_packages(at_module_level(tree("components")))
    assert "recipe" in imports("rate_search")
    assert "transformers" not in outside_packages(at_module_level(tree("data")))


def test_every_layer_names_existing_files():
    assert set(LAYERS) <= set(MODULES), "SPINE names files that are gone"


def test_every_file_has_a_layer():
    homeless = [f"dynlora_cli/{module}.py" for module in MODULES if not layer(module)]
    assert not homeless, f"add to SPINE in {Path(__file__).name}, as low as the imports allow: {homeless}"


def test_imports_point_down():
    upward = [f"{module} -> {other}" for module in MODULES for other in imports(module) if layer(other) > layer(module)]
    assert not upward, f"move what both need below them: {upward}"


def test_imports_have_no_circles():
    order = TopologicalSorter({module: imports(module) - {module} for module in MODULES}).static_order()
    assert set(MODULES) <= set(order)  # a circle raises CycleError, which names it


def test_commands_do_not_import_each_other():
    commands = {module for module in MODULES if layer(module) == 7}
    for command in commands:
        assert not imports(command) & commands, f"{command}: what two commands need belongs into layer 6"


def test_drawers_are_reached_by_name_only():
    importers = [module for module in MODULES if imports(module) & set(DRAWER_FILES)]
    assert not importers, f"use drawers.load, so that one new file is enough: {importers}"


def test_a_drawer_knows_no_other_drawer():
    for module in MODULES:
        own = module.split(".")[0]
        others = {other for other in imports(module) if other.split(".")[0] in set(DRAWERS) - {own}}
        assert own not in DRAWERS or not others, f"{module} imports {others}"


def test_only_the_console_imports_rich():
    users = {module for module in MODULES if "rich" in outside_packages(ast.walk(tree(module)))}
    assert {module.split("_")[0] for module in users} == {"console"}


def test_heavy_libraries_stay_where_they_are_needed():
    for module in MODULES:
        anywhere, early = outside_packages(ast.walk(tree(module))), outside_packages(at_module_level(tree(module)))
        if layer(module) <= 2:
            assert not anywhere & HEAVY, f"{module} is used before a recipe is known to be right: it must stay light"
        if layer(module) == 8:
            assert not early & HEAVY, f"{module}: import it inside the function that needs it"
        slowest = {"bitsandbytes", "datasets"}  # each takes seconds, and most runs need neither
        assert not early & slowest, f"{module}: import it inside the function that needs it"


# -- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["dynlora_cli", "tests", "scripts"])
def test_no_file_is_too_long(folder: str):
    lengths = {path: len(path.read_text("utf-8").splitlines()) for path in (REPOSITORY / folder).rglob("*.py")}
    too_long = {path.name: lines for path, lines in lengths.items() if lines > LONGEST_FILE}
    assert not too_long, f"over {LONGEST_FILE} lines: split by what changes together"


def test_the_environment_is_read_in_few_places():
    def reads(node: ast.AST) -> bool:
        names = {"environ", "environb", "getenv"}
        return (isinstance(node, ast.Attribute) and node.attr in names) or (
            isinstance(node, ast.alias) and node.name in names
        )

    readers = {module for module in MODULES if any(map(reads, ast.walk(tree(module))))}
    assert readers == set(READS_ENVIRONMENT), "name the file and the variable in READS_ENVIRONMENT, or make it a key"


@pytest.mark.parametrize("module", DRAWER_FILES)
def test_a_drawers_file_explains_itself(module: str):
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
