"""The official fine-tuned networks inside every engine: their loss, and the logits of the copy that is evaluated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from mimscale.config.deepspeed import load_ds_config
from mimscale.config.run import RunConfig
from mimscale.convert.formats.finetune import from_official
from mimscale.distributed.world import from_environment
from mimscale.engine.config import EngineConfig
from mimscale.engine.factory import make_engine
from mimscale.evals.frozen_student import StudentSkeleton, copied
from mimscale.methods.finetune import Finetune
from tests import golden
from tests.golden import batch_of, close, run_config
from tests.methods.test_convmae import sections

pytestmark = pytest.mark.usefixtures("process_group")


@dataclass(frozen=True)
class Network:
    """method: with the official weights. loss: of the labels, where the file has one."""

    run: RunConfig
    method: Finetune
    images: Tensor
    logits: Tensor
    labels: Tensor | None = None
    loss: Tensor | None = None


def vit(name: str, pool: str) -> Network:
    g = golden.load("ft_head_dev")
    c = g.config
    section = {"name": "finetune", "classes": c["classes"], "pool": pool, "label_smoothing": 0}
    run = run_config(section, {"width": c["embed"], "depth": c["depth"], "heads": c["heads"]}, c["img"])
    method = Finetune(run, {})
    method.load_state_dict(from_official(g.part(f"state_{name}")).weights)
    return Network(run, method, g["image"], g[f"{name}/logits"], g["label"], g[f"{name}/loss"])


def mean_pool() -> Network:
    return vit("gap", "mean")


def class_token() -> Network:
    return vit("cls", "cls")


def convmae() -> Network:
    g = golden.load("convvit_finetune_dev")
    student, stages = sections(g.config)
    run = run_config({"name": "finetune", "classes": g.config["num_classes"], "stages": stages}, student)
    method = Finetune(run, {})
    method.load_state_dict(from_official(g.part("state")).weights)
    return Network(run, method, g["input/images"], g["output/logits"])


@pytest.mark.parametrize("engine_name", [*(f"cpu_zero{stage}_fp32" for stage in range(4)), "torch"])
@pytest.mark.parametrize("network", [mean_pool, class_token, convmae])
def test_official_network(network: Callable[[], Network], engine_name: str) -> None:
    n = network()
    skeleton = StudentSkeleton(n.method)
    section = EngineConfig(ds_config="cpu_zero0_fp32", device="cpu", backend="torch")
    if engine_name != "torch":
        section = EngineConfig(ds_config=engine_name, device="cpu")
    engine = make_engine(
        n.method,
        n.run.model_copy(update={"engine": section}),
        from_environment("cpu"),
        micro_batch=len(n.images),
        accumulation=1,
        ds_config=load_ds_config(section.ds_config),
    )
    outside = skeleton.filled([*copied(engine.parameters(""), torch.float32, prefix=""), *n.method.named_buffers()])
    close(outside.logits(n.images), n.logits)
    if n.loss is not None:
        batch = replace(batch_of(n.images), labels=n.labels)
        golden.loss_close(engine.forward_backward(batch, {})["loss"], n.loss)
        soft = torch.nn.functional.one_hot(n.labels, n.logits.shape[1]).float()  # type: ignore[arg-type]
        golden.loss_close(engine.forward_backward(replace(batch, labels=None, soft_labels=soft), {})["loss"], n.loss)
    engine.close()
