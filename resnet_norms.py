"""ResNet-18 with swappable normalization. Needs torch alone; copy this file into any project.

    from resnet_norms import resnet18
    encoder = resnet18(norm="gn+ws", width=64, stem="cifar")
    y = encoder(torch.randn(8, 3, 32, 32))    # representation, (8, 512)

norm      after every convolution
bn        batch normalization (Ioffe and Szegedy 2015), statistics over the batch
gn        group normalization (Wu and He 2018), statistics within one image
gn+ws     gn, and every convolution standardizes its weights (Qiao et al. 2019)
none      nothing; the convolutions then have a bias
callable  your own: a number of channels -> a module

With norm="bn", width=64 and stem="imagenet" the network has the parameter names and the initialisation of
torchvision.models.resnet18 and computes the same bits; only the classifier `fc` is missing. The names `bn1`,
`bn2` and `downsample.1` stay under every norm.
"""

import functools

import torch
import torch.nn as nn
import torch.nn.functional as F

__all__ = ["resnet18", "WSConv2d"]


class WSConv2d(nn.Conv2d):
    """Convolution with weight standardization (Qiao et al. 2019, arXiv 1903.10520, equations 2 and 3).

    Each output channel's weights are shifted to mean 0 and scaled to variance 1 before use, so the output
    does not depend on their mean or scale; the gradient passes through the standardization. The paper adds
    its epsilon to the variance, which makes small weights scale-dependent; here the variance is only kept
    from being 0, where all weights of a channel are equal and its output is 0 (plus the bias).
    """

    def forward(self, x):
        variance, mean = torch.var_mean(self.weight, dim=(1, 2, 3), correction=0, keepdim=True)
        weight = (self.weight - mean) * torch.where(variance > 0, variance, 1.0).rsqrt()
        return self._conv_forward(x, weight, self.bias)


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut (He et al. 2016): (N, c_in, H, W) -> (N, c_out, H', W')."""

    def __init__(self, c_in, c_out, stride, conv, norm):
        super().__init__()
        self.conv1 = conv(c_in, c_out, 3, stride, padding=1)
        self.bn1 = norm(c_out)
        self.conv2 = conv(c_out, c_out, 3, padding=1)
        self.bn2 = norm(c_out)
        self.downsample = None
        # Where c_in is less than a vector, 8 channels with AVX2 and 16 with AVX-512, oneDNN's weight gradient
        # of a strided 1 x 1 convolution in channels_last writes past its workspace (uxlfoundation/oneDNN,
        # issue 6035). So the pixels that the stride skips are left out before the convolution there.
        self.skip = stride if c_in < 16 else 1
        if stride != 1 or c_in != c_out:
            self.downsample = nn.Sequential(conv(c_in, c_out, 1, stride // self.skip), norm(c_out))

    def forward(self, x):
        shortcut = x
        if self.downsample is not None:
            kept = x[:, :, :: self.skip, :: self.skip]
            shortcut = self.downsample(kept)
        x = torch.relu_(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        return torch.relu_(x + shortcut)


class ResNet(nn.Module):
    """See `resnet18`."""

    def __init__(self, width, stem, conv, norm):
        super().__init__()
        if stem == "imagenet":
            self.conv1 = conv(3, width, 7, stride=2, padding=3)
            self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        else:
            self.conv1 = conv(3, width, 3, padding=1)
            self.maxpool = nn.Identity()
        self.bn1 = norm(width)
        c_in = width
        for i in range(4):
            c_out = width * 2**i
            first = BasicBlock(c_in, c_out, 1 if i == 0 else 2, conv, norm)
            second = BasicBlock(c_out, c_out, 1, conv, norm)
            self.add_module(f"layer{i + 1}", nn.Sequential(first, second))
            c_in = c_out
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x):
        x = torch.relu_(self.bn1(self.conv1(x)))
        x = self.layer1(self.maxpool(x))
        x = self.layer2(x)
        x = self.layer3(x)
        x = self.layer4(x)
        return F.adaptive_avg_pool2d(x, 1).flatten(1)


def resnet18(norm="bn", width=64, stem="imagenet"):
    """ResNet-18 without its classifier: float images (N, 3, H, W) -> representation y (N, 8 * width).

    norm: "bn", "gn", "gn+ws", "none" or a callable. GroupNorm has width / 2 groups in every layer, 32 at
    width 64. width: channels of the first stage; each further stage doubles them. stem: "imagenet", a 7 x 7
    convolution of stride 2 and a max-pool, or "cifar", a 3 x 3 convolution of stride 1. Raises ValueError for
    any other norm or stem, a width under 1, and an odd width with GroupNorm.
    """
    norms = {
        "bn": nn.BatchNorm2d,
        "gn": functools.partial(nn.GroupNorm, width // 2),
        "gn+ws": functools.partial(nn.GroupNorm, width // 2),
        "none": lambda channels: nn.Identity(),
    }
    if not callable(norm) and norm not in norms:
        raise ValueError(f"norm is {norm!r}, not a callable or one of {', '.join(norms)}")
    if stem not in ("imagenet", "cifar"):
        raise ValueError(f"stem is {stem!r}, not imagenet or cifar")
    if width < 1:
        raise ValueError(f"width is {width}, not at least 1")
    if norm in ("gn", "gn+ws") and width % 2:
        raise ValueError(f"width is {width}, not even, and GroupNorm has width / 2 groups")
    conv = functools.partial(WSConv2d if norm == "gn+ws" else nn.Conv2d, bias=norm == "none")
    return ResNet(width, stem, conv, norm if callable(norm) else norms[norm])
