"""Damaged run folders:  python -m tests.faults.folders [--seed S] [--count N] [--keep FOLDER]

One file of the folder of a killed run is damaged, and the run is started again. It must reach its last step with the
same weights to the bit, or end with one line and exit code 2; never with a traceback, a hang, or other weights.
"""

from __future__ import annotations

import argparse
import collections
import os
import random
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from tests import ranks

STEPS, LIMIT_S = 6, 15.0
OTHERS = (
    b"",
    b"5\n",
    b"[]",
    b"{}",
    b"null",
    b'{"a": 1}\n',
    b"\0" * 300,
    b"thesis\n",
    b"\xff\xfe\x00\x01" * 40,
    b"[" * 9000,
)
DIGITS, STRUCTURE = b"0123456789", b'{}[],:"\n '


@dataclass(frozen=True)
class Damage:
    """What was done to which file, in words."""

    file: str
    what: str


@dataclass(frozen=True)
class Outcome:
    """failure: "" where the rules hold."""

    damage: Damage
    code: int
    seconds: float
    failure: str
    line: str = ""


class Folders:
    """A killed run, and copies of it."""

    def __init__(self, folder: Path, shards: Path) -> None:
        self.folder, self._number = folder, 0
        sections = {"data": {"workers": 0}, "schedule": {"steps": STEPS, "warmup_epochs": 0}, "student": {"depth": 1}}
        self.recipe = ranks.recipe(folder, shards, "mae", checkpoint={"every": 2, "keep": 9}, **sections)
        self.whole, self.killed = folder / "whole", folder / "killed"
        ranks.train(1, self.recipe, self.whole)
        ranks.cut_back(self.whole, self.killed, 4)
        self.expected = ranks.tensors(self.whole)
        self._leave_more()

    def _leave_more(self) -> None:
        """What a longer life leaves in a run folder."""
        line = '{"sample": 5, "shard": "shard-000000.tar", "key": "c\u00e4t", "reason": "OSError: cut"}\n'
        (self.killed / "damaged.jsonl").write_text(line)
        (self.killed / "guard.json").write_text('{"step": 3, "rollbacks": 0, "incidents": []}\n')
        (self.killed / "left_out.jsonl").write_text('{"from_step": 1, "batch": 1, "samples": [1], "keys": ["a"]}\n')
        for name in ("hang/rank-0.txt", "job/restarts.txt"):
            (self.killed / name).parent.mkdir()
            (self.killed / name).write_text("job 7 restart 0 step 2\n")
        claim = b'{"job": null, "restart": 0, "host": "elsewhere", "boot": "b", "pid": 1, "parent": 1, "token": "ab"}'
        (self.killed / "lock").write_bytes(claim.ljust(2048) + b"%020d" % 5)

    def files(self) -> list[Path]:
        """Every file, relative to the run folder."""
        return sorted(path.relative_to(self.killed) for path in self.killed.rglob("*") if path.is_file())

    def strike(self, dice: random.Random) -> Outcome:
        """Damage a copy, start it, and say what became of it."""
        self._number += 1
        run_dir = self.folder / f"run-{self._number}"
        shutil.copytree(self.killed, run_dir)
        damage = harm(run_dir, dice.choice(self.files()), dice)
        start_s = time.monotonic()
        words: list[str | Path] = ["tests.faults.quick_beats", "train", self.recipe, "--run-dir", run_dir]
        done = ranks.run(1, *words, check=False)
        seconds = time.monotonic() - start_s
        said = [line for line in done.stderr.splitlines() if line.startswith("mimscale train: ")]
        failure = self._wrong(done.returncode, done.stdout + done.stderr, said, run_dir)
        if not failure and seconds > LIMIT_S:
            failure = f"took {seconds:.0f} s"
        if not failure:
            shutil.rmtree(run_dir)
        return Outcome(damage, done.returncode, seconds, failure, said[0] if said else "")

    def _wrong(self, code: int, text: str, said: list[str], run_dir: Path) -> str:
        if "Traceback" in text:
            return f"a traceback: {text[-1500:]}"
        if code == 2:
            return "" if len(said) == 1 else f"{len(said)} lines: {said}"
        if code != 0:
            return f"exit code {code}: {text[-1500:]}"
        got = ranks.tensors(run_dir)
        same = got.keys() == self.expected.keys() and all(torch.equal(got[k], v) for k, v in self.expected.items())
        return "" if same else "reached its last step with other weights"


def harm(run_dir: Path, file: Path, dice: random.Random) -> Damage:
    path = run_dir / file
    content = path.read_bytes()
    kinds = ["flip", "flip", "flip", "flip", "cut", "absent", "others", "folder", "longer", "pipe", "link"]
    kind = dice.choice(kinds if content else ["absent", "others", "folder", "longer", "pipe", "link"])
    if kind == "flip":
        what, content = flipped(content, dice)
        path.write_bytes(content)
    elif kind == "cut":
        size = dice.choice([0, len(content) // 2, len(content) - 1])
        path.write_bytes(content[:size])
        what = f"cut to {size} of {len(content)} bytes"
    elif kind == "others":
        other = dice.choice(OTHERS)
        path.write_bytes(other)
        what = f"holds {other[:20]!r}"
    elif kind == "longer":
        path.write_bytes(content + dice.choice(OTHERS))
        what = "has more bytes"
    else:
        path.unlink()
        what = kind
        if kind == "folder":
            path.mkdir()
        elif kind == "pipe":
            os.mkfifo(path)
        elif kind == "link":
            path.symlink_to(dice.choice(["nothing", "/dev/null", "/dev/zero", "/etc", "."]))
    return Damage(str(file), what)


def flipped(content: bytes, dice: random.Random) -> tuple[str, bytes]:
    """One bit of one byte: the lowest, which leaves text readable, or the highest, which does not."""
    classes: dict[str, list[int]] = {"digit": [], "structure": [], "text": []}
    start = 0 if len(content) < 50_000 else dice.choice([0, dice.randrange(len(content) - 20_000)])
    for at, byte in enumerate(content[start : start + 20_000], start):
        classes["digit" if byte in DIGITS else "structure" if byte in STRUCTURE else "text"].append(at)
    name = dice.choice([name for name, places in classes.items() if places])
    at, bit = dice.choice(classes[name]), dice.choice([0x01, 0x80])
    changed = bytearray(content)
    changed[at] ^= bit
    return f"bit {bit:#04x} of byte {at} ({name})", bytes(changed)


def main() -> int:
    from data_prep.__main__ import main as data_prep
    from mimscale.data.synthetic import make_image_folder

    parser = argparse.ArgumentParser(
        prog="python -m tests.faults.folders", description=(__doc__ or "").partition("\n\n")[2]
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--keep", type=Path, help="work in this new folder and leave it, with the folders that failed")
    args = parser.parse_args()
    folder = args.keep or Path(tempfile.mkdtemp(prefix="folders-"))
    make_image_folder(folder / "images", classes=4, per_class=20, side=48)
    assert data_prep(["folder", str(folder / "images"), str(folder / "shards"), "--shard-samples", "16"]) == 0
    dice, folders = random.Random(args.seed), Folders(folder, folder / "shards")
    codes, longest_s, bad = collections.Counter[int](), 0.0, 0
    for number in range(args.count):
        outcome = folders.strike(dice)
        codes[outcome.code] += 1
        longest_s = max(longest_s, outcome.seconds)
        bad += bool(outcome.failure)
        print(
            f"{number}: {outcome.damage.file}: {outcome.damage.what}: {outcome.code} {outcome.line[:200]}", flush=True
        )
        if outcome.failure:
            print(f"FAILS: {outcome.failure}", flush=True)
    print(f"seed {args.seed}: {args.count} damaged folders, exit codes {dict(codes)}, longest {longest_s:.1f} s")
    print(f"{bad} with a wrong result")
    if args.keep is None:
        shutil.rmtree(folder)
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
