// Batch norm in channels-last memory with what follows it in a ResNet: the shortcut's addition and ReLU.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

// How the backward pass knows the sign of a ReLU's input: from the output `y` or, where nothing was added to x · scale + shift, by finding
// it again; with neither there was no ReLU.
template <class T>
struct Passage {
    const T* y;
    const float *scale, *shift;
};

#define KERNELS "norm_kernels.hpp"
#include "targets.hpp"

namespace py = pybind11;
using FloatArray = py::array_t<float, py::array::c_style>;

constexpr long PIECE = 512;  // rows whose sums are taken in float32; the sums of pieces are added in float64

// Rows of C channels, float32 or bfloat16 (as 16-bit integers), contiguous; or nothing.
struct Rows {
    long count = 0, channels = 0;
    bool wide = false;
    char* data = nullptr;

    Rows(const py::object& given, const char* name, bool writable = false) {
        if (given.is_none()) return;
        const auto array = py::cast<py::array>(given);
        wide = py::isinstance<py::array_t<float>>(array);
        if (!wide && !py::isinstance<py::array_t<int16_t>>(array)) throw std::invalid_argument(std::string(name) + " must be float32, or bfloat16 as int16");
        if (array.ndim() != 2 || !(array.flags() & py::array::c_style)) throw std::invalid_argument(std::string(name) + " must be contiguous rows of channels");
        count = array.shape(0), channels = array.shape(1);
        data = static_cast<char*>(writable ? const_cast<py::array&>(array).mutable_data() : const_cast<void*>(array.data()));
    }
    template <class T>
    T* at(long row) const {
        return data ? reinterpret_cast<T*>(data) + row * channels : nullptr;
    }
    void same_as(const Rows& other, const char* name) const {
        if (data && (count != other.count || channels != other.channels || wide != other.wide)) throw std::invalid_argument(std::string(name) + " differ from x in shape or type");
    }
};

static const float* per_channel(const FloatArray& array, const Rows& rows, const char* name) {
    if (array.size() != rows.channels) throw std::invalid_argument(std::string(name) + " must have one number a channel");
    return array.data();
}

// Calls body(first row, rows, piece) for all pieces, in torch's own OpenMP threads: they are awake between its operations, and 60 such
// calls a step would not get over starting threads of their own.
template <class Body>
static void for_pieces(const Rows& x, int threads, Body&& body) {
    const long pieces = (x.count + PIECE - 1) / PIECE;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long p = 0; p < pieces; ++p) body(p * PIECE, std::min(PIECE, x.count - p * PIECE), p);
}

// Two sums for each channel, (2, C), in an order that does not depend on threads; body(first row, rows, sums, sums) adds a piece's.
template <class Body>
static std::vector<double> sums(const Rows& x, int threads, Body&& body) {
    const long width = 2 * x.channels;
    std::vector<float> partial(size_t((x.count + PIECE - 1) / PIECE * width), 0.f);
    for_pieces(x, threads, [&](long row, long rows, long piece) {
        float* own = partial.data() + piece * width;
        body(row, rows, own, own + x.channels);
    });
    std::vector<double> total(size_t(width), 0.);
    for (size_t k = 0; k < partial.size(); ++k) total[k % width] += partial[k];
    return total;
}

// Fills mean and variance (C each, over all rows, not corrected) of x.
static void statistics(const py::object& given, FloatArray mean, FloatArray variance, int threads) {
    const Rows x(given, "x");
    per_channel(mean, x, "mean"), per_channel(variance, x, "variance");
    if (x.count == 0) throw std::invalid_argument("x has no rows");
    float *middle = mean.mutable_data(), *spread = variance.mutable_data();
    py::gil_scoped_release release;
    std::vector<float> pivot(x.channels);  // near the mean, so that squares do not cancel
    for (long c = 0; c < x.channels; ++c) {
        const float first = x.wide ? x.at<float>(0)[c] : plain::number(x.at<Bfloat16>(0)[c]);
        pivot[c] = std::isfinite(first) ? first : 0.f;
    }
    const auto total = sums(x, threads, [&](long row, long rows, float* first, float* second) {
        if (x.wide)
            PICK(moments_float)(x.at<float>(row), rows, x.channels, pivot.data(), first, second);
        else
            PICK(moments_bfloat16)(x.at<Bfloat16>(row), rows, x.channels, pivot.data(), first, second);
    });
    for (long c = 0; c < x.channels; ++c) {
        const double apart = total[c] / double(x.count), square = total[x.channels + c] / double(x.count) - apart * apart;
        middle[c] = float(pivot[c] + apart);
        spread[c] = float(square < 0 ? 0. : square);
    }
}

// The two numbers a channel that make y of x: scale = weight / √(variance + epsilon) and shift = bias - mean · scale.
struct Line {
    std::vector<float> scale, shift;

    Line(long channels, const float* mean, const float* variance, const float* weight, const float* bias, float epsilon) : scale(channels), shift(channels) {
        for (long c = 0; c < channels; ++c) scale[c] = weight[c] / std::sqrt(variance[c] + epsilon), shift[c] = bias[c] - mean[c] * scale[c];
    }
};

// y = (x - mean) / √(variance + epsilon) · weight + bias (+ shortcut), then ReLU if asked.
static void apply(const py::object& given_x, const py::object& given_shortcut, const FloatArray& mean, const FloatArray& variance, const FloatArray& weight,
                  const FloatArray& bias, float epsilon, bool relu, const py::array& given_y, int threads) {
    const Rows x(given_x, "x"), shortcut(given_shortcut, "shortcuts"), y(given_y, "results", true);
    shortcut.same_as(x, "shortcuts"), y.same_as(x, "results");
    const float *middle = per_channel(mean, x, "mean"), *spread = per_channel(variance, x, "variance");
    const float *factor = per_channel(weight, x, "weight"), *summand = per_channel(bias, x, "bias");
    py::gil_scoped_release release;
    const Line line(x.channels, middle, spread, factor, summand, epsilon);
    for_pieces(x, threads, [&](long row, long rows, long) {
        const float *scale = line.scale.data(), *shift = line.shift.data();
        if (x.wide)
            PICK(normalise_float)(x.at<float>(row), shortcut.at<float>(row), rows, x.channels, scale, shift, relu, y.at<float>(row));
        else
            PICK(normalise_bfloat16)(x.at<Bfloat16>(row), shortcut.at<Bfloat16>(row), rows, x.channels, scale, shift, relu, y.at<Bfloat16>(row));
    });
}

// Gradients of the above, with mean and variance taken from x: fills to_x, to_shortcut if there was one, to_weight and to_bias.
// `output` is y; it is needed only with both a shortcut and ReLU.
static void backward(const py::array& given_slope, const py::object& given_x, const py::object& given_output, const FloatArray& mean, const FloatArray& variance,
                     const FloatArray& weight, const FloatArray& bias, float epsilon, bool relu, const py::array& given_to_x, const py::object& given_to_shortcut,
                     FloatArray to_weight, FloatArray to_bias, int threads) {
    const Rows slope(given_slope, "slopes"), x(given_x, "x"), output(given_output, "outputs"), to_x(given_to_x, "gradients", true),
        to_shortcut(given_to_shortcut, "shortcuts' gradients", true);
    slope.same_as(x, "slopes"), output.same_as(x, "outputs"), to_x.same_as(x, "gradients"), to_shortcut.same_as(x, "shortcuts' gradients");
    if (relu && to_shortcut.data && !output.data) throw std::invalid_argument("with a shortcut, the gradient of ReLU needs its output");
    const float *middle = per_channel(mean, x, "mean"), *spread = per_channel(variance, x, "variance");
    const float *factor = per_channel(weight, x, "weight"), *summand = per_channel(bias, x, "bias");
    per_channel(to_weight, x, "weight's gradient"), per_channel(to_bias, x, "bias's gradient");
    float *into_weight = to_weight.mutable_data(), *into_bias = to_bias.mutable_data();
    py::gil_scoped_release release;
    const long channels = x.channels;
    const Line line(channels, middle, spread, factor, summand, epsilon);
    const bool again = relu && !output.data;  // the ReLU's input is found again
    const float *scale = again ? line.scale.data() : nullptr, *shift = again ? line.shift.data() : nullptr;
    const auto total = sums(x, threads, [&](long row, long rows, float* first, float* second) {
        if (x.wide)
            PICK(slopes_float)(slope.at<float>(row), x.at<float>(row), {output.at<float>(row), scale, shift}, rows, channels, middle, first, second,
                               to_shortcut.at<float>(row));
        else
            PICK(slopes_bfloat16)(slope.at<Bfloat16>(row), x.at<Bfloat16>(row), {output.at<Bfloat16>(row), scale, shift}, rows, channels, middle, first, second,
                                  to_shortcut.at<Bfloat16>(row));
    });
    std::vector<float> factors(3 * channels);
    for (long c = 0; c < channels; ++c) {
        const double inverse = 1 / std::sqrt(double(spread[c]) + epsilon), share = 1 / double(x.count);
        into_bias[c] = float(total[c]), into_weight[c] = float(total[channels + c] * inverse);
        factors[c] = float(factor[c] * inverse);
        factors[channels + c] = float(-factor[c] * inverse * inverse * inverse * total[channels + c] * share);
        factors[2 * channels + c] = float(-factor[c] * inverse * total[c] * share);
    }
    const bool ready = to_shortcut.data;  // the shortcut's gradient has been through the ReLU
    for_pieces(x, threads, [&](long row, long rows, long) {
        if (x.wide)
            PICK(to_input_float)((ready ? to_shortcut : slope).at<float>(row), x.at<float>(row), {ready ? nullptr : output.at<float>(row), scale, shift}, rows,
                                 channels, middle, factors.data(), to_x.at<float>(row));
        else
            PICK(to_input_bfloat16)((ready ? to_shortcut : slope).at<Bfloat16>(row), x.at<Bfloat16>(row), {ready ? nullptr : output.at<Bfloat16>(row), scale, shift},
                                    rows, channels, middle, factors.data(), to_x.at<Bfloat16>(row));
    });
}

PYBIND11_MODULE(_norm, m) {
    const auto as_is = [] { return py::arg().noconvert(); };
    m.def("statistics", &statistics, py::arg(), as_is(), as_is(), py::arg());
    m.def("apply", &apply, py::arg(), py::arg(), as_is(), as_is(), as_is(), as_is(), py::arg(), py::arg(), py::arg(), py::arg());
    m.def("backward", &backward, py::arg(), py::arg(), py::arg(), as_is(), as_is(), as_is(), as_is(), py::arg(), py::arg(), py::arg(), py::arg(), as_is(), as_is(),
          py::arg());
}
