"""What this backend is measured beside, in the rounds of ``python -m base bench``: other people's programs for the same work.

Each function takes what its part measures (`measuring.work`) and returns name → callable, or name → why it cannot be
measured. MLPerf's reference (SSD v1) comes from MosaicML's Composer, which ships its files; they are loaded one by one,
for the package itself needs much that is not needed here.
"""

import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
import torchvision
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

MLPERF, DALI, FASTER = "MLPerf reference", "DALI on the CPU", "faster-coco-eval"
INSTALL = "pip install -r cpu/peers.txt"
INSTALL_MLPERF = "pip install --no-deps mosaicml==0.10.1"
CRITERION = 0.5
DECODER = importlib.util.find_spec("simplejpeg")  # the fastest, of which the loader is to reach so much; others are no measure

# part → case → peer → what a rate of this backend should be at least, as a multiple of the peer's or the ceiling; "": the rate itself
AT_LEAST = {
    "loader": {"": {MLPERF: 8, DALI: 3.5, **({"ceiling": 0.8} if DECODER else {})}},
    "matcher": {"7 boxes": {MLPERF: 40}, "500 boxes": {"": 1000}},
    "loss": {"float32": {MLPERF: 5}},  # as MLPerf trains; on bfloat16 logits its loss is another, less exact one
    "decoder": {"crowded": {MLPERF: 500}, "all above the threshold": {"": 1000 / 150}},
    "evaluator": {"": {"": 5000 / 4}},
    "predict": {"SSD300-ResNet34": {"ceiling": 0.6}, "the demo's model": {"ceiling": 0.6}},
    "step": {"": {MLPERF: 2.3, "ceiling": 0.85}},
}
AT_MOST = {"loader": {"memory a worker": 300, "its growth": 15}, "loss": {"extra memory": 1.2}}

Peers = dict[str, Callable[[], object] | str]


def installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


@cache
def mlperf(name: str) -> ModuleType:
    """A file of MLPerf's reference: ``utils``, ``base_model`` or ``ssd300``."""
    folder = Path(importlib.util.find_spec("composer").submodule_search_locations[0]) / "models" / "ssd"
    full = f"composer.models.ssd.{name}"
    spec = importlib.util.spec_from_file_location(full, folder / f"{name}.py")
    module = sys.modules[full] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def without_mlperf() -> Peers:
    return {} if installed("composer") else {MLPERF: INSTALL_MLPERF}


def mlperf_targets(boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """MLPerf's targets of N images: boxes (N, 4, A) and labels (N, A)."""
    encoder = mlperf("utils").Encoder(mlperf("utils").dboxes300_coco())
    found = [encoder.encode(*image, CRITERION) for image in zip(boxes, labels, strict=True)]
    return torch.stack([b for b, _ in found]).transpose(1, 2).contiguous(), torch.stack([c for _, c in found])


class MLPerfSamples(Dataset):
    """MLPerf's samples: PIL, torchvision's transforms, and its encoder for the targets."""

    def __init__(self, index, folder: Path):
        utils = mlperf("utils")
        self.index, self.folder = index, folder
        self.transform = utils.SSDTransformer(utils.dboxes300_coco(), (300, 300))

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, number: int) -> tuple:
        image = Image.open(self.folder / self.index.file_name(number)).convert("RGB")
        boxes, labels = self.index.ltrb(number)
        image, _, boxes, labels = self.transform(image, image.size[::-1], torch.tensor(boxes), torch.tensor(labels))
        return image, boxes, labels


def loader(work: SimpleNamespace) -> Peers:
    """Epochs over ``work.index`` with its files in ``work.folder``, batches of 32, two processes or threads."""
    peers = without_mlperf()
    if not peers:
        batches = DataLoader(MLPerfSamples(work.index, work.folder), batch_size=32, shuffle=True, num_workers=2, persistent_workers=True)
        peers[MLPERF] = lambda: [None for _ in batches]
    peers[DALI] = dali(work) if installed("nvidia.dali") else INSTALL
    return peers


def dali(work: SimpleNamespace) -> Callable[[], None]:
    """DALI's pipeline for SSD: crop by boxes, decoding of the crop, jitter, resize, flip, box encoder."""
    from nvidia.dali import fn, pipeline_def, types

    anchors = work.default_boxes.ltrb.flatten().tolist()

    @pipeline_def(batch_size=32, num_threads=2, device_id=None, seed=1)
    def pipeline():
        files, boxes, labels = fn.readers.coco(
            file_root=str(work.folder), annotations_file=str(work.annotations), ltrb=True, ratio=True, skip_empty=True,
            random_shuffle=True, name="reader",
        )  # fmt: skip
        begin, shape, boxes, labels = fn.random_bbox_crop(
            boxes, labels, aspect_ratio=[0.5, 2.0], thresholds=[0, 0.1, 0.3, 0.5, 0.7, 0.9], scaling=[0.3, 1.0], bbox_layout="xyXY",
            allow_no_crop=True, num_attempts=50,
        )  # fmt: skip
        images = fn.decoders.image_slice(files, begin, shape, device="cpu", output_type=types.RGB)
        images = fn.resize(images, resize_x=300, resize_y=300, interp_type=types.INTERP_LINEAR, antialias=True)
        mirrored = fn.random.coin_flip(probability=0.5)
        boxes = fn.bb_flip(boxes, ltrb=True, horizontal=mirrored)
        images = fn.color_twist(
            fn.flip(images, horizontal=mirrored), brightness=fn.random.uniform(range=[0.875, 1.125]), contrast=fn.random.uniform(range=[0.5, 1.5]),
            saturation=fn.random.uniform(range=[0.5, 1.5]), hue=fn.random.uniform(range=[-18.0, 18.0]),
        )  # fmt: skip
        return images, *fn.box_encoder(boxes, labels, criteria=CRITERION, anchors=anchors)

    built = pipeline()
    built.build()

    def run() -> None:
        for _ in range(len(work.files) // 32):
            built.run()

    return run


def matcher(work: SimpleNamespace) -> Peers:
    """``work.boxes`` (N, M, 4) and ``work.labels`` (N, M), image by image, as MLPerf's loader does."""
    peers = without_mlperf()
    if not peers:
        encoder = mlperf("utils").Encoder(mlperf("utils").dboxes300_coco())
        peers[MLPERF] = lambda: [encoder.encode(boxes, labels, CRITERION) for boxes, labels in zip(work.boxes, work.labels, strict=True)]
    return peers


def loss(work: SimpleNamespace) -> Peers:
    """Of ``work.offsets`` (N, A, 4), ``work.logits`` (N, A, C) and ``work.targets``; its boxes are (N, 4, A), not encoded."""
    peers = without_mlperf()
    if not peers:
        judge = mlperf("base_model").Loss(mlperf("utils").dboxes300_coco())
        targets = mlperf_targets(work.boxes, work.labels)
        offsets, logits = (t.detach().transpose(1, 2).contiguous().requires_grad_() for t in (work.offsets, work.logits))

        def run() -> None:
            offsets.grad = logits.grad = None
            judge(offsets, logits, *targets).backward()

        peers[MLPERF] = run
    return peers


def decoder(work: SimpleNamespace) -> Peers:
    """Of ``work.predictions``; MLPerf's takes (N, 4, A) and (N, C, A), and changes them."""
    peers = without_mlperf()
    if not peers:
        encoder = mlperf("utils").Encoder(mlperf("utils").dboxes300_coco())
        offsets, logits = (t.transpose(1, 2).contiguous() for t in work.predictions)
        peers[MLPERF] = lambda: encoder.decode_batch(offsets.clone(), logits, CRITERION, 200, work.score_threshold)
    return peers


def evaluator(work: SimpleNamespace) -> Peers:
    """Of ``work.truth``, a COCO dictionary, and ``work.found``, float64 (D, 7): image id, x, y, width, height, score, category."""
    if not installed("faster_coco_eval"):
        return {FASTER: INSTALL}
    from faster_coco_eval import COCO, COCOeval_faster

    truth = COCO(work.truth)

    def run() -> None:
        result = COCOeval_faster(truth, truth.loadRes(work.found), "bbox", print_function=lambda *_: None)
        result.evaluate()
        result.accumulate()
        result.summarize()

    return {FASTER: run}


def step(work: SimpleNamespace) -> Peers:
    """``work.batch`` through MLPerf's model, loss and torch's SGD, in float32 as it comes; its targets are there already."""
    peers = without_mlperf()
    if not peers:
        judge = mlperf("base_model").Loss(mlperf("utils").dboxes300_coco())  # base_model is also what ssd300 imports
        targets = mlperf_targets(work.batch.boxes, work.batch.labels)
        with tempfile.TemporaryDirectory() as folder:
            weights = Path(folder) / "resnet34.pth"
            torch.save(torchvision.models.resnet34(weights=None).state_dict(), weights)
            model = mlperf("ssd300").SSD300(81, os.fspath(weights)).train()
        images = work.batch.images.permute(0, 3, 1, 2).float().contiguous() / 255
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)

        def run() -> None:
            optimizer.zero_grad()
            judge(*model(images), *targets).backward()
            optimizer.step()

        peers[MLPERF] = run
    return peers
