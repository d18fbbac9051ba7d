"""The labels of ILSVRC2012's validation images, from any of the files in which they are distributed.

The official ground truth uses the devkit's ILSVRC2012_ID. Its order is not the sorted order of the wnids that trained
classifiers use; the synset list or the devkit's meta.mat maps one to the other.
"""

from __future__ import annotations

import csv
import io
import sys
import tarfile
import zlib
from collections import Counter
from pathlib import Path

from mimscale.data.names import one_line
from mimscale.errors import UserError

DEVKIT_META = "data/meta.mat"
DEVKIT_TRUTH = "data/ILSVRC2012_validation_ground_truth.txt"
MAX_BYTES = 64 << 20  # of a file inside the devkit


def read_val_labels(truth: Path, synsets: Path | None) -> dict[str, str]:
    """Image name -> wnid. Raises UserError. truth is one of

    - LOC_val_solution.csv (Kaggle): columns ImageId and PredictionString, which starts with the wnid;
    - ILSVRC2012_devkit_t12.tar.gz: ground truth and meta.mat (needs scipy);
    - ILSVRC2012_validation_ground_truth.txt with `synsets`, a file whose line i has the wnid of ILSVRC2012_ID i.
    """
    try:
        if truth.suffix == ".csv":
            csv.field_size_limit(sys.maxsize)  # the limit is one for the whole process
            with open(truth, newline="", encoding="utf-8-sig") as file:
                rows = [(row["ImageId"], (row["PredictionString"] or "").split()) for row in csv.DictReader(file)]
            if empty := [name for name, words in rows if not words]:
                raise UserError(f"ground truth '{truth}': '{one_line(str(empty[0]))}' has no class; complete its row")
            if len(dict(rows)) != len(rows):
                twice, _ = Counter(name for name, _ in rows).most_common(1)[0]
                raise UserError(f"ground truth '{truth}': '{one_line(str(twice))}' has several rows; keep one")
            return {name: words[0] for name, words in rows}
        if truth.name.endswith((".tar", ".tar.gz", ".tgz")):
            with tarfile.open(truth) as devkit:
                wnids = _class_wnids(_extract(devkit, DEVKIT_META))
                text = _extract(devkit, DEVKIT_TRUTH).decode()
        else:
            if synsets is None:
                raise UserError(f"ground truth '{truth}' has devkit ids; add --synsets FILE (line i = wnid of id i)")
            wnids = dict(enumerate((line.split()[0] for line in synsets.read_text().splitlines() if line.strip()), 1))
            text = truth.read_text()
        ids = [int(line) for line in text.split()]
        return {f"ILSVRC2012_val_{number:08d}": wnids[devkit_id] for number, devkit_id in enumerate(ids, 1)}
    except UserError:
        raise
    except KeyError as error:
        raise UserError(
            f"ground truth '{truth}': {error} is not in it or in the synset list; give the right file"
        ) from None
    except (OSError, ValueError, IndexError, EOFError, zlib.error, csv.Error, tarfile.TarError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"ground truth '{truth}' cannot be read: {reason}") from None


def _class_wnids(meta: bytes) -> dict[int, str]:
    """ILSVRC2012_ID -> wnid of the classes, which are the synsets without children."""
    from scipy.io import loadmat

    try:
        synsets = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        return {int(s["ILSVRC2012_ID"]): str(s["WNID"]) for s in synsets if int(s["num_children"]) == 0}
    except Exception as error:  # scipy's parser raises whatever it meets
        raise ValueError(f"{DEVKIT_META}: {error}") from None


def _extract(devkit: tarfile.TarFile, ending: str) -> bytes:
    name = next((name for name in devkit.getnames() if name.endswith(ending)), None)
    file = devkit.extractfile(name) if name else None
    if file is None:
        raise UserError(
            f"'{devkit.name!r}' holds no {ending}; give ILSVRC2012_devkit_t12.tar.gz, or a text or csv file"
        )
    if devkit.getmember(name or "").size > MAX_BYTES:
        raise UserError(f"'{devkit.name!r}': {ending} has more than {MAX_BYTES:,} bytes; give the right file")
    return file.read()
