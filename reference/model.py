"""SSD on a ResNet: the MLPerf architecture, for any image size and strides."""

import itertools
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

LARGEST_SIDE = 8192  # pixels; a bound, so that a slip of the pen is refused before it takes all memory
BACKBONES = ("resnet18", "resnet34", "resnet50")
LEVEL_CHANNELS = (512, 512, 256, 256, 256)  # after the backbone's own level
MIDDLE_CHANNELS = (256, 256, 128, 128, 128)


class SSD(nn.Module):
    """SSD with heads on six levels (paper section 2.1; MLPerf reference ``SSD300``).

    The backbone is a ResNet up to ``layer3``, whose first block keeps its resolution (38×38 for 300×300). ``strides`` are
    those of all offset heads, of all class heads, and of the first four additional blocks; the fifth has stride 1. The
    last two additional blocks have no padding. Images are float (N, 3, H, W); ``default_boxes`` move with the module. Batch norm
    takes its statistics over the ranks of ``norm_group``. Raises UserError as `feature_sizes` does.
    """

    def __init__(
        self, *, num_classes: int, image_size: tuple[int, int], strides: Sequence[int], backbone: str, norm_group: ProcessGroup | None = None
    ):
        super().__init__()
        if backbone not in BACKBONES:
            raise UserError(f"backbone {backbone!r} is not one of {', '.join(BACKBONES)}")
        sizes = feature_sizes(image_size, strides)
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
        self.default_boxes = default_boxes(image_size, sizes)

    def forward(self, images: Tensor) -> Predictions:
        levels = [self.features(images)]
        for block in self.extras:
            levels.append(self.apply_extra(block, levels[-1]))
        return self.apply_heads(levels)

    def apply_extra(self, block: nn.Sequential, x: Tensor) -> Tensor:
        """An additional block: two convolutions, each with a bias and ReLU; backends fuse the latter."""
        return block(x)

    def apply_heads(self, levels: list[Tensor]) -> Predictions:
        """All heads on their levels (N, C, rows, columns); backends fuse them."""
        offsets = [boxes_last(self.apply_head(head, level), 4) for head, level in zip(self.offset_heads, levels, strict=True)]
        logits = [boxes_last(self.apply_head(head, level), self.num_classes) for head, level in zip(self.class_heads, levels, strict=True)]
        return Predictions(torch.cat(offsets, 1), torch.cat(logits, 1))

    def features(self, images: Tensor) -> Tensor:
        """The backbone's level, as torchvision's ResNet computes it."""
        net = self.backbone
        x = shortcut = self.apply_pool(net.maxpool, self.apply_norm(net.bn1, self.apply_stem(net.conv1, images)))
        for block in (*net.layer1, *net.layer2, *net.layer3):
            if block.downsample is not None:
                convolution, norm = block.downsample
                shortcut = self.apply_norm(norm, convolution(shortcut), relu=False)
            x = self.apply_norm(block.bn1, block.conv1(x))
            if hasattr(block, "conv3"):
                x = self.apply_norm(block.bn2, block.conv2(x))
                x, shortcut = self.apply_join(block.bn3, block.conv3(x), shortcut)
            else:
                x, shortcut = self.apply_join(block.bn2, block.conv2(x), shortcut)
        return x

    def apply_stem(self, convolution: nn.Conv2d, images: Tensor) -> Tensor:
        """The first convolution, 7×7 at stride 2 on three channels; backends give it a shape that their units like."""
        return convolution(images)

    def apply_pool(self, pool: nn.MaxPool2d, x: Tensor) -> Tensor:
        """The only pooling, 3×3 at stride 2; backends may know a faster one."""
        return pool(x)

    def apply_norm(self, norm: nn.Module, x: Tensor, shortcut: Tensor | None = None, relu: bool = True) -> Tensor:
        """Batch norm, then the shortcut's addition and ReLU; backends fuse them."""
        x = norm(x) if self.norm_group is None or not norm.training else group_norm(norm, x, self.norm_group)
        if shortcut is not None:
            x += shortcut
        return functional.relu_(x) if relu else x

    def apply_join(self, norm: nn.Module, x: Tensor, shortcut: Tensor) -> tuple[Tensor, Tensor]:
        """A block's end, for the two that take it, the next block's first convolution and its shortcut: backends fuse their gradients' sum."""
        x = self.apply_norm(norm, x, shortcut)
        return x, x

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
    """(rows, columns) of the six levels of default boxes.

    Raises UserError if a level is empty, naming strides that fit, if the heads disagree, or for a side above LARGEST_SIDE.
    """
    named = f"image size {image_size[0]}×{image_size[1]} with strides {' '.join(map(str, strides))}"
    if len(strides) != 6 or min(strides) < 1 or max(strides) > LARGEST_SIDE:
        raise UserError(
            f"strides {list(strides)}: six whole numbers of at least 1, and at most {LARGEST_SIDE}, are needed: "
            "offset heads, class heads, four blocks"
        )
    if max(image_size) > LARGEST_SIDE:
        raise UserError(f"{named}: a side has at most {LARGEST_SIDE} pixels")
    rows, columns = (level_sides(side, strides[2:]) for side in image_size)
    if 0 in rows + columns:
        level = next(number for number, sides in enumerate(zip(rows, columns, strict=True), 1) if 0 in sides)
        sides = ", ".join(f"{r}×{c}" for r, c in zip(rows, columns, strict=True))
        raise UserError(f"{named} leaves no feature map on level {level} of 6 ({sides}); {advice(min(image_size), strides)}")
    offset_maps, class_maps = (tuple((1 + (r - 1) // s, 1 + (c - 1) // s) for r, c in zip(rows, columns, strict=True)) for s in strides[:2])
    if offset_maps != class_maps:
        both = " ".join(map(str, (strides[0], strides[0], *strides[2:])))
        apart = f"{strides[0]} of the offset heads and {strides[1]} of the class heads give different feature maps"
        raise UserError(f"{named}: {apart}; strides {both} fit")
    return offset_maps


def level_sides(side: int, block_strides: Sequence[int]) -> list[int]:
    """How many rows or columns the six levels have that heads look at, of a side in pixels; 0 from the first on that is empty."""
    for kernel, padding in ((7, 3), (3, 1), (3, 1)):  # conv1, maxpool, layer2; layer1 and layer3 keep the size
        side = (side + 2 * padding - kernel) // 2 + 1
    sides = [side]
    for stride, padding in zip((*block_strides, 1), (1, 1, 1, 0, 0), strict=True):
        sides.append((sides[-1] + 2 * padding - 3) // stride + 1 if sides[-1] + 2 * padding >= 3 else 0)
    return sides


def advice(side: int, strides: Sequence[int]) -> str:
    """Strides that leave every level of a side something: those given, but 1 from a block on; or how large a side has to be."""
    for kept in range(5, 1, -1):
        fitting = (strides[0], strides[0], *strides[2:kept], *[1] * (6 - kept))
        if level_sides(side, fitting[2:])[-1]:
            return f"strides {' '.join(map(str, fitting))} fit, or a larger image"
    least = next(pixels for pixels in itertools.count(side) if level_sides(pixels, (1,) * 4)[-1])
    return f"no strides fit a side below {least} pixels"
