// From predictions to detections, by the rules of reference/decoder.py, several images at a time.
#pragma GCC optimize("fp-contract=off")  // overlaps in the reference's arithmetic, so that boxes on the threshold fall alike

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cmath>
#include <functional>
#include <stdexcept>
#include <string>

#include "parallel.hpp"

#define KERNELS "decoder_kernels.hpp"
#include "targets.hpp"

namespace py = pybind11;
using FloatArray = py::array_t<float, py::array::c_style>;

constexpr size_t BEST_A_CLASS = 200;
constexpr size_t ROOM = 1000;  // a class's candidates are cut to the best whenever there are so many
constexpr size_t PADDED = (BEST_A_CLASS + MOST_LANES) / MOST_LANES * MOST_LANES;

// A score and what comes first among equals, as one number: the greater one is the better one. Scores are not negative.
static uint64_t ranked(float score, uint32_t number) { return uint64_t(plain::as<uint32_t>(score)) << 32 | uint32_t(~number); }
static float score_of(uint64_t rank) { return plain::as<float>(uint32_t(rank >> 32)); }
static uint32_t number_of(uint64_t rank) { return ~uint32_t(rank); }

struct Box {
    float ltrb[4];
};

struct Found {
    Box box;
    int64_t label;
    float score;
};

// One image's predictions: offsets float32, logits float32 or bfloat16.
struct Image {
    const float* offsets;
    const float* wide;  // or null
    const Bfloat16* narrow;
    long stride, count, classes;
    const float* defaults;  // xywh
};

struct Settings {
    float score_threshold, iou_threshold;
    size_t max_detections;
};

static void keep_best(std::vector<uint64_t>& ranks, size_t most) {
    if (ranks.size() <= most) return;
    std::nth_element(ranks.begin(), ranks.begin() + most, ranks.end(), std::greater<uint64_t>());
    ranks.resize(most);
}

// base/boxes.py: decode
static Box box_of(const Image& image, uint32_t number) {
    const float *offset = image.offsets + 4 * long(number), *xywh = image.defaults + 4 * long(number);
    Box box;
    for (int i = 0; i < 2; ++i) {
        const float centre = offset[i] * 0.1f * xywh[i + 2] + xywh[i], size = std::exp(offset[i + 2] * 0.2f) * xywh[i + 2];
        box.ltrb[i] = centre - size / 2;
        box.ltrb[i + 2] = centre + size / 2;
    }
    return box;
}

// Of the best candidates of a class, by falling score, those that no better one kept overlaps too much are added to `kept`.
static void keep(const Image& image, const std::vector<uint64_t>& candidates, int64_t label, const Settings& settings, std::vector<Found>& kept) {
    alignas(64) float left[PADDED] = {}, top[PADDED] = {}, right[PADDED] = {}, bottom[PADDED] = {}, area[PADDED] = {};
    alignas(64) int32_t dropped[PADDED] = {};
    const auto suppress = PICK(suppress);
    const size_t count = candidates.size();
    for (size_t i = 0; i < count; ++i) {
        const Box box = box_of(image, number_of(candidates[i]));
        left[i] = box.ltrb[0], top[i] = box.ltrb[1], right[i] = box.ltrb[2], bottom[i] = box.ltrb[3];
        area[i] = (box.ltrb[2] - box.ltrb[0]) * (box.ltrb[3] - box.ltrb[1]);
    }
    for (size_t i = 0; i < count; ++i) {
        if (dropped[i]) continue;
        kept.push_back({{{left[i], top[i], right[i], bottom[i]}}, label, score_of(candidates[i])});
        suppress(left, top, right, bottom, area, int64_t(i + 1), int64_t(count), settings.iou_threshold, dropped);
    }
}

static std::vector<Found> decode_image(const Image& image, const Settings& settings) {
    const long classes = image.classes;
    static thread_local std::vector<std::vector<uint64_t>> candidates;
    if (candidates.size() < size_t(classes)) candidates.resize(classes);
    for (auto& list : candidates) list.clear();
    std::vector<float> scores(std::max<long>(classes, MOST_LANES)), least(std::max<long>(classes, MOST_LANES), settings.score_threshold);
    std::vector<int32_t> which(classes);
    const auto above = PICK(above);
    const auto next_float = PICK(next_float);
    const auto next_bfloat16 = PICK(next_bfloat16);

    for (long a = 0;; ++a) {
        a = image.wide ? next_float(image.wide, image.stride, a, image.count, classes, settings.score_threshold, scores.data())
                       : next_bfloat16(image.narrow, image.stride, a, image.count, classes, settings.score_threshold, scores.data());
        if (a >= image.count) break;
        const int64_t number = above(scores.data(), least.data(), 1, classes, which.data());
        for (int64_t i = 0; i < number; ++i) {
            auto& list = candidates[which[i]];
            if (list.capacity() == 0) list.reserve(64);
            list.push_back(ranked(scores[which[i]], uint32_t(a)));
            if (list.size() < ROOM) continue;
            keep_best(list, BEST_A_CLASS);
            // A later default box with the score of the worst that is left comes after it: only better ones are looked at from now on.
            least[which[i]] = std::max(settings.score_threshold, score_of(*std::min_element(list.begin(), list.end())));
        }
    }

    std::vector<Found> kept;
    for (long label = 1; label < classes; ++label) {
        auto& list = candidates[label];
        if (list.empty()) continue;
        keep_best(list, BEST_A_CLASS);
        std::sort(list.begin(), list.end(), std::greater<uint64_t>());
        keep(image, list, label, settings, kept);
    }
    std::vector<uint64_t> order(kept.size());
    for (size_t i = 0; i < kept.size(); ++i) order[i] = ranked(kept[i].score, uint32_t(i));
    keep_best(order, settings.max_detections);
    std::sort(order.begin(), order.end(), std::greater<uint64_t>());
    std::vector<Found> best;
    best.reserve(order.size());
    for (const uint64_t rank : order) best.push_back(kept[number_of(rank)]);
    return best;
}

// offsets (N, A, 4) float32, logits (N, A, C) float32 or bfloat16 as int16, default boxes (A, 4) xywh → [(boxes, labels, scores)].
static py::list decode(FloatArray offsets, py::array logits, FloatArray defaults, float score_threshold, float iou_threshold, long max_detections, int threads) {
    const bool wide = py::isinstance<py::array_t<float>>(logits);
    if (!wide && !py::isinstance<py::array_t<int16_t>>(logits)) throw std::invalid_argument("logits must be float32, or bfloat16 as int16");
    if (logits.ndim() != 3 || offsets.ndim() != 3 || defaults.ndim() != 2) throw std::invalid_argument("offsets, logits and default boxes must have 3, 3 and 2 dimensions");
    const long images = logits.shape(0), count = logits.shape(1), classes = logits.shape(2), size = logits.itemsize();
    if (offsets.shape(0) != images || offsets.shape(1) != count || offsets.shape(2) != 4 || defaults.shape(0) != count || defaults.shape(1) != 4)
        throw std::invalid_argument("offsets must be (N, A, 4), logits (N, A, C), default boxes (A, 4)");
    if (classes < 1 || count >= 1l << 31 || classes >= 1l << 24) throw std::invalid_argument("there must be at least one class, and fewer than 2^31 default boxes and 2^24 classes");
    if (images > 0 && classes > 1 && logits.strides(2) != size) throw std::invalid_argument("logits must be contiguous in the last dimension");
    if (max_detections < 0) throw std::invalid_argument("max_detections must not be negative, and is " + std::to_string(max_detections));
    if (score_threshold != score_threshold || iou_threshold != iou_threshold) throw std::invalid_argument("score_threshold and iou_threshold must be numbers");
    const Settings settings{score_threshold, iou_threshold, size_t(max_detections)};
    const float *offset = offsets.data(), *xywh = defaults.data();
    const char* logit = static_cast<const char*>(logits.data());
    const long image_bytes = logits.strides(0), stride = logits.strides(1) / size;
    std::vector<std::vector<Found>> found(images);
    {
        py::gil_scoped_release release;
        parallel_for(images, threads, [&](long n) {
            const char* mine = logit + n * image_bytes;
            const Image image{offset + 4 * n * count, wide ? reinterpret_cast<const float*>(mine) : nullptr, reinterpret_cast<const Bfloat16*>(mine), stride,
                              count, classes, xywh};
            found[n] = decode_image(image, settings);
        });
    }
    py::list result;
    for (const auto& image : found) {
        const auto detections = py::ssize_t(image.size());
        py::array_t<float> boxes({detections, py::ssize_t(4)}), scores(detections);
        py::array_t<int64_t> labels(detections);
        for (py::ssize_t i = 0; i < detections; ++i) {
            std::copy_n(image[i].box.ltrb, 4, boxes.mutable_data() + 4 * i);
            labels.mutable_data()[i] = image[i].label;
            scores.mutable_data()[i] = image[i].score;
        }
        result.append(py::make_tuple(boxes, labels, scores));
    }
    return result;
}

PYBIND11_MODULE(_decoder, m) {
    m.def("decode", &decode, py::arg().noconvert(), py::arg(), py::arg().noconvert(), py::arg(), py::arg(), py::arg(), py::arg());
}
