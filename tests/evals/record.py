"""Record what `mimscale evaluate` reports, bit for bit, so that a change of structure can be shown to change no number.

    python -m tests.evals.record BEFORE.json             # at one commit
    python -m tests.evals.record AFTER.json              # at another
    python -m tests.evals.record --compare BEFORE.json AFTER.json

Three small students at their seeded initialisation (two methods, two image sizes), both poolings, two seeds and two
batch sizes, on images whose classes are hard to distinguish: every metric of every row, and the sha256 of predictions
behind them. The files are equal only on one machine with one set of packages.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

from torch import Tensor

from data_prep.__main__ import main as data_prep
from mimscale.__main__ import main
from mimscale.data.synthetic import make_image_folder
from mimscale.evals import metrics
from tests.evals.conftest import save_run, small_run

SETTINGS = {
    "defaults": ("knn", "linear", "lowshot --shots 1 --draws 2"),
    "others": ("knn --k 7 --temperature 0.2", "linear", "lowshot --shots 5 --draws 3"),
}
METRICS = ("knn", "linear", "l2", "lowshot", "lowshot_sd", "lowshot_draws")


def record(folder: Path) -> dict[str, Any]:
    """case -> metrics; "predictions" -> the sorted hashes of all predictions whose accuracy was taken."""
    for name, per_class, seed in (("train", 24, 0), ("val", 11, 1)):
        images = make_image_folder(folder / f"{name}-images", classes=12, per_class=per_class, side=40, seed=seed)
        assert data_prep(["folder", str(images), str(folder / name)]) == 0
    runs = [
        save_run(folder / "mae", small_run("mae")),
        save_run(folder / "supervised", small_run("finetune"), step=8),
        save_run(folder / "larger", small_run("mae", image_size=48), step=9),
    ]
    common = [*map(str, runs), "--train", str(folder / "train"), "--val", str(folder / "val"), "--pool", "mean", "cls"]
    common += ["--crop-pct", "1", "--workers", "0", "--device", "cpu"]
    common += ["--baselines"]  # leave out at a commit before there was the option
    hashes: set[str] = set()
    accuracy = metrics.multiclass_accuracy

    def recorded(predictions_N: Tensor, *args: Any, **options: Any) -> Tensor:
        hashes.add(hashlib.sha256(predictions_N.numpy().tobytes()).hexdigest())
        return accuracy(predictions_N, *args, **options)

    out: dict[str, Any] = {}
    with patch.object(metrics, "multiclass_accuracy", recorded):
        for setting, calls in SETTINGS.items():
            for call in calls:
                for seed, batch in ((0, 256), (1, 37)):
                    report = folder / "report.json"
                    options = ["--seed", str(seed), "--batch", str(batch), "--out", str(report)]
                    assert main(["evaluate", *call.split(), *common, *options]) == 0
                    for row in json.loads(report.read_text())["rows"]:
                        case = f"{setting}, seed {seed}: {row['network']}, {row['pool']}"
                        out.setdefault(case, {}).update({key: row[key] for key in METRICS if key in row})
    return {**out, "predictions": sorted(hashes)}


def compare(before: Path, after: Path) -> int:
    """Exit code 1 where a case differs or stands in one file only."""
    one, other = (json.loads(path.read_text()) for path in (before, after))
    differ = [case for case in sorted(one.keys() | other.keys()) if one.get(case) != other.get(case)]
    for case in differ:
        print(f"differs: {case}: {one.get(case)} {other.get(case)}")
    print(f"{len(differ)} of {len(one.keys() | other.keys())} cases differ; {len(one['predictions'])} predictions")
    return 1 if differ else 0


if __name__ == "__main__":
    if sys.argv[1] == "--compare":
        sys.exit(compare(Path(sys.argv[2]), Path(sys.argv[3])))
    with tempfile.TemporaryDirectory() as folder:
        Path(sys.argv[1]).write_text(json.dumps(record(Path(folder)), indent=1) + "\n")
