"""Loading with DALI: on a GPU, JPEGs are decoded by nvJPEG, then resized, mirrored and jittered there; without one, on the CPU.

Order, shards and random draws are the reference's, whose `Samples` and `PlainLoader` this builds on: its worker processes
look at the files' headers and draw, and DALI's threads read, decode and do the work on pixels. DALI's own ``readers.coco``
shuffles within a buffer, and ``random_bbox_crop`` draws from a state that a restart would have to restore, for the same
number of ranks. Here a sample is a pure function of (seed, epoch, image id), as `base.contracts.Loader` asks: a run
resumes exactly with nothing saved, and boxes and labels are the reference's to the bit. Pixels differ from its by how a
JPEG is decoded and resized.

DALI gets whole, ordinary JPEGs. All other files (PNG, CMYK, turned by EXIF, damaged, very large, …) are the reference's
samples from start to end, which so decides what they show and which of them are bad.

DALI's cache is left out: it keeps whole pictures, and here only the part that a crop shows is decoded.
"""

import gc
import importlib.metadata
import weakref
from collections import deque
from collections.abc import Iterator

import numpy as np
import torch
from base.backends.reference import loader as reference
from torch import Tensor

from base.contracts import Batch
from base.errors import UserError

from .dali_samples import DaliSamples, Order, Work, pack
from .jitter import jitter

AHEAD = 2  # batches that DALI works on beside the one that the receiver has


def version() -> str | None:
    """That of the DALI installed here, for whichever CUDA; None without one. Imports nothing."""
    return next((d.version for d in importlib.metadata.distributions() if d.name.lower().replace("_", "-").startswith("nvidia-dali")), None)


def start_worker(worker: int) -> None:
    """As the reference's. A pipeline that awaits collection must not be ended here, where its threads do not exist."""
    gc.freeze()
    reference.leave_group(worker)


def pipeline(size: tuple[int, int], batch_size: int, threads: int, device: torch.device):
    """DALI's graph: inputs ``paths``, ``start``, ``shape``, ``flip`` → uint8 (N, H, W, 3). Raises UserError if DALI is missing."""
    try:
        from nvidia.dali import Pipeline, fn, types
    except ImportError as error:
        why = error if version() else "which is not installed"  # this project's own folder may answer to the wheel's name
        raise UserError(f"the DALI loader needs the package nvidia-dali ({why}): python3 prepare.py --name nvidia") from error
    # The first run of a pipeline takes as many batches at once as its queue is deep, which an epoch may not have. One that
    # is 1 deep can have more runs scheduled all the same.
    graph = Pipeline(batch_size, threads, device.index, prefetch_queue_depth=1)
    with graph:
        paths = fn.external_source(name="paths", ndim=1, dtype=types.UINT8)
        start, shape = (fn.external_source(name=name, ndim=1, dtype=types.INT32) for name in ("start", "shape"))
        flip = fn.external_source(name="flip", ndim=0, dtype=types.INT32)
        images = fn.decoders.image_slice(
            fn.io.file.read(paths), start=start, shape=shape, device="mixed" if device.type == "cuda" else "cpu",
            output_type=types.RGB, adjust_orientation=False, jpeg_fancy_upsampling=True,
        )  # fmt: skip
        images = fn.resize(images, resize_x=size[1], resize_y=size[0], interp_type=types.INTERP_LINEAR, antialias=True)
        graph.set_outputs(fn.flip(images, horizontal=flip))
    graph.build()
    return graph


def schedule(graph, orders: list[Order]) -> None:
    """Lets DALI begin with a batch, if there is anything to do."""
    if orders:
        graph.feed_input("paths", [np.frombuffer(order.path, np.uint8) for order in orders])
        graph.feed_input("start", np.array([order.start for order in orders], np.int32))
        graph.feed_input("shape", np.array([order.shape for order in orders], np.int32))
        graph.feed_input("flip", np.array([order.flip for order in orders], np.int32))
        graph.schedule_run()


class DaliLoader(reference.PlainLoader):
    """The reference's loader ``plain`` with DALI: ``workers`` processes, and as many threads of DALI's; 0: none, and one."""

    def __init__(self, plain: reference.PlainLoader, batch_size: int, workers: int, epoch: int = 0):
        self.samples = DaliSamples(**vars(plain.loader.dataset))
        super().__init__(self.samples, plain.plan, workers, gaps=plain.gaps, epoch=epoch)
        self.loader.collate_fn, self.loader.worker_init_fn = pack, start_worker
        self.device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        self.options = self.samples.size, batch_size, max(1, workers), self.device
        self.graph, self.running = pipeline(*self.options), lambda: None

    def results(self) -> Iterator[tuple[Batch | None, list, int]]:
        if running := self.running():  # all iterations share the pipeline: one that was left early gives it back
            running.close()
        self.drain()
        batches = self.finished_batches(super().results())
        self.running = weakref.ref(batches)  # not a cycle: workers end in order only if references end them
        return batches

    def finished_batches(self, works: Iterator[Work]) -> Iterator[tuple[Batch | None, list, int]]:
        working = deque()
        for work in works:
            schedule(self.graph, work.orders)
            working.append(work)
            if len(working) > AHEAD:
                yield self.finish(working)
        while working:
            yield self.finish(working)

    def drain(self) -> None:
        """Takes and forgets what DALI still works on."""
        try:
            while not self.graph.empty():
                self.graph.outputs()
        except RuntimeError:  # about what nobody wants any more; but an error ends a pipeline
            self.graph = pipeline(*self.options)

    def finish(self, working: deque[Work]) -> tuple[Batch | None, list, int]:
        """Takes the first batch: what the reference's `collate` would make of it."""
        made = self.decoded(working)
        work = working.popleft()
        batch, bad, lost = work.collated
        if batch is None:
            return None, bad, lost
        images = made
        if work.others:
            images = torch.empty(len(batch.image_ids), *self.samples.size, 3, dtype=torch.uint8, device=self.device)
            if made is not None:
                images[torch.tensor([place for place in range(len(images)) if place not in work.others], device=self.device)] = made
            for place, picture in work.others.items():
                images[place] = torch.tensor(picture)
        return batch._replace(images=images), bad, lost

    def decoded(self, working: deque[Work]) -> Tensor | None:
        """What was ordered for the first batch, uint8 (n, H, W, 3) on ``device``; None if nothing was."""
        while orders := working[0].orders:
            try:
                (made,) = self.graph.outputs(torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None)
            except RuntimeError:
                refused = self.refused(orders)
                if not refused or len(refused) == len(orders) > 1:
                    raise  # no file causes it: a GPU out of memory must not become a slow run on the reference's loader
                self.samples.refused |= refused
                self.begin_again(working)
                continue
            images = torch.from_dlpack(made.as_tensor())
            if orders[0].amounts is None:
                return images
            return jitter(images, *(torch.from_numpy(np.stack(drawn)) for drawn in zip(*(order[-2:] for order in orders), strict=True)))
        return None

    def refused(self, orders: list[Order]) -> frozenset[int]:
        """The numbers of the images that DALI cannot make even alone: it stops at the first, and often names none."""
        found, graph = [], pipeline(*self.options)
        for order in orders:
            try:
                schedule(graph, [order])
                graph.outputs()
            except RuntimeError:
                found.append(order.number)
                graph = pipeline(*self.options)
        return frozenset(found)

    def begin_again(self, working: deque[Work]) -> None:
        """Gives refused images to the reference and everything else to a new pipeline, for an error ends the old one."""
        self.graph = pipeline(*self.options)
        for place, work in enumerate(working):
            if any(order.number in self.samples.refused for order in work.orders):
                working[place] = pack([self.samples[key] for key in work.keys])
            schedule(self.graph, working[place].orders)


def train_loader(*, batch_size: int, workers: int, epoch: int = 0, **options) -> DaliLoader:
    """Augmented batches of the images with boxes; arguments as `base.contracts.MakeTrainLoader`. Raises UserError without DALI."""
    return DaliLoader(reference.train_loader(batch_size=batch_size, workers=0, epoch=epoch, **options), batch_size, workers, epoch)


def eval_loader(*, batch_size: int, workers: int, **options) -> DaliLoader:
    """Batches of all images, resized only; arguments as `base.contracts.MakeEvalLoader`. Raises UserError without DALI."""
    return DaliLoader(reference.eval_loader(batch_size=batch_size, workers=0, **options), batch_size, workers)
