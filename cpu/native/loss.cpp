// The multibox loss (reference/loss.py): one pass over the logits forward, and backward only the rows that took part.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cmath>
#include <functional>
#include <limits>
#include <stdexcept>
#include <string>

#include "parallel.hpp"

#define KERNELS "loss_kernels.hpp"
#include "targets.hpp"

namespace py = pybind11;
using FloatArray = py::array_t<float, py::array::c_style>;
using LongArray = py::array_t<int64_t, py::array::c_style>;
using ByteArray = py::array_t<uint8_t, py::array::c_style>;

constexpr long NEGATIVES_PER_POSITIVE = 3;

// Numbers (N, A, K), float32 or bfloat16 (as 16-bit integers), the last dimension contiguous.
struct Cube {
    long images, count, width;
    long image_stride, stride;  // in elements
    bool wide;                  // float32
    char* data;

    Cube(const py::array& array, const char* name, bool writable = false) {
        const long size = long(array.itemsize());
        wide = py::isinstance<py::array_t<float>>(array);
        if (!wide && !py::isinstance<py::array_t<int16_t>>(array)) throw std::invalid_argument(std::string(name) + " must be float32, or bfloat16 as int16");
        if (array.ndim() != 3) throw std::invalid_argument(std::string(name) + " must have three dimensions");
        images = array.shape(0), count = array.shape(1), width = array.shape(2);
        if (images > 0 && width > 1 && array.strides(2) != size) throw std::invalid_argument(std::string(name) + " must be contiguous in the last dimension");
        image_stride = array.strides(0) / size, stride = array.strides(1) / size;
        data = static_cast<char*>(writable ? const_cast<py::array&>(array).mutable_data() : const_cast<void*>(array.data()));
    }
    float* floats(long n, long a) const { return reinterpret_cast<float*>(data) + n * image_stride + a * stride; }
    Bfloat16* halves(long n, long a) const { return reinterpret_cast<Bfloat16*>(data) + n * image_stride + a * stride; }
    float at(long n, long a, long k) const { return wide ? floats(n, a)[k] : plain::number(halves(n, a)[k]); }
    void set(long n, long a, long k, float x) const { wide ? plain::store(floats(n, a) + k, x) : plain::store(halves(n, a) + k, x); }
};

static void check(const Cube& offsets, const Cube& logits, const FloatArray& wanted, const LongArray& labels) {
    const long images = logits.images, count = logits.count;
    if (offsets.images != images || offsets.count != count || offsets.width != 4) throw std::invalid_argument("offsets must be (N, A, 4), as logits are (N, A, C)");
    if (wanted.ndim() != 3 || wanted.shape(0) != images || wanted.shape(1) != count || wanted.shape(2) != 4)
        throw std::invalid_argument("the targets' offsets must be (N, A, 4), as logits are (N, A, C)");
    if (labels.ndim() != 2 || labels.shape(0) != images || labels.shape(1) != count)
        throw std::invalid_argument("the targets' labels must be (N, A), as logits are (N, A, C)");
}

// Cross-entropies in an order of whole numbers: what is not a number is the hardest of all.
static uint32_t hardness(float entropy) {
    if (entropy != entropy) return 0x7fffffff;
    return entropy > 0 ? plain::as<uint32_t>(entropy) : 0;
}

// One image's share of the sum; fills chosen (1 where a default box's cross-entropy counts) and positives.
static double image_loss(const Cube& offsets, const Cube& logits, const float* wanted, const int64_t* labels, long n, uint8_t* chosen, float* positives) {
    const long count = logits.count, classes = logits.width;
    long positive = 0;
    for (long a = 0; a < count; ++a) {
        if (labels[a] < 0 || labels[a] >= classes)
            throw std::invalid_argument("label " + std::to_string(labels[a]) + " of image " + std::to_string(n) + ", default box " + std::to_string(a) +
                                        " is not one of the " + std::to_string(classes) + " classes");
        positive += labels[a] > 0;
    }
    *positives = float(positive);
    if (positive == 0) return 0;

    const size_t room = (size_t(count) + MOST_LANES - 1) / MOST_LANES * MOST_LANES;
    std::vector<float> entropies(room), sums(room, 1.f);
    if (logits.wide)
        PICK(cross_entropies_float)(logits.floats(n, 0), logits.stride, count, classes, labels, entropies.data(), sums.data());
    else
        PICK(cross_entropies_bfloat16)(logits.halves(n, 0), logits.stride, count, classes, labels, entropies.data(), sums.data());

    double total = 0;
    std::vector<uint32_t> keys;
    keys.reserve(count - positive);
    for (long a = 0; a < count; ++a) {
        const float entropy = entropies[a];
        if (labels[a] == 0) {
            keys.push_back(hardness(entropy));
            continue;
        }
        chosen[a] = 1;
        total += entropy;
        for (int k = 0; k < 4; ++k) {
            const float apart = std::abs(offsets.at(n, a, k) - wanted[4 * a + k]);
            total += apart < 1 ? 0.5f * apart * apart : apart - 0.5f;
        }
    }

    const long wish = std::min<long>(NEGATIVES_PER_POSITIVE * positive, long(keys.size()));
    if (wish == 0) return total / double(positive);
    std::vector<uint32_t> order(keys);
    std::nth_element(order.begin(), order.begin() + (wish - 1), order.end(), std::greater<uint32_t>());
    const uint32_t least = order[wish - 1];
    long equal = wish;  // how many of those as hard as the last one are taken: the first ones
    for (const uint32_t key : keys) equal -= key > least;
    long number = 0;
    for (long a = 0; a < count; ++a) {
        if (labels[a] != 0) continue;
        const uint32_t key = keys[number++];
        if (key < least || (key == least && equal-- <= 0)) continue;
        chosen[a] = 1;
        total += entropies[a];
    }
    return total / double(positive);
}

// → the loss; fills chosen (N, A) and positives (N) for the backward pass, which come zeroed.
static double forward(const py::array& given_offsets, const py::array& given_logits, const FloatArray& wanted, const LongArray& labels, ByteArray chosen,
                      FloatArray positives, int threads) {
    const Cube offsets(given_offsets, "offsets"), logits(given_logits, "logits");
    check(offsets, logits, wanted, labels);
    const long images = logits.images, count = logits.count;
    if (chosen.size() != images * count || positives.size() != images) throw std::invalid_argument("the room for results does not fit");
    const float* target = wanted.data();
    const int64_t* label = labels.data();
    float* found = positives.mutable_data();
    uint8_t* mask = chosen.mutable_data();
    std::vector<double> losses(images);
    {
        py::gil_scoped_release release;
        parallel_for(images, threads, [&](long n) {
            losses[n] = image_loss(offsets, logits, target + 4 * n * count, label + n * count, n, mask + n * count, found + n);
        });
    }
    double total = 0;
    for (const double loss : losses) total += loss;
    return total / double(images);  // not a number for no images, as a mean of nothing is
}

// Writes the gradients of scale * loss where they are not zero; to_offsets and to_logits come zeroed.
static void backward(const py::array& given_offsets, const py::array& given_logits, const FloatArray& wanted, const LongArray& labels, const ByteArray& chosen,
                     const FloatArray& positives, float scale, const py::array& given_to_offsets, const py::array& given_to_logits,
                     int threads) {
    const Cube offsets(given_offsets, "offsets"), logits(given_logits, "logits");
    const Cube to_offsets(given_to_offsets, "offsets' gradient", true), to_logits(given_to_logits, "logits' gradient", true);
    check(offsets, logits, wanted, labels);
    check(to_offsets, to_logits, wanted, labels);
    const long images = logits.images, count = logits.count, classes = logits.width;
    if (to_logits.width != classes || to_logits.wide != logits.wide || chosen.size() != images * count || positives.size() != images)
        throw std::invalid_argument("what the forward pass kept does not fit");
    const float *target = wanted.data(), *found = positives.data();
    const int64_t* label = labels.data();
    const uint8_t* mask = chosen.data();
    py::gil_scoped_release release;
    parallel_for(images, threads, [&](long n) {
        if (!(found[n] > 0)) return;
        const float share = scale / float(images) / found[n];
        const auto wide = PICK(gradient_float);
        const auto narrow = PICK(gradient_bfloat16);
        for (long a = 0; a < count; ++a) {
            const long here = n * count + a;
            if (!mask[here]) continue;
            if (label[here] < 0 || label[here] >= classes) throw std::invalid_argument("the targets' labels have changed since the forward pass");
            if (logits.wide)
                wide(logits.floats(n, a), classes, label[here], share, to_logits.floats(n, a));
            else
                narrow(logits.halves(n, a), classes, label[here], share, to_logits.halves(n, a));
            if (label[here] == 0) continue;
            for (int k = 0; k < 4; ++k) {
                const float apart = offsets.at(n, a, k) - target[4 * here + k];
                to_offsets.set(n, a, k, (apart > 1 ? 1.f : apart < -1 ? -1.f : apart) * share);
            }
        }
    });
}

PYBIND11_MODULE(_loss, m) {
    const auto as_is = [] { return py::arg().noconvert(); };
    m.def("forward", &forward, py::arg(), py::arg(), as_is(), as_is(), as_is(), as_is(), py::arg());
    m.def("backward", &backward, py::arg(), py::arg(), as_is(), as_is(), as_is(), as_is(), py::arg(), py::arg(), py::arg(), py::arg());
}
