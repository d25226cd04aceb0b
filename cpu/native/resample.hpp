// Antialiased bilinear resize of 8-bit RGB, as PIL's: a triangle as wide as the scale, rows first, then columns.
//
// The result is planar in bands of LANES rows, band → column → channel → row, so that everything after the row pass works
// on LANES rows at once with plain vector instructions.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "parallel.hpp"

namespace images {

constexpr int LANES = 32;      // rows of a band
constexpr int MAX_TAPS = 64;   // source pixels an output pixel may be made of in a direction; more lose precision in 16 bits
constexpr int ONE = 65535;     // the weights of an output pixel add up to this

// For every output pixel of one direction: the first source pixel and the weights, `taps` each, 0 beyond `count`.
struct Taps {
    std::vector<int> first, count;
    std::vector<uint16_t> weights;
    int taps = 0, begin = 0, end = 0;  // begin…end: the source pixels that have a weight

    // `low`, `high`: the part of the source that becomes `size` pixels. Returns false where MAX_TAPS does not do.
    // A `halved` source has every second pixel, `length` in all; those between are what libjpeg makes of them (3:1 of the
    // nearer and the other neighbour), so that its weights are those of the full source, shared out.
    bool prepare(double low, double high, int size, bool halved = false, int length = 0) {
        const double scale = (high - low) / size, width = std::max(scale, 1.0);
        taps = int(std::ceil(width)) * 2 + 1;
        if (taps > MAX_TAPS) return false;
        if (halved) taps = taps / 2 + 3;
        first.resize(size), count.resize(size), weights.assign(size_t(size) * taps, 0);
        const int lowest = int(std::floor(low)), highest = int(std::ceil(high));
        for (int i = 0; i < size; ++i) {
            const double centre = low + (i + 0.5) * scale - 0.5, slope = 1 / width;  // of pixels' numbers
            int from = std::max(lowest, int(std::ceil(centre - width))), to = std::min(highest, int(std::floor(centre + width)) + 1);
            from = std::min(from, highest - 1), to = std::max(to, from + 1);
            double share[MAX_TAPS + 3] = {};
            auto weight = [&](int at) { return std::max(0.0, 1 - std::abs(at - centre) * slope); };
            if (halved) {
                const int start = std::max(from / 2 - 1, 0);
                for (int at = from; at < to; ++at) {
                    const int near = std::min(at / 2, length - 1), other = std::min(std::max(at % 2 ? near + 1 : near - 1, 0), length - 1);
                    share[near - start] += 0.75 * weight(at), share[other - start] += 0.25 * weight(at);
                }
                to = std::min((to - 1) / 2 + 2, length), from = start;
            } else {
                for (int at = from; at < to; ++at) share[at - from] = weight(at);
            }
            double sum = 0, done = 0;
            int skip = 0, some = to - from;  // without those at the ends that have no weight
            while (skip < some - 1 && share[skip] <= 0) ++skip;
            while (some - 1 > skip && share[some - 1] <= 0) --some;
            for (int k = skip; k < some; ++k) sum += share[k];
            first[i] = from + skip, count[i] = some - skip;
            const double unit = ONE / sum;
            int before = 0;
            for (int k = skip; k < some; ++k) {  // rounded so that they add up exactly
                done += share[k];
                const int upto = int(done * unit + 0.5);
                weights[size_t(i) * taps + (k - skip)] = uint16_t(upto - before);
                before = upto;
            }
        }
        begin = *std::min_element(first.begin(), first.end()), end = 0;
        for (int i = 0; i < size; ++i) end = std::max(end, first[i] + count[i]);
        return true;
    }
};

// sum[i] += row[i] · weight, in 1/256; N a constant, so that it becomes a few vector instructions.
template <int N>
[[gnu::always_inline]] inline void add_weighted(uint16_t* __restrict sum, const uint8_t* __restrict row, uint16_t weight) {
    for (int i = 0; i < N; ++i) sum[i] += uint16_t((uint32_t(uint16_t(row[i] << 8)) * weight) >> 16);
    asm volatile("");  // keeps GCC from joining this loop with that over the rows, and then from vectorising it
}

// out[i] = Σ rows[k][i] · weights[k]
CLONES inline void blend_rows(uint8_t* __restrict out, const uint8_t* const* rows, const uint16_t* weights, int taps, int n) {
    constexpr int STEP = 128;
    for (int next = 0; next < n; next += STEP) {
        const int start = std::max(std::min(next, n - STEP), 0);  // the last part overlaps the one before
        uint16_t sum[STEP];
        for (int i = 0; i < STEP; ++i) sum[i] = 128;
        if (n >= STEP) {
            for (int k = 0; k < taps; ++k) add_weighted<STEP>(sum, rows[k] + start, weights[k]);
            for (int i = 0; i < STEP; ++i) out[start + i] = uint8_t(sum[i] >> 8);
        } else {
            for (int k = 0; k < taps; ++k)
                for (int i = 0; i < n; ++i) add_weighted<1>(sum + i, rows[k] + i, weights[k]);
            for (int i = 0; i < n; ++i) out[i] = uint8_t(sum[i] >> 8);
        }
    }
}

// One band: in is [source column from `begin` on][CHANNELS][LANES], out [column][3][LANES].
template <int CHANNELS>
[[gnu::always_inline]] inline void blend_some_columns(uint8_t* __restrict out, const uint8_t* __restrict in, const Taps& across, int begin, int width, bool flip) {
    constexpr int STEP = CHANNELS * LANES;
    for (int x = 0; x < width; ++x) {
        const uint8_t* source = in + size_t(across.first[x] - begin) * STEP;
        const uint16_t* weight = across.weights.data() + size_t(x) * across.taps;
        uint16_t sum[STEP];
        for (int i = 0; i < STEP; ++i) sum[i] = 128;
        for (int k = 0; k < across.count[x]; ++k) add_weighted<STEP>(sum, source + k * STEP, weight[k]);
        uint8_t* target = out + size_t(flip ? width - 1 - x : x) * 3 * LANES;
        for (int i = 0; i < STEP; ++i) target[i] = uint8_t(sum[i] >> 8);
    }
}
CLONES inline void blend_columns_of_3(uint8_t* out, const uint8_t* in, const Taps& across, int begin, int width, bool flip) {
    blend_some_columns<3>(out, in, across, begin, width, flip);
}
CLONES inline void blend_columns_of_1(uint8_t* out, const uint8_t* in, const Taps& across, int begin, int width, bool flip) {
    blend_some_columns<1>(out, in, across, begin, width, flip);
}

// A picture of `groups` × 3 × LANES bytes from YCbCr to RGB (JFIF), in place.
CLONES inline void to_rgb(uint8_t* __restrict picture, long groups) {
    for (long g = 0; g < groups; ++g, picture += 3 * LANES)
        for (int i = 0; i < LANES; ++i) {
            const int y = (picture[i] << 16) + 32768, blue = picture[LANES + i] - 128, red = picture[2 * LANES + i] - 128;
            const int r = (y + 91881 * red) >> 16, g = (y - 22554 * blue - 46802 * red) >> 16, b = (y + 116130 * blue) >> 16;
            picture[i] = uint8_t(std::min(std::max(r, 0), 255));
            picture[LANES + i] = uint8_t(std::min(std::max(g, 0), 255));
            picture[2 * LANES + i] = uint8_t(std::min(std::max(b, 0), 255));
        }
}

#if defined(__SSE2__)
inline void transpose_16(uint8_t* out, size_t out_pitch, const uint8_t* in, size_t in_pitch) {
    __m128i a[16], b[16];
    for (int i = 0; i < 16; ++i) a[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i * in_pitch));
    for (int step = 0; step < 4; ++step) {  // each: interleave row i with row i + 8
        for (int i = 0; i < 8; ++i) b[2 * i] = _mm_unpacklo_epi8(a[i], a[i + 8]), b[2 * i + 1] = _mm_unpackhi_epi8(a[i], a[i + 8]);
        for (int i = 0; i < 16; ++i) a[i] = b[i];
    }
    for (int i = 0; i < 16; ++i) _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i * out_pitch), a[i]);
}
#endif

// in: rows × columns → out: columns × rows
inline void transpose(uint8_t* out, size_t out_pitch, const uint8_t* in, size_t in_pitch, int rows, int columns) {
    int y = 0;
#if defined(__SSE2__)
    for (; y + 16 <= rows; y += 16) {
        int x = 0;
        for (; x + 16 <= columns; x += 16) transpose_16(out + x * out_pitch + y, out_pitch, in + y * in_pitch + x, in_pitch);
        for (; x < columns; ++x)
            for (int i = y; i < y + 16; ++i) out[x * out_pitch + i] = in[i * in_pitch + x];
    }
#endif
    for (; y < rows; ++y)
        for (int x = 0; x < columns; ++x) out[x * out_pitch + y] = in[y * in_pitch + x];
}

}  // namespace images
