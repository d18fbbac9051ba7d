"""`mimscale completion bash|zsh`: a script for the shell. All that it completes stands in it, so that TAB starts no
Python: verbs, options, recipes, the keys of each recipe, and where paths are meant, paths.

shtab writes the part that knows the parser; recipes and keys are completed by the functions below.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path, PurePath
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from mimscale.config.recipes import load_recipe, recipe_names
from mimscale.files.command_line import end_with_example

RECIPE = {"bash": "_mimscale_recipes", "zsh": "_mimscale_recipes"}
KEY = {"bash": "_mimscale_keys", "zsh": "_mimscale_keys"}
COMPLETED = {"recipe": RECIPE, "names": RECIPE, "overrides": KEY, "override": KEY, "set": KEY}
"""Of an argument by its destination."""
FOLDERS = ("DIR", "NEW")
"""Metavars of paths that are folders; other paths may be files."""

# Both shells read this: the keys of the recipe among the words given, one per line as KEY=VALUES; else of all recipes.
TABLE = """
_mimscale_recipe_names='{names}'
_mimscale_common_keys='{common}'
_mimscale_keys_of() {{
  local word
  for word in "$@"; do
    case "${{word%%,*}}" in
{cases}
      *) continue ;;
    esac
    echo "$_mimscale_common_keys"
    return
  done
  echo "$_mimscale_common_keys"
  echo '{every}'
}}
"""
BASH = """
_mimscale_recipes() {
  compgen -W "$_mimscale_recipe_names" -- "$1"
  compgen -f -X '!*.yaml' -- "$1"
  compgen -d -S / -- "$1"
}
_mimscale_keys() {
  local word=$1 key="" line rest values before=""
  if [[ $word == = ]]; then
    word="" key=${COMP_WORDS[COMP_CWORD-1]}
  elif [[ ${COMP_WORDS[COMP_CWORD-1]} == = ]]; then
    key=${COMP_WORDS[COMP_CWORD-2]}
  fi
  while IFS= read -r line; do
    values=${line#*=} line=${line%%=*}
    if [[ -n $key ]]; then
      [[ $line == "$key" ]] || continue
      if [[ $values == PATH ]]; then compgen -f -- "$word"; else compgen -W "$values" -- "$word"; fi
      return
    fi
    [[ $line == "$word"* ]] || continue
    rest=${line#"$word"}
    if [[ $rest == *.* ]]; then line=$word${rest%%.*}.; else line=$line=; fi
    [[ $line == "$before" ]] || echo "$line"
    before=$line
  done < <(_mimscale_keys_of "${COMP_WORDS[@]}" | LC_ALL=C sort -u)
}
"""
BASH_END = """
_mimscale() {
  _shtab_mimscale "$@"
  [[ ${COMPREPLY[0]-} == *[./=] ]] && compopt -o nospace 2>/dev/null
  return 0
}
complete -o bashdefault -o default -F _mimscale mimscale
"""
ZSH = """
_mimscale_recipes() {
  compadd -- ${=_mimscale_recipe_names}
  _files -g '*.yaml'
}
_mimscale_keys() {
  local -a lines keys
  local line
  lines=(${(f)"$(_mimscale_keys_of ${words[@]})"})
  if [[ $PREFIX == *=* ]]; then
    for line in $lines; do
      [[ ${line%%=*} == ${PREFIX%%=*} ]] || continue
      compset -P '*='
      if [[ ${line#*=} == PATH ]]; then _files; else compadd -- ${=line#*=}; fi
      return
    done
  else
    keys=(${${lines%%=*}:#})
    compadd -S '=' -- $keys
  fi
}
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=("bash", "zsh"), help="the shell that is to read it")
    end_with_example(
        parser,
        "mimscale completion bash > ~/.local/share/bash-completion/completions/mimscale",
        "mimscale completion zsh > ~/.zfunc/_mimscale",
    )


def run(args: argparse.Namespace) -> int:
    print(script(args.parser, args.shell))
    return 0


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """parser: that of all verbs; what its arguments are completed by is written into it."""
    import shtab

    for one in parsers(parser):
        for action in one._actions:
            known: Any = COMPLETED.get(action.dest)
            if known is None and action.type is Path:
                known = shtab.DIRECTORY if action.metavar in FOLDERS else shtab.FILE
            if known is not None and not action.choices:
                action.complete = known  # type: ignore[attr-defined]
    text = table() + (BASH if shell == "bash" else ZSH)
    preamble: Any = {shell: text}
    found = str(shtab.complete(parser, shell=shell, root_prefix="mimscale", preamble=preamble))
    return found + (BASH_END if shell == "bash" else "")


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """The parser and those of its verbs, at any depth."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for one in action.choices.values():
                yield from parsers(one)


def table() -> str:
    """Names and keys of all recipes as variables and a function of the shell."""
    lines = {name: {f"{key}={values}" for key, values in keys_of(load_recipe(name)).items()} for name in recipe_names()}
    common = set.intersection(*lines.values())
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, found in lines.items():
        groups.setdefault(tuple(sorted(found - common)), []).append(name)
    cases = "\n".join(f"      {'|'.join(names)}) echo '{_text(own)}' ;;" for own, names in groups.items())
    every = set.union(*lines.values()) - common
    return TABLE.format(names=" ".join(lines), common=_text(common), cases=cases, every=_text(every))


def _text(lines: set[str] | tuple[str, ...]) -> str:
    return "\n".join(sorted(lines))


def keys_of(section: BaseModel | type[BaseModel], place: str = "") -> dict[str, str]:
    """`section.key` -> the words that may be its value, "PATH" for a path, else "". Also of sections left out."""
    found: dict[str, str] = {}
    kind = section if isinstance(section, type) else type(section)
    for name, field in kind.model_fields.items():
        value = getattr(section, name) if isinstance(section, BaseModel) else None
        parts = [part for part in _parts(field.annotation) if part is not type(None)]
        inner = value if isinstance(value, BaseModel) else next((p for p in parts if _is_section(p)), None)
        if isinstance(value, Mapping) and value and all(isinstance(one, BaseModel) for one in value.values()):
            for key, one in value.items():
                found |= keys_of(one, f"{place}{name}.{key}.")
        elif inner is not None:
            found |= keys_of(inner, f"{place}{name}.")
        else:
            found[f"{place}{name}"] = _values(parts)
    return found


def _parts(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, else the annotation alone."""
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _values(parts: list[Any]) -> str:
    words: list[str] = []
    for part in parts:
        if get_origin(part) is Literal:
            words += [str(word.value if isinstance(word, Enum) else word) for word in get_args(part)]
        elif part is bool:
            words += ["true", "false"]
        elif isinstance(part, type) and issubclass(part, PurePath):
            return "PATH"
    return " ".join(words)
