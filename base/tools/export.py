"""``python -m base export --checkpoint C --out FILE``: the detector for other programs, checked against PyTorch before this ends.

``.onnx``: images uint8 (N, H, W, 3) RGB, resized → ``image`` int64 (D), ``boxes`` float32 (D, 4), ``labels`` int64 (D), ``scores`` float32
(D): the detections of all images, by image and falling score. With ``--dense``: ``boxes`` (N, A, 4), ``scores`` (N, C - 1, A) of every default box.
``.pt2``: a torch.export program with the dense outputs. ``.pt``: weights in the MLPerf reference's layout.

Boxes are ltrb in [0, 1], labels those of the checkpoint (1 … C - 1). N is free. The check runs the file on the validation images of the
data that the checkpoint was trained on (or ``--data_dir``): the same detections as PyTorch's, and an mAP within 1e-4.
"""

import argparse
import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from base.backends.reference.decoder import BEST_A_CLASS, decode, decode_image
from base.backends.reference.step import normalise
from base.boxes import decode as decode_offsets
from base.contracts import Detections
from base.distributed import Ranks
from base.errors import UserError
from base.evaluate import figures, flat, make_eval_loader
from base.tools.detector import CHECKPOINT, Detector, flags_of_data, on_data, open_checkpoint
from base.weights import from_mlperf, to_mlperf

OPSET = 20
Limits = tuple[float, float, int]  # lowest score, overlap from which a box is dropped, most detections of an image
# The reference's decoding in ONNX: the best of each class, suppression within each, and of an image the best of all
SUPPRESSION = """
<ir_version: 10, opset_import: ["" : OPSET]>
suppression (float[N, A, 4] boxes_of_all, float[N, C, A] scores_of_all)
    => (int64[D] image, float[D, 4] boxes, int64[D] labels, float[D] scores)
<int64 zero = {0}, int64 one = {1}, int64 most = {MOST}, int64[1] k = {BEST}, int64[1] last = {-1}, int64[3] rows = {-1, BEST, 4},
 int64[3] lines = {-1, 1, BEST}, int64[2] flat = {-1, BEST}, int64[2] ends = {0, 2}, float overlap = {IOU}, float least = {SCORE},
 double two = {2}, int64[2] off_on = {0, 1}>
{
    top, place = TopK <axis = 2> (scores_of_all, k)
    places = Unsqueeze (place, last)
    near = GatherND <batch_dims = 1> (boxes_of_all, places)
    candidates = Reshape (near, rows)
    candidate_scores = Reshape (top, lines)
    kept = NonMaxSuppression (candidates, candidate_scores, k, overlap, least)
    at = Gather <axis = 1> (kept, ends)
    box = GatherND (candidates, at)
    by_class = Reshape (top, flat)
    score = GatherND (by_class, at)
    row = Gather <axis = 1> (kept, zero)
    shape = Shape (scores_of_all)
    pictures = Gather (shape, zero)
    classes = Gather (shape, one)
    image_of = Div (row, classes)
    class_of = Mod (row, classes)
    label = Add (class_of, one)
    image_number = Cast <to = 11> (image_of)
    behind = Mul (image_number, two)
    sure = Cast <to = 11> (score)
    key = Sub (sure, behind)
    count = Shape (key)
    _, order = TopK (key, count)
    image_sorted = Gather (image_of, order)
    own = OneHot (image_sorted, pictures, off_on)
    so_far = CumSum (own, zero)
    ranks = Mul (so_far, own)
    rank = ReduceMax <keepdims = 0> (ranks, last)
    good = LessOrEqual (rank, most)
    final = Compress (order, good)
    image = Gather (image_of, final)
    boxes = Gather (box, final)
    labels = Gather (label, final)
    scores = Gather (score, final)
}
"""


class Dense(nn.Module):
    """uint8 images (N, H, W, 3) → boxes float32 (N, A, 4), scores (N, C - 1, A)."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.register_buffer("xywh", model.default_boxes.xywh)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        predictions = self.model(normalise(images))
        return decode_offsets(predictions.offsets, self.xywh), predictions.logits.softmax(-1)[..., 1:].transpose(1, 2)


def needed(*packages: str) -> list:
    """Imports optional packages. Raises UserError with the command that installs them."""
    try:
        return [importlib.import_module(package) for package in packages]
    except ImportError as error:
        raise UserError(f"export needs the package {error.name}: {sys.executable} -m pip install onnx onnxscript onnxruntime") from error


def to_onnx(dense: Dense, example: Tensor, path: Path, limits: Limits, suppressed: bool) -> Callable[[Tensor], list[Detections]]:
    """Writes the ONNX file, with the suppression in it or without; → what runs it."""
    onnx, onnxruntime, _ = needed("onnx", "onnxruntime", "onnxscript")
    sizes = {"images": {0: torch.export.Dim("N", min=1)}}
    names = ["boxes", "scores"] if not suppressed else ["dense_boxes", "dense_scores"]
    program = torch.onnx.export(
        dense, (example,), dynamo=True, dynamic_shapes=sizes, input_names=["images"], output_names=names, opset_version=OPSET, verbose=False
    )
    network = program.model_proto
    if suppressed:
        text, (score, overlap, most) = SUPPRESSION, limits
        values = {"OPSET": OPSET, "BEST": min(BEST_A_CLASS, len(dense.xywh)), "SCORE": float(score), "IOU": float(overlap), "MOST": most}
        for name, value in values.items():
            text = text.replace(name, str(value))
        tail = onnx.parser.parse_model(text)
        network.ir_version = tail.ir_version
        network = onnx.compose.merge_models(network, tail, io_map=[("dense_boxes", "boxes_of_all"), ("dense_scores", "scores_of_all")])
    onnx.checker.check_model(network)
    onnx.save(network, str(path))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> list[Detections]:
        outputs = [torch.from_numpy(array) for array in session.run(None, {"images": images.numpy()})]
        if not suppressed:
            return from_dense(*outputs, limits)
        image, *found = outputs
        return [Detections(*(column[image == number] for column in found)) for number in range(len(images))]

    return run


def from_dense(boxes: Tensor, scores: Tensor, limits: Limits) -> list[Detections]:
    """The reference's detections of dense outputs."""
    with_background = torch.nn.functional.pad(scores.transpose(1, 2), (1, 0))
    return [decode_image(b, s, *limits) for b, s in zip(boxes, with_background, strict=True)]


def to_pt2(dense: Dense, example: Tensor, path: Path, limits: Limits) -> Callable[[Tensor], list[Detections]]:
    """Writes the torch.export program; → what runs it."""
    program = torch.export.export(dense, (example,), dynamic_shapes=({0: torch.export.Dim("N", min=1)},))
    torch.export.save(program, path)
    loaded = torch.export.load(path).module()

    @torch.no_grad()
    def run(images: Tensor) -> list[Detections]:
        return from_dense(*loaded(images), limits)

    return run


def compare(detector: Detector, limits: Limits, run: Callable[[Tensor], list[Detections]]) -> tuple[int, float, float, float]:
    """The file beside PyTorch on the validation images: → detections, worst difference of a box or score, and both mAPs.

    Raises UserError where they differ: other detections, or an mAP more than 1e-4 apart.
    """
    config, backend, ranks = detector.config, detector.backend, Ranks(0, 1, detector.device)
    ids, sizes, ours, theirs = [], [], [], []
    for batch in make_eval_loader(backend, config, ranks):
        ids.append(batch.image_ids)
        sizes.append(batch.sizes)
        ours += decode(detector.step.predict(batch.images), detector.model.default_boxes, *limits)
        theirs += run(batch.images)
    worst = 0.0
    for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        near = np.array_equal(a.labels, b.labels) or len(a.scores) == len(b.scores) and torch.equal(a.labels.sort()[0], b.labels.sort()[0])
        if not near:
            raise UserError(f"image {torch.cat(ids)[number]}: PyTorch finds {len(a.scores)} boxes and the file {len(b.scores)}, or of other classes")
        if torch.equal(a.labels, b.labels) and len(a.scores):
            worst = max(worst, (a.boxes - b.boxes).abs().max().item(), (a.scores - b.scores).abs().max().item())
    both = [figures(backend, config.path("val_annotations"), flat(ids, sizes, found))["AP"] for found in (ours, theirs)]
    if abs(both[0] - both[1]) > 1e-4:
        raise UserError(f"PyTorch's mAP is {both[0]:.5f} and the file's {both[1]:.5f}")
    return sum(len(found.scores) for found in theirs), worst, *both


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m base export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help=CHECKPOINT)
    parser.add_argument("--out", type=Path, required=True, help="file to write: .onnx, .pt2 or .pt")
    parser.add_argument("--dense", action="store_true", help="no suppression in the .onnx: outputs of every default box")
    parser.add_argument("--score", type=float, default=0.05, help="lowest score of a detection (default: %(default)s)")
    flags_of_data(parser, " to check on")
    parser.add_argument("--no_check", "--no-check", action="store_true", help="do not run what was written")
    flags = parser.parse_args(arguments)
    detector = open_checkpoint(flags.checkpoint, "reference", "cpu", workers=1)
    kind = flags.out.suffix
    if kind not in (".onnx", ".pt2", ".pt"):
        raise UserError(f"--out {flags.out} must end in .onnx, .pt2 or .pt")
    checked = kind != ".pt" and not flags.no_check
    if checked:
        detector = on_data(detector, flags)
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    if kind == ".pt":
        state = detector.model.state_dict()
        theirs = to_mlperf(state)
        torch.save({"model": theirs}, flags.out)
        again = from_mlperf(torch.load(flags.out, weights_only=True)["model"])
        if any(not torch.equal(again[name], tensor) for name, tensor in state.items()):
            raise UserError(f"{flags.out} does not read back as what was written")
        print(f"{flags.out}: {len(theirs)} tensors in MLPerf's layout, read back and the same")
        return 0
    dense = Dense(detector.model).eval()
    example = torch.zeros(2, *detector.config.image_size, 3, dtype=torch.uint8)
    limits = flags.score, detector.config.iou_threshold, detector.config.max_detections
    if kind == ".pt2":
        run = to_pt2(dense, example, flags.out, limits)
    else:
        run = to_onnx(dense, example, flags.out, limits, not flags.dense)
    size = f"{flags.out.stat().st_size / 1e6:.1f} MB"
    if not checked:
        print(f"{flags.out}: {size}, not checked")
        return 0
    count, worst, ours, theirs = compare(detector, limits, run)
    found = f"{count} detections in the validation images, the same as PyTorch's, the worst {worst:.1e} apart"
    print(f"{flags.out}: {size}; {found}; mAP {theirs:.4f}, PyTorch's {ours:.4f}")
    return 0
