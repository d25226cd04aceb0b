"""Numbers, arrays and arguments of which some are as they should not be; for fuzz.py."""

import numpy as np


def some(rng, *choices):
    return choices[rng.integers(len(choices))]


def numbers(rng, shape, dtype=np.float32, odd: float = 0.3) -> np.ndarray:
    """Numbers of which some are as they should not be."""
    with np.errstate(all="ignore"):
        if np.issubdtype(dtype, np.integer):
            info = np.iinfo(dtype)
            values, strange = rng.integers(0, 5, shape), [info.min, info.max, -1, 0, 6, 100]
        else:
            values, strange = rng.normal(0.5, 1, shape), [np.nan, np.inf, -np.inf, 3e38, -3e38, 1e-40, 0.0, 1e300, 88.0, -104.0]
        values = np.asarray(values)
        if rng.random() < odd:
            strange = np.array(strange, dtype if np.issubdtype(dtype, np.integer) else float)[rng.integers(0, len(strange), shape)]
            values = np.where(rng.random(shape) < rng.choice([0.05, 0.5, 1]), strange, values)
        return np.ascontiguousarray(values.astype(dtype))


def twisted(rng, array: np.ndarray, chance: float = 0.06):
    """The array or, now and then, another shape, layout, type, or no array at all."""
    if rng.random() >= chance:
        return array
    axis = int(rng.integers(max(array.ndim, 1)))
    return some(
        rng,
        lambda: array[..., ::-1] if array.ndim else array,
        lambda: np.repeat(array, 2, -1)[..., ::2] if array.ndim else array,
        lambda: np.asfortranarray(array),
        lambda: array[:0],
        lambda: array[None],
        lambda: array.ravel(),
        lambda: array.ravel()[:1].reshape(()) if array.size else array,
        lambda: np.take(array, range(array.shape[axis] // 2), axis),
        lambda: np.concatenate([array, array], axis),
        lambda: np.broadcast_to(array[:1], array.shape) if len(array) else array,
        lambda: array.astype(some(rng, np.float64, np.int32, np.int16, np.uint8, np.complex64, ">f4", object)),
        lambda: read_only(array),
        lambda: array.tolist(),
        lambda: None,
    )()


def read_only(array: np.ndarray) -> np.ndarray:
    copy = array.copy()
    copy.flags.writeable = False
    return copy


def count_of(rng) -> int:
    return some(rng, 1, 1, 2, 2, 4, 0, -1, 1000)
