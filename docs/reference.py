"""Writes docs/reference/ from the code: python docs/reference.py

recipe.md has every key of a recipe, cli.md every command and option, python.md the public names of `mimscale`. A test
fails where a page is not what this program would write.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

import data_prep.__main__ as data_prep
import mimscale
from mimscale.__main__ import VERBS, make_parser
from mimscale.config.key_texts import key_texts
from mimscale.config.registry import class_in, names_in
from mimscale.config.run import RunConfig

FOLDER = Path(__file__).resolve().parent / "reference"
HEADER = "<!-- python docs/reference.py writes this page: change the code, not the page -->"
BY_NAME = {  # section whose model depends on a name in it -> (package of the names, heading of each)
    "method": ("mimscale.methods", "`method.name: {}`"),
    "method.masking": ("mimscale.masking", "`method.masking.policy: {}`"),
    "optim": ("mimscale.optim.optimizers", "`optim.name: {}`"),
    "evals.protocols": ("mimscale.evals.protocols", "`evals.protocols.{}`"),
}
WORDS = {bool: "true or false", int: "integer", float: "number", str: "text", Path: "path", Any: "anything"}
BOUNDS = {
    "ge": "≥ {:,.10g}",
    "gt": "> {:,.10g}",
    "le": "≤ {:,.10g}",
    "lt": "< {:,.10g}",
    "min_length": "length ≥ {}",
    "pattern": "like `{}`",
}


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, text in pages().items():
        (FOLDER / name).write_text(text)
        print(f"docs/reference/{name}")


def pages() -> dict[str, str]:
    """Name of each page -> its Markdown."""
    found = {"recipe.md": recipe(), "cli.md": cli(), "python.md": python()}
    return {name: f"{HEADER}\n\n" + "\n\n".join(filter(None, blocks)) + "\n" for name, blocks in found.items()}


def cell(text: object) -> str:
    """Text that may stand in a table and in a paragraph; what stands in backquotes already stays as it is."""
    parts = re.split(r"(`[^`]*`)", " ".join(str(text).split()))
    plain = [part if part.startswith("`") else re.sub(r"([*{}])", r"\\\1", part).replace("<", "&lt;") for part in parts]
    return "".join(plain).replace("|", "\\|")


def table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(heads), ["---"] * len(list(heads)), *map(list, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# ------------------------------------------------------------------------------------------------ recipe


def recipe() -> Iterator[str]:
    yield "# Every key of a recipe"
    yield (
        "`section.key`, its values, its default, and what it does. How recipes are written, extended and overridden: "
        "[recipes.md](../recipes.md); with their values: `mimscale train RECIPE --show`. An unknown key is an error. "
        "What a key of a method, a masking policy, an optimiser or a protocol is called depends on the name that is "
        "chosen, so these have a table for each name."
    )
    plain = [(n, f) for n, f in RunConfig.model_fields.items() if not section_of(f.annotation)]
    yield table(("key", "values", "default", "what it does"), (row(name, field) for name, field in plain))
    for name, field in RunConfig.model_fields.items():
        model = section_of(field.annotation)
        if model is None:
            continue
        yield f"## `{name}`"
        yield cell(sentence(field.description or ""))
        if name in BY_NAME:
            yield from by_name(name)
        else:
            yield from section(model, f"{name}.{'NAME.' if get_origin(field.annotation) is dict else ''}")
        for inner in BY_NAME:
            if inner.startswith(f"{name}."):
                yield from by_name(inner)


def by_name(place: str) -> Iterator[str]:
    package, heading = BY_NAME[place]
    prefix = f"{place}.{'{}.' if place == 'evals.protocols' else ''}"
    for name in names_in(package):
        config = class_in(package, name, place).Config
        yield f"### {heading.format(name)}"
        doc = (importlib.import_module(f"{package}.{name}").__doc__ or "").split("\n\n")[0]
        yield cell(" ".join(doc.split()))
        yield from section(config, prefix.format(name)) if config.model_fields else ["No keys."]


def section(model: type[BaseModel], prefix: str) -> Iterator[str]:
    """What the docstring says of the section, and a table of its keys and those of the sections inside."""
    if (model.__doc__ or "").strip():
        yield cell(key_texts(model.__doc__, model.model_fields)[0])
    rows = [row(name, field) for name, field in keys(model, prefix)]
    yield table(("key", "values", "default", "what it does"), rows)


def keys(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """(name with its place, field) of a section and of those inside it; a masking policy has tables of its own."""
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}", field
        inner = section_of(field.annotation)
        if inner is not None and f"{prefix}{name}" not in BY_NAME:
            yield from keys(inner, f"{prefix}{name}.{'NAME.' if get_origin(field.annotation) is dict else ''}")


def every_key() -> Iterator[tuple[str, FieldInfo]]:
    """All keys that the page has; NAME stands for a name of the user's own."""
    for name, field in RunConfig.model_fields.items():
        yield name, field
        model = section_of(field.annotation)
        if model is not None and name not in BY_NAME:
            yield from keys(model, f"{name}.{'NAME.' if get_origin(field.annotation) is dict else ''}")
    for place, (package, _) in BY_NAME.items():
        for name in names_in(package):
            yield from keys(class_in(package, name, place).Config, f"{place}({name}).")


def section_of(kind: Any) -> type[BaseModel] | None:
    """The model in a field's type, if it has one."""
    if inspect.isclass(kind) and issubclass(kind, BaseModel):
        return kind
    return next(filter(None, map(section_of, get_args(kind))), None)


def row(name: str, field: FieldInfo) -> list[str]:
    kind = Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
    return [f"`{name}`", cell(values(kind)), default(field), cell(field.description or "")]


def values(kind: Any) -> str:
    """The values that a type admits, in words."""
    arguments = get_args(kind)
    if get_origin(kind) is Annotated:
        rules = [part for item in arguments[1:] for part in getattr(item, "metadata", [item])]
        given = [(form, getattr(rule, name, None)) for rule in rules for name, form in BOUNDS.items()]
        return ", ".join([values(arguments[0]), *(form.format(value) for form, value in given if value is not None)])
    if kind is type(None):
        return "null"
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(values(argument) for argument in arguments)
    if get_origin(kind) is Literal:
        return ", ".join(f"`{argument}`" for argument in arguments)
    if get_origin(kind) is tuple:
        inner = values(arguments[0])
        return f"list of {inner}" if arguments[-1] is Ellipsis else f"{len(arguments)} × {inner}"
    if get_origin(kind) is dict:
        inner = "sections" if section_of(arguments[1]) else values(arguments[1])
        return f"map of {values(arguments[0])} to {inner}"
    if section_of(kind) is not None:
        return "section"
    return WORDS.get(kind) or str(getattr(kind, "__name__", kind))


def default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return "its defaults"
    if isinstance(value, dict) and not value:
        return "none"
    plain = json.dumps(value, default=str, ensure_ascii=False)
    return f"`{plain[1:-1] if isinstance(value, str) else plain}`"


def sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}"


# ------------------------------------------------------------------------------------------------ command line


def cli() -> Iterator[str]:
    yield "# Every command and option"
    yield (
        "What `--help` prints. `section.key=value` changes a key of a recipe ([recipe.md](recipe.md)). Completion, "
        "JSON, colours and exit codes: [cli.md](../cli.md)."
    )
    for parser, text in subcommands(make_parser(VERBS)[0]):
        yield from command(parser, text, 2)
    yield "## `python -m data_prep`"
    yield "Makes and checks data sets of tar shards: [data_prep/README.md](../../data_prep/README.md)."
    for parser, text in subcommands(data_prep.make_parser()):
        yield from command(parser, text, 3)


def command(parser: argparse.ArgumentParser, text: str, level: int) -> Iterator[str]:
    """Heading, description, a table of the options, the closing example, and the same of its subcommands."""
    inner = list(subcommands(parser))
    shown = [a for a in parser._actions if a.help != argparse.SUPPRESS and not isinstance(a, argparse._HelpAction)]
    shown = [action for action in shown if not isinstance(action, argparse._SubParsersAction)]
    positional = [name_of(action) for action in shown if not action.option_strings]
    options = ["[options]"] if any(action.option_strings for action in shown) else []
    yield f"{'#' * level} `{parser.prog}`"
    yield cell(sentence(parser.description or text))
    yield f"```text\n{' '.join([parser.prog, *options, *positional, *(['...'] if inner else [])])}\n```"
    if shown:
        yield table(("argument", "default", "what it does"), map(option_row, shown))
    if parser.epilog:
        yield f"```text\n{inspect.cleandoc((parser.epilog % {'prog': parser.prog}).strip())}\n```"
    for below, about in inner:
        yield from command(below, about, min(level + 1, 6))


def subcommands(parser: argparse.ArgumentParser) -> Iterator[tuple[argparse.ArgumentParser, str]]:
    """Each with its line in the help of the parser above."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            lines = {choice.dest: choice.help or "" for choice in action._choices_actions}
            yield from ((below, lines.get(name, "")) for name, below in action.choices.items())


def name_of(action: argparse.Action) -> str:
    name = action.metavar or (f"{{{','.join(map(str, action.choices))}}}" if action.choices else action.dest.upper())
    word = name if isinstance(name, str) else " ".join(name)
    return {"?": f"[{word}]", "*": f"[{word} ...]", "+": f"{word} [...]"}.get(str(action.nargs), word)


def option_row(action: argparse.Action) -> list[str]:
    takes = "" if action.nargs == 0 else f" {name_of(action)}"
    flags = action.option_strings
    if isinstance(action, argparse.BooleanOptionalAction):
        takes = ""
    written = ", ".join(f"`{flag}{takes}`".replace("|", "\\|") for flag in flags) or f"`{name_of(action)}`"
    text = (action.help or "") % {**vars(action), "prog": "", "type": getattr(action.type, "__name__", "")}
    value = action.default
    hidden = value in (None, False, argparse.SUPPRESS) or value == [] or "default" in text
    return [written, "required" if flags and action.required else "" if hidden else f"`{value}`", cell(text)]


# ------------------------------------------------------------------------------------------------ Python


def python() -> Iterator[str]:
    yield "# The Python API, name by name"
    yield "What `mimscale.__all__` names. How they are used together: [python.md](../python.md)."
    for name in sorted(mimscale.__all__, key=lambda name: (name[0].isupper(), name)):
        found = getattr(mimscale, name)
        if not callable(found):
            continue
        yield f"## `mimscale.{name}`"
        if not inspect.isclass(found):
            yield signature(name, found)
        yield from prose(found.__doc__)
        if inspect.isclass(found) and not issubclass(found, Exception):
            for member, value in vars(found).items():
                is_property = isinstance(value, property)
                if not member.startswith("_") and (is_property or inspect.isfunction(value)):
                    yield f"### `{name}.{member}`"
                    yield "A property." if is_property else signature(f"{name}.{member}", value)
                    yield from prose(value.__doc__)


def signature(name: str, function: Any) -> str:
    """The call, one parameter a line where it is long."""
    found = inspect.signature(function)
    line = f"{name}{found}".replace("'", "")
    if len(line) > 100:
        parts, star = list[str](), False
        for parameter in found.parameters.values():
            if parameter.kind is parameter.KEYWORD_ONLY and not star:
                parts, star = [*parts, "*"], True
            parts.append(str(parameter).replace("'", ""))
        returned = "" if found.return_annotation is found.empty else f" -> {found.return_annotation}"
        line = f"{name}(\n    " + ",\n    ".join(parts) + f",\n){returned}"
    return f"```python\n{line}\n```"


def prose(docstring: str | None) -> Iterator[str]:
    """A docstring as Markdown: paragraphs, what it says of each name as a list, its example as code."""
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(docstring or "")):
        if paragraph.startswith(">>>"):
            yield f"```pycon\n{paragraph}\n```"
            continue
        pieces = re.split(r"(?:^|(?<=\. )|(?<=\.  ))((?:\w+(?:, )?)+): ", " ".join(paragraph.split("\n")))
        names, texts = pieces[1::2], pieces[2::2]
        if not names or any(" " in name.replace(", ", "") for name in names):
            yield cell(paragraph)
            continue
        if pieces[0].strip():
            yield cell(pieces[0])
        yield "\n".join(f"- `{name}`: {cell(text)}" for name, text in zip(names, texts, strict=True))


if __name__ == "__main__":
    main()
