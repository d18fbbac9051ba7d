"""ImageNet-C: 15 corruptions in 5 severities, and the mean corruption error (Hendrycks and Dietterich, ICLR 2019,
arXiv 1903.12261, sec. 4.1)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mimscale.data.manifest import MANIFEST
from mimscale.errors import UserError

SEVERITIES = (1, 2, 3, 4, 5)
ALEXNET = {  # corruption -> error of AlexNet, mean over the severities; github.com/hendrycks/robustness
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}


def corruption_errors(errors: Mapping[tuple[str, int], float]) -> dict[str, float]:
    """Corruption -> CE in percent: the error summed over the severities, divided by AlexNet's.

    errors: (corruption, severity) -> share of wrong predictions, 0 to 1, for all 75.
    """
    return {
        name: 100 * sum(errors[name, severity] for severity in SEVERITIES) / (len(SEVERITIES) * alexnet)
        for name, alexnet in ALEXNET.items()
    }


def mean_corruption_error(errors: Mapping[tuple[str, int], float]) -> float:
    """mCE in percent: the mean of CE over the 15 corruptions. AlexNet has 100, a perfect classifier 0."""
    ce = corruption_errors(errors)
    return sum(ce.values()) / len(ce)


def corrupted_sets(folder: Path) -> dict[tuple[str, int], Path]:
    """(corruption, severity) -> its shards, FOLDER/CORRUPTION/SEVERITY. Raises UserError where one of 75 is missing."""
    paths = {(name, severity): folder / name / str(severity) for name in ALEXNET for severity in SEVERITIES}
    missing = [path for path in paths.values() if not (path / MANIFEST).is_file()]
    if missing:
        raise UserError(
            f"--corruptions {folder}: {len(missing)} of {len(paths)} data sets CORRUPTION/SEVERITY have no {MANIFEST}, "
            f"the first is {missing[0]}; make it with `python -m data_prep folder`"
        )
    return paths
