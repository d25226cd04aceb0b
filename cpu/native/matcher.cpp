// Matching of ground-truth boxes to default boxes, by the rules and in the arithmetic of reference/matcher.py.
#pragma GCC optimize("fp-contract=off")  // a fused multiply-add would break ties that the reference sees

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cmath>
#include <limits>
#include <stdexcept>

#include "parallel.hpp"

namespace py = pybind11;
using FloatArray = py::array_t<float, py::array::c_style>;
using LongArray = py::array_t<int64_t, py::array::c_style>;

constexpr float THRESHOLD = 0.5f;
constexpr float MARGIN = 1.0001f;  // bounds are this much wider than needed, which rounding cannot bridge
constexpr long BOXES_A_THREAD = 500;  // fewer take less time than waking another thread does
constexpr int64_t BLOCK = 32;      // default boxes looked at together; a multiple of the lanes of every machine

struct DefaultArrays {
    int64_t blocks;
    const float *left, *top, *right, *bottom, *area;
    const float *block_left, *block_top, *block_right, *block_bottom, *block_width, *block_height, *block_area;
};

#define KERNELS "matcher_kernels.hpp"
#include "targets.hpp"

// The default boxes in the MLPerf order, where neighbours have one shape, one array for each coordinate, and bounds of each block.
struct Defaults {
    long count, blocks;
    std::vector<float> left, top, right, bottom, area;
    std::vector<float> block_left, block_top, block_right, block_bottom, block_width, block_height, block_area;
    std::vector<float> xywh;
    std::vector<int64_t> order;
    DefaultArrays arrays;

    Defaults(FloatArray given_xywh, FloatArray ltrb, LongArray mlperf_order) {
        count = mlperf_order.size();
        if (count == 0 || mlperf_order.ndim() != 1) throw std::invalid_argument("there must be default boxes, and their order one-dimensional");
        for (const auto* boxes : {&given_xywh, &ltrb})
            if (boxes->ndim() != 2 || boxes->shape(0) != count || boxes->shape(1) != 4)
                throw std::invalid_argument("default boxes must be (A, 4), with an order of A numbers");
        order.assign(mlperf_order.data(), mlperf_order.data() + count);
        std::vector<char> seen(count);
        for (const int64_t number : order)
            if (number < 0 || number >= count || seen[number]++)
                throw std::invalid_argument("mlperf_order must have each default box once, and has " + std::to_string(number) + " wrongly");
        const long rows = (count + BLOCK - 1) / BLOCK;
        blocks = (rows + MOST_LANES - 1) / MOST_LANES * MOST_LANES;
        constexpr float FAR = std::numeric_limits<float>::max();
        for (auto* lows : {&left, &top}) lows->assign(rows * BLOCK, FAR);  // what fills up the last block overlaps nothing
        for (auto* highs : {&right, &bottom}) highs->assign(rows * BLOCK, -FAR);
        area.assign(rows * BLOCK, 1.f);
        for (auto* lows : {&block_left, &block_top, &block_area}) lows->assign(blocks, FAR);
        for (auto* highs : {&block_right, &block_bottom}) highs->assign(blocks, -FAR);
        for (auto* sizes : {&block_width, &block_height}) sizes->assign(blocks, 0.f);
        xywh.resize(4 * count);
        for (long k = 0; k < count; ++k) {
            const float* box = ltrb.data() + 4 * order[k];
            std::copy_n(given_xywh.data() + 4 * order[k], 4, xywh.data() + 4 * k);
            for (int i = 0; i < 4; ++i)
                if (!std::isfinite(box[i])) throw std::invalid_argument("default box " + std::to_string(order[k]) + " is not finite");
            left[k] = box[0], top[k] = box[1], right[k] = box[2], bottom[k] = box[3];
            const float width = box[2] - box[0], height = box[3] - box[1];
            area[k] = width * height;
            const long block = k / BLOCK;
            block_left[block] = std::min(block_left[block], box[0]);
            block_top[block] = std::min(block_top[block], box[1]);
            block_right[block] = std::max(block_right[block], box[2]);
            block_bottom[block] = std::max(block_bottom[block], box[3]);
            block_width[block] = std::max(block_width[block], width);
            block_height[block] = std::max(block_height[block], height);
            block_area[block] = std::min(block_area[block], area[k]);
        }
        arrays = {blocks,           left.data(),       top.data(),         right.data(),        bottom.data(),      area.data(),        block_left.data(),
                  block_top.data(), block_right.data(), block_bottom.data(), block_width.data(), block_height.data(), block_area.data()};
    }
    Defaults(const Defaults&) = delete;
};

// What one image needs besides its result.
struct Scratch {
    std::vector<float> overlap, bound;
    std::vector<int32_t> box, numbers;
    std::vector<int64_t> best_default;
};

static void match_image(const Defaults& d, const float* boxes, const int64_t* labels, long count, float* offsets, int64_t* classes) {
    if (std::none_of(labels, labels + count, [](int64_t label) { return label > 0; })) return;
    static thread_local Scratch scratch;
    const size_t padded = d.area.size();
    scratch.overlap.resize(padded);
    scratch.box.resize(padded);
    scratch.bound.resize(d.blocks);
    scratch.best_default.resize(count);
    std::fill(scratch.overlap.begin(), scratch.overlap.end(), THRESHOLD);
    const auto find = PICK(find);
    find(d.arrays, boxes, labels, count, scratch.overlap.data(), scratch.box.data(), scratch.bound.data(), scratch.best_default.data());
    for (long m = 0; m < count; ++m)
        if (labels[m] > 0) scratch.overlap[scratch.best_default[m]] = 2, scratch.box[scratch.best_default[m]] = int32_t(m);
    scratch.numbers.resize(padded);
    const long found = PICK(matched)(scratch.overlap.data(), long(padded), scratch.numbers.data());  // what fills up the last block is not above it
    for (long i = 0; i < found; ++i) {
        const long k = scratch.numbers[i];
        const float* box = boxes + 4 * scratch.box[k];
        const float* xywh = &d.xywh[4 * k];
        float* offset = offsets + 4 * d.order[k];
        classes[d.order[k]] = labels[scratch.box[k]];
        for (int i = 0; i < 2; ++i) {  // base/boxes.py: encode
            offset[i] = ((box[i] + box[i + 2]) / 2 - xywh[i]) / xywh[i + 2] / 0.1f;
            offset[i + 2] = std::log((box[i + 2] - box[i]) / xywh[i + 2]) / 0.2f;
        }
    }
}

// Boxes (N, M, 4), labels (N, M); offsets (N, A, 4) and classes (N, A) come zeroed and are filled in.
static void match(const Defaults& d, FloatArray boxes, LongArray labels, FloatArray offsets, LongArray classes, int threads) {
    if (boxes.ndim() != 3 || labels.ndim() != 2 || boxes.shape(0) != labels.shape(0) || boxes.shape(1) != labels.shape(1) || boxes.shape(2) != 4)
        throw std::invalid_argument("boxes must be (N, M, 4) and labels (N, M)");
    const long images = boxes.shape(0), count = boxes.shape(1);
    if (count > std::numeric_limits<int32_t>::max()) throw std::invalid_argument("too many boxes an image");
    if (offsets.ndim() != 3 || offsets.shape(0) != images || offsets.shape(1) != d.count || offsets.shape(2) != 4 || classes.ndim() != 2 ||
        classes.shape(0) != images || classes.shape(1) != d.count)
        throw std::invalid_argument("the result must be (N, A, 4) and (N, A)");
    const float* box = boxes.data();
    const int64_t* label = labels.data();
    float* offset = offsets.mutable_data();
    int64_t* target = classes.mutable_data();
    py::gil_scoped_release release;
    parallel_for(images, int(std::min<long>(threads, 1 + images * count / BOXES_A_THREAD)), [&](long n) {
        match_image(d, box + 4 * n * count, label + n * count, count, offset + 4 * n * d.count, target + n * d.count);
    });
}

PYBIND11_MODULE(_matcher, m) {
    py::class_<Defaults>(m, "Defaults").def(py::init<FloatArray, FloatArray, LongArray>(), py::arg().noconvert(), py::arg().noconvert(), py::arg().noconvert());
    m.def("match", &match, py::arg(), py::arg().noconvert(), py::arg().noconvert(), py::arg().noconvert(), py::arg().noconvert(), py::arg());
}
