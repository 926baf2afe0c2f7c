"""The documentation holds: links lead somewhere, and the options that it names are those of the commands."""

from __future__ import annotations

import dataclasses
import re
from functools import cache
from typing import get_type_hints

import pytest

from ckd_dist.commands import COMMANDS
from ckd_dist.store.options import PlanConfig
from launch.graph import PipelineConfig
from launch.jobs import LaunchConfig
from tests.helpers.commands import ROOT, run

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
CONFIGURED = {**COMMANDS, "ckd_dist.store plan": PlanConfig}
"""Command -> its options, where these are a class."""
PARSED = [
    *(f"ckd_dist.store {name}" for name in ("info", "verify", "repair", "convert", "compare", "pack", "unpack")),
    "ckd_dist.report", "ckd_dist.lineage", "ckd_dist.bench", "ckd_dist.bench.gpu", "data_prep.write_beton",
]  # fmt: skip
"""Commands whose options only their help tells."""
LAUNCH = {"launch.submit": LaunchConfig, "launch.pipeline": PipelineConfig}
FOREIGN = {"nproc_per_node", "test_only", "no_deps", "optim", "help", "config"}
"""Options of torchrun, sbatch and pip; one that is gone, as the changelog says; and those that every command has."""
OPTION = re.compile(r"(?<![\w-])--([a-zA-Z][\w.-]*\w)|(?<![\w-])--([a-zA-Z])\b")

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)


def fields(cls, section=""):
    """Dotted names of the options of a class."""
    for name, kind in get_type_hints(cls).items():
        yield from fields(kind, f"{name}.") if dataclasses.is_dataclass(kind) else [section + name]


def named(text):
    """Options that a text names, as fields are."""
    for word in OPTION.finditer(text):
        yield re.sub(r"^(slurm\.extra|model\.options)\..*", r"\1", (word[1] or word[2]).replace("-", "_"))


@cache
def options():
    """Command -> names of its options."""
    known = {command: set(fields(cls)) for command, cls in (CONFIGURED | LAUNCH).items()}
    for command in PARSED:
        module, *words = command.split()
        known[command] = set(named(run(module, *words, "--help").stdout))
    known["launch.submit"] |= set().union(*(known[command] for command in CONFIGURED))  # theirs are among its own
    return known


def commands(text):
    """(command, the words after it) of every `python -m COMMAND` in a text's blocks and lines of code."""
    for code in re.findall(r"```\w*\n(.*?)```|`([^`]+)`", text, re.DOTALL):
        for line in re.sub(r"\s*\\\n\s*", " ", code[0] or " ".join(code[1].split())).splitlines():
            if found := re.search(r"-m ((?:ckd_dist|launch|data_prep)\.[\w.]+)(.*)", line):
                module, words = found[1], found[2].partition(" #")[0]
                if module == "ckd_dist.store":
                    command, _, words = words.strip().partition(" ")
                    module += f" {command}"
                yield module, words


def anchors(path):
    """What a link into a page may name after #: its headings as mkdocs and GitHub write them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@each_page
def test_every_relative_link_leads_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL))
    for link in links:
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.is_file(), f"{link} of {page.name}: there is no such file"
        assert not anchor or anchor in anchors(target), f"{link} of {page.name}: there is no such heading"


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150 and max(map(len, lines)) <= 130


@each_page
def test_every_option_that_is_named_exists(page):
    text = page.read_text()
    if page.name != "CONTRIBUTING.md":  # which speaks of tools, not of commands
        assert set(named(text)) <= FOREIGN.union(*options().values())
    for command, words in commands(text):
        if command in options():
            assert set(named(words)) <= options()[command] | FOREIGN, command


def test_every_command_is_on_the_page_of_commands():
    asked = re.findall(r"^python -m (.*) --help$", (ROOT / "docs" / "commands.md").read_text(), re.MULTILINE)
    assert {*CONFIGURED, *PARSED, *LAUNCH, "ckd_dist.store"} == set(asked)


def test_every_module_that_is_named_exists():
    for page in PAGES:
        for module in set(re.findall(r"-m ((?:ckd_dist|launch|data_prep)(?:\.\w+)+)", page.read_text())):
            path = ROOT / module.replace(".", "/")
            assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), f"{module} in {page.name}"
