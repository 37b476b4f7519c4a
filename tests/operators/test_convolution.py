"""Convolutions against torch's own layers, and the windows that fit."""

from __future__ import annotations

import math

import numpy as np
import pytest

import structops as so
from structops.testing import assert_close, to_backend

pytestmark = pytest.mark.torch


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # torch says that it copies its input
@pytest.mark.parametrize("padding", ["valid", "same", "circular"])
@pytest.mark.parametrize(
    ("taps", "spatial"), [((3,), (6,)), ((2,), (5,)), ((4,), (4,)), ((3, 2), (4, 5)), ((1, 4), (2, 4))]
)
def test_the_product_is_that_of_the_layer(taps: tuple[int, ...], spatial: tuple[int, ...], padding: str) -> None:
    import torch

    layer = (torch.nn.Conv1d if len(taps) == 1 else torch.nn.Conv2d)(
        2,
        3,
        taps,
        bias=False,
        dtype=torch.float64,
        padding="valid" if padding == "valid" else "same",
        padding_mode="circular" if padding == "circular" else "zeros",
    )
    A = so.Convolution(layer.weight.detach(), spatial, padding=padding)
    x = to_backend(np.random.default_rng(0).standard_normal((4, 2 * math.prod(spatial))), "torch")
    assert_close(x @ A.T, layer(x.reshape(4, 2, *spatial)).reshape(4, -1).detach(), scale=10)


def test_a_number_is_one_spatial_axis() -> None:
    kernel = to_backend(np.ones((2, 1, 3)), "torch")
    assert so.Convolution(kernel, 5).shape == so.Convolution(kernel, (5,)).shape == (6, 5)


@pytest.mark.parametrize(
    ("shape", "spatial", "padding", "message"),
    [
        ((1, 1, 5), 4, "valid", "window .5,. is larger than spatial_shape .4,."),
        ((1, 1, 5), 4, "circular", "larger"),
        ((1, 1, 3), (4, 4), "valid", "spatial axes"),
        ((1, 1, 3, 3), 4, "valid", "spatial axes"),
        ((1, 1, 3), 4, "full", "valid, same, circular"),
        ((1, 1, 3, 3, 3), (4, 4, 4), "valid", "kernel must have shape"),
        ((1, 3), 4, "valid", "kernel must have shape"),
    ],
)
def test_what_does_not_fit(shape: tuple[int, ...], spatial: tuple[int, ...], padding: str, message: str) -> None:
    with pytest.raises(so.ShapeError, match=message):
        so.Convolution(to_backend(np.ones(shape), "torch"), spatial, padding=padding)


@pytest.mark.parametrize("spatial", [(0,), (-3,)])
def test_an_empty_input_is_refused(spatial: tuple[int, ...]) -> None:
    for padding in ("valid", "same", "circular"):
        with pytest.raises(so.ShapeError):
            so.Convolution(to_backend(np.ones((1, 1, 1)), "torch"), spatial, padding=padding)


def test_the_kernel_of_a_transpose_is_flipped_with_channels_exchanged() -> None:
    kernel = to_backend(np.random.default_rng(0).standard_normal((3, 2, 2)), "torch")
    A = so.Convolution(kernel, 5)
    assert A.kernel is kernel
    assert A.T.T.kernel is kernel
    assert A.T.channels == (2, 3)
    assert_close(A.T.kernel, kernel.numpy()[:, :, ::-1].transpose(1, 0, 2))
