"""The contract of both loaders, for every backend: what is in a batch, which images, in which order, and what ends it."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from base.errors import LostProcess, UserError
from base.sampling import epoch_order, sample_rng
from tests.conftest import ROOT
from tests.small_data import SIZE, check_batch, evaluating, ids, many, picture, pure, samples, training, write_coco


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict:
    """35 images with boxes and 4 without."""
    return many(tmp_path_factory.mktemp("data") / "images", 35, empty=4)


def test_batches_of_training(backend, data):
    loader = training(backend, data)
    batches = list(loader)
    assert len(batches) == len(loader) == 2 and loader.bad_images == {}
    for batch in batches:
        check_batch(batch, 16)
        assert (batch.labels > 0).any(1).all()  # no image without boxes


def test_batches_of_evaluation(backend, data):
    loader = evaluating(backend, data)
    batches = list(loader)
    assert len(batches) == len(loader) == 10
    for batch in batches[:-1]:
        check_batch(batch, 4)
    check_batch(batches[-1], 3)  # 39 images: a ragged last batch
    assert [key for batch in ids(batches) for key in batch] == [10 + 3 * number for number in range(39)]


def test_recorded_sizes_boxes_and_labels_arrive(backend, tmp_path):
    pictures = {4: picture(0, 80, 40), 2: picture(1, 30, 90)}
    boxes = {4: [[8, 4, 16, 8, 7], [40, 20, 40, 20, 3]], 2: [[0, 0, 30, 90, 3]]}
    (batch,) = evaluating(backend, write_coco(tmp_path, pictures, boxes))
    assert batch.image_ids.tolist() == [2, 4]
    assert batch.sizes.tolist() == [[90, 30], [40, 80]]  # height, width
    assert batch.labels.tolist() == [[1, 0], [2, 1]]  # in the order of category ids
    want = [[[0, 0, 1, 1], [0, 0, 0, 0]], [[0.1, 0.1, 0.3, 0.3], [0.5, 0.5, 1, 1]]]
    np.testing.assert_allclose(batch.boxes.cpu().numpy(), want, atol=1e-6)


@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_channels_are_red_green_blue(backend, tmp_path, kind):
    colours = {1: (255, 0, 0), 2: (0, 255, 0), 3: (0, 0, 255)}
    pictures = {key: Image.new("RGB", (50, 40), colour) for key, colour in colours.items()}
    (batch,) = evaluating(backend, write_coco(tmp_path, pictures, {}, kind))
    for image, colour in zip(batch.images.cpu().int(), colours.values(), strict=True):
        assert (image - torch.tensor(colour)).abs().max() <= 2
    assert batch.labels.shape[1] >= 1 and not batch.labels.any()  # images without boxes belong to evaluation


@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_evaluation_images_are_pils_bilinear_resize(backend, tmp_path, kind):
    """Of photographs' sharpness, larger and smaller than the sample: mean error under a level, and 3 at the 99.9th percentile."""
    pictures, rng = {}, np.random.default_rng(0)
    for key, (width, height) in enumerate([(200, 150), (64, 48), (31, 97), (640, 480)], 1):
        rough = Image.fromarray(rng.integers(0, 256, (height // 6 + 2, width // 6 + 2, 3), dtype=np.uint8))
        image = rough.resize((width, height), Image.Resampling.BICUBIC)
        ImageDraw.Draw(image).rectangle((width // 5, height // 4, width // 2, height // 2), fill=(250, 240, 10))
        pictures[key] = image
    data = write_coco(tmp_path, pictures, {}, kind)
    (batch,) = evaluating(backend, data)
    for image, key in zip(batch.images, pictures, strict=True):
        with Image.open(tmp_path / f"{key}.{kind}") as stored:
            want = np.asarray(stored.convert("RGB").resize(SIZE[::-1], Image.Resampling.BILINEAR), dtype=int)
        wrong = np.abs(image.cpu().numpy().astype(int) - want)
        assert wrong.mean() <= 1 and np.quantile(wrong, 0.999) <= 3, key


@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_sees_every_image_once_over_all_ranks(backend, tmp_path, count, world_size):
    data, seen = many(tmp_path, count), []
    for rank in range(world_size):
        loader = evaluating(backend, data, batch_size=2, rank=rank, world_size=world_size)
        batches = ids(list(loader))
        mine = [key for batch in batches for key in batch]
        assert len(batches) == len(loader) and mine == sorted(mine)
        assert all(1 <= len(batch) <= 2 for batch in batches)
        seen += mine
    assert sorted(seen) == [10 + 3 * number for number in range(count)]


def test_evaluation_can_be_iterated_again(backend, data):
    loader = evaluating(backend, data, workers=1)
    first = samples(list(loader))
    assert samples(list(loader)) == first and len(first) == 39


def test_evaluation_with_workers_and_fewer_images_than_ranks(backend, tmp_path):
    data = many(tmp_path, 1)
    assert [ids(list(evaluating(backend, data, workers=1, rank=rank, world_size=2))) for rank in range(2)] == [[[10]], []]


def test_a_global_batch_is_the_same_whatever_ranks_share_it(backend, data):
    whole = list(pure(training(backend, data)))
    for world_size in (2, 4):
        parts = [list(training(backend, data, batch_size=16 // world_size, rank=rank, world_size=world_size)) for rank in range(world_size)]
        for number, batch in enumerate(whole):
            together = [part[number] for part in parts]
            assert [key for part in ids(together) for key in part] == batch.image_ids.tolist()  # in the order of ranks
            assert samples(together) == samples([batch])


def test_an_epoch_has_each_image_at_most_once_and_an_order_of_its_own(backend, data):
    loader, orders = training(backend, data), []
    for epoch in range(3):
        loader.set_epoch(epoch)
        orders.append([key for batch in ids(list(loader)) for key in batch])
        assert len(set(orders[-1])) == len(orders[-1]) == 32
    orders.append([key for batch in ids(list(training(backend, data, seed=6))) for key in batch])
    assert len({tuple(order) for order in orders}) == 4
    assert len({frozenset(order) for order in orders}) > 1  # other images are left over each time


def test_epochs_and_seeds_change_the_samples(backend, data):
    loader = pure(training(backend, data))
    first = samples(list(loader))
    loader.set_epoch(1)
    other_epoch, other_seed = samples(list(loader)), samples(list(training(backend, data, seed=6)))
    for other in (other_epoch, other_seed):
        both = first.keys() & other.keys()
        assert len(both) > 10 and all(first[key][0] != other[key][0] for key in both)
    assert samples(list(training(backend, data, epoch=1))) == other_epoch


def test_neither_workers_nor_a_restart_change_a_sample(backend, data):
    loader = pure(training(backend, data, batch_size=8))
    epochs = []
    for epoch in (3, 4):
        loader.set_epoch(epoch)
        epochs.append(list(loader))
    for workers in (1, 2):
        other = training(backend, data, batch_size=8, workers=workers, epoch=3)
        first_epoch = list(other)
        other.set_epoch(4, 1)
        rest = list(other)
        assert ids(first_epoch) == ids(epochs[0]) and samples(first_epoch) == samples(epochs[0])
        assert ids(rest) == ids(epochs[1][1:]) and samples(rest) == samples(epochs[1][1:])
        assert len(other) == 4  # batches an epoch, wherever it was entered


def test_an_iteration_left_early_does_not_disturb_the_next(backend, data):
    for workers in (0, 2):
        loader = pure(training(backend, data, batch_size=4, workers=workers))
        want = samples(list(loader))
        for _ in range(2):
            iteration = iter(loader)
            next(iteration)
            loader.set_epoch(1)
            next(iter(loader))
            loader.set_epoch(0)
            assert samples(list(loader)) == want


def test_first_batch_at_the_end_gives_nothing(backend, data):
    loader = training(backend, data)
    loader.set_epoch(0, len(loader))
    assert list(loader) == []


def test_a_data_set_smaller_than_a_global_batch_is_refused(backend, data):
    with pytest.raises(UserError, match=r"35 .*36.*12.*3.*batch_size"):
        training(backend, data, batch_size=12, world_size=3)


def test_500_boxes_in_an_image(backend, tmp_path):
    rng = np.random.default_rng(0)
    boxes = {1: [[*rng.uniform(0, 80, 2).tolist(), *rng.uniform(3, 15, 2).tolist(), 3 + 4 * (n % 2)] for n in range(500)], 2: [[1, 1, 9, 9, 3]]}
    data = write_coco(tmp_path, {1: picture(1, 100, 100), 2: picture(2, 60, 90)}, boxes)
    (batch,) = evaluating(backend, data)
    check_batch(batch, 2)
    assert (batch.labels > 0).sum(1).tolist() == [500, 1]
    (batch,) = training(backend, data, batch_size=2)
    check_batch(batch, 2)
    counts = dict(zip(batch.image_ids.tolist(), (batch.labels > 0).sum(1).tolist(), strict=True))
    assert 1 <= counts[1] <= 500 and counts[2] == 1


def test_negative_image_ids(backend, tmp_path):
    """The index allows them; the random numbers must too."""
    data = write_coco(tmp_path, {-5: picture(1, 60, 50), -6: picture(2, 60, 50)}, {-5: [[5, 5, 20, 20, 3]], -6: [[5, 5, 20, 20, 3]]})
    (batch,) = training(backend, data, batch_size=2)
    assert sorted(batch.image_ids.tolist()) == [-6, -5]
    assert sample_rng(1, 2, -5).random() != sample_rng(1, 2, 5).random()


def test_a_very_thin_box_never_becomes_an_empty_one(backend, tmp_path):
    """Mirrored, a box of 1e-9 of the width at the left edge is below what 32 bits resolve at the right edge."""
    data = write_coco(tmp_path, {1: picture(1, 100, 100)}, {1: [[0, 10, 1e-7, 50, 3], [20, 20, 60, 60, 7]]})
    loader = training(backend, data, batch_size=1)
    for epoch in range(12):
        loader.set_epoch(epoch)
        (batch,) = loader
        check_batch(batch, 1)


def children() -> set[int]:
    return {process.pid for process in multiprocessing.active_children()}


@pytest.fixture
def workers_of(backend, data):
    """A loader with two workers that have given a batch each: (iteration, its processes)."""
    before = children()
    loader = training(backend, data, batch_size=1, workers=2)
    iteration = iter(loader)
    next(iteration), next(iteration)
    found = children() - before
    if not found:
        pytest.skip("this loader has no processes of multiprocessing")
    yield iteration, found
    for pid in found & children():
        os.kill(pid, signal.SIGKILL)


def test_a_killed_worker_is_an_error_and_no_hang(workers_of):
    iteration, pids = workers_of
    os.kill(min(pids), signal.SIGKILL)
    while min(pids) in children():
        pass  # as in a training step: the death shows when the next batch is asked for, not in the middle of this
    with pytest.raises(LostProcess, match="loader process ended unexpectedly"):
        for _ in iteration:
            pass


def test_an_interrupt_does_not_end_the_workers(workers_of):
    iteration, pids = workers_of
    for pid in pids:
        os.kill(pid, signal.SIGINT)
    assert len(list(iteration)) == 33 and pids <= children()


INTERRUPTED = """
import os, signal, sys
from base.backend import load_backend
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests in the background has it ignored
loader = load_backend(sys.argv[1]).train_loader(
    annotation_file=sys.argv[2], image_dir=sys.argv[3], image_size=(48, 64), batch_size=1, workers=2, seed=1)
for batch in loader:
    os.killpg(0, signal.SIGINT)  # what Ctrl-C does
"""


def test_ctrl_c_leaves_one_traceback(backend, data):
    arguments = [backend.name, str(data["annotation_file"]), str(data["image_dir"])]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, *arguments], env=environment, capture_output=True, text=True, timeout=100, start_new_session=True
    )
    assert done.returncode in (-signal.SIGINT, 1, 130)
    assert done.stderr.count("KeyboardInterrupt") == done.stderr.count("Traceback") == 1, done.stderr


def test_an_error_in_a_worker_is_not_mistaken_for_a_death(data):
    """Only a process that ended is the user's to put right; a fault in the program keeps its traceback."""
    from base.backends.reference.loader import PlainLoader

    class Broken(torch.utils.data.Dataset):
        skip = False

        def __getitem__(self, key):
            raise RuntimeError("a fault of the program")

    loader = PlainLoader(Broken(), lambda epoch: [[(0, 0)]], workers=1, gaps=False)
    with pytest.raises(RuntimeError, match="a fault of the program"):
        next(iter(loader))


def test_the_order_is_a_permutation_that_only_seed_and_epoch_choose():
    order = epoch_order(1000, 3, 4)
    assert sorted(order.tolist()) == list(range(1000)) and order.tolist() == epoch_order(1000, 3, 4).tolist()
    fixed = np.mean([np.mean(epoch_order(1000, 3, epoch) == np.arange(1000)) for epoch in range(50)])
    assert fixed < 0.01  # 0.001 by chance


def test_loaders_work_outside_the_main_thread(backend, data):
    counted = []
    thread = threading.Thread(target=lambda: counted.extend(ids(list(evaluating(backend, data, workers=1)))))
    thread.start()
    thread.join(60)
    assert sum(map(len, counted)) == 39
