"""Samples that could not be used: `damaged.jsonl` in the run folder, one line per sample, over all launches."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mimscale.errors import UserError
from mimscale.fault_tolerance.retrying_writer import RetryingWriter
from mimscale.files.regular import read_regular
from mimscale.types import Damage


class DamageLog:
    """Collects what this rank's batches met; `merge` merges the ranks and counts each sample once.

    limit: more than so many samples are too many. writer: of rank 0, which writes the file.
    """

    def __init__(self, path: Path, limit: int, writer: RetryingWriter | None = None):
        self.path, self.limit, self._writer = path, limit, writer
        self._known = {entry["sample"]: entry for entry in _entries(path)}
        self._new: dict[int, Damage] = {}

    def add(self, found: Iterable[Damage]) -> None:
        for damage in found:
            if damage.sample not in self._known:
                self._new.setdefault(damage.sample, damage)

    def take(self) -> list[Damage]:
        """What this rank has met since the last call."""
        taken = list(self._new.values())
        self._new.clear()
        return taken

    def merge(self, of_all_ranks: Iterable[Iterable[Damage]]) -> list[Damage]:
        """What is new to the run, in the order of sample ids."""
        met = {damage.sample: damage for part in of_all_ranks for damage in part}
        new = [met[sample] for sample in sorted(met) if sample not in self._known]
        self._known |= {damage.sample: asdict(damage) for damage in new}
        if new and self._writer is not None:
            self._writer.append(self.path, "".join(json.dumps(asdict(damage)) + "\n" for damage in new))
        return new

    @property
    def total(self) -> int:
        return len(self._known)

    @property
    def full(self) -> bool:
        return self.total > self.limit

    def verdict(self) -> str:
        """One line for a run that has met too many."""
        first = "; ".join(f"{e['shard']}: {e['key']} ({e['reason']})" for e in list(self._known.values())[:3])
        return (
            f"{self.total} samples cannot be used, data.max_damaged allows {self.limit}: {first}; all stand in "
            f"{self.path}; repair them and remove that file, or raise data.max_damaged"
        )


def default_limit(samples: int) -> int:
    return max(10, samples // 10_000)


def _entries(path: Path) -> list[dict[str, Any]]:
    """What a killed run left unfinished, and what is no entry of ours, is passed over. Raises UserError."""
    entries = []
    try:
        text = read_regular(path)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); repair it, or move it away") from None
    for line in text.splitlines():
        try:
            entry = json.loads(line)
            damage = Damage(**entry)
        except (ValueError, TypeError, RecursionError):
            continue
        if type(damage.sample) is int and all(isinstance(v, str) for k, v in entry.items() if k != "sample"):
            entries.append(entry)
    return entries
