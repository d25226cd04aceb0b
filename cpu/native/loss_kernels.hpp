// The loss's passes over logits, compiled by targets.hpp for each kind of machine.

// partition() of the logits of each default box of an image.
template <class T>
INLINE void partitions(const T* logits, int64_t stride, int64_t count, int64_t classes, float* shift, float* total) {
    const Ints last = last_lanes(classes);
    for (int64_t a = 0; a < count; ++a) {
        const Partition found = partition(logits + a * stride, classes, last);
        shift[a] = found.shift;
        total[a] = found.sum;
    }
}
static void partitions_float(const float* logits, int64_t stride, int64_t count, int64_t classes, float* shift, float* total) {
    partitions(logits, stride, count, classes, shift, total);
}
static void partitions_bfloat16(const Bfloat16* logits, int64_t stride, int64_t count, int64_t classes, float* shift, float* total) {
    partitions(logits, stride, count, classes, shift, total);
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
