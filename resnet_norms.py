"""ResNet-18 with swappable normalization. Needs torch alone; copy this file into any project.

    from resnet_norms import resnet18
    encoder = resnet18(norm="gn+ws", width=64, stem="cifar")
    y = encoder(torch.randn(8, 3, 32, 32))    # representation, (8, 512)

norm     after every convolution
bn       batch normalization (Ioffe and Szegedy 2015), statistics over the batch
gn       group normalization (Wu and He 2018), statistics within one image
gn+ws    gn, and every convolution standardizes its weights (Qiao et al. 2019)
none     nothing; the convolutions then have a bias

With norm="bn", width=64 and stem="imagenet" the network has the parameter names and the initialisation of
torchvision.models.resnet18 and computes the same bits; only the classifier `fc` is missing. The names `bn1`, `bn2` and
`downsample.1` stay under every norm, so that a checkpoint says which layer a tensor belongs to.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

__all__ = ["resnet18", "group_norm", "WSConv2d"]


class WSConv2d(nn.Conv2d):
    """Convolution with weight standardization (Qiao et al. 2019, arXiv 1903.10520, equations 2 and 3).

    Each output channel's weights are shifted to mean 0 and scaled to variance 1 before use, so the output does not
    depend on their mean or scale; the gradient passes through the standardization. The paper adds its epsilon to the
    variance, which makes small weights scale-dependent; here the standard deviation is only kept from being 0, where
    all weights of a channel are equal and its output is 0 (plus the bias).
    """

    def forward(self, x):
        variance, mean = torch.var_mean(self.weight, dim=(1, 2, 3), correction=0, keepdim=True)
        tiny = torch.finfo(variance.dtype).tiny
        return self._conv_forward(x, (self.weight - mean) * variance.clamp_min(tiny).rsqrt(), self.bias)


def group_norm(channels, max_groups=32):
    """GroupNorm of 32 groups; where `channels` is too narrow for that, of as many as leave two channels in each group.

    The smallest group at width 64 has two channels too. One channel a group would be instance normalization, which
    maps a 1 x 1 feature map to a constant. The number of groups always divides `channels`.
    """
    groups = max(g for g in range(1, max_groups + 1) if channels % g == 0 and (2 * g <= channels or g == 1))
    return GroupNorm(groups, channels)


class GroupNorm(nn.GroupNorm):
    """nn.GroupNorm, with sums over all channels at once where torch's kernel for a CPU is slow.

    That kernel goes through a channels_last image group by group, and takes up to four times as long where a group has
    less than a vector of channels. Up to 2 MB (in fp32) it stays: little is gained, and the study keeps its logs' bits.
    """

    def forward(self, x):
        narrow = self.num_channels // self.num_groups < 8 and x.dtype == self.weight.dtype and x.device.type == "cpu"
        if narrow and x.numel() > 2**19 and x.is_contiguous(memory_format=torch.channels_last):
            return NarrowGroups.apply(x, self.num_groups, self.weight, self.bias, self.eps)
        return super().forward(x)


class NarrowGroups(torch.autograd.Function):
    """Group normalization of a channels_last tensor (Wu and He 2018, equation 1), to fp32 rounding that of torch.

    The output and the gradient of the input are one factor and one summand for each channel of an image, and no tensor
    of the input's size is made but these two.
    """

    @staticmethod
    def rows(x, groups):
        """(N, C, H, W) -> (N, H * W, groups, C / groups), a view where x is channels_last."""
        return x.permute(0, 2, 3, 1).reshape(len(x), -1, groups, x.shape[1] // groups)

    @staticmethod
    def forward(ctx, x, groups, weight, bias, eps):
        y = x * x
        mean, square = (NarrowGroups.rows(t, groups).mean(1, True).mean(3, True) for t in (x, y))
        rstd = ((square - mean * mean).clamp_min(0) + eps).rsqrt()
        weight, bias = weight.view(groups, -1), bias.view(groups, -1)
        scale = rstd * weight
        torch.addcmul(bias - mean * scale, NarrowGroups.rows(x, groups), scale, out=NarrowGroups.rows(y, groups))
        ctx.save_for_backward(x, weight, mean, rstd)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight, mean, rstd = ctx.saved_tensors
        grad_x = x * grad
        x, grad, out = (NarrowGroups.rows(t, len(weight)) for t in (x, grad, grad_x))
        total = grad.sum(1, True)
        product = rstd * (out.sum(1, True) - mean * total)      # of the gradient and the normalized input
        size = x[0, :, 0].numel()
        slope = -(rstd * rstd / size) * (weight * product).sum(3, True)
        shift = -(rstd / size) * (weight * total).sum(3, True) - slope * mean
        slope, shift = (t.repeat(1, 1, 1, weight.shape[1]) for t in (slope, shift))
        torch.addcmul(shift, grad, rstd * weight, out=out).addcmul_(x, slope)
        return grad_x, None, product.sum((0, 1)).flatten(), total.sum((0, 1)).flatten(), None


class OneWindow(torch.autograd.Function):
    """conv2d, bit for bit, where the kernel covers the whole map from one place, which makes it a linear layer: the
    gradients are matrix products. Those of conv2d take ten times as long on a CPU, in oneDNN's weight gradient.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, stride, padding):
        ctx.save_for_backward(x, weight)
        ctx.taps = ..., *(slice(p, p + side) for p, side in zip(padding, x.shape[2:]))     # the others meet only padding
        return F.conv2d(x, weight, bias, stride, padding)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad, taps = grad.flatten(1), weight[ctx.taps]
        grad_x = (grad @ taps.flatten(1).to(grad.dtype)).view_as(x)
        grad_weight = torch.zeros_like(weight)
        grad_weight[ctx.taps] = (grad.T @ x.flatten(1).to(grad.dtype)).view_as(taps)
        return grad_x, grad_weight, grad.sum(0) if ctx.needs_input_grad[2] else None, None, None


class Covering:
    """Mixed into a convolution without groups and dilation: `OneWindow` where it applies, on a CPU."""

    def _conv_forward(self, x, weight, bias):
        axes = zip(x.shape[2:], self.kernel_size, self.stride, self.padding)
        if x.device.type == "cpu" and all(
            p + side <= kernel and side + 2 * p - kernel < stride for side, kernel, stride, p in axes
        ):
            return OneWindow.apply(x, weight, bias, self.stride, self.padding)
        return super()._conv_forward(x, weight, bias)


class CoveringConv2d(Covering, nn.Conv2d):
    pass


class CoveringWSConv2d(Covering, WSConv2d):
    pass


LAYERS = {  # norm -> (convolution, normalization of a number of channels)
    "bn": (CoveringConv2d, nn.BatchNorm2d),
    "gn": (CoveringConv2d, group_norm),
    "gn+ws": (CoveringWSConv2d, group_norm),
    "none": (CoveringConv2d, lambda channels: nn.Identity()),
}


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut (He et al. 2016, figure 5 left): (N, c_in, H, W) -> (N, c_out, H/s, W/s)."""

    def __init__(self, c_in, c_out, stride, norm):
        super().__init__()
        conv, normalize = LAYERS[norm]
        bias = norm == "none"
        self.conv1 = conv(c_in, c_out, 3, stride, padding=1, bias=bias)
        self.bn1 = normalize(c_out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv(c_out, c_out, 3, padding=1, bias=bias)
        self.bn2 = normalize(c_out)
        self.downsample = None
        # Where c_in is less than a vector, 8 channels with AVX2 and 16 with AVX-512, oneDNN's weight gradient of a strided
        # 1 x 1 convolution in channels_last writes past its workspace (uxlfoundation/oneDNN, issue 6035). So the pixels
        # that the stride skips are left out before the convolution there.
        self.skip = stride if c_in < 16 else 1
        if stride != 1 or c_in != c_out:
            self.downsample = nn.Sequential(conv(c_in, c_out, 1, stride // self.skip, bias=bias), normalize(c_out))

    def forward(self, x):
        shortcut = x if self.downsample is None else self.downsample(x[:, :, :: self.skip, :: self.skip])
        x = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(x)) + shortcut)


class ResNet(nn.Module):
    """See `resnet18`."""

    def __init__(self, norm, width, stem):
        super().__init__()
        conv, normalize = LAYERS[norm]
        bias = norm == "none"
        if stem == "imagenet":
            self.conv1 = conv(3, width, 7, stride=2, padding=3, bias=bias)
        else:
            self.conv1 = conv(3, width, 3, padding=1, bias=bias)
        self.bn1 = normalize(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if stem == "imagenet" else nn.Identity()
        for i in range(4):
            c_in, c_out = width * 2 ** max(i - 1, 0), width * 2**i
            stride = 1 if i == 0 else 2
            blocks = BasicBlock(c_in, c_out, stride, norm), BasicBlock(c_out, c_out, 1, norm)
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return F.adaptive_avg_pool2d(x, 1).flatten(1)


def resnet18(norm="bn", width=64, stem="imagenet"):
    """ResNet-18 without its classifier: float images (N, 3, H, W) -> representation y (N, 8 * width).

    norm: "bn", "gn", "gn+ws" or "none". width: channels of the first stage; each further stage doubles them.
    stem: "imagenet", a 7 x 7 convolution of stride 2 and a max-pool, or "cifar", a 3 x 3 convolution of stride 1.
    Raises ValueError for any other norm or stem, or a width under 1.
    """
    if norm not in LAYERS:
        raise ValueError(f"norm is {norm!r}, not one of {', '.join(LAYERS)}")
    if stem not in ("imagenet", "cifar"):
        raise ValueError(f"stem is {stem!r}, not imagenet or cifar")
    if width < 1:
        raise ValueError(f"width is {width}, not at least 1")
    return ResNet(norm, width, stem)
