"""Weights from elsewhere: torchvision's ResNet files and MLPerf reference checkpoints."""

import re
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn

from base.boxes import BOXES_PER_CELL
from base.errors import UserError
from data_sets.coco_json import digest

# MLPerf reference name → this project's, by prefix (golden/mlperf_state_dict.json has all 218 names)
MLPERF_PREFIXES = (
    ("model.layer1.0.", "backbone.conv1."),
    ("model.layer1.1.", "backbone.bn1."),
    ("model.layer1.4.", "backbone.layer1."),
    ("model.layer1.5.", "backbone.layer2."),
    ("model.layer2.0.", "backbone.layer3."),
    ("additional_blocks.", "extras."),
    ("loc.", "offset_heads."),
    ("conf.", "class_heads."),
)
HASHED_NAME = re.compile(r".*-([0-9a-f]{8,64})\.pth?")  # torchvision puts the start of the SHA-256 into the file's name


def read_tensors(path: str | Path) -> dict:
    """A torch file by safe means only (no code in it can run). Raises UserError naming what is wrong with it."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist or is not a file")
    try:
        if zipfile.is_zipfile(path):  # torch's own reader does not check the sums that the archive carries
            with zipfile.ZipFile(path) as archive:
                if (broken := archive.testzip()) is not None:
                    raise UserError(f"{path} is damaged: {broken} does not have its checksum")
        return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # a damaged file makes the reader stumble in any way
        if found := re.search(r"GLOBAL (\S+)", str(error)):
            raise UserError(f"{path} is refused: it holds {found[1]}, not only tensors and plain values: it could run code when loaded") from error
        detail = re.split(r"\n|\. In PyTorch", str(error))[0] or type(error).__name__
        raise UserError(f"{path} is truncated, damaged or not a torch file ({detail}); put a whole one in its place") from error


def load_backbone(model: nn.Module, path: str | Path) -> None:
    """Puts a torchvision ResNet's weights (without layer4 and classifier) into ``model.backbone``.

    Raises UserError if the file is missing, damaged (also: not the SHA-256 that its name states) or another network's.
    """
    path = Path(path)
    state = read_tensors(path)
    if (named := HASHED_NAME.fullmatch(path.name)) and not (actual := digest(path)).startswith(named[1]):
        raise UserError(
            f"backbone {path} is not the file that its name promises: SHA-256 {actual[:8]}…, not {named[1]}…; download it again"
        )
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise UserError(f"backbone {path} does not hold a torchvision state dict")
    wanted = model.backbone.state_dict()
    missing = [name for name in wanted if name not in state and not name.endswith("num_batches_tracked")]
    shapes = [
        f"{n} {tuple(state[n].shape)} instead of {tuple(t.shape)}" for n, t in wanted.items() if n in state and state[n].shape != t.shape
    ]
    surplus = [name for name in state if name not in wanted and not name.startswith(("layer4.", "fc."))]
    if missing or shapes or surplus:
        detail = [f"lacks {name}" for name in missing[:1]] + [f"has {text}" for text in [*shapes[:1], *(f"{name} besides" for name in surplus[:1])]]
        raise UserError(f"backbone {path} is not weights of this model's ResNet: it {' and '.join(detail)}; is --backbone right?")
    model.backbone.load_state_dict({name: state.get(name, tensor) for name, tensor in wanted.items()})


def is_mlperf(state: dict) -> bool:
    """Whether a state dict has the MLPerf reference's names (perhaps behind DistributedDataParallel's ``module.``)."""
    return any(str(name).removeprefix("module.").startswith("model.layer1.0.") for name in state)


def from_mlperf(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """An MLPerf reference state dict → this project's names and order of default boxes.

    MLPerf's heads have channel = value · boxes + box, this project's have channel = box · values + value.
    """
    renamed = {}
    for name, tensor in state.items():
        name = str(name).removeprefix("module.")
        match = next(((theirs, ours) for theirs, ours in MLPERF_PREFIXES if name.startswith(theirs)), None)
        if match is None or not isinstance(tensor, Tensor):
            raise UserError(f"{name!r} is no weight of an SSD-ResNet checkpoint in MLPerf's layout")
        ours = match[1] + name.removeprefix(match[0])
        renamed[ours] = _reorder_head(ours, tensor)
    return renamed


def to_mlperf(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """This project's state dict → the MLPerf reference's names and order of default boxes; the way back of `from_mlperf`."""
    renamed = {}
    for name, tensor in state.items():
        theirs, ours = next(pair for pair in MLPERF_PREFIXES if name.startswith(pair[1]))
        renamed[theirs + name.removeprefix(ours)] = _reorder_head(name, tensor, back=True)
    return renamed


def _reorder_head(name: str, tensor: Tensor, back: bool = False) -> Tensor:
    kind, level, *_ = name.split(".")
    boxes = dict(enumerate(BOXES_PER_CELL)).get(int(level) if level.isdecimal() else None)
    if kind not in ("offset_heads", "class_heads") or boxes is None or not tensor.dim() or len(tensor) % boxes:
        return tensor
    return tensor.reshape(*((boxes, -1) if back else (-1, boxes)), *tensor.shape[1:]).transpose(0, 1).reshape(tensor.shape)
