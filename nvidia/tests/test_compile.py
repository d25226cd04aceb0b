"""The kernels compile for the GPUs that they are meant for, to the assembler's last pass; no GPU is needed for that."""

import pytest
import triton
from base.backends.nvidia import jitter, loss, matcher, prologue
from base.backends.nvidia.kernels import interpreted
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

pytestmark = pytest.mark.skipif(interpreted(), reason="Triton's interpreter is on, and nothing is compiled")

MATCHING = {"boxes": "*fp32", "labels": "*i64", "defaults": "*fp32", "rank": "*i64", "best": "*i64", "most": "i32", "count": "i32"}
ASSIGNING = {**MATCHING, "xywh": "*fp32", "offsets": "*fp32", "classes": "*i64"}
SELECTING = {"offsets": "*bf16", "wanted": "*fp32", "labels": "*i64", "entropies": "*fp32", "losses": "*fp32", "chosen": "*u8", "positives": "*i32"}
GRADIENTS = {
    "slopes": "*fp32", "offsets": "*bf16", "logits": "*bf16", "wanted": "*fp32", "labels": "*i64", "chosen": "*u8", "positives": "*i32",
    "to_offsets": "*bf16", "to_logits": "*bf16", "rows": "i32", "count": "i32", "classes": "i32",
}
JITTER = {"images": "*u8", "factors": "*fp32", "order": "*i32", "sums": "*i64", "pixels": "i32"}
KERNELS = {  # kernel: (types of what it is given, constants)
    matcher.find_best: (MATCHING, {"BLOCK": matcher.BLOCK}),
    matcher.assign: (ASSIGNING, {"BLOCK": matcher.BLOCK}),
    loss.cross_entropies: (
        {"logits": "*bf16", "labels": "*i64", "entropies": "*fp32", "rows": "i32", "classes": "i32"},
        {"ROWS": loss.ROWS, "WIDTH": 128},
    ),
    loss.select: ({**SELECTING, "count": "i32"}, {"BLOCK": loss.WHOLE, "TOGETHER": True}),
    loss.gradients: (GRADIENTS, {"ROWS": loss.ROWS, "WIDTH": 128}),
    jitter.add_grey: (JITTER, {"BLOCK": jitter.PIXELS}),
    jitter.apply_changes: ({**JITTER, "out": "*u8"}, {"BLOCK": jitter.PIXELS}),
    prologue.normalise_bytes: ({"images": "*u8", "out": "*bf16", "count": "i32"}, {"CHANNELS": 3, "BLOCK": prologue.BLOCK}),
}


@pytest.mark.parametrize("capability", [70, 80, 90])
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.__name__)
def test_a_kernel_compiles(kernel, capability):
    types, constants = KERNELS[kernel]
    if capability < 80:  # no bfloat16 there
        types = {name: kind.replace("bf16", "fp16") for name, kind in types.items()}
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    source = ASTSource(kernel, signature, constants)
    options = {"num_warps": 32} if kernel is loss.select else {}
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert built.asm["cubin"] and f"sm_{capability}" in built.asm["ptx"]
