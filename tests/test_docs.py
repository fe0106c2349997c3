"""README and docs/: links lead somewhere, generated pages are fresh, and what a reader is told to type works."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer
import yaml
from cli_helpers import Dynlora
from tutorials import code_of

from dynlora_cli.cli.app import app
from dynlora_cli.config.load import load_recipe
from dynlora_cli.export import targets

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
GENERATED = {DOCS / name for name in ("recipe-reference.md", "commands.md", "models.md")}
WRITTEN = [page for page in PAGES if page not in GENERATED]
# Pages whose commands are run in this order, in one folder.
WALK = [
    "quickstart.md",
    "howto/data.md",
    "howto/chat.md",
    "howto/new-tokens.md",
    "howto/eval.md",
    "howto/prune.md",
    "howto/merge.md",
    "howto/export.md",
    "howto/adapt.md",
    "howto/library.md",
    "howto/talk.md",
    "howto/routing.md",
    "howto/routing-proxy.md",
    "updates.md",
    "howto/preference.md",
    "migrate/trl.md",
]
BASE = {"model": {"name_or_path": "builtin:tiny"}, "dataset": {"train": [{"path": "builtin:stdlib-docs"}]}}
OF_OTHER_TOOLS = {"--max-lora-rank", "--max-loras", "--lora-paths", "--lora-init-without-apply", "--cache-ram"}
OF_OTHER_TOOLS |= {"--nnodes", "--rdzv-endpoint", "--rdzv-id"}
SECTIONS = "model|dataset|adapter|rank|pruning|train|eval"

FENCE = re.compile(r"^```(\S*)([^\n]*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


each_page = pytest.mark.parametrize("page", PAGES, ids=name_of)
each_written_page = pytest.mark.parametrize("page", WRITTEN, ids=name_of)


class Block(NamedTuple):
    """A fenced block: what it is marked as, its title or an empty text, its text, and why it is not run."""

    kind: str
    title: str
    text: str
    not_run: str


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for match in FENCE.finditer(text):
        title = re.search(r'title="(.*?)"', match[2])
        reason = re.search(r"<!-- not run: (.*) -->\n$", text[: match.start()])
        yield Block(match[1], title[1] if title else "", match[3], reason[1] if reason else "")


def prose(page: Path) -> str:
    """The page without fenced blocks and indented formulas."""
    return re.sub(r"^    .*$", "", FENCE.sub("", page.read_text(encoding="utf-8")), flags=re.MULTILINE)


def inline(page: Path) -> list[str]:
    """Inline code, a vertical bar of a table as it is meant."""
    return [code.replace("\\|", "|") for code in re.findall(r"`([^`\n]+)`", prose(page))]


def shell_lines(block: Block) -> Iterator[list[str]]:
    """The commands of a block, as words, without comments and what is redirected."""
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            yield words[: words.index(">")] if ">" in words else words


def commands(page: Path, runnable: bool = False) -> list[list[str]]:
    """Every `dynlora ...` in the blocks of a page (`runnable`: that are not marked as not run), without its first word."""
    chosen = [block for block in blocks(page) if block.kind == "bash" and not (runnable and block.not_run)]
    found = [words for block in chosen for words in shell_lines(block)]
    return [words[1:] for words in found if words[0] == "dynlora"]


# Links.


def anchors(page: Path) -> set[str]:
    """What headings are called in an address, on GitHub and in the site alike."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def links(page: Path) -> list[str]:
    return re.findall(r"!?\[[^\]]*\]\(([^)\s]+)\)", prose(page))


@each_page
def test_links_resolve(page: Path):
    wrong = []
    for link in links(page):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        inside = page.parent == ROOT or target.is_relative_to(DOCS)  # the site has nothing else
        found = not name.startswith(("/", "http")) and target.is_file() and inside
        if not found or (anchor and anchor not in anchors(target)):
            wrong.append(link)
    assert not wrong


@each_written_page
def test_paths_in_code_exist(page: Path):
    named = {code for code in inline(page) if re.fullmatch(r"(scripts|recipes|docs|tests|dynlora_cli)/[\w./-]*", code)}
    if page.parent.name == "extending":
        named -= code_of(page.stem).keys()  # what the reader is about to write
    assert not [path for path in named if not (ROOT / path).exists()]


def test_promises_are_shown_by_tests_that_exist():
    page = (DOCS / "promises.md").read_text(encoding="utf-8")
    named = re.findall(r"^- `(tests/[\w/]+\.py)::(\w+)`$", page, flags=re.MULTILINE)
    assert len(named) == page.count("::") > 30
    missing = [
        f"{file}::{test}"
        for file, test in named
        if f"\ndef {test}(" not in f"\n{(ROOT / file).read_text(encoding='utf-8')}"
    ]
    assert not missing
    promises = page.partition("## What is not promised")[0].split("\n**")[1:]
    assert not [promise for promise in promises if "- `tests/" not in promise and "Read it before" not in promise]


def test_files_named_in_descriptions_exist():
    """The reference repeats what the recipe's keys say of themselves."""
    named = re.findall(r"dynlora_cli/[\w/]+(?:\.py)?", (DOCS / "recipe-reference.md").read_text(encoding="utf-8"))
    assert named
    assert not [path for path in named if not (ROOT / path).exists()]


def test_every_page_is_in_the_site():
    found: list[str] = []

    def walk(entry: Any) -> None:
        if isinstance(entry, str):
            found.append(entry)
        else:
            for item in entry if isinstance(entry, list) else entry.values():
                walk(item)

    walk(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    assert sorted(found) == sorted(page.relative_to(DOCS).as_posix() for page in PAGES if page.parent != ROOT)


def test_site_builds(tmp_path: Path):
    pytest.importorskip("material", reason="the extra docs is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "quickstart.html").is_file()


# Generated pages and pictures.


def make_docs(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    spec = importlib.util.spec_from_file_location("make_docs", ROOT / "scripts/make_docs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_pages_are_fresh(monkeypatch: pytest.MonkeyPatch):
    made = make_docs(monkeypatch).files()
    stale = [name_of(path) for path, text in made.items() if path.read_text(encoding="utf-8") != text]
    assert not stale, "run: python scripts/make_docs.py"
    assert {DOCS / "recipe-reference.md", DOCS / "commands.md", DOCS / "pictures/ranks.svg"} <= made.keys()


def test_reference_knows_what_the_check_refuses(monkeypatch: pytest.MonkeyPatch):
    """The generator tries settings; here is one of each kind that it must have met."""
    page = (DOCS / "recipe-reference.md").read_text(encoding="utf-8")
    assert "| `model.load_in_4bit: true` | `model.load_in_8bit: true` | 4 and 8 bits exclude each other" in page
    assert "| `rank.init: 2` |  | got 2, below the budget 8" in page
    refusals = make_docs(monkeypatch).refusals
    assert refusals(("model.load_in_4bit", True)) == []
    assert len(refusals(("adapter.variant", "full"), ("model.load_in_4bit", True))) == 1


# What a reader types.


@each_written_page
def test_commands_parse(page: Path):
    group: Any = typer.main.get_command(app)
    for words in commands(page):
        group.commands[words[0]].make_context(words[0], list(words[1:])).close()
        if "--to" in words:
            target = words[words.index("--to") + 1].replace("-", "_")
            assert (Path(targets.__path__[0]) / f"{target}.py").is_file(), words


def options_of(command: Any) -> set[str]:
    """Of a command, and of those of a group."""
    own = {option for one in command.params for option in one.opts}
    return own.union(*(options_of(each) for each in getattr(command, "commands", {}).values()))


@each_written_page
def test_commands_in_sentences_exist(page: Path):
    group: Any = typer.main.get_command(app)
    known = options_of(group)
    for code in inline(page):
        words = shlex.split(code) if code.startswith(("dynlora ", "--")) else []
        if words[:1] == ["dynlora"]:
            assert words[1] in group.commands, code
            options = options_of(group.commands[words[1]])
            unknown = [word for word in words if word.startswith("--") and word not in options]
        else:
            unknown = [word for word in words[:1] if word.rstrip(":") not in known | OF_OTHER_TOOLS]
        assert not unknown, code


@each_written_page
def test_recipes_of_commands_load(page: Path, tmp_path: Path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(BASE), encoding="utf-8")
    for words in commands(page, runnable=True):
        if words[0] == "train":
            settings = [value for name, value in itertools.pairwise(words) if name == "--set"]
            load_recipe(ROOT / words[1] if words[1].startswith("recipes/") else recipe, settings)


@each_written_page
def test_recipes_load(page: Path, tmp_path: Path):
    path = tmp_path / "recipe.yaml"
    for block in blocks(page):
        if block.kind == "yaml" and not block.not_run:
            path.write_text(block.text, encoding="utf-8")
            load_recipe(path)
    for code in inline(page):
        if re.match(rf"({SECTIONS}): \{{", code):
            path.write_text(yaml.safe_dump({**BASE, **yaml.safe_load(code)}), encoding="utf-8")
            load_recipe(path)
        setting = re.fullmatch(rf"((?:{SECTIONS})\.\w+): (\S+)", code)
        if setting:
            path.write_text(yaml.safe_dump(BASE), encoding="utf-8")
            load_recipe(path, [f"{setting[1]}={setting[2]}"])


def test_there_is_something_to_check():
    assert sum(len(commands(page)) for page in WRITTEN) > 30
    assert sum(block.kind == "yaml" for page in WRITTEN for block in blocks(page)) >= 2
    assert sum(bool(re.match(rf"({SECTIONS}): \{{", code)) for code in inline(DOCS / "recipes.md")) > 20


@pytest.mark.slow
def test_walk_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dynlora: Dynlora):
    """Every command of the quickstart and of the how-to pages, one after the other, on fewer steps and rows."""
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    monkeypatch.chdir(tmp_path)
    for page in WALK:
        for block in blocks(DOCS / page):
            if block.title:
                Path(block.title).write_text(block.text, encoding="utf-8")
            if block.kind != "bash" or block.not_run:
                continue
            for line in block.text.splitlines():
                line = line.replace("scripts/quickstart", "dynlora train recipes/quickstart.yaml")
                name, *arguments = shlex.split(line, comments=True) or [""]
                file = ""
                if ">" in arguments:
                    *arguments, _, file = arguments
                if name == "python":
                    subprocess.run([sys.executable, *arguments], check=True)
                if name == "dynlora":
                    answer = dynlora(*shorter(arguments))
                    assert answer.code == 0, (page, line, answer.err)
                    if file:
                        Path(file).write_text(answer.out, encoding="utf-8")
    assert Path("out/small/merged/config.json").is_file()
    table = (
        (DOCS / "run-folder.md").read_text(encoding="utf-8").split("## What is in dynlora.json?")[1].split("\n## ")[0]
    )
    keys = re.findall(r"`(\w+)`", "".join(line.split("|")[1] for line in table.splitlines() if line.startswith("| `")))
    assert len(keys) > 15
    assert keys_missing(keys, Path("out/quickstart/dynlora.json")) == ["tokens", "rank_by_timestep"]
    assert keys_missing(keys, Path("out/markers/dynlora.json")) == ["rank_by_timestep"]


def keys_missing(keys: list[str], record: Path) -> list[str]:
    found = json.loads(record.read_text(encoding="utf-8"))
    return [key for key in keys if key not in found]


def shorter(words: list[str]) -> list[str]:
    """The same command on fewer steps, rows and answers."""
    less = {"eval": ["--max-samples", "24", "--generate", "2"], "prune": ["--max-samples", "24"]}.get(words[0], [])
    if words[0] == "train" and "--dry-run" not in words:
        return [*words, "--set", "train.max_steps=12", "--set", "eval.max_samples=24"]
    if words[0] == "adapt":
        return [*words, "--set", "train.max_steps=4", "--set", "eval.samples=0"]
    if {"--library", "--router"} & set(words):
        less = less[:2]
    given = {word for word in words if word.startswith("--")}
    pairs = zip(less[::2], less[1::2], strict=True)
    return words + [word for pair in pairs if pair[0] not in given for word in pair]


# What is said of the tool.


def test_messages_are_those_of_the_code():
    """Every message that the troubleshooting page explains is in the code; `…` stands for what differs."""
    texts = []
    for path in (ROOT / "dynlora_cli").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                texts.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
    everything = "\n".join(texts)
    tables = re.findall(
        r"^\| (`.*?) \| ", (DOCS / "troubleshooting.md").read_text(encoding="utf-8"), flags=re.MULTILINE
    )
    messages = [code for cell in tables for code in re.findall(r"`([^`]+)`", cell)]
    assert len(messages) > 30
    missing = [
        message for message in messages for piece in message.split("…") if piece.strip(" ,;:.?") not in everything
    ]
    assert not missing


def test_every_exit_code_is_explained():
    from dynlora_cli import errors

    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    codes = {kind.exit_code for kind in vars(errors).values() if hasattr(kind, "exit_code")}
    assert codes == {1, 2, 3, 4, 130}
    assert all(re.search(rf"^## {code}: ", page, flags=re.MULTILINE) for code in codes)


def test_readme_is_short_and_its_numbers_are_on_the_pages_it_links():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 131
    section = text.split("## What it is worth")[1].split("\n## ")[0]
    rows = [line.split("|")[2:4] for line in section.splitlines() if line.startswith("| ") and "](" in line]
    assert len(rows) == 3
    for measured, link in rows:
        page = (ROOT / re.findall(r"\((docs/[\w.-]+)", link)[0]).read_text(encoding="utf-8")
        numbers = re.findall(r"[+-]?\d+\.\d+", measured)
        assert numbers
        assert not [number for number in numbers if number not in page]


def test_variants_and_policies_are_all_named():
    for folder, page in (("lora.variants", "variants.md"), ("export.targets", "howto/export.md")):
        names = [
            path.stem.replace("_", "-")
            for path in Path(importlib.import_module(f"dynlora_cli.{folder}").__path__[0]).glob("[!_]*.py")
        ]
        text = (DOCS / page).read_text(encoding="utf-8")
        assert not [name for name in names if f"| `{name}` |" not in text]
