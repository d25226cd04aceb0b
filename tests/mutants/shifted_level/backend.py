"""Model: the default boxes of the second level lie half a cell to the right."""

from dataclasses import replace

from base.backends.reference.model import SSD

from base.backend import Backend


def shifted(**options):
    model = SSD(**options)
    sizes = model.default_boxes.feature_sizes
    first = 4 * sizes[0][0] * sizes[0][1]
    some = slice(first, first + 6 * sizes[1][0] * sizes[1][1])
    xywh, ltrb = model.default_boxes.xywh.clone(), model.default_boxes.ltrb.clone()
    half = 0.5 / sizes[1][1]
    xywh[some, 0] += half
    ltrb[some, ::2] += half
    model.default_boxes = replace(model.default_boxes, xywh=xywh, ltrb=ltrb)
    return model


BACKEND = Backend(name="shifted_level", model=shifted)
