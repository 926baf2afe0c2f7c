"""What mkdocs does beside its own work: pages and pictures are taken from where they are in the repository, and help
from the commands themselves, so that nothing is there twice and nothing can be stale."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
"""Pages of the site that are not in docs/."""
HELP = re.compile(r"^```\n(make help|python -m [\w. ]+ --help)\n```$", re.MULTILINE)
"""A block that is nothing but a question for help."""


def on_files(files, config):
    """Add the pages that are not in docs/."""
    for name in PAGES:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))


def on_page_markdown(markdown, page, config, files):
    """Answer questions for help, and make links of the repository, docs/X.md and ../X, those of the site; a picture or
    another file that is linked to becomes part of it."""

    def link(match):
        path = match[1]
        if files.get_file_from_path(path) is None and (ROOT / path).is_file():
            files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
        return f"]({path}"

    if page.file.src_path in PAGES:
        markdown = re.sub(r"\]\(docs/", "](", markdown)
    markdown = re.sub(r"\]\(\.\./([^)#]+)", link, markdown)
    questions = list(dict.fromkeys(HELP.findall(markdown)))
    with ThreadPoolExecutor(2) as pool:
        answers = dict(zip(questions, pool.map(answer, questions), strict=True))
    return HELP.sub(lambda match: f"```text\n{answers[match[1]]}\n```", markdown)


def answer(question):
    """What a command prints."""
    words = [sys.executable if word == "python" else word for word in question.split()]
    outside = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # of `make docs`
    environment = {**outside, "COLUMNS": "100", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT)
    return done.stdout.replace(" \b", "").strip()  # jsonargparse moves back in a line
