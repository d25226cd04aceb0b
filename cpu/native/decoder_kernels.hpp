// The decoder's inner loops, compiled by targets.hpp for each kind of machine.

// e^x, and 0 where that is below what exponential() gives.
INLINE Floats vanishing(const Floats& x) { return x < -87.f ? Floats{} : exponential(x); }

// Softmax of a row with its largest score past class 0 → whether that is above the threshold; `scores` has room for all classes.
//
// Only a row that may have a score above the threshold is written.
template <class T>
INLINE bool scores_of(const T* row, int64_t classes, const Ints& last, float threshold, float* scores) {
    const Partition all_of_it = partition(row, classes, last);
    const float shift = all_of_it.shift, part = 1 / all_of_it.sum;
    if (!(all_of_it.sum > 0)) return false;  // not a number
    // Most rows are background: what all other classes have together is not above the threshold.
    const float background = exponential(all(number(row[0]) - shift))[0] * part;
    if (1 - background < threshold - 1e-5f) return false;
    if (classes < LANES) {
        float padded[LANES] = {};
        for (int64_t c = 0; c < classes; ++c) padded[c] = number(row[c]);
        store(padded, vanishing(load(padded) - shift) * part);
        for (int64_t c = 0; c < classes; ++c) scores[c] = padded[c];
        return true;
    }
    Ints above = {};
    for (int64_t c = 0; c + LANES < classes; c += LANES) {
        const Floats score = vanishing(load(row + c) - shift) * part;
        store(scores + c, score);
        above |= (score > threshold) & (lane_numbers() + int32_t(c) > 0);
    }
    const Floats score = vanishing(load(row + classes - LANES) - shift) * part;
    store(scores + classes - LANES, score);
    return bits(above | (score > threshold)) != 0;
}

// Looks at the default boxes from `from` on → the next with a score above the threshold, its softmax in `scores`; `count` if there is none.
static int64_t next_float(const float* logits, int64_t stride, int64_t from, int64_t count, int64_t classes, float threshold, float* scores) {
    const Ints last = last_lanes(classes);
    while (from < count && !scores_of(logits + from * stride, classes, last, threshold, scores)) ++from;
    return from;
}
static int64_t next_bfloat16(const Bfloat16* logits, int64_t stride, int64_t from, int64_t count, int64_t classes, float threshold, float* scores) {
    const Ints last = last_lanes(classes);
    while (from < count && !scores_of(logits + from * stride, classes, last, threshold, scores)) ++from;
    return from;
}

// Writes the numbers of the classes from `from` on whose score is above the least they need → how many.
static int64_t above(const float* scores, const float* least, int64_t from, int64_t count, int32_t* found) {
    int64_t number = 0, c = from;
    for (; c + LANES <= count; c += LANES)
        for (uint32_t left_over = bits(load(scores + c) > load(least + c)); left_over; left_over &= left_over - 1)
            found[number++] = int32_t(c) + __builtin_ctz(left_over);
    for (; c < count; ++c)
        if (scores[c] > least[c]) found[number++] = int32_t(c);
    return number;
}

// Marks those of the boxes from..count, in steps of LANES, that overlap box `from - 1` by the threshold or more.
static void suppress(const float* left, const float* top, const float* right, const float* bottom, const float* area, int64_t from, int64_t count,
                     float threshold, int32_t* dropped) {
    const int64_t i = from - 1;
    for (int64_t k = from / LANES * LANES; k < count; k += LANES) {
        const Floats width = smaller(all(right[i]), load(right + k)) - larger(all(left[i]), load(left + k));
        const Floats height = smaller(all(bottom[i]), load(bottom + k)) - larger(all(top[i]), load(top + k));
        const Floats shared = larger(width, all(0.f)) * larger(height, all(0.f));
        const Floats overlap = shared / ((area[i] + load(area + k)) - shared);
        store(dropped + k, load(dropped + k) | (overlap >= threshold));
    }
}
