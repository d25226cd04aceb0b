// Entropy decoding and inverse DCT of the blocks of a JPEG scan, compiled by targets.hpp for each kind of machine.

using images::DUMMY;
using images::END;
using images::LOOK;

// The bits of a scan. Reading behind its end is for the caller to notice, once a block.
struct ScanBits {
    uint64_t next;  // the next bits, from the top
    int count;      // so many of them are known
    const uint8_t* at;

    [[gnu::always_inline]] void refill() {  // to 56 bits or more
        uint64_t word;
        std::memcpy(&word, at, 8);
        next |= __builtin_bswap64(word) >> count;
        at += (63 - count) >> 3;
        count |= 56;
    }
    [[gnu::always_inline]] void skip(int some) {
        next <<= some;
        count -= some;
    }
    [[gnu::always_inline]] const uint8_t* used() const { return at - count / 8; }
};

INLINE images::Huffman::Entry look_up(const ScanBits& bits, const images::Huffman& table) {
    const images::Huffman::Entry entry = table.entries[bits.next >> (64 - LOOK)];
    return __builtin_expect(entry.first_used == 0, 0) ? table.long_entry(bits.next) : entry;
}
INLINE int first_value(const ScanBits& bits, const images::Huffman::Entry& entry) {
#if MACHINE >= 256
    uint16_t start_and_bits;
    std::memcpy(&start_and_bits, &entry.first_start, sizeof start_and_bits);
    const int raw = int(__builtin_ia32_bextr_u64(bits.next, start_and_bits));
#else
    const int raw = int(bits.next >> 1 >> (entry.first_start - 1)) & ((1 << entry.first_bits) - 1);
#endif
    return images::value_of(raw, entry.first_bits);
}

// The next block; with KEEP its coefficients, into zeros → the number after its last one, or 0 if it cannot be a block.
template <bool KEEP>
INLINE int block(ScanBits& given, const images::Part& from, int& last, int16_t* coefficients) {
    ScanBits bits = given;
    bits.refill();
    const images::Huffman::Entry difference = look_up(bits, *from.dc);
    if (difference.first_used == 0) return 0;
    last = int16_t(last + first_value(bits, difference));
    bits.skip(difference.first_used);
    if (KEEP) coefficients[0] = int16_t(last);
    int position = 1;
    auto another = [&]() __attribute__((always_inline)) {
        const images::Huffman::Entry entry = look_up(bits, *from.ac);
        position += entry.first_step;
        const int value = KEEP ? first_value(bits, entry) : 0;
        // The second before the first: where there is none, they have one place.
        if (KEEP) coefficients[images::ORDER.place[position - 1 + entry.second_step]] = entry.second_value;
        if (KEEP) coefficients[images::ORDER.place[position - 1]] = int16_t(value);
        if (position >= 64 || entry.first_used == 0) {  // what may follow belongs to the next block
            bits.skip(entry.first_used);
            position = entry.first_used ? position : END - 1;
            return false;
        }
        position += entry.second_step;
        bits.skip(entry.used);
        return position < 64;
    };
    if (another())
        do bits.refill();
        while (another() && another());
    given = bits;
    return position == 64 || position >= END ? position : 0;
}

typedef float Floats8 __attribute__((vector_size(32)));
typedef int32_t Ints8 __attribute__((vector_size(32)));
typedef int16_t Shorts8 __attribute__((vector_size(16)));
typedef uint8_t Bytes8 __attribute__((vector_size(8)));

// One dimension, eight transforms side by side.
INLINE void transform(Floats8* v) {
    const Floats8 even = v[0] + v[4], odd = v[0] - v[4], both = v[2] + v[6], turned = (v[2] - v[6]) * 1.414213562f - both;
    const Floats8 a0 = even + both, a3 = even - both, a1 = odd + turned, a2 = odd - turned;
    const Floats8 p = v[5] + v[3], q = v[5] - v[3], r = v[1] + v[7], s = v[1] - v[7];
    const Floats8 mixed = (q + s) * 1.847759065f;
    const Floats8 b0 = r + p, b1 = mixed - q * 2.613125930f - b0, b2 = (r - p) * 1.414213562f - b1, b3 = mixed - s * 1.082392200f - b2;
    v[0] = a0 + b0, v[7] = a0 - b0;
    v[1] = a1 + b1, v[6] = a1 - b1;
    v[2] = a2 + b2, v[5] = a2 - b2;
    v[3] = a3 + b3, v[4] = a3 - b3;
}

INLINE void transpose(Floats8* v) {
    const Ints8 low = {0, 8, 1, 9, 4, 12, 5, 13}, high = {2, 10, 3, 11, 6, 14, 7, 15};
    const Ints8 firsts = {0, 1, 8, 9, 4, 5, 12, 13}, seconds = {2, 3, 10, 11, 6, 7, 14, 15};
    const Ints8 lower = {0, 1, 2, 3, 8, 9, 10, 11}, upper = {4, 5, 6, 7, 12, 13, 14, 15};
    Floats8 pairs[8], fours[8];
    for (int i = 0; i < 8; i += 2) pairs[i] = __builtin_shuffle(v[i], v[i + 1], low), pairs[i + 1] = __builtin_shuffle(v[i], v[i + 1], high);
    for (int i = 0; i < 8; i += 4)
        for (int k = 0; k < 2; ++k) {
            fours[i + 2 * k] = __builtin_shuffle(pairs[i + k], pairs[i + k + 2], firsts);
            fours[i + 2 * k + 1] = __builtin_shuffle(pairs[i + k], pairs[i + k + 2], seconds);
        }
    for (int i = 0; i < 4; ++i) v[i] = __builtin_shuffle(fours[i], fours[i + 4], lower), v[i + 4] = __builtin_shuffle(fours[i], fours[i + 4], upper);
}

// Coefficients stored by columns, and their scales → eight rows of eight pixels. `flat`: there is none but the first.
INLINE void to_pixels(const int16_t* coefficients, const float* scales, bool flat, uint8_t* out, size_t pitch) {
    if (flat) {
        const float level = coefficients[0] * scales[0] + 128.5f;
        const uint8_t pixel = uint8_t(level < 0 ? 0 : level > 255 ? 255 : int(level));
        for (int y = 0; y < 8; ++y) std::memset(out + y * pitch, pixel, 8);
        return;
    }
    Floats8 v[8];
    for (int i = 0; i < 8; ++i) {
        Shorts8 some;
        Floats8 scale;
        std::memcpy(&some, coefficients + 8 * i, sizeof some);
        std::memcpy(&scale, scales + 8 * i, sizeof scale);
        v[i] = __builtin_convertvector(some, Floats8) * scale;
    }
    transform(v);
    transpose(v);
    v[0] += 128.5f;  // goes into every pixel once
    transform(v);
#if MACHINE >= 256  // four rows at a time; packing saturates
    for (int y = 0; y < 8; y += 4) {
        __m256i whole[4];
        for (int i = 0; i < 4; ++i) whole[i] = _mm256_cvttps_epi32(as<__m256>(v[y + i]));
        const __m256i four = _mm256_packus_epi16(_mm256_packs_epi32(whole[0], whole[1]), _mm256_packs_epi32(whole[2], whole[3]));
        const __m256i rows = _mm256_permutevar8x32_epi32(four, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
        uint64_t pixels[4];
        std::memcpy(pixels, &rows, sizeof pixels);
        for (int i = 0; i < 4; ++i) std::memcpy(out + (y + i) * pitch, pixels + i, 8);
    }
#else
    for (int y = 0; y < 8; ++y) {
        Floats8 level = v[y] < 0.f ? Floats8{} : v[y];
        level = level > 255.f ? Floats8{} + 255.f : level;
        const Bytes8 pixels = __builtin_convertvector(__builtin_convertvector(level, Ints8), Bytes8);
        std::memcpy(out + y * pitch, &pixels, sizeof pixels);
    }
#endif
}

static bool decode_scan(const images::Scan& scan) {
    ScanBits bits = {0, 0, scan.begin};
    int last[3] = {};
    alignas(64) int16_t coefficients[DUMMY + 1];
    for (int row = 0; row < scan.rows; ++row)
        for (int column = 0; column < scan.columns; ++column) {
            const bool keep = row >= scan.first_row && column >= scan.first_column && column < scan.last_column;
            for (int i = 0; i < scan.parts; ++i) {
                const images::Part& part = scan.part[i];
                for (int number = 0; number < part.across * part.down; ++number) {
                    if (bits.used() > scan.end) return false;
                    if (!keep) {
                        if (!block<false>(bits, part, last[i], nullptr)) return false;
                        continue;
                    }
                    std::memset(coefficients, 0, sizeof coefficients);
                    const int ended = block<true>(bits, part, last[i], coefficients);
                    if (!ended) return false;
                    const size_t y = size_t(row - scan.first_row) * part.down + number / part.across;
                    const size_t x = size_t(column - scan.first_column) * part.across + number % part.across;
                    to_pixels(coefficients, part.scales, ended == END, part.pixels + 8 * (y * part.pitch + x), part.pitch);
                }
            }
        }
    return bits.used() <= scan.end;
}
