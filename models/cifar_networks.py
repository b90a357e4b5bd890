"""The networks missing in torchvision: functions of the number of classes, by name in NETWORKS.

The tensors in state_dict() of a published network have the order and shapes of those in RepDistiller and mdistiller.
"""
from collections import OrderedDict
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.efficientnet import EfficientNet, FusedMBConvConfig, MBConvConfig
from torchvision.models.resnet import BasicBlock, Bottleneck, conv1x1, conv3x3
from torchvision.models.shufflenetv2 import InvertedResidual as ShuffleV2Block
from torchvision.ops import Conv2dNormActivation


def _classifier(features, channels: int, num_classes: int, *, kaiming=True, head_std: float | None = None,
                zero_bias=False) -> nn.Module:
    """A chain of modules, global average pooling and a linear head, initialised as in the published networks.

    kaiming: normal initialisation of convolutions by their fan-out.  head_std: standard deviation of the head's weights.
    zero_bias: of the head.  What is not set has PyTorch's initialisation.
    """
    head = nn.Linear(channels, num_classes)
    net = nn.Sequential(OrderedDict(
        features=nn.Sequential(*features), pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), head=head))
    for module in net.modules():
        if kaiming and isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    if head_std is not None:
        nn.init.normal_(head.weight, std=head_std)
    if zero_bias:
        nn.init.zeros_(head.bias)
    return net


def resnet(num_classes: int, *, widths, blocks, block=BasicBlock) -> nn.Module:
    """ResNet for 32x32 images (He et al. 2016, arXiv 1512.03385 §4.2): 3x3 stem and stages.

    widths: of the stem and of each stage.  blocks: their number in each stage.  block: BasicBlock or Bottleneck.
    """
    channels, *stages = widths
    features = [Conv2dNormActivation(3, channels)]
    for stage, (width, count) in enumerate(zip(stages, blocks)):
        for index in range(count):
            stride, outputs = 2 if stage > 0 and index == 0 else 1, width * block.expansion
            shortcut = None
            if stride != 1 or channels != outputs:
                shortcut = nn.Sequential(conv1x1(channels, outputs, stride), nn.BatchNorm2d(outputs))
            features.append(block(channels, width, stride, shortcut))
            channels = outputs
    return _classifier(features, channels, num_classes)


class PreActivationBlock(nn.Module):
    """Pre-activation residual block; a shortcut that changes the width branches off after the first activation."""

    def __init__(self, channels: int, width: int, stride: int):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(channels), conv3x3(channels, width, stride)
        self.norm2, self.conv2 = nn.BatchNorm2d(width), conv3x3(width, width)
        self.shortcut = conv1x1(channels, width, stride) if channels != width else None

    def forward(self, features):
        active = F.relu(self.norm1(features))
        residual = self.conv2(F.relu(self.norm2(self.conv1(active))))
        return residual + (features if self.shortcut is None else self.shortcut(active))


def wide_resnet(num_classes: int, *, depth: int, widen: int) -> nn.Module:
    """Wide ResNet for 32x32 images (Zagoruyko and Komodakis 2016, arXiv 1605.07146) without dropout; `depth` = 6n + 4."""
    channels = 16
    features = [conv3x3(3, channels)]
    for stage, width in enumerate((16 * widen, 32 * widen, 64 * widen)):
        for block in range((depth - 4) // 6):
            features.append(PreActivationBlock(channels, width, 2 if stage > 0 and block == 0 else 1))
            channels = width
    return _classifier([*features, nn.BatchNorm2d(channels), nn.ReLU()], channels, num_classes, zero_bias=True)


class LargeImagePool(nn.MaxPool2d):
    """Fourth pooling of the VGGs, skipped for feature maps below 8x8: images of 32x32 keep 4x4 positions."""

    def forward(self, features):
        return super().forward(features) if features.shape[-1] >= 8 else features


def vgg(num_classes: int, *, convolutions) -> nn.Module:
    """VGG for 32x32 images (Simonyan and Zisserman 2015, arXiv 1409.1556): five stages, batch norm, one linear layer.

    convolutions: their number in each stage.
    """
    channels, features = 3, []
    widths, pools = (64, 128, 256, 512, 512), (nn.MaxPool2d, nn.MaxPool2d, nn.MaxPool2d, LargeImagePool, None)
    for width, count, pool in zip(widths, convolutions, pools):
        for _ in range(count):
            features.append(Conv2dNormActivation(channels, width, bias=True))
            channels = width
        if pool:
            features.append(pool(2))
    return _classifier(features, channels, num_classes, head_std=0.01, zero_bias=True)


class InvertedResidual(nn.Sequential):
    """Inverted residual block; unlike torchvision's, it has an expansion convolution even for a factor of one."""

    def __init__(self, channels: int, width: int, stride: int, expansion: int):
        hidden = channels * expansion
        super().__init__(
            Conv2dNormActivation(channels, hidden, 1),
            Conv2dNormActivation(hidden, hidden, 3, stride, groups=hidden),
            Conv2dNormActivation(hidden, width, 1, activation_layer=None),
        )
        self.skip = stride == 1 and channels == width

    def forward(self, features):
        return features + super().forward(features) if self.skip else super().forward(features)


def half_mobilenet_v2(num_classes: int) -> nn.Module:
    """MobileNetV2 (Sandler et al. 2018, arXiv 1801.04381) with half the width, one stride fewer than for ImageNet, and ReLU."""
    channels = 16
    features = [Conv2dNormActivation(3, channels, stride=2)]
    for expansion, width, blocks, first_stride in (
        (1, 8, 1, 1), (6, 12, 2, 1), (6, 16, 3, 2), (6, 32, 4, 2), (6, 48, 3, 1), (6, 80, 3, 2), (6, 160, 1, 1),
    ):
        for block in range(blocks):
            features.append(InvertedResidual(channels, width, first_stride if block == 0 else 1, expansion))
            channels = width
    return _classifier([*features, Conv2dNormActivation(channels, 1280, 1)], 1280, num_classes, head_std=0.01, zero_bias=True)


class ShuffleV1Block(nn.Module):
    """ShuffleNet-V1 unit: grouped bottleneck with channel shuffle; one of stride 2 appends its averaged input as channels."""

    def __init__(self, channels: int, width: int, stride: int, groups: int, first_groups: int):
        super().__init__()
        added = width - channels if stride == 2 else width
        hidden = added // 4
        self.residual = nn.Sequential(
            Conv2dNormActivation(channels, hidden, 1, groups=first_groups),
            nn.ChannelShuffle(first_groups),
            Conv2dNormActivation(hidden, hidden, 3, stride, groups=hidden),
            Conv2dNormActivation(hidden, added, 1, groups=groups, activation_layer=None),
        )
        self.pool = nn.AvgPool2d(3, 2, padding=1) if stride == 2 else None

    def forward(self, features):
        residual = self.residual(features)
        return F.relu(residual + features if self.pool is None else torch.cat([residual, self.pool(features)], 1))


def shufflenet_v1(num_classes: int) -> nn.Module:
    """ShuffleNet-V1 (Zhang et al. 2018, arXiv 1707.01083) with three groups and a 1x1 stem without stride."""
    channels, groups = 24, 3
    features = [Conv2dNormActivation(3, channels, 1)]
    for width, blocks in ((240, 4), (480, 8), (960, 4)):
        for index in range(blocks):
            first_groups = 1 if len(features) == 1 else groups
            features.append(ShuffleV1Block(channels, width, 2 if index == 0 else 1, groups, first_groups))
            channels = width
    return _classifier(features, channels, num_classes, kaiming=False)


def shufflenet_v2(num_classes: int) -> nn.Module:
    """ShuffleNet-V2 (Ma et al. 2018, arXiv 1807.11164) at width 1 with a 1x1 stem without stride, and no max pooling."""
    channels = 24
    features = [Conv2dNormActivation(3, channels, 1)]
    for width, blocks in ((116, 4), (232, 8), (464, 4)):
        for index in range(blocks):
            features.append(ShuffleV2Block(channels, width, 2 if index == 0 else 1))
            channels = width
    return _classifier([*features, Conv2dNormActivation(channels, 1024, 1)], 1024, num_classes, kaiming=False)


def small_efficientnet_v2(num_classes: int, *, stem: int, stages, last: int) -> nn.Module:
    """torchvision's EfficientNetV2 with few 3x3 stages of (block, expansion, stride, width, layers), without dropout."""
    channels, settings = stem, []
    for block, expansion, stride, width, layers in stages:
        settings.append(block(expansion, 3, stride, channels, width, layers))
        channels = width
    return EfficientNet(settings, dropout=0.0, stochastic_depth_prob=0.0, num_classes=num_classes, last_channel=last,
                        norm_layer=partial(nn.BatchNorm2d, eps=1e-3))


NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    **{f"resnet{depth}": partial(resnet, widths=(16, 16, 32, 64), blocks=((depth - 2) // 6,) * 3)
       for depth in (8, 14, 20, 32, 44, 56, 110)},
    **{f"resnet{depth}x4": partial(resnet, widths=(32, 64, 128, 256), blocks=((depth - 2) // 6,) * 3) for depth in (8, 32)},
    "cifar_resnet18": partial(resnet, widths=(64, 64, 128, 256, 512), blocks=(2, 2, 2, 2)),
    "cifar_resnet50": partial(resnet, widths=(64, 64, 128, 256, 512), blocks=(3, 4, 6, 3), block=Bottleneck),
    **{f"wrn_{depth}_{widen}": partial(wide_resnet, depth=depth, widen=widen) for depth in (16, 40) for widen in (1, 2)},
    "vgg8": partial(vgg, convolutions=(1, 1, 1, 1, 1)),
    "vgg11": partial(vgg, convolutions=(1, 1, 2, 2, 2)),
    "vgg13": partial(vgg, convolutions=(2, 2, 2, 2, 2)),
    "vgg16": partial(vgg, convolutions=(2, 2, 3, 3, 3)),
    "vgg19": partial(vgg, convolutions=(2, 2, 4, 4, 4)),
    "mobilenet_v2": half_mobilenet_v2,
    "shufflenet_v1": shufflenet_v1,
    "shufflenet_v2": shufflenet_v2,
    "v2_pico": partial(small_efficientnet_v2, stem=8, last=128, stages=(
        (FusedMBConvConfig, 1, 1, 8, 1), (FusedMBConvConfig, 2, 2, 16, 1),
        (FusedMBConvConfig, 2, 2, 24, 1), (MBConvConfig, 2, 1, 32, 1))),
    "v2_tiny": partial(small_efficientnet_v2, stem=16, last=320, stages=(
        (FusedMBConvConfig, 1, 1, 16, 1), (FusedMBConvConfig, 4, 2, 32, 1),
        (FusedMBConvConfig, 4, 2, 48, 2), (MBConvConfig, 4, 1, 80, 2))),
}
