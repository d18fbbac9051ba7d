"""The moving average of tensors, by itself. Its place in runs and checkpoints: tests/training/test_ema.py."""

from __future__ import annotations

import torch

from mimscale.optim.ema import MovingAverage


def test_follows_its_definition_and_can_start_anew() -> None:
    random = torch.Generator().manual_seed(0)
    weights = [torch.randn(3, 4, generator=random), torch.randn(5, generator=random)]
    average = MovingAverage(0.9, weights)
    expected = [tensor.double() for tensor in weights]
    for _ in range(20):
        for tensor in weights:
            tensor.add_(torch.randn(tensor.shape, generator=random))
        average.update()
        expected = [0.9 * mean + 0.1 * tensor.double() for mean, tensor in zip(expected, weights, strict=True)]
    for tensor, mean in zip(weights, expected, strict=True):
        torch.testing.assert_close(average.of(tensor).double(), mean, rtol=1e-5, atol=1e-6)
        assert average.of(tensor).dtype == torch.float32 and average.of(tensor).shape == tensor.shape
    average.restart()
    assert all(torch.equal(average.of(tensor), tensor) for tensor in weights)
    assert average.of(weights[0]).data_ptr() != weights[0].data_ptr()


def test_of_nothing() -> None:
    """A rank may hold no piece of the student."""
    average = MovingAverage(0.9, [])
    average.update()
    average.restart()
