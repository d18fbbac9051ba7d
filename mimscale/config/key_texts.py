"""What a section's docstring says of each key: the one source of the recipe reference."""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection


def key_texts(docstring: str | None, keys: Collection[str]) -> tuple[str, dict[str, str]]:
    """The text about the section, and key -> text, of a docstring in which sentences such as these stand anywhere:

        every: optimiser steps between saves. mean, std: of the checkpoint. crops (experimental): steps per image.

    A key's text ends where the next key or the next paragraph begins; paragraphs that begin with no key are about the
    section. What stands in brackets after a key comes first in its text.
    """
    if not docstring or not keys:
        return " ".join((docstring or "").split()), {}
    key = "|".join(sorted(map(re.escape, keys), key=len, reverse=True))
    start = re.compile(rf"(?:^|(?<=[.;)] ))((?:{key})(?:, (?:{key}))*)( \([^()]*\))?: ")
    section, texts = list[str](), dict[str, str]()
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(docstring)):
        before, *pieces = start.split(" ".join(paragraph.split()))
        section.append(before.strip())
        for names, bracket, text in zip(pieces[::3], pieces[1::3], pieces[2::3], strict=True):
            for name in names.split(", "):
                words = f"{bracket.strip()} {text}" if bracket else text
                texts[name] = f"{texts[name]} {words.strip()}" if name in texts else words.strip()
    return " ".join(filter(None, section)), texts
