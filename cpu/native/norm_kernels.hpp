// Batch norm's passes over rows of C channels, compiled by targets.hpp for each kind of machine.

// Channels [c, c + LANES) of a row, or as many as there are.
template <class T>
INLINE Floats channels(const T* row, int64_t c, int64_t count) {
    if (c + LANES <= count) return load(row + c);
    float padded[LANES] = {};
    for (int64_t k = c; k < count; ++k) padded[k - c] = number(row[k]);
    return load(padded);
}
template <class T>
INLINE void set_channels(T* row, int64_t c, int64_t count, const Floats& x) {
    if (c + LANES <= count) return store(row + c, x);
    float padded[LANES];
    store(padded, x);
    for (int64_t k = c; k < count; ++k) store(row + k, padded[k - c]);
}

constexpr int64_t TOGETHER = 8;  // rows in one go, while their sums are in registers and they are in the first cache
constexpr int WIDE = 4;          // vectors side by side: whole cache lines

// Adds up x - pivot and its square: into first and second (C each).
template <class T>
INLINE void moments(const T* x, int64_t rows, int64_t count, const float* pivot, float* first, float* second) {
    for (int64_t row = 0; row < rows; row += TOGETHER) {
        const int64_t end = row + TOGETHER < rows ? row + TOGETHER : rows;
        for (int64_t c = 0; c < count; c += LANES) {
            const Floats from = channels(pivot, c, count);
            Floats one = channels(first, c, count), two = channels(second, c, count);
            for (int64_t at = row * count; at < end * count; at += count) {
                const Floats apart = channels(x + at, c, count) - from;
                one += apart, two += apart * apart;
            }
            set_channels(first, c, count, one), set_channels(second, c, count, two);
        }
    }
}
static void moments_float(const float* x, int64_t rows, int64_t count, const float* pivot, float* first, float* second) { moments(x, rows, count, pivot, first, second); }
static void moments_bfloat16(const Bfloat16* x, int64_t rows, int64_t count, const float* pivot, float* first, float* second) {
    moments(x, rows, count, pivot, first, second);
}

// What is not a number passes, as in torch.
INLINE Floats rectified(const Floats& x) { return x < 0 ? Floats{} : x; }

// y = x · scale + shift (+ shortcut), and ReLU.
template <class T>
INLINE void normalise(const T* x, const T* shortcut, int64_t rows, int64_t count, const float* scale, const float* shift, bool relu, T* y) {
    for (int64_t at = 0; at < rows * count; at += count) {
        for (int64_t c = 0; c < count; c += LANES) {
            Floats z = channels(x + at, c, count) * channels(scale, c, count) + channels(shift, c, count);
            if (shortcut) z += channels(shortcut + at, c, count);
            set_channels(y + at, c, count, relu ? rectified(z) : z);
        }
    }
}
static void normalise_float(const float* x, const float* shortcut, int64_t rows, int64_t count, const float* scale, const float* shift, bool relu, float* y) {
    normalise(x, shortcut, rows, count, scale, shift, relu, y);
}
static void normalise_bfloat16(const Bfloat16* x, const Bfloat16* shortcut, int64_t rows, int64_t count, const float* scale, const float* shift, bool relu,
                               Bfloat16* y) {
    normalise(x, shortcut, rows, count, scale, shift, relu, y);
}

// What a ReLU let through: where its input was above zero, or not a number.
template <class T>
INLINE Floats through(const Passage<T>& relu, const Floats& slope, const Floats& x, int64_t at, int64_t c, int64_t count) {
    if (relu.y) return channels(relu.y + at, c, count) <= 0 ? Floats{} : slope;
    if (relu.scale) return x * channels(relu.scale, c, count) + channels(relu.shift, c, count) <= 0 ? Floats{} : slope;
    return slope;
}

// Adds up the gradient that passed the ReLU, and its product with x - mean; keeps the gradient, if there is room for it.
template <int VECTORS, class T>
INLINE void slopes_of(const T* slope, const T* x, const Passage<T>& relu, int64_t row, int64_t rows, int64_t c, int64_t count, const float* mean, float* first,
                      float* second, T* kept) {
    Floats middle[VECTORS], one[VECTORS], two[VECTORS];
    for (int v = 0; v < VECTORS; ++v) {
        const int64_t k = c + v * LANES;
        middle[v] = channels(mean, k, count), one[v] = channels(first, k, count), two[v] = channels(second, k, count);
    }
    for (int64_t at = row * count; at < (row + rows) * count; at += count)
        for (int v = 0; v < VECTORS; ++v) {
            const int64_t k = c + v * LANES;
            const Floats value = channels(x + at, k, count), g = through(relu, channels(slope + at, k, count), value, at, k, count);
            one[v] += g, two[v] += g * (value - middle[v]);
            if (kept) set_channels(kept + at, k, count, g);
        }
    for (int v = 0; v < VECTORS; ++v) set_channels(first, c + v * LANES, count, one[v]), set_channels(second, c + v * LANES, count, two[v]);
}
template <class T>
INLINE void slopes(const T* slope, const T* x, const Passage<T>& relu, int64_t rows, int64_t count, const float* mean, float* first, float* second, T* kept) {
    for (int64_t row = 0, c; row < rows; row += TOGETHER) {
        const int64_t some = row + TOGETHER < rows ? TOGETHER : rows - row;
        for (c = 0; c + WIDE * LANES <= count; c += WIDE * LANES) slopes_of<WIDE>(slope, x, relu, row, some, c, count, mean, first, second, kept);
        for (; c < count; c += LANES) slopes_of<1>(slope, x, relu, row, some, c, count, mean, first, second, kept);
    }
}
static void slopes_float(const float* slope, const float* x, const Passage<float>& relu, int64_t rows, int64_t count, const float* mean, float* first, float* second,
                         float* kept) {
    slopes(slope, x, relu, rows, count, mean, first, second, kept);
}
static void slopes_bfloat16(const Bfloat16* slope, const Bfloat16* x, const Passage<Bfloat16>& relu, int64_t rows, int64_t count, const float* mean, float* first,
                            float* second, Bfloat16* kept) {
    slopes(slope, x, relu, rows, count, mean, first, second, kept);
}

// The gradient of x: factors[0] · gradient + factors[1] · (x - mean) + factors[2], each (C).
template <class T>
INLINE void to_input(const T* slope, const T* x, const Passage<T>& relu, int64_t rows, int64_t count, const float* mean, const float* factors, T* to) {
    for (int64_t at = 0; at < rows * count; at += count) {
        for (int64_t c = 0; c < count; c += LANES) {
            const Floats value = channels(x + at, c, count), g = through(relu, channels(slope + at, c, count), value, at, c, count);
            const Floats sums = (value - channels(mean, c, count)) * channels(factors + count, c, count) + channels(factors + 2 * count, c, count);
            set_channels(to + at, c, count, g * channels(factors, c, count) + sums);
        }
    }
}
static void to_input_float(const float* slope, const float* x, const Passage<float>& relu, int64_t rows, int64_t count, const float* mean, const float* factors,
                           float* to) {
    to_input(slope, x, relu, rows, count, mean, factors, to);
}
static void to_input_bfloat16(const Bfloat16* slope, const Bfloat16* x, const Passage<Bfloat16>& relu, int64_t rows, int64_t count, const float* mean,
                              const float* factors, Bfloat16* to) {
    to_input(slope, x, relu, rows, count, mean, factors, to);
}
