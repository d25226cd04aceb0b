// The matcher's inner loop, compiled by targets.hpp for each kind of machine.

// For every box the best default box, for every default box the first of the best boxes above the threshold.
//
// `overlap` comes filled with the threshold; `bound` has room for a number for each block.
static void find(const DefaultArrays& d, const float* boxes, const int64_t* labels, int64_t count, float* overlap, int32_t* box_of, float* bound,
                 int64_t* best_default) {
    for (int64_t m = 0; m < count; ++m) {
        if (labels[m] <= 0) continue;
        const float left = boxes[4 * m], top = boxes[4 * m + 1], right = boxes[4 * m + 2], bottom = boxes[4 * m + 3];
        const float area = (right - left) * (bottom - top);
        for (int64_t k = 0; k < d.blocks; k += LANES) {  // no default box of the block overlaps the box more than this
            Floats width = smaller(all(right), load(d.block_right + k)) - larger(all(left), load(d.block_left + k));
            Floats height = smaller(all(bottom), load(d.block_bottom + k)) - larger(all(top), load(d.block_top + k));
            width = smaller(larger(width, all(0.f)), load(d.block_width + k));
            height = smaller(larger(height, all(0.f)), load(d.block_height + k));
            const Floats shared = width * height, smallest = load(d.block_area + k);
            const Floats together = larger(larger(area + smallest - shared, smallest), all(area));
            store(bound + k, shared / together * MARGIN);
        }
        float best = 0;
        int64_t where = 0;  // a box that overlaps nothing takes the first
        for (int64_t group = 0; group < d.blocks; group += LANES) {
            const Floats bounds = load(bound + group);
            const Ints hopeful = (bounds > 0.f) & (bounds >= smaller(best, THRESHOLD));
            for (uint32_t left_over = bits(hopeful); left_over; left_over &= left_over - 1) {
                const int64_t block = group + __builtin_ctz(left_over);
                const float need = smaller(best, THRESHOLD);
                if (bound[block] < need) continue;  // the best has grown since
                for (int64_t k = block * BLOCK; k < (block + 1) * BLOCK; k += LANES) {
                    const Floats width = smaller(all(right), load(d.right + k)) - larger(all(left), load(d.left + k));
                    const Floats height = smaller(all(bottom), load(d.bottom + k)) - larger(all(top), load(d.top + k));
                    const Floats shared = larger(width, all(0.f)) * larger(height, all(0.f));
                    const Floats together = (area + load(d.area + k)) - shared;
                    if (!bits(shared > need / MARGIN * together)) continue;
                    const Floats here = shared / together, before = load(overlap + k);
                    const Ints better = here > before;
                    if (bits(better)) {
                        store(box_of + k, better ? Ints{} + int32_t(m) : load(box_of + k));
                        store(overlap + k, better ? here : before);
                    }
                    if (!bits(here > best)) continue;
                    best = largest(here);
                    where = k + __builtin_ctz(bits(here == best));
                }
            }
        }
        best_default[m] = where;
    }
}

// Writes the numbers of the default boxes whose overlap is above the threshold → how many.
static int64_t matched(const float* overlap, int64_t count, int32_t* numbers) {
    int64_t found = 0;
    for (int64_t k = 0; k < count; k += LANES)
        for (uint32_t left_over = bits(load(overlap + k) > THRESHOLD); left_over; left_over &= left_over - 1)
            numbers[found++] = int32_t(k) + __builtin_ctz(left_over);
    return found;
}
