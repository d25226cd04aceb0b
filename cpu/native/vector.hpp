// LANES numbers at a time. Included by targets.hpp once for each kind of machine, in a namespace of its own.

typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef uint32_t Words __attribute__((vector_size(LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));

template <class To, class From>
INLINE To as(const From& from) {
    static_assert(sizeof(To) == sizeof(From), "same size");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

INLINE float number(float x) { return x; }
INLINE float number(Bfloat16 x) { return as<float>(uint32_t(x.bits) << 16); }

INLINE Floats all(float x) { return Floats{} + x; }
INLINE Floats load(const float* from) {
    Floats x;
    std::memcpy(&x, from, sizeof x);
    return x;
}
INLINE Floats load(const Bfloat16* from) {
    Halves halves;
    std::memcpy(&halves, from, sizeof halves);
    return as<Floats>(__builtin_convertvector(halves, Words) << 16);
}
INLINE Ints load(const int32_t* from) {
    Ints x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

INLINE void store(float* to, float x) { *to = x; }
INLINE void store(Bfloat16* to, float x) {  // to the nearest, ties to even; what is not a number stays so
    const uint32_t bits = as<uint32_t>(x);
    to->bits = x != x ? uint16_t(0x7fc0) : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
INLINE void store(float* to, const Floats& x) { std::memcpy(to, &x, sizeof x); }
INLINE void store(int32_t* to, const Ints& x) { std::memcpy(to, &x, sizeof x); }
INLINE void store(Bfloat16* to, const Floats& x) {
    const Words bits = as<Words>(x);
    const Words rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    const Halves halves = __builtin_convertvector(x != x ? Words{} + 0x7fc0 : rounded, Halves);
    std::memcpy(to, &halves, sizeof halves);
}

INLINE Floats larger(const Floats& a, const Floats& b) { return a > b ? a : b; }
INLINE Floats smaller(const Floats& a, const Floats& b) { return a < b ? a : b; }
INLINE float larger(float a, float b) { return a > b ? a : b; }
INLINE float smaller(float a, float b) { return a < b ? a : b; }

INLINE Ints lane_numbers() {
    Ints lane;
    for (int k = 0; k < LANES; ++k) lane[k] = k;
    return lane;
}

INLINE float sum(const Floats& x) {
    Floats total = x;
    for (int step = LANES / 2; step; step /= 2) total += __builtin_shuffle(total, lane_numbers() ^ step);
    return total[0];
}
INLINE float largest(const Floats& x) {
    Floats most = x;
    for (int step = LANES / 2; step; step /= 2) most = larger(most, __builtin_shuffle(most, lane_numbers() ^ step));
    return most[0];
}

// One bit for each lane of a comparison that holds, the first lane's lowest.
INLINE uint32_t bits(const Ints& mask) {
#if MACHINE == 512
    return _mm512_movepi32_mask(as<__m512i>(mask));
#elif MACHINE == 256
    return uint32_t(_mm256_movemask_ps(as<__m256>(mask)));
#elif defined(__SSE2__)
    return uint32_t(_mm_movemask_ps(as<__m128>(mask)));
#else
    uint32_t found = 0;
    for (int k = 0; k < LANES; ++k) found |= uint32_t(mask[k] & 1) << k;
    return found;
#endif
}

// a · b + c; rounded once where the machine can, also in files that are compiled with fp-contract=off.
INLINE Floats multiply_add(const Floats& a, const Floats& b, const Floats& c) {
#if MACHINE == 512
    return as<Floats>(_mm512_fmadd_ps(as<__m512>(a), as<__m512>(b), as<__m512>(c)));
#elif MACHINE == 256
    return as<Floats>(_mm256_fmadd_ps(as<__m256>(a), as<__m256>(b), as<__m256>(c)));
#else
    return a * b + c;
#endif
}

// e^x to 2e-7 relative, between e^-87 and e^88; what is not a number stays so. 2^(n + f) with |f| ≤ 1/2; the polynomial is the one
// of degree 6 that is nearest to 2^f (Remez; 2e-9 relative, before rounding).
INLINE Floats exponential(const Floats& given) {
    Floats x = given > 88.f ? all(88.f) : given;
    x = x < -87.f ? all(-87.f) : x;
    const Floats shifted = multiply_add(x, all(1.44269504f), all(12582912.f));  // 1.5 * 2^23: the nearest whole number is now in the low bits
    const Floats whole = shifted - 12582912.f, f = multiply_add(x, all(1.44269504f), -whole);
    Floats p = multiply_add(f, all(1.534732010e-4f), all(1.340015445e-3f));
    p = multiply_add(p, f, all(9.618484243e-3f));
    p = multiply_add(p, f, all(5.550328082e-2f));
    p = multiply_add(p, f, all(2.402264692e-1f));
    p = multiply_add(p, f, all(6.931472062e-1f));
    p = multiply_add(p, f, all(1.f));
#if MACHINE == 512
    return as<Floats>(_mm512_scalef_ps(as<__m512>(p), as<__m512>(whole)));
#else
    return p * as<Floats>((as<Words>(shifted) << 23) + (127u << 23));
#endif
}

// log x of normal numbers above 0, to 2e-7 (the polynomial is that of Cephes' logf); what is not a number stays so.
INLINE Floats logarithm(const Floats& x) {
    const Ints bits = as<Ints>(x);
    Ints exponent = (bits >> 23) - 126;
    Floats m = as<Floats>((bits & 0x007fffff) | 0x3f000000);  // 1/2 … 1
    const Ints small = m < 0.707106781f;
    exponent += small;  // -1 where it holds
    m = (small ? m + m : m) - 1.f;
    const Floats e = __builtin_convertvector(exponent, Floats), square = m * m;
    Floats p = multiply_add(m, all(7.0376836292e-2f), all(-1.1514610310e-1f));
    for (const float c : {1.1676998740e-1f, -1.2420140846e-1f, 1.4249322787e-1f, -1.6668057665e-1f, 2.0000714765e-1f, -2.4999993993e-1f, 3.3333331174e-1f})
        p = multiply_add(p, m, all(c));
    p = multiply_add(p * m, square, e * -2.12194440e-4f);
    const Floats result = multiply_add(square, all(-0.5f), p) + m + e * 0.693359375f;
    return x == x ? result : x;
}

// Rows of `count` logits are taken LANES at a time, the last piece overlapping the one before it; a row shorter than a piece is copied.

// Which lanes of the last piece no earlier piece had.
INLINE Ints last_lanes(int64_t count) {
    const int32_t rest = int32_t(count % LANES);
    if (rest == 0) return lane_numbers() >= 0;
    return count < LANES ? lane_numbers() < rest : lane_numbers() >= LANES - rest;
}

// Sum of e^(x - shift) over a row of at least one logit.
template <class T>
INLINE float sum_of_exponentials(const T* row, int64_t count, const Ints& last, float shift) {
    if (count < LANES) {
        float padded[LANES] = {};
        for (int64_t c = 0; c < count; ++c) padded[c] = number(row[c]);
        return sum(last ? exponential(load(padded) - shift) : Floats{});
    }
    Floats total = {};
    for (int64_t c = 0; c + LANES < count; c += LANES) total += exponential(load(row + c) - shift);
    const Floats end = exponential(load(row + count - LANES) - shift);
    return sum(total + (last ? end : Floats{}));
}

template <class T>
INLINE float largest_of(const T* row, int64_t count) {
    float most = number(row[0]);
    for (int64_t c = 1; c < count; ++c) most = larger(number(row[c]), most);
    return most;
}

// The sum of all e^x of a row is e^shift * sum.
struct Partition {
    float shift, sum;
};

// Without the usual search for the largest logit, unless the plain sum is not safely inside what a float can hold.
template <class T>
INLINE Partition partition(const T* row, int64_t count, const Ints& last) {
    const float plain = sum_of_exponentials(row, count, last, 0.f);
    if (plain > 1e-15f && plain < 1e15f) return {0.f, plain};
    const float most = largest_of(row, count);
    return {most, sum_of_exponentials(row, count, last, most)};
}
