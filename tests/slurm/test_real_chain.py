"""jobs/submit with the real programs, from the official archives' layout to results.json, on two nodes of CPUs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from mimscale.data.synthetic import make_image_folder
from tests.data_prep.test_imagenet import WNIDS, meta, pack
from tests.slurm.conftest import Site
from tests.slurm.test_chain import STAGES, states, submit

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.multi]
HERE = Path(__file__).parent
TWO = "--nodes=2 --ntasks-per-node=1 --gpus-per-node=1 --cpus-per-task=1"
TRAIN, VAL = 10, 4  # images per class


def archives(root: Path) -> None:
    """ILSVRC2012's three archives with synthetic images of four classes."""
    classes = sorted(make_image_folder(root / "images", classes=4, per_class=TRAIN + VAL, side=40).iterdir())
    of_class = {w: [p.read_bytes() for p in sorted(c.iterdir())] for w, c in zip(sorted(WNIDS), classes, strict=True)}
    inner = {}
    for wnid, images in of_class.items():
        content = {f"{wnid}_{n}.JPEG": image for n, image in enumerate(images[:TRAIN])}
        inner[f"{wnid}.tar"] = pack(root / f"{wnid}.tar", content)
    pack(root / "ILSVRC2012_img_train.tar", inner)
    val = [(WNIDS.index(wnid) + 1, image) for wnid, images in of_class.items() for image in images[TRAIN:]]
    pack(
        root / "ILSVRC2012_img_val.tar",
        {f"ILSVRC2012_val_{n:08d}.JPEG": image for n, (_, image) in enumerate(val, 1)},
    )
    data = "ILSVRC2012_devkit_t12/data/"
    truth = "".join(f"{number}\n" for number, _ in val).encode()
    devkit = {f"{data}meta.mat": meta(), f"{data}ILSVRC2012_validation_ground_truth.txt": truth}
    pack(root / "ILSVRC2012_devkit_t12.tar.gz", devkit, "w:gz")


def test_all_stages_into_one_results_json(site: Site) -> None:
    """Every stage on two ranks of two nodes, with an evaluation while training; one protocol fails and no other."""
    archives(site.folder)
    site.write_env(MIMSCALE_PYTHON=sys.executable, SITE_LOCAL_DIR=str(site.cluster.local), MIN_FREE_GB="1")
    val = site.folder / "val"
    recipe = site.folder / "recipe.yaml"
    evals = f"evals: {{val: {val}, every: 6, protocols: {{ridge: {{}}}}}}\n"
    expected = "expected:\n" + "".join(
        f"  {name}: {{value: {value}, source: this test}}\n"
        for name, value in {"knn": 0, "attentive": 100, "top1": 0, "nosuch": 50, "sweep": 50}.items()
    )
    recipe.write_text((HERE / "tiny.yaml").read_text().replace("steps: 120", "steps: 12") + evals + expected)
    done = submit(
        site,
        *("engine.ds_config=cpu_zero2_bf16", "engine.device=cpu"),
        IMAGENET=str(site.folder),
        RECIPE=str(recipe),
        FINETUNE=str(HERE / "tiny_finetune.yaml"),
        FINETUNE_CHANGES="engine.ds_config=cpu_zero2_fp32 engine.device=cpu",
        VERBS="knn linear attentive nosuch",
        EVAL_DEVICE="cpu",
        ARRAY="0-1",
        TRAIN_OPTS=TWO,
        EVAL_OPTS=TWO,
        FINETUNE_OPTS=TWO,
    )
    assert done.returncode == 0, done.stderr
    jobs = dict(line.split() for line in (site.run_dir / "job" / "jobs.txt").read_text().splitlines())
    end = site.cluster.wait(jobs["results"], timeout_s=590)
    logs = "\n".join(path.read_text() for path in sorted((site.run_dir / "job").glob("*.out")))
    assert end["JobState"] == "COMPLETED", logs
    found = json.loads((site.run_dir / "results.json").read_text())
    assert states(found) == {**dict.fromkeys(STAGES[:-1], "done"), "nosuch": "failed"}, logs
    figures = {f["metric"]: f for f in found["figures"]}
    assert {"knn", "linear", "attentive", "top1"} <= figures.keys()
    assert all(0 <= f["value"] <= 100 for f in found["figures"])
    assert {figures[name]["step"] for name in ("knn", "linear", "attentive", "top1")} == {12}
    status = {entry["protocol"]: entry["status"] for entry in found["expected"]}
    missing = 100 - figures["attentive"]["value"]
    short = f"short by {missing:.1f}" if missing >= 0.05 else "reached"
    assert status == {"knn": "reached", "attentive": short, "top1": "reached", "nosuch": "failed", "sweep": "not run"}
    assert found["training"]["finished"] and found["training"]["step"] == 12
    assert found["training"]["evals"]["at"] == 12
    assert {"ridge", "rankme", "spread"} <= found["training"]["evals"].keys()
    for name in ("pretrain", "finetune"):
        run_dir = site.run_dir / "finetune" if name == "finetune" else site.run_dir
        (launch,) = (json.loads(line) for line in (run_dir / "launches.jsonl").read_text().splitlines())
        assert launch["ranks"] == 2 and launch["slurm_job"] == jobs[name]
