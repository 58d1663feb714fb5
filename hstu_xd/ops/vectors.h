/* Vectors as long as the processor's, and what the native operators compute alike.
 *
 * They are the compiler's vector extensions (GCC, Clang). Longer ones would be split by it, but what
 * it compares it would then take lane by lane, and what it stores by way of the stack.
 */

#ifndef HSTU_XD_VECTORS_H
#define HSTU_XD_VECTORS_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* Lanes of a vector. */
#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif

/* Rows that meet a vector of columns when it is read. */
enum { ROWS = 4 };

typedef float floats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

static inline floats load(const float *from) { return *(const floats *)from; }
static inline void store(float *to, floats x) { *(floats *)to = x; }
static inline floats splat(float x) { return x - (floats){0}; }
static inline ints splat_int(int32_t x) { return x - (ints){0}; }
static inline ints lanes_from(int32_t first) {
    static const int32_t numbers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return *(const ints *)numbers + splat_int(first);
}

/* Takes x where the mask has all bits set, and zero where it has none. */
static inline floats keep(ints mask, floats x) { return (floats)((ints)x & mask); }
static inline floats choose(ints mask, floats x, floats other) {
    return (floats)(((ints)x & mask) | ((ints)other & ~mask));
}
static inline ints at_least(ints x, ints least) { return (x & (x > least)) | (least & (x <= least)); }
static inline ints at_most(ints x, ints most) { return (x & (x < most)) | (most & (x >= most)); }

/* Rows are short: a call of memcpy or memset would take longer than they do. */
static inline void copy(float *to, const float *from, int64_t n) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) store(to + i, load(from + i));
    if (i < n) memcpy(to + i, from + i, (n - i) * sizeof(float));
}

/* Sets rows to zero that are padded to full vectors. */
static inline void clear(float *to, int64_t padded) {
    for (int64_t i = 0; i < padded; i += LANES) store(to + i, splat(0));
}

typedef float four __attribute__((vector_size(16)));
typedef union {
    floats all;
    four parts[LANES / 4];
} Parts;

static inline float sum(floats x) {
    const Parts of = {.all = x};
    four total = of.parts[0];
    for (int i = 1; i < LANES / 4; i++) total += of.parts[i];
    return (total[0] + total[1]) + (total[2] + total[3]);
}

static inline float larger(float x, float y) { return x > y ? x : y; }

static inline float largest(floats x) {
    float found = x[0];
    for (int lane = 1; lane < LANES; lane++) found = larger(found, x[lane]);
    return found;
}

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t round_up(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

#ifdef __clang__
#define SHUFFLED(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLED(a, b, ...) __builtin_shuffle(a, b, (ints){__VA_ARGS__})
#endif
#if LANES == 16
#define FIRST_HALVES 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define LAST_HALVES 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif LANES == 8
#define FIRST_HALVES 0, 8, 1, 9, 2, 10, 3, 11
#define LAST_HALVES 4, 12, 5, 13, 6, 14, 7, 15
#else
#define FIRST_HALVES 0, 4, 1, 5
#define LAST_HALVES 2, 6, 3, 7
#endif

/* Makes rows of a square columns: each round puts between one another what is half of them apart. */
static inline void transpose(floats rows[LANES]) {
    for (int round = 1; round < LANES; round *= 2) {
        floats next[LANES];
        for (int i = 0; i < LANES / 2; i++) {
            next[2 * i] = SHUFFLED(rows[i], rows[i + LANES / 2], FIRST_HALVES);
            next[2 * i + 1] = SHUFFLED(rows[i], rows[i + LANES / 2], LAST_HALVES);
        }
        for (int i = 0; i < LANES; i++) rows[i] = next[i];
    }
}

/* The first n floats of a vector, of LANES at most, and zeros; and the way back. */
static inline floats load_some(const float *from, int64_t n) {
    floats found = {0};
    if (n >= LANES) return load(from);
    memcpy(&found, from, n * sizeof(float));
    return found;
}
static inline void store_some(float *to, floats x, int64_t n) {
    if (n >= LANES)
        store(to, x);
    else
        memcpy(to, &x, n * sizeof(float));
}

/* products[r][j] = <rows[r], columns[.][j]> of ROWS rows and n columns, up to full vectors.
 *
 * Rows are padded to full vectors, columns lie wide apart, and the rows of products apart.
 */
static inline void multiply(const float *rows, int64_t padded, const float *columns, int64_t width, int64_t wide,
                            int64_t n, float *products, int64_t apart) {
    for (int64_t j = 0; j < n; j += LANES) {
        floats total[ROWS] = {0};
        for (int64_t c = 0; c < width; c++) {
            const floats column = load(columns + c * wide + j);
            for (int r = 0; r < ROWS; r++) total[r] += splat(rows[r * padded + c]) * column;
        }
        for (int r = 0; r < ROWS; r++) store(products + r * apart + j, total[r]);
    }
}

/* totals[r] += sum_j weights[r][j] rows[j] of n rows that are padded to full vectors. */
static inline void add_rows(const float *weights, int64_t apart, const float *rows, int64_t padded, int64_t n,
                            float *totals) {
    for (int64_t c = 0; c < padded; c += LANES) {
        floats total[ROWS];
        for (int r = 0; r < ROWS; r++) total[r] = load(totals + r * padded + c);
        for (int64_t j = 0; j < n; j++) {
            const floats row = load(rows + j * padded + c);
            for (int r = 0; r < ROWS; r++) total[r] += splat(weights[r * apart + j]) * row;
        }
        for (int r = 0; r < ROWS; r++) store(totals + r * padded + c, total[r]);
    }
}

/* exp(x) within two units in the last place; x is taken to lie between -87 and 88. */
static inline floats exponential(floats x) {
    x = choose(x < splat(-87.0f), splat(-87.0f), x);
    x = choose(x > splat(88.0f), splat(88.0f), x);
    /* Adding 1.5 * 2^23 rounds to an integer, which then stands in the low bits. */
    const floats magic = splat(12582912.0f);
    const floats shifted = x * splat(1.44269504f) + magic;
    const floats whole = shifted - magic;
    const floats rest = x - whole * splat(0.693359375f) + whole * splat(2.12194440e-4f);
    /* Taylor's series, with its last coefficients fitted to |rest| <= ln(2) / 2. */
    floats series = splat(1.9875691500e-4f);
    series = series * rest + splat(1.3981999507e-3f);
    series = series * rest + splat(8.3334519073e-3f);
    series = series * rest + splat(4.1665795894e-2f);
    series = series * rest + splat(1.6666665459e-1f);
    series = series * rest + splat(5.0000001201e-1f);
    series = series * rest * rest + rest + splat(1.0f);
    const ints exponent = (ints)shifted - (ints)magic + splat_int(127);
    return series * (floats)(exponent << 23);
}

/* Buckets of time differences by the edges of hstu_xd.ops.relative_bias.bucket_edges.
 *
 * An edge is the bits of the first float32 of a bucket, and bits order as magnitudes do. The
 * exponent and the mantissa, read as one number, are a logarithm that is too small by less than a
 * bucket: so the bucket is the one guessed or the next.
 */
static inline ints time_bucket(const int64_t difference[LANES], const int32_t *edges, int32_t last) {
    const int32_t one = 0x3F800000;
    floats magnitude;
    for (int lane = 0; lane < LANES; lane++) magnitude[lane] = (float)difference[lane];
    ints bits = (ints)magnitude & splat_int(0x7FFFFFFF);
    bits = at_least(bits, splat_int(one));
    const floats logarithm = __builtin_convertvector(bits - splat_int(one), floats);
    /* ln(2) / 0.301 buckets an exponent, of 2^23 bits, and a little less against rounding up. */
    ints bucket = __builtin_convertvector(logarithm * splat(2.302814888f / 8388608.0f * 0.999999f), ints);
    ints next;
    for (int lane = 0; lane < LANES; lane++) next[lane] = edges[bucket[lane] + 1];
    bucket -= bits >= next; /* a comparison that holds is -1 */
    return at_most(bucket, splat_int(last));
}

/* Memory for floats where vectors do not straddle lines of the cache. */
static inline void *aligned(int64_t bytes) {
    void *found = aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (!found) abort();
    return found;
}

/* Memory of one thread, which grows as it is asked for more; what it held is lost then. */
typedef struct {
    float *at;
    int64_t size;
} Scratch;

static inline float *reserve(Scratch *scratch, int64_t size) {
    if (size > scratch->size) {
        free(scratch->at);
        scratch->at = aligned(size * sizeof(float));
        scratch->size = size;
    }
    return scratch->at;
}

#endif
