// The random draws of one training sample, number for number those of the reference's `augment` with NumPy's Generator.
//
// They come from the Generator's own bit stream, through the struct that NumPy publishes for this (numpy/random/bitgen.h).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

namespace images {

struct BitStream {  // numpy/random/bitgen.h: bitgen_t
    void* state;
    uint64_t (*next_uint64)(void*);
    uint32_t (*next_uint32)(void*);
    double (*next_double)(void*);
    uint64_t (*next_raw)(void*);
};

// Generator.integers(count), count < 2³²: Lemire's method.
inline uint32_t draw_below(BitStream& bits, uint32_t count) {
    uint64_t product = uint64_t(bits.next_uint32(bits.state)) * count;
    if (uint32_t(product) < count) {
        const uint32_t least = (UINT32_MAX - (count - 1)) % count;
        while (uint32_t(product) < least) product = uint64_t(bits.next_uint32(bits.state)) * count;
    }
    return uint32_t(product >> 32);
}

// What Generator.permutation draws below count, which is 2 or more: bits until they are few enough.
inline uint32_t draw_place(BitStream& bits, uint32_t count) {
    uint32_t mask = 1;
    while (mask < count - 1) mask = mask << 1 | 1;
    for (;;)
        if (const uint32_t number = bits.next_uint32(bits.state) & mask; number < count) return number;
}

// Generator.uniform(low, high)
inline double draw_uniform(BitStream& bits, double low, double high) {
    const double range = high - low;
    return low + range * bits.next_double(bits.state);
}

struct Box {
    double left, top, right, bottom;
};

inline double iou(const Box& a, const Box& b) {
    const double width = std::max(std::min(a.right, b.right) - std::max(a.left, b.left), 0.0);
    const double height = std::max(std::min(a.bottom, b.bottom) - std::max(a.top, b.top), 0.0);
    const double shared = width * height;
    return shared / ((a.right - a.left) * (a.bottom - a.top) + (b.right - b.left) * (b.bottom - b.top) - shared);
}

struct Sample {
    Box crop = {0, 0, 1, 1};
    bool flip = false;
    std::vector<int> kept;  // the boxes that remain, by their numbers
    std::vector<float> boxes;  // 4 for each of them
    int order[4] = {0, 1, 2, 3};
    double amounts[4] = {1, 1, 1, 0};
};

// What the reference draws with: its constants, handed over from Python.
struct Rules {
    std::vector<double> minimum_ious;
    double flip_probability;
    double low[4], high[4];  // of the colour changes
};

inline void draw_crop(BitStream& bits, const Rules& rules, const std::vector<Box>& boxes, int tries, Sample& sample) {
    for (;;) {
        const uint32_t rule = draw_below(bits, uint32_t(rules.minimum_ious.size()) + 2);
        sample.kept.clear();
        if (rule == 0) {
            sample.crop = {0, 0, 1, 1};
            for (size_t i = 0; i < boxes.size(); ++i) sample.kept.push_back(int(i));
            return;
        }
        const double minimum = rule <= rules.minimum_ious.size() ? rules.minimum_ious[rule - 1] : -INFINITY;
        for (int attempt = 0; attempt < tries; ++attempt) {
            const double width = draw_uniform(bits, 0.3, 1.0), height = draw_uniform(bits, 0.3, 1.0);
            const double left = draw_uniform(bits, 0, 1.0 - width), top = draw_uniform(bits, 0, 1.0 - height);
            if (!(0.5 <= width / height && width / height <= 2)) continue;
            const Box crop = {left, top, left + width, top + height};
            bool fits = true;
            for (size_t i = 0; i < boxes.size() && fits; ++i) fits = iou(boxes[i], crop) > minimum;
            if (!fits) continue;
            sample.kept.clear();
            for (size_t i = 0; i < boxes.size(); ++i) {
                const double x = (boxes[i].left + boxes[i].right) / 2, y = (boxes[i].top + boxes[i].bottom) / 2;
                if (x > crop.left && x < crop.right && y > crop.top && y < crop.bottom) sample.kept.push_back(int(i));
            }
            if (!sample.kept.empty()) {
                sample.crop = crop;
                return;
            }
        }
    }
}

inline void draw_sample(BitStream& bits, const Rules& rules, const std::vector<Box>& boxes, int tries, Sample& sample) {
    draw_crop(bits, rules, boxes, tries, sample);
    sample.flip = bits.next_double(bits.state) < rules.flip_probability;
    const Box& crop = sample.crop;
    const double width = crop.right - crop.left, height = crop.bottom - crop.top;
    auto along = [](double edge, double start, double size) { return (std::min(std::max(edge, start), start + size) - start) / size; };
    auto unit = [](double edge) { return float(std::min(std::max(edge, 0.0), 1.0)); };
    std::vector<int> thick;
    sample.boxes.clear();
    for (int number : sample.kept) {
        const Box& box = boxes[size_t(number)];
        double left = along(box.left, crop.left, width), right = along(box.right, crop.left, width);
        const double top = along(box.top, crop.top, height), bottom = along(box.bottom, crop.top, height);
        if (sample.flip) {
            const double mirrored = 1 - right;
            right = 1 - left, left = mirrored;
        }
        const float edges[4] = {unit(left), unit(top), unit(right), unit(bottom)};
        if (!(edges[0] < edges[2] && edges[1] < edges[3])) continue;
        thick.push_back(number);
        sample.boxes.insert(sample.boxes.end(), edges, edges + 4);
    }
    sample.kept.swap(thick);
    for (int change = 0; change < 4; ++change) sample.amounts[change] = draw_uniform(bits, rules.low[change], rules.high[change]);
    for (int i = 0; i < 4; ++i) sample.order[i] = i;
    for (uint32_t i = 3; i > 0; --i) std::swap(sample.order[i], sample.order[draw_place(bits, i + 1)]);  // Generator.permutation(4)
}

}  // namespace images
