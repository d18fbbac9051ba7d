"""Record what every tiny recipe trains, bit for bit, so that a change of structure can be shown to change no number.

    python -m tests.training.record BEFORE.json          # at one commit
    python -m tests.training.record AFTER.json           # at another
    python -m tests.training.record --compare BEFORE.json AFTER.json
    python -m tests.training.record AFTER.json --plain       # engine.plain = all; further words are overrides too
    python -m tests.training.record --compare BEFORE.json AFTER.json --within 1e-5    # of the losses, relative

For every tiny recipe, ZeRO stage 0, 2 and 3, and 1 and 2 ranks: the loss of each of 20 steps and the sha256 of the
final fp32 weights. Two micro-batches per step and rank where there are two ranks, four where there is one. The files
are equal only on one machine with one set of packages.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.__main__ import main as data_prep
from tests import ranks
from tests.training.test_tiny_recipes import TINY

STEPS = 20
STAGES, RANKS = (0, 2, 3), (1, 2)


def weights_hash(run_dir: Path) -> str:
    """sha256 over the names and the fp32 values of all parameters in a run's newest checkpoint."""
    digest = hashlib.sha256()
    for name, tensor in sorted(ranks.tensors(run_dir).items()):
        if name.startswith("fp32|"):
            digest.update(name.encode())
            digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def record(folder: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """case -> {"loss": [...], "sha256": ...}; the runs are made in `folder`."""
    assert data_prep(["synthetic", str(folder / "images")]) == 0
    assert data_prep(["folder", str(folder / "images"), str(folder / "shards")]) == 0
    found = {}
    for stage in STAGES:
        for count in RANKS:
            cases = {name: folder / f"{name} zero{stage} ranks{count}" for name in TINY}
            changes = [f"data.shards={folder / 'shards'}", f"schedule.steps={STEPS}", "log.every=1", "log.panels=0"]
            changes += ["log.trackers=[]", f"engine.ds_config=cpu_zero{stage}_fp32", "engine.max_micro_batch=8"]
            changes += overrides
            words = [[name, *changes, "--run-dir", str(run_dir)] for name, run_dir in cases.items()]
            (folder / "runs.json").write_text(json.dumps(words))
            ranks.run(count, "tests.training.several", folder / "runs.json")
            for run_dir in cases.values():
                losses = list(ranks.curve(run_dir).values())
                assert len(losses) == STEPS
                found[run_dir.name] = {"loss": [value.hex() for value in losses], "sha256": weights_hash(run_dir)}
    return found


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """One line for each case that is not equal to the bit or stands in one recording only."""
    lines = []
    for case in sorted(before.keys() | after.keys()):
        ours, theirs = before.get(case), after.get(case)
        if ours is None or theirs is None:
            lines.append(f"{case}: only in the {'second' if ours is None else 'first'}")
        elif ours["loss"] != theirs["loss"]:
            step = next(i for i, pair in enumerate(zip(ours["loss"], theirs["loss"], strict=True)) if len({*pair}) > 1)
            lines.append(f"{case}: the loss of step {step + 1} differs")
        elif ours["sha256"] != theirs["sha256"]:
            lines.append(f"{case}: equal losses, but the final weights differ")
    return lines


def apart(before: dict[str, Any], after: dict[str, Any]) -> dict[str, float]:
    """case -> the largest relative difference of its losses."""
    losses = {
        case: [[float.fromhex(value) for value in of[case]["loss"]] for of in (before, after)]
        for case in before.keys() & after.keys()
    }
    return {case: max(abs(a / b - 1) for a, b in zip(*pair, strict=True)) for case, pair in losses.items()}


def main(words: list[str]) -> int:
    if words[:1] == ["--compare"]:
        before, after = (json.loads(Path(path).read_text()) for path in words[1:3])
        lines = differences(before, after)
        if words[3:4] == ["--within"]:
            limit, found = float(words[4]), apart(before, after)
            worst = max(found, key=lambda case: found[case])
            equal = f"{len(before) - len(lines)} of {len(before)} cases equal to the bit"
            print(f"{equal}, losses at most {found[worst]:.1e} apart ({worst})")
            return int(found.keys() != before.keys() or found[worst] > limit)
        print("\n".join(lines) or f"{len(before)} cases, equal to the bit")
        return int(bool(lines))
    overrides = ["engine.plain=all" if word == "--plain" else word for word in words[1:]]
    with tempfile.TemporaryDirectory() as folder:
        Path(words[0]).write_text(json.dumps(record(Path(folder), overrides), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
