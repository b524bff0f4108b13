"""The layers computed a second time, from a state dict, with elementary operations.

Nothing of ran_layers or timm is used here, and of torch.nn.functional only the convolution: normalisation, pooling
and bilinear interpolation are written out.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def relu(x: Tensor) -> Tensor:
    return x.clamp(min=0)


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def max_pool(x: Tensor) -> Tensor:
    """Max-pooling 3x3 of stride 2: each output pixel is the largest of the input pixels within one of its own."""
    rows = [x[:, :, max(i - 1, 0):i + 2] for i in range(0, x.shape[2], 2)]
    x = torch.stack([row.amax(2) for row in rows], 2)
    columns = [x[..., max(i - 1, 0):i + 2] for i in range(0, x.shape[3], 2)]
    return torch.stack([column.amax(3) for column in columns], 3)


def bilinear_weights(n_in: int, n_out: int) -> Tensor:
    """The matrix that interpolates n_in values at the centres of n_out pixels of the same interval."""
    weights = torch.zeros(n_out, n_in, dtype=torch.float64)
    for i in range(n_out):
        position = min(max((i + 0.5) * n_in / n_out - 0.5, 0), n_in - 1)
        left = min(int(position), n_in - 1)
        weights[i, left] += 1 - (position - left)
        weights[i, min(left + 1, n_in - 1)] += position - left
    return weights


def upsample(x: Tensor, like: Tensor) -> Tensor:
    vertical = bilinear_weights(x.shape[2], like.shape[2])
    horizontal = bilinear_weights(x.shape[3], like.shape[3])
    return torch.einsum("ih,jw,nchw->ncij", vertical, horizontal, x)


@dataclass
class Formula:
    """The layers as functions of the weights in ``state``; ``name`` says where in it a layer's weights are.

    ``training`` normalises with the statistics of the batch; ``stride``, ``groups`` and ``resnext`` are those of every
    unit.
    """

    state: dict[str, Tensor]
    training: bool = False
    stride: int = 1
    groups: int = 1
    resnext: bool = False

    def conv(self, name: str, x: Tensor, stride: int = 1, groups: int = 1) -> Tensor:
        weight = self.state[f"{name}.weight"]
        assert f"{name}.bias" not in self.state, "no convolution has a bias"
        return F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2, groups=groups)

    def norm(self, name: str, x: Tensor) -> Tensor:
        keys = ("weight", "bias", "running_mean", "running_var")
        weight, bias, mean, var = (self.state[f"{name}.{key}"].reshape(1, -1, 1, 1) for key in keys)
        if self.training:
            mean = x.mean((0, 2, 3), keepdim=True)
            var = ((x - mean) ** 2).mean((0, 2, 3), keepdim=True)
        return (x - mean) / (var + 1e-5) ** 0.5 * weight + bias

    def preact_unit(self, name: str, x: Tensor) -> Tensor:
        stride = self.stride
        preact = relu(self.norm(f"{name}norm1", x))
        y = self.conv(f"{name}conv1", preact)
        y = self.conv(f"{name}conv2", relu(self.norm(f"{name}norm2", y)), stride, self.groups)
        y = self.conv(f"{name}conv3", relu(self.norm(f"{name}norm3", y)))
        projected = f"{name}downsample.weight" in self.state
        return y + (self.conv(f"{name}downsample", preact, stride) if projected else x)

    def resnext_unit(self, name: str, x: Tensor) -> Tensor:
        y = relu(self.norm(f"{name}norm1", self.conv(f"{name}conv1", x)))
        y = relu(self.norm(f"{name}norm2", self.conv(f"{name}conv2", y, self.stride, self.groups)))
        y = self.norm(f"{name}norm3", self.conv(f"{name}conv3", y))
        if f"{name}downsample.0.weight" in self.state:
            x = self.norm(f"{name}downsample.1", self.conv(f"{name}downsample.0", x, self.stride))
        return relu(y + x)

    def unit(self, name: str, x: Tensor) -> Tensor:
        return self.resnext_unit(name, x) if self.resnext else self.preact_unit(name, x)

    def units(self, name: str, x: Tensor, count: int, first: int = 0) -> Tensor:
        for i in range(first, first + count):
            x = self.unit(f"{name}{i}.", x)
        return x

    def head(self, name: str, x: Tensor, mask_act: str = "mixed") -> Tensor:
        if f"{name}norm1.weight" in self.state:
            x = relu(self.norm(f"{name}norm1", x))
        x = self.conv(f"{name}conv1", x)
        x = self.conv(f"{name}conv2", relu(self.norm(f"{name}norm2", x)))
        if mask_act == "channel":
            return x / ((x ** 2).sum(1, keepdim=True) ** 0.5).clamp(min=1e-12)  # a position of zeros stays one
        if mask_act == "spatial":
            mean = x.mean((2, 3), keepdim=True)
            x = (x - mean) / (((x - mean) ** 2).mean((2, 3), keepdim=True) + 1e-5) ** 0.5
        return sigmoid(x)

    def soft_mask(
            self, name: str, x: Tensor, mask_depth: int = 1, r: int = 1, skips: int | None = None,
            mask_act: str = "mixed") -> Tensor:
        d = mask_depth
        skips = d - 1 if skips is None else skips
        maps = [x]
        for i in range(d):
            maps.append(self.units(f"{name}down.{i}.", max_pool(maps[-1]), r, first=1))
        y = self.units(f"{name}bottom.", maps[d], r)
        for step, i in enumerate(range(d - 1, 0, -1)):
            y = upsample(y, like=maps[i])
            if i <= skips:
                y = y + self.unit(f"{name}up.{step}.skip.", maps[i])
            y = self.units(f"{name}up.{step}.units.", y, r)
        return self.head(f"{name}head.", upsample(y, like=x), mask_act)

    def local_mask(self, name: str, x: Tensor, units: int = 2, mask_act: str = "mixed") -> Tensor:
        return self.head(f"{name}head.", self.units(f"{name}units.", x, units), mask_act)

    def module(
            self, x: Tensor, p: int = 1, t: int = 2, r: int = 1, mask_depth: int = 1, skips: int | None = None,
            mask: str = "soft", learning: str = "residual", mask_act: str = "mixed") -> Tensor:
        x = self.units("pre.", x, p)
        trunk = self.units("trunk.", x, t)
        if mask == "soft":
            m = self.soft_mask("mask.", x, mask_depth, r, skips, mask_act)
        else:
            m = self.local_mask("mask.", x, mask_act=mask_act)
        return self.units("post.", (1 + m) * trunk if learning == "residual" else m * trunk, p)
