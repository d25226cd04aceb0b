"""SSD on a ResNet: the MLPerf architecture, for any image size and strides."""

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torchvision
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional

from base.boxes import BOXES_PER_CELL, default_boxes
from base.contracts import Predictions
from base.errors import UserError

from .all_reduce import group_norm

BACKBONES = ("resnet18", "resnet34", "resnet50")
LEVEL_CHANNELS = (512, 512, 256, 256, 256)  # after the backbone's own level
MIDDLE_CHANNELS = (256, 256, 128, 128, 128)


class SSD(nn.Module):
    """SSD with heads on six levels (paper section 2.1; MLPerf reference ``SSD300``).

    The backbone is a ResNet up to ``layer3``, whose first block keeps its resolution (38×38 for 300×300). ``strides`` are
    those of all offset heads, of all class heads, and of the first four additional blocks; the fifth has stride 1. The
    last two additional blocks have no padding. Images are float (N, 3, H, W); ``default_boxes`` move with the module. Batch norm
    takes its statistics over the ranks of ``norm_group``. Raises UserError for a size or strides that leave no level.
    """

    def __init__(
        self, *, num_classes: int, image_size: tuple[int, int], strides: Sequence[int], backbone: str, norm_group: ProcessGroup | None = None
    ):
        super().__init__()
        if backbone not in BACKBONES:
            raise UserError(f"backbone {backbone!r} is not one of {', '.join(BACKBONES)}")
        self.num_classes, self.norm_group = num_classes, norm_group
        self.backbone = resnet_to_layer3(backbone)
        channels = (256 if backbone != "resnet50" else 1024, *LEVEL_CHANNELS)
        block_strides, paddings = (*strides[2:], 1), (1, 1, 1, 0, 0)
        self.extras = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(before, middle, 1),
                nn.ReLU(inplace=True),
                nn.Conv2d(middle, after, 3, stride=stride, padding=padding),
                nn.ReLU(inplace=True),
            )
            for before, middle, after, stride, padding in zip(
                channels, MIDDLE_CHANNELS, channels[1:], block_strides, paddings, strict=False
            )
        )
        per_cell = list(zip(channels, BOXES_PER_CELL, strict=True))
        self.offset_heads = nn.ModuleList(nn.Conv2d(c, n * 4, 3, stride=strides[0], padding=1) for c, n in per_cell)
        self.class_heads = nn.ModuleList(nn.Conv2d(c, n * num_classes, 3, stride=strides[1], padding=1) for c, n in per_cell)
        for layer in (*self.extras, *self.offset_heads, *self.class_heads):
            for parameter in layer.parameters():
                if parameter.dim() > 1:
                    nn.init.xavier_uniform_(parameter)
        self.default_boxes = default_boxes(image_size, feature_sizes(image_size, strides))

    def forward(self, images: Tensor) -> Predictions:
        levels = [self.features(images)]
        for block in self.extras:
            levels.append(block(levels[-1]))
        offsets = [boxes_last(self.apply_head(head, level), 4) for head, level in zip(self.offset_heads, levels, strict=True)]
        logits = [boxes_last(self.apply_head(head, level), self.num_classes) for head, level in zip(self.class_heads, levels, strict=True)]
        return Predictions(torch.cat(offsets, 1), torch.cat(logits, 1))

    def features(self, images: Tensor) -> Tensor:
        """The backbone's level, as torchvision's ResNet computes it."""
        net = self.backbone
        x = net.maxpool(self.apply_norm(net.bn1, net.conv1(images)))
        for block in (*net.layer1, *net.layer2, *net.layer3):
            shortcut = x
            if block.downsample is not None:
                convolution, norm = block.downsample
                shortcut = self.apply_norm(norm, convolution(x), relu=False)
            x = self.apply_norm(block.bn1, block.conv1(x))
            if hasattr(block, "conv3"):
                x = self.apply_norm(block.bn2, block.conv2(x))
                x = self.apply_norm(block.bn3, block.conv3(x), shortcut)
            else:
                x = self.apply_norm(block.bn2, block.conv2(x), shortcut)
        return x

    def apply_norm(self, norm: nn.Module, x: Tensor, shortcut: Tensor | None = None, relu: bool = True) -> Tensor:
        """Batch norm, then the shortcut's addition and ReLU; backends fuse them."""
        x = norm(x) if self.norm_group is None or not norm.training else group_norm(norm, x, self.norm_group)
        if shortcut is not None:
            x += shortcut
        return functional.relu_(x) if relu else x

    def apply_head(self, head: nn.Conv2d, level: Tensor) -> Tensor:
        """A head's 3×3 convolution; backends may know a faster backward pass."""
        return head(level)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)  # .to(device) and its kin: default boxes follow the weights' device, never their dtype
        self.default_boxes = self.default_boxes.to(self.class_heads[0].weight.device)
        return self


def boxes_last(output: Tensor, values: int) -> Tensor:
    """A head's output (N, boxes·values, rows, columns) → (N, rows·columns·boxes, values); a view if it is channels-last."""
    return output.permute(0, 2, 3, 1).reshape(output.shape[0], -1, values)


def resnet_to_layer3(name: str) -> nn.Sequential:
    """torchvision's ResNet without layer4 and classifier, ``layer3`` at stride 1; children keep torchvision's names."""
    resnet = getattr(torchvision.models, name)(weights=None)
    for module in resnet.layer3[0].modules():
        if isinstance(module, nn.Conv2d):
            module.stride = (1, 1)
    wanted = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3")
    return nn.Sequential(OrderedDict((name, child) for name, child in resnet.named_children() if name in wanted))


def feature_sizes(image_size: tuple[int, int], strides: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """(rows, columns) of the six levels of default boxes. Raises UserError if a level is empty or the heads disagree."""

    def convolved(size: int, kernel: int, stride: int, padding: int) -> int:
        return (size + 2 * padding - kernel) // stride + 1

    if len(strides) != 6 or min(strides) < 1:
        raise UserError(f"strides {list(strides)}: six whole numbers of at least 1 are needed: offset heads, class heads, four blocks")
    sides = []
    for side in image_size:
        side = convolved(side, 7, 2, 3)  # conv1
        side = convolved(side, 3, 2, 1)  # maxpool
        levels = [convolved(side, 3, 2, 1)]  # layer2; layer1 and layer3 keep the size
        for stride, padding in zip((*strides[2:], 1), (1, 1, 1, 0, 0), strict=True):
            levels.append(convolved(levels[-1], 3, stride, padding) if levels[-1] + 2 * padding >= 3 else 0)
        if 0 in levels:
            raise UserError(
                f"image size {image_size[0]}×{image_size[1]} with strides {' '.join(map(str, strides))} leaves no feature map on level "
                f"{levels.index(0) + 1} of 6 (sides {' '.join(map(str, levels))}); use a larger image or smaller strides after the second"
            )
        heads = [[convolved(level, 3, stride, 1) for level in levels] for stride in strides[:2]]
        if heads[0] != heads[1]:
            raise UserError(f"strides {strides[0]} of the offset heads and {strides[1]} of the class heads give different feature maps")
        sides.append(heads[0])
    return tuple(zip(*sides, strict=True))
