// The loss's passes over logits, compiled by targets.hpp for each kind of machine.

// Cross-entropies of the default boxes of an image with their labels; `entropies` has room for a multiple of MOST_LANES.
template <class T>
INLINE void cross_entropies(const T* logits, int64_t stride, int64_t count, int64_t classes, const int64_t* labels, float* entropies, float* sums) {
    const Ints last = last_lanes(classes);
    for (int64_t a = 0; a < count; ++a) {
        const T* row = logits + a * stride;
        const Partition found = partition(row, classes, last);
        sums[a] = found.sum;
        entropies[a] = found.shift - number(row[labels[a]]);
    }
    for (int64_t a = 0; a < count; a += LANES) store(entropies + a, load(entropies + a) + logarithm(load(sums + a)));
}
static void cross_entropies_float(const float* logits, int64_t stride, int64_t count, int64_t classes, const int64_t* labels, float* entropies, float* sums) {
    cross_entropies(logits, stride, count, classes, labels, entropies, sums);
}
static void cross_entropies_bfloat16(const Bfloat16* logits, int64_t stride, int64_t count, int64_t classes, const int64_t* labels, float* entropies, float* sums) {
    cross_entropies(logits, stride, count, classes, labels, entropies, sums);
}

// Gradient of scale * cross-entropy of one default box: scale * (softmax - one at the label).
template <class T>
INLINE void gradient(const T* row, int64_t classes, int64_t label, float scale, T* to) {
    const Partition all_of_it = partition(row, classes, last_lanes(classes));
    const float shift = all_of_it.shift, part = scale / all_of_it.sum;
    if (classes < LANES) {
        float padded[LANES] = {};
        for (int64_t c = 0; c < classes; ++c) padded[c] = number(row[c]);
        store(padded, exponential(load(padded) - shift) * part);
        for (int64_t c = 0; c < classes; ++c) store(to + c, padded[c]);
    } else {
        for (int64_t c = 0; c + LANES < classes; c += LANES) store(to + c, exponential(load(row + c) - shift) * part);
        store(to + classes - LANES, exponential(load(row + classes - LANES) - shift) * part);  // overlaps the piece before it
    }
    const float softmax = exponential(all(number(row[label]) - shift))[0] / all_of_it.sum;
    store(to + label, (softmax - 1) * scale);
}
static void gradient_float(const float* row, int64_t classes, int64_t label, float scale, float* to) { gradient(row, classes, label, scale, to); }
static void gradient_bfloat16(const Bfloat16* row, int64_t classes, int64_t label, float scale, Bfloat16* to) {
    gradient(row, classes, label, scale, to);
}
