"""On the CPU, without Triton's interpreter, the reference and torch do the work."""

import copy
import json
import re
import subprocess
import sys

import pytest
import torch
from base.backends.nvidia.dali import version
from base.backends.nvidia.decoder import decode
from base.backends.nvidia.kernels import interpreted
from base.backends.nvidia.loss import multibox_loss
from base.backends.nvidia.matcher import match
from base.backends.nvidia.model import FusedSSD
from base.backends.nvidia.norm import norm_relu
from base.backends.nvidia.prologue import prologue
from base.backends.nvidia.step import build_optimizer, precision, start_momentum
from base.backends.reference import decoder as reference
from base.backends.reference.step import normalise
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from base.boxes import default_boxes
from base.contracts import Predictions
from base.errors import UserError
from tests.conftest import ROOT, one_line_without_its_device, same_losses_on_the_cpu

pytestmark = pytest.mark.skipif(interpreted(), reason="Triton's interpreter has the kernels run on the CPU")


def test_decoding():
    boxes = default_boxes((300, 300), ((4, 4), (3, 3), (2, 2), (2, 2), (1, 1), (1, 1)))
    predictions = Predictions(torch.randn(2, len(boxes), 4), torch.randn(2, len(boxes), 5) * 3)
    for found, want in zip(decode(predictions, boxes), reference.decode(predictions, boxes), strict=True):
        assert len(want.scores) > 20 and all(map(torch.equal, found, want))
    with pytest.raises(ValueError, match="negative"):
        decode(predictions, boxes, max_detections=-1)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("with_shortcut", [True, False])
def test_batch_norm(with_shortcut, training):
    norm, x = nn.BatchNorm2d(5).train(training), torch.randn(3, 5, 4, 4, requires_grad=True)
    own, shortcut = copy.deepcopy(norm), torch.randn(3, 5, 4, 4) if with_shortcut else None
    y, want = norm_relu(own, x, shortcut, True), (norm(x) + (shortcut if with_shortcut else 0)).relu()
    assert torch.equal(y, want) and all(map(torch.equal, own.buffers(), norm.buffers()))
    assert torch.equal(*(torch.autograd.grad(result.sum(), x)[0] for result in (y, want)))


def test_mirroring():
    images, flips = torch.randint(0, 256, (2, 5, 4, 3), dtype=torch.uint8), torch.tensor([False, True])
    want = torch.cat([normalise(images[:1]), normalise(images[1:]).flip(3)])
    x = prologue(images, torch.float32, 4, flips)
    assert torch.equal(x[:, :3], want) and not x[:, 3:].any() and x.is_contiguous(memory_format=torch.channels_last)


def test_the_compiler_sees_model_matching_and_loss_as_one_graph():
    """With tensors that only say that they are on a GPU: what it would trace there."""

    def forward(images, boxes, labels):
        return multibox_loss(model(prologue(images, torch.bfloat16)), match(boxes, labels, model.default_boxes))

    model = FusedSSD(num_classes=81, image_size=(300, 300), strides=(1, 1, 2, 2, 2, 1), backbone="resnet18")
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.bfloat16()  # as autocast does, which needs a GPU
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to("cuda", memory_format=torch.channels_last)
        images = torch.empty(2, 300, 300, 3, dtype=torch.uint8, device="cuda")
        boxes, labels = torch.empty(2, 64, 4, device="cuda"), torch.empty(2, 64, dtype=torch.long, device="cuda")
        found = torch._dynamo.explain(forward)(images, boxes, labels)
    assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_one_line_says_what_is_missing_and_what_runs_here(train):
    one_line_without_its_device(train, "nvidia")


@pytest.mark.skipif(version() is None, reason="DALI is not installed")
def test_a_run_on_the_cpu(train, tmp_path):
    same_losses_on_the_cpu(train, tmp_path, "nvidia")


BUILT = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]  # torch 2.11 for CUDA 13


@pytest.mark.parametrize(
    ("capability", "built", "dtype"),
    [
        ((7, 0), ["sm_50", "sm_60", "sm_70", "sm_80", "sm_90"], torch.float16),
        ((7, 5), BUILT, torch.float16),
        ((8, 9), BUILT, torch.bfloat16),
        ((9, 0), ["sm_80", "sm_90a"], torch.bfloat16),
        ((9, 0), ["compute_80"], torch.bfloat16),
        ((7, 0), BUILT, None),
        ((9, 0), ["sm_80", "sm_100", "compute_100"], None),
        ((10, 3), ["sm_90", "sm_100a"], None),
    ],
)
def test_the_precision_of_a_gpu_or_why_this_torch_cannot_use_it(monkeypatch, capability, built, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla V100-SXM2-16GB")
    if dtype:
        assert precision(torch.device("cuda", 0)) is dtype
    else:
        with pytest.raises(UserError, match=r"no code for Tesla V100-SXM2-16GB \(sm_\d+\), only sm_.*CUDA 12"):
            precision(torch.device("cuda", 0))


def test_a_first_step_that_was_skipped_leaves_no_momentum():
    """As GradScaler does it on a GPU: the kernel itself skips the step if a gradient was not finite."""
    weight = torch.nn.Parameter(torch.ones(1000))
    optimizer = build_optimizer([weight], momentum=0.9, weight_decay=0.0)
    start_momentum(optimizer)
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.grad_scale = torch.tensor(1.0)
    for infinite in (1.0, 0.0, 0.0):
        weight.grad = torch.full((1000,), 2.0)
        optimizer.found_inf = torch.tensor(infinite)
        optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full((1000,), 1 - 0.1 * 2 - 0.1 * 2 * 1.9))


def test_the_bench_needs_little_more_than_torch():
    """What a bare GPU machine lacks is not imported."""
    lacking = ("pydantic", "rich", "pycocotools", "mlperf_logging", "pytest", "nvidia.dali")
    program = f"import sys; sys.modules.update(dict.fromkeys({lacking})); import base.backends.nvidia.bench"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


@pytest.mark.long
def test_the_bench_works(tmp_path):
    """On the CPU and little work: its figures say nothing."""
    command = [sys.executable, "-m", "base.backends.nvidia.bench", "--device", "cpu", "--out", str(tmp_path / "cpu.md")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "cpu.md").read_text()
    kernels = "prologue", "matcher", "loss, forward", "first convolution", "pooling", "decoder", "norm + add"
    for row in (*kernels, "this backend", "without graph", "native loader", "dali loader"):
        assert re.search(rf"^\| .*{re.escape(row)}.*\d", text, re.M), text
    assert "not measured" not in text and set(json.loads((tmp_path / "cpu.json").read_text())) == {"about", "seconds"}
