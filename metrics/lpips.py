"""LPIPS, a perceptual distance (arXiv:1801.03924): two batches of images in, distances out."""
from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

# Widths of VGG16's convolutions; mean and std of ImageNet, for images in [-1, 1].
VGG_WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
RGB_SHIFT, RGB_SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class LPIPS(nn.Module):
    """x, y [B, 3, H, W] in [-1, 1] -> [B], as version 0.1 with VGG16.

    Unit-length features at five depths of VGG16, squared differences, weighted per channel, mean
    over pixels. A new instance has random weights; `formats.lpips.load_lpips` fills them. Names are
    those of taming-transformers.
    """

    def __init__(self):
        super().__init__()
        self.scaling_layer = nn.Module()
        self.scaling_layer.register_buffer("shift", torch.tensor(RGB_SHIFT).view(1, 3, 1, 1))
        self.scaling_layer.register_buffer("scale", torch.tensor(RGB_SCALE).view(1, 3, 1, 1))
        self.net = nn.Module()
        c_in, index = 3, 0                  # the index is that in torchvision's vgg16().features
        for depth, widths in enumerate(VGG_WIDTHS):
            layers = [nn.MaxPool2d(2)] if depth else []
            for width in widths:
                layers += [nn.Conv2d(c_in, width, 3, padding=1), nn.ReLU()]
                c_in = width
            named = OrderedDict((str(i), layer) for i, layer in enumerate(layers, index))
            self.net.add_module(f"slice{depth + 1}", nn.Sequential(named))
            index += len(layers)
            lin = nn.Sequential(OrderedDict({"1": nn.Conv2d(c_in, 1, 1, bias=False)}))
            self.add_module(f"lin{depth}", nn.Sequential(OrderedDict(model=lin)))   # 0: a dropout

    def features(self, x: Tensor) -> list[Tensor]:
        """The five feature maps of x, each of unit length along its channels."""
        h = (x - self.scaling_layer.shift) / self.scaling_layer.scale
        maps = []
        for layers in self.net.children():
            h = layers(h)
            maps.append(h / (h.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return maps

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        distance = x.new_zeros(len(x))
        for depth, (a, b) in enumerate(zip(self.features(x), self.features(y), strict=True)):
            lin = self.get_submodule(f"lin{depth}")
            distance = distance + lin((a - b).square()).mean((1, 2, 3))     # [B, 1, h, w] -> [B]
        return distance
