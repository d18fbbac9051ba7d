"""What trainers import. The server of tests/forked.py imports it once for all of them."""

import importlib

import timm  # noqa: F401
import torch

import mimscale.training.loop  # noqa: F401
from mimscale.engine.deepspeed_runtime import import_deepspeed

import_deepspeed(torch.device("cpu"))
importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")  # DeepSpeed imports it late, and torch's compiler
