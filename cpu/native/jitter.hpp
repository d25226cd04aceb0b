// Colour jitter with PIL's arithmetic (its 8-bit roundings included) on planar floats that hold whole numbers.
#pragma once

#include <cmath>
#include <cstdint>

#include "parallel.hpp"
#include "resample.hpp"

namespace images {

enum Change { BRIGHTNESS = 0, CONTRAST = 1, SATURATION = 2, HUE = 3 };  // in the order in which the reference draws them

constexpr int CHUNK = 8 * LANES;  // pixels worked on at once

struct Chunk {
    alignas(64) float red[CHUNK], green[CHUNK], blue[CHUNK];
};

CLONES inline void load(Chunk& chunk, const uint8_t* pixels, int groups) {
    for (int g = 0; g < groups; ++g)
        for (int i = 0; i < LANES; ++i) {
            chunk.red[g * LANES + i] = pixels[(g * 3 + 0) * LANES + i];
            chunk.green[g * LANES + i] = pixels[(g * 3 + 1) * LANES + i];
            chunk.blue[g * LANES + i] = pixels[(g * 3 + 2) * LANES + i];
        }
}

CLONES inline void store(uint8_t* pixels, const Chunk& chunk, int groups) {
    for (int g = 0; g < groups; ++g)
        for (int i = 0; i < LANES; ++i) {
            pixels[(g * 3 + 0) * LANES + i] = uint8_t(int(chunk.red[g * LANES + i]));
            pixels[(g * 3 + 1) * LANES + i] = uint8_t(int(chunk.green[g * LANES + i]));
            pixels[(g * 3 + 2) * LANES + i] = uint8_t(int(chunk.blue[g * LANES + i]));
        }
}

inline float whole(float x) { return float(int(x)); }  // towards zero, as C casts; every x here is ≥ 0

inline float larger(float a, float b) { return a > b ? a : b; }  // one instruction each, which nested conditions are not
inline float smaller(float a, float b) { return a < b ? a : b; }

inline float clamped(float x) { return float(std::min(std::max(int(x), 0), 255)); }  // in whole numbers, which the compiler can vectorise

inline float grey_of(float r, float g, float b) { return whole((19595 * r + 38470 * g + 7471 * b + 32768) * (1.0f / 65536)); }

// PIL's blend with one grey: brightness (0) and contrast (the mean).
CLONES inline void blend_with(float* values, int n, float other, float amount) {
    for (int i = 0; i < n; ++i) values[i] = clamped(other + amount * (values[i] - other));
}

CLONES inline void saturate(Chunk& chunk, int n, float amount) {
    for (int i = 0; i < n; ++i) {
        const float r = chunk.red[i], g = chunk.green[i], b = chunk.blue[i], grey = grey_of(r, g, b);
        chunk.red[i] = clamped(grey + amount * (r - grey));
        chunk.green[i] = clamped(grey + amount * (g - grey));
        chunk.blue[i] = clamped(grey + amount * (b - grey));
    }
}

// To PIL's 8-bit HSV, the hue moved by `shift` of 256, and back.
CLONES inline void turn_hue(Chunk& chunk, int n, float shift) {
    for (int i = 0; i < n; ++i) {
        const float r = chunk.red[i], g = chunk.green[i], b = chunk.blue[i];
        const float high = larger(larger(r, g), b), low = smaller(smaller(r, g), b);
        const float range = high - low, divisor = larger(range, 1), brightest = larger(high, 1);  // of whole numbers
        const float both = 1.0f / (divisor * brightest), per_range = both * brightest;  // one division for two
        const float from_red = (g - b) * per_range, from_green = 2 + (b - r) * per_range, from_blue = 4 + (r - g) * per_range;
        float hue = (r == high ? from_red : g == high ? from_green : from_blue) * (1.0f / 6);
        hue = hue < 0 ? hue + 1 : hue;
        hue = whole(hue * 255 + 1e-4f) + shift;  // 8 bits, which wrap around
        hue = hue >= 256 ? hue - 256 : hue;
        const float saturation = whole(range * divisor * both * 255 + 1e-4f) * (1.0f / 255);
        const float sector = hue * (6.0f / 255), chroma = high * saturation;
        auto channel = [=](float offset) {
            float at = sector + offset;
            at = at >= 6 ? at - 6 : at;
            return whole(high - chroma * smaller(larger(smaller(at, 4 - at), 0), 1) + 0.5f);
        };
        chunk.red[i] = channel(5), chunk.green[i] = channel(3), chunk.blue[i] = channel(1);
    }
}

CLONES inline int64_t sum_grey(const Chunk& chunk, int n) {
    int64_t total = 0;
    for (int start = 0; start < n; start += LANES) {
        int sum = 0;
        for (int i = start; i < start + LANES; ++i) sum += int(grey_of(chunk.red[i], chunk.green[i], chunk.blue[i]));
        total += sum;
    }
    return total;
}

// Changes a picture of `groups` × 3 × LANES bytes in place; what is outside it must be 0. `pixels`: of the picture itself.
inline void jitter(uint8_t* picture, long groups, long pixels, const int* order, const double* amounts, int changes) {
    int begin = 0;
    long mean = 0;
    Chunk chunk;
    constexpr int PER_CHUNK = CHUNK / LANES;
    while (begin < changes) {
        int end = begin + 1;  // the changes up to the next that needs the mean of what they give
        while (end < changes && order[end] != CONTRAST) ++end;
        const bool needs_mean = end < changes, first_is_contrast = order[begin] == CONTRAST;
        if (begin == 0 && first_is_contrast) {
            int64_t sum = 0;
            for (long at = 0; at < groups; at += PER_CHUNK) {
                const int some = int(std::min<long>(PER_CHUNK, groups - at));
                load(chunk, picture + at * 3 * LANES, some);
                sum += sum_grey(chunk, some * LANES);
            }
            mean = long(double(sum) / double(pixels) + 0.5);
        }
        int64_t sum = 0;
        for (long at = 0; at < groups; at += PER_CHUNK) {
            const int some = int(std::min<long>(PER_CHUNK, groups - at)), n = some * LANES;
            load(chunk, picture + at * 3 * LANES, some);
            for (int c = begin; c < end; ++c) {
                const float amount = float(amounts[order[c]]);
                if (order[c] == SATURATION) {
                    saturate(chunk, n, amount);
                } else if (order[c] == HUE) {
                    const int shift = int(amounts[HUE] * 255);
                    turn_hue(chunk, n, float(shift & 255));
                } else {
                    const float other = order[c] == CONTRAST ? float(mean) : 0.0f;
                    for (float* values : {chunk.red, chunk.green, chunk.blue}) blend_with(values, n, other, amount);
                }
            }
            if (needs_mean) sum += sum_grey(chunk, n);
            store(picture + at * 3 * LANES, chunk, some);
        }
        mean = long(double(sum) / double(pixels) + 0.5);
        begin = end;
    }
}

}  // namespace images
