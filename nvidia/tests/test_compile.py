"""The kernels compile for the GPUs that they are meant for, to the assembler's last pass; no GPU is needed for that."""

import pytest
import triton
from base.backends.nvidia import decoder, heads, jitter, loss, matcher, norm, pool, prologue, stem
from base.backends.nvidia.kernels import interpreted
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

pytestmark = pytest.mark.skipif(interpreted(), reason="Triton's interpreter is on, and nothing is compiled")

CLASSES, COUNT = 81, 8732
MATCHING = {"boxes": "*fp32", "labels": "*i64", "defaults": "*fp32", "rank": "*i64", "best": "*i64", "most": "i32", "count": "i32"}
ASSIGNING = {**MATCHING, "xywh": "*fp32", "offsets": "*fp32", "classes": "*i64"}
ENTROPIES = {"logits": "*bf16", "labels": "*i64", "entropies": "*fp32", "rows": "i32", "classes": "i32"}
SELECTING = {"offsets": "*bf16", "wanted": "*fp32", "labels": "*i64", "entropies": "*fp32", "losses": "*fp32", "chosen": "*u8", "positives": "*i32"}
GRADIENTS = {
    "slopes": "*fp32", "offsets": "*bf16", "logits": "*bf16", "wanted": "*fp32", "labels": "*i64", "chosen": "*u8", "positives": "*i32",
    "to_offsets": "*bf16", "to_logits": "*bf16", "rows": "i32", "count": "i32", "classes": "i32",
}  # fmt: skip
JITTER = {"images": "*u8", "factors": "*fp32", "order": "*i32", "sums": "*i64", "pixels": "i32"}
PROLOGUE = {"images": "*u8", "flips": "*u8", "out": "*bf16", "count": "i32", "height": "i32", "width": "i32"}
MIRRORING = {**PROLOGUE, "flips": "*i1"}
CANDIDATES = {
    "logits": "*bf16", "image_stride": "i32", "row_stride": "i32", "class_stride": "i32", "keys": "*i64", "counts": "*i32", "count": "i32",
    "classes": "i32", "score_threshold": "fp32",
}  # fmt: skip
SUPPRESSING = {
    "keys": "*i64", "counts": "*i32", "offsets": "*bf16", "image_stride": "i32", "row_stride": "i32", "value_stride": "i32", "xywh": "*fp32",
    "kept_keys": "*i64", "kept_boxes": "*fp32", "count": "i32", "foreground": "i32", "most": "i32", "iou_threshold": "fp32",
}  # fmt: skip
SIDES = {"height": "i32", "width": "i32", "rows": "i32", "columns": "i32", "channels": "i32"}
POOLING = {**SIDES, "x": "*bf16", "y": "*bf16", "place": "*u8", "slope": "*bf16", "to_x": "*bf16"}
PRODUCTS = {**SIDES, "folded": "*bf16", "slope": "*bf16", "partial": "*fp32", "pixels": "i32", "count": "i32"}
FOLDING = {**SIDES, "images": "*bf16", "out": "*bf16", "each": "i32"}
HEADS = {
    **dict.fromkeys(("output", "offsets", "logits", "to_offsets", "to_logits", "to_output"), "*bf16"), "bias": "*fp32",
    **dict.fromkeys(("start", "count", "cells", "channels", "boxes", "classes"), "i32"),
}  # fmt: skip
LINE = {"mean": "*fp32", "variance": "*fp32", "weight": "*fp32", "bias": "*fp32", "epsilon": "fp32", "rows": "i32", "count": "i32"}
MOMENTS = {"x": "*bf16", "partial": "*fp32", "rows": "i32", "count": "i32"}
MEANS = {"mean": "*fp32", "variance": "*fp32", "running_mean": "*fp32", "running_var": "*fp32", "momentum": "fp32", "correction": "fp32"}
APPLYING = {**LINE, "x": "*bf16", "shortcut": "*bf16", "y": "*bf16"}
SLOPES = {**LINE, "slope": "*bf16", "other": "*bf16", "x": "*bf16", "y": "*bf16", "partial": "*fp32", "passed": "*bf16"}
TO_INPUT = {**LINE, "slope": "*bf16", "x": "*bf16", "sums": "*fp32", "to_x": "*bf16", "share": "fp32"}
FINISHING = {"partial": "*fp32", "variance": "*fp32", "sums": "*fp32", "to_weight": "*fp32", "epsilon": "fp32", "count": "i32", "parts": "i32"}

PLAIN, EXACT, SELECTED = {}, {"enable_fp_fusion": False}, {"num_warps": 32}
MOMENTS_OF, SLOPES_OF, MAPPED = (
    {"ROWS": numbers // norm.CHANNELS, "CHANNELS": norm.CHANNELS} for numbers in (norm.MOMENTS, norm.SLOPES, norm.MAPPED)
)
FINISHED = dict(zip(("CHANNELS", "PARTS"), norm.FINISHED, strict=True))
WIDTH = triton.next_power_of_2(CLASSES)
ROWS = {"ROWS": loss.ROWS, "WIDTH": WIDTH}

# (kernel, types of what it is given, constants, options of the launch); bfloat16 stands for the precision of the model
KERNELS = [
    (matcher.find_best, MATCHING, {"BOXES": 128, "BLOCK": matcher.BLOCK}, EXACT),
    (matcher.assign, ASSIGNING, {"BOXES": 128, "BLOCK": matcher.BLOCK}, EXACT),
    (pool.maxima, POOLING, {"CELLS": pool.CELLS, "CHANNELS": pool.CHANNELS}, PLAIN),
    (pool.to_pixels, POOLING, {"CELLS": pool.CELLS, "CHANNELS": pool.CHANNELS}, PLAIN),
    (stem.add_products, PRODUCTS, {"WIDE": 64, "ACROSS": 4 * stem.CHANNELS, "PIXELS": stem.PIXELS, "EXACT": "tf32"}, stem.LAUNCH),
    (stem.fold, FOLDING, {"CHANNELS": stem.CHANNELS, "BLOCK": stem.BLOCK}, PLAIN),
    *((kernel, HEADS, {"ROWS": heads.ROWS, "COLUMNS": heads.COLUMNS}, PLAIN) for kernel in (heads.place, heads.take)),
    (loss.cross_entropies, ENTROPIES, ROWS, {"num_warps": loss.warps(loss.ROWS * WIDTH)}),
    (loss.select, {**SELECTING, "count": "i32"}, {"BLOCK": loss.WHOLE, "TOGETHER": True}, SELECTED),
    (loss.select, {**SELECTING, "count": "i32"}, {"BLOCK": loss.WHOLE, "TOGETHER": False}, SELECTED),
    (loss.gradients, GRADIENTS, {**ROWS, "ROWS": loss.FEW}, {"num_warps": 2 * loss.warps(loss.FEW * WIDTH)}),
    (jitter.add_grey, JITTER, {"BLOCK": jitter.PIXELS}, EXACT),
    (jitter.apply_changes, {**JITTER, "out": "*u8"}, {"BLOCK": jitter.PIXELS}, EXACT),
    (prologue.normalise_bytes, PROLOGUE, {"CHANNELS": 3, "FLIP": False, "BLOCK": prologue.BLOCK}, PLAIN),
    (prologue.normalise_bytes, MIRRORING, {"CHANNELS": 3, "FLIP": True, "BLOCK": prologue.BLOCK}, PLAIN),
    (prologue.normalise_bytes, MIRRORING, {"CHANNELS": 4, "FLIP": True, "BLOCK": prologue.BLOCK}, PLAIN),
    (decoder.candidates, CANDIDATES, {"ROWS": decoder.TILE // WIDTH, "WIDTH": WIDTH}, EXACT),
    (decoder.keep_best, {"keys": "*i64", "counts": "*i32", "count": "i32"}, {"SEGMENT": decoder.SEGMENT}, {**EXACT, "num_warps": 8}),
    (decoder.suppress, SUPPRESSING, {"BLOCK": triton.next_power_of_2(decoder.BEST_A_CLASS)}, {**EXACT, "num_warps": 1}),
    (norm.add_moments, MOMENTS, MOMENTS_OF, norm.SUMMING),
    (norm.finish_moments, {**MOMENTS, **MEANS, "parts": "i32"}, {"UPDATE": True, **FINISHED}, PLAIN),
    (norm.finish_moments, {**MOMENTS, **MEANS, "parts": "i32"}, {"UPDATE": False, **FINISHED}, PLAIN),
    *((norm.apply, APPLYING, {**MAPPED, "ADD": add, "RELU": relu}, norm.MAPPING) for add, relu in ((0, 0), (0, 1), (1, 1))),
    *(
        (norm.add_slopes, SLOPES, {**SLOPES_OF, "MODE": mode.value, "TWO": two}, norm.SUMMING)
        for mode, two in ((norm.ALL, 0), (norm.AGAIN, 0), (norm.OUTPUT, 0), (norm.OUTPUT, 1))
    ),
    (norm.finish_slopes, FINISHING, FINISHED, PLAIN),
    *((norm.to_input, TO_INPUT, {**MAPPED, "MODE": mode.value}, norm.MAPPING) for mode in (norm.ALL, norm.AGAIN)),
]
DTYPES = {70: "fp16", 80: "bf16", 90: "bf16"}  # what the step takes there


@pytest.mark.parametrize("capability", DTYPES)
@pytest.mark.parametrize("case", KERNELS, ids=lambda case: "-".join([case[0].__name__, *map(str, case[2].values())]))
def test_a_kernel_compiles(case, capability):
    kernel, types, constants, options = case
    signature = {name: types[name].replace("bf16", DTYPES[capability]) if name in types else "constexpr" for name in kernel.arg_names}
    source = ASTSource(kernel, signature, constants)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert built.asm["cubin"] and f"sm_{capability}" in built.asm["ptx"]
