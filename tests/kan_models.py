"""Networks of convolutional KAN layers as public libraries have them, which PyPI does not have: code of ours."""

from __future__ import annotations

from odd_layers import GramConvLayer
from torch import nn


class KAGNBlock(nn.Module):
    """y = x + conv2(conv1(x)), and where the channels or the stride change, a KAN convolution of size 1 on x."""

    def __init__(self, n, m, stride=1):
        super().__init__()
        self.conv1, self.conv2 = GramConvLayer(n, m, stride=stride), GramConvLayer(m, m)
        self.downsample = None if (n, stride) == (m, 1) else GramConvLayer(n, m, kernel_size=1, stride=stride)

    def forward(self, x):
        return self.conv2(self.conv1(x)) + (x if self.downsample is None else self.downsample(x))


class ResKAGNet(nn.Sequential):
    """A ResNet of KAGN convolutions, by default of 18 layers, as torch-conv-kan's."""

    def __init__(self, widths=(64, 128, 256, 512), blocks=2, channels=3, classes=1000):
        stem = [GramConvLayer(channels, widths[0], kernel_size=7, stride=2), nn.MaxPool2d(3, 2, 1)]
        stages = [
            KAGNBlock(n if block == 0 else m, m, 2 if block == 0 and n != m else 1)
            for n, m in zip((widths[0], *widths), widths, strict=False)
            for block in range(blocks)
        ]
        super().__init__(*stem, *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], classes))


class VGGKAGN(nn.Sequential):
    """A VGG of KAGN convolutions, by default of 11 layers, as torch-conv-kan's; "M" halves the image."""

    def __init__(self, layers=(16, "M", 32, "M", 64, 64, "M", 128, 128, "M", 128, 128), channels=3, classes=100):
        features, n = [], channels
        for m in layers:
            features.append(nn.MaxPool2d(2, 2) if m == "M" else GramConvLayer(n, m))
            n = n if m == "M" else m
        super().__init__(*features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(n, classes))
