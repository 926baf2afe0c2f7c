"""How options are read: defaults < YAML < command line.

Nothing here imports torch, so that ``--help`` and a refused option are answered at once."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, get_args

import jsonargparse

from ckd_dist.core.errors import UserError, require

T = TypeVar("T")

Amp = Literal["auto", "bfloat16", "float16", "off"]
Scaling = Literal["raw", "minmax", "zscore"]
"""How I(X;F) and I(Y;F) are scaled over the checkpoints before they are added."""


Range = tuple[float, float]
"""The least and the greatest value that an option takes: whatever is beyond is a slip of the hand."""
COUNT: Range = (1, 1_000_000)
SIDE: Range = (8, 8192)
SEED: Range = (0, 2**31 - 1)
RATE: Range = (1e-12, 1000)
TEMPERATURE: Range = (0.001, 1000)
SHARE: Range = (0, 1)


def require_ranges(config: object, section: str = "", /, **ranges: Range) -> None:
    """Raise `UserError` unless these options of a section, numbers or lists of numbers, are in their ranges; None is,
    not-a-number is in none."""
    for name, (low, high) in ranges.items():
        value = getattr(config, name)
        for each in value if isinstance(value, list) else [value]:
            require(each is None or low <= each <= high, f"{section}{name} is {each}: give {low:,} to {high:,}")


# ------------------------------------------------------------------------------------------- reading


def load_config(
    cls: type[T], argv: Sequence[str] | None = None, *, prog: str | None = None, description: str | None = None
) -> T:
    """Read a `cls` from its defaults, ``--config X.yaml`` and dotted options, later ones winning.

    Raises `UserError`, one line, for an unknown key (with the nearest known one), a value of the wrong type or
    a contradiction. ``--help`` and ``--print_config`` print and raise `SystemExit(0)`.
    """
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        prog=prog, description=description or cls.__doc__, exit_on_error=False, formatter_class=_HelpFormatter
    )
    parser.add_argument("--config", action=_ConfigFile, help="YAML file with any of the options below.")
    parser.add_class_arguments(cls)
    for action in parser._actions:
        if action.dest in _section_names(parser):  # --optim FILE would be read past all checks
            del parser._option_string_actions[f"--{action.dest}"]
            action.help = argparse.SUPPRESS
    switches = {
        f"--{action.dest}"
        for action in parser._actions
        if bool in (hint := getattr(action, "_typehint", None), *get_args(hint))
    }
    argv = _switched_on(option_words(sys.argv[1:] if argv is None else argv), switches)
    try:
        return cls(**_sections(parser.instantiate(parser.parse_args(argv)), cls))
    except jsonargparse.ArgumentError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, UserError):
            cause = cause.__cause__ or cause.__context__
        raise UserError(str(cause) if cause else _one_line(str(error), parser)) from None


def option_words(words: Sequence[str]) -> list[str]:
    """A command line in which options have the names of fields: --shard-size is --shard_size."""
    return [re.sub(r"^--[\w.-]+", lambda m: "--" + m[0][2:].replace("-", "_"), word) for word in words]


def flag_words(words: Sequence[str], *flags: str) -> list[str]:
    """A command line in which the options `flags` may stand without a value: --json is --json=true."""
    return [f"{word}=true" if word[:2] == "--" and word[2:] in flags else word for word in words]


def _switched_on(words: Sequence[str], switches: set[str]) -> list[str]:
    """A command line in which the options `switches`, which may be true, may stand alone: --trust is --trust=true."""
    following = [*words, "--"][1:]
    return [
        f"{word}=true" if word in switches and next_word.startswith("--") else word
        for word, next_word in zip(words, following, strict=True)
    ]


def to_dict(config: object) -> dict:
    """The resolved configuration as plain dicts and lists, as written to config.yaml."""
    assert dataclasses.is_dataclass(config) and not isinstance(config, type)
    return dataclasses.asdict(config)


def flatten(values: dict, prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one dict with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


class Parser(argparse.ArgumentParser):
    """A command line with words that are no options: errors are `UserError`, the help keeps the module's text."""

    def __init__(self, **options: Any):
        super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter, **options})

    def error(self, message: str) -> NoReturn:
        """Raise `UserError`."""
        raise UserError(f"{message} (see --help)")


class _ConfigFile(jsonargparse.ActionConfigFile):
    """A file of options, read by `read_yaml`; jsonargparse gets its content as JSON."""

    def __call__(self, parser, cfg, values, option_string=None):
        content = read_yaml(values, "config")
        for section in _section_names(parser):
            value = content.get(section, {})
            require(isinstance(value, dict), f"config: {values}: {section} is {value}: give its options by name")
        try:
            super().__call__(parser, cfg, json.dumps(content, ensure_ascii=False), option_string)
        except UnicodeEncodeError as error:
            letter = error.object[error.start]
            raise UserError(f"config: {values}: this locale has no {letter!a}: set LC_ALL=C.UTF-8") from None


def _section_names(parser: jsonargparse.ArgumentParser) -> set[str]:
    words = [option for action in parser._actions for option in action.option_strings]
    return {word[2:].partition(".")[0] for word in words if "." in word}


def read_yaml(path: str | Path, option: str) -> dict[str, Any]:
    """What a YAML file of options says, in plain values; it is UTF-8 in every locale.

    Raises `UserError`, one line, where it is no regular file, which could be without an end, or no mapping, and where
    its aliases refer to themselves or multiply beyond the largest size.
    """
    require(os.path.exists(path), f"{option}: no such file: {path}")
    require(os.path.isfile(path), f"{option}: {path} is not a regular file")
    import yaml

    try:
        with open(path, "rb") as file:
            content = file.read(_LARGEST_FILE + 1).decode()
        values = jsonargparse.get_loader("yaml")(content)
        size = len(content)
        for part in json.JSONEncoder().iterencode(values):
            size += len(part)
            if size > 2 * _LARGEST_FILE:
                raise ValueError("it is too large")
    except (ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        reason = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else re.sub(r"\s+", " ", str(error))
        raise UserError(f"{option}: {path} cannot be read as YAML ({reason})") from None
    require(isinstance(values, dict), f"{option}: {path} holds no options: write them as name: value")
    return values


_LARGEST_FILE = 1 << 20


class _HelpFormatter(jsonargparse.DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help with the module's text as it stands, and without the usage block, which lists every option twice."""

    def add_usage(self, usage, actions, groups, prefix=None):
        super().add_usage("%(prog)s [--config X.yaml] [--section.option VALUE ...]", actions, groups, prefix)


def _sections(namespace: jsonargparse.Namespace, cls: type) -> dict:
    return {f.name: getattr(namespace, f.name) for f in dataclasses.fields(cls)}


def _one_line(message: str, parser: jsonargparse.ArgumentParser) -> str:
    """jsonargparse's message on one line, with the nearest known option for an unknown one."""
    message = re.sub(r"\s*\n\s*", " ", message.strip())
    message = re.sub(r"Expected a <class '(\w+)'>", r"expected \1", message)
    message = re.sub(r"Expected a typing\.Literal\[(.*?)\]", r"expected one of \1", message)
    known = [option[2:] for action in parser._actions for option in action.option_strings if option[:2] == "--"]
    unknown = None
    if match := re.search(r"unrecognized arguments: (.*)", message):
        unknown = match[1].split()[0].lstrip("-").split("=")[0]
        message = f"unknown option --{unknown}"
    elif match := re.search(r"Group '([^']*)' does not accept option '([^']*)'", message):
        unknown = f"{match[1]}.{match[2]}"
        message = f"unknown key {unknown} in the configuration file"
    elif match := re.search(r"Option '([^']*)' is not accepted", message):
        unknown = match[1]
        message = f"unknown key {unknown} in the configuration file"
    elif match := re.search(r"required: (.*)", message):
        message = f"missing option: --{match[1].replace(', ', ', --')}"
    elif match := re.search(r'Parser key "([^"]*)": *(.*)', message):
        message = f"option {match[1]}: {match[2]}"
    if unknown and (near := difflib.get_close_matches(unknown, known, n=1)):
        message += f"; did you mean --{near[0]}?"
    return f"{message} (see --help)"
