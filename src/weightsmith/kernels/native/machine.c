/* Runs a program of array operations over stretches of tensors, tile by tile.
 *
 * A program is what kernels/trace.py records when a method runs on symbolic arrays: a list of operations on
 * registers. Every register holds one tile, small enough that all of them stay in a core's first or second cache, so
 * a method of eighty operations reads its inputs from memory once and writes its result once.
 *
 * What results rest on, and the levels that this file is compiled for, are in numbers.h.
 */
#include "numbers.h"

#define BINS 65536 /* of a histogram, as in kernels/select.py */

typedef int32_t m32;  /* a mask: all bits set where true */

/* One operation, as laid out by Program in kernels/program.py. */
typedef struct {
    int64_t op;       /* index into OPERATIONS */
    int64_t out;      /* register, or slot of an output, sum, count or selection */
    int64_t a, b, c;  /* registers, or the slot of an input */
    int64_t form;     /* which of a, b, c are single values: bits 1, 2 and 4; bit 8: so is the result */
    int64_t x, y;     /* immediate operands */
} code;

typedef struct {
    char *registers;
    len stride;              /* bytes from one register to the next */
    const char *const *inputs;
    char *const *outputs;
    f64 *sums;               /* LANES per slot while running */
    int64_t *counts;
    int64_t *const *found;   /* per slot of a selection: where to put patterns, or a histogram */
    int64_t index;           /* of the tile's first element in the tensor */
    int64_t position;        /* ... in the scope of the statistic */
    len done;                /* elements before this tile in this stretch */
    len n;                   /* elements of this tile */
    uint64_t *scratch;       /* 2 n + 3 * 2048 + 8 words, for ranks and random numbers */
} state;

#define REGISTER(T, r) ((T *)(s->registers + (r) * s->stride))
#define LENGTH(c) ((c)->form & 8 ? (len)1 : s->n)

/* ---- elementwise ------------------------------------------------------------------------------------------- */

#define UNARY(name, T, O, EXPRESSION)                            \
    static void name(const code *c, state *s) {                  \
        const T *restrict a = REGISTER(T, c->a);                 \
        O *restrict o = REGISTER(O, c->out);                     \
        const len n = LENGTH(c);                                 \
        for (len i = 0; i < n; i++) {                            \
            const T x = a[i];                                    \
            o[i] = (EXPRESSION);                                 \
        }                                                        \
    }

#define BINARY(name, T, O, EXPRESSION)                           \
    static void name(const code *c, state *s) {                  \
        const T *a = REGISTER(T, c->a), *b = REGISTER(T, c->b);  \
        O *restrict o = REGISTER(O, c->out);                     \
        const len n = LENGTH(c);                                 \
        if ((c->form & 3) == 0) {                                \
            for (len i = 0; i < n; i++) {                        \
                const T x = a[i], y = b[i];                      \
                o[i] = (EXPRESSION);                             \
            }                                                    \
        } else if ((c->form & 3) == 2) {                         \
            const T y = b[0];                                    \
            for (len i = 0; i < n; i++) {                        \
                const T x = a[i];                                \
                o[i] = (EXPRESSION);                             \
            }                                                    \
        } else if ((c->form & 3) == 1) {                         \
            const T x = a[0];                                    \
            for (len i = 0; i < n; i++) {                        \
                const T y = b[i];                                \
                o[i] = (EXPRESSION);                             \
            }                                                    \
        } else {                                                 \
            const T x = a[0], y = b[0];                          \
            for (len i = 0; i < n; i++) o[i] = (EXPRESSION);     \
        }                                                        \
    }

#define MASK(condition) ((condition) ? (m32)-1 : (m32)0)

/* x times a mask that counts as 1 and 0: zeros keep the sign of x, and NaN stays NaN, as in the array API. */
#define GATE(T)                                                          \
    static void gate_##T(const code *c, state *s) {                      \
        const T *a = REGISTER(T, c->a);                                  \
        const m32 *k = REGISTER(m32, c->b);                              \
        T *restrict o = REGISTER(T, c->out);                             \
        const len n = LENGTH(c);                                         \
        if (c->form & 1) {                                               \
            const T x = a[0];                                            \
            for (len i = 0; i < n; i++) o[i] = x * (k[i] ? (T)1 : (T)0); \
        } else {                                                         \
            for (len i = 0; i < n; i++) o[i] = a[i] * (k[i] ? (T)1 : (T)0); \
        }                                                                \
    }

#define FLOATING(T)                                                      \
    BINARY(add_##T, T, T, x + y)                                         \
    BINARY(sub_##T, T, T, x - y)                                         \
    BINARY(mul_##T, T, T, x *y)                                          \
    BINARY(div_##T, T, T, x / y)                                         \
    BINARY(min_##T, T, T, x < y || x != x ? x : y)                       \
    BINARY(max_##T, T, T, x > y || x != x ? x : y)                       \
    BINARY(lt_##T, T, m32, MASK(x < y))                                  \
    BINARY(le_##T, T, m32, MASK(x <= y))                                 \
    BINARY(eq_##T, T, m32, MASK(x == y))                                 \
    BINARY(ne_##T, T, m32, MASK(x != y))                                 \
    UNARY(neg_##T, T, T, -x)                                             \
    GATE(T)                                                              \
    UNARY(isnan_##T, T, m32, MASK(x != x))                               \
    UNARY(isfinite_##T, T, m32, MASK(x - x == 0))                        \
    static void where_##T(const code *c, state *s) {                     \
        const m32 *k = REGISTER(m32, c->a);                              \
        const T *a = REGISTER(T, c->b), *b = REGISTER(T, c->c);          \
        T *restrict o = REGISTER(T, c->out);                             \
        const len n = LENGTH(c);                                         \
        if ((c->form & 6) == 0) {                                        \
            for (len i = 0; i < n; i++) {                                \
                const T x = a[i], y = b[i];                              \
                o[i] = k[i] ? x : y;                                     \
            }                                                            \
        } else if ((c->form & 6) == 2) {                                 \
            const T x = a[0];                                            \
            for (len i = 0; i < n; i++) {                                \
                const T y = b[i];                                        \
                o[i] = k[i] ? x : y;                                     \
            }                                                            \
        } else if ((c->form & 6) == 4) {                                 \
            const T y = b[0];                                            \
            for (len i = 0; i < n; i++) {                                \
                const T x = a[i];                                        \
                o[i] = k[i] ? x : y;                                     \
            }                                                            \
        } else {                                                         \
            const T x = a[0], y = b[0];                                  \
            for (len i = 0; i < n; i++) o[i] = k[i] ? x : y;             \
        }                                                                \
    }                                                                    \
    static void constant_##T(const code *c, state *s) {                  \
        f64 value;                                                       \
        memcpy(&value, &c->x, sizeof value);                             \
        REGISTER(T, c->out)[0] = (T)value;                               \
    }

FLOATING(f32)
FLOATING(f64)
UNARY(abs_f32, f32, f32, fabsf(x))
UNARY(abs_f64, f64, f64, fabs(x))
UNARY(sqrt_f32, f32, f32, sqrtf(x))
UNARY(sqrt_f64, f64, f64, sqrt(x))
UNARY(widen_f32, f32, f64, (f64)x)
UNARY(narrow_f64, f64, f32, (f32)x)
UNARY(float_f32, m32, f32, x ? 1.0f : 0.0f)
UNARY(float_f64, m32, f64, x ? 1.0 : 0.0)
BINARY(and_m32, m32, m32, x &y)
BINARY(or_m32, m32, m32, x | y)
BINARY(xor_m32, m32, m32, x ^ y)
UNARY(not_m32, m32, m32, ~x)

/* position <= x, for the indices of elements in the scope */
static void position_le_m32(const code *c, state *s) {
    m32 *restrict o = REGISTER(m32, c->out);
    const int64_t kept = c->x - s->position + 1; /* this many of the tile's elements are at or below x */
    const len n = s->n, edge = kept < 0 ? 0 : kept > n ? n : (len)kept;
    for (len i = 0; i < edge; i++) o[i] = -1;
    for (len i = edge; i < n; i++) o[i] = 0;
}

/* exp and log of the C library differ between machines; these do not. Errors are within one unit in the last place.
 * exp: x = k ln 2 + r, |r| <= ln 2 / 2, by the Taylor polynomial of degree 13 in r. */
static inline f64 exp_one(f64 x) {
    const f64 inside = x < -745.2 ? -745.2 : x > 709.8 ? 709.8 : x;
    const f64 shifter = 0x1.8p52;
    const f64 shifted = inside * 0x1.71547652b82fep0 + shifter;
    const f64 k = shifted - shifter;
    const f64 r = (inside - k * 0x1.62e42fefa0000p-1) - k * 0x1.cf79abc9e3b3ap-40;
    f64 p = 1.0 / 6227020800.0;
    p = p * r + 1.0 / 479001600.0;
    p = p * r + 1.0 / 39916800.0;
    p = p * r + 1.0 / 3628800.0;
    p = p * r + 1.0 / 362880.0;
    p = p * r + 1.0 / 40320.0;
    p = p * r + 1.0 / 5040.0;
    p = p * r + 1.0 / 720.0;
    p = p * r + 1.0 / 120.0;
    p = p * r + 1.0 / 24.0;
    p = p * r + 1.0 / 6.0;
    p = p * r + 0.5;
    p = (p * r) * r + r;
    p = p + 1.0;
    /* Two factors, so that results below the normal range are rounded rather than lost. */
    int64_t whole;
    memcpy(&whole, &shifted, sizeof whole);
    whole = (int64_t)((uint64_t)whole << 12) >> 12; /* the low bits of the sum hold k in two's complement */
    const int64_t half = whole >> 1, rest = whole - half;
    const int64_t one_bits = (int64_t)((uint64_t)(half + 1023) << 52);
    const int64_t other_bits = (int64_t)((uint64_t)(rest + 1023) << 52);
    f64 one, other;
    memcpy(&one, &one_bits, sizeof one);
    memcpy(&other, &other_bits, sizeof other);
    const f64 result = (p * one) * other;
    return x != x ? x : x > 709.79 ? INFINITY : x < -745.14 ? 0.0 : result;
}

/* log: x = 2^k m with m in [sqrt 1/2, sqrt 2); with s = (m - 1) / (m + 1), log m = 2 (s + s^3/3 + s^5/5 + ...). */
static inline f64 log_one(f64 x) {
    const f64 tiny = x < 0x1p-1022 ? x * 0x1p54 : x;
    int64_t bits;
    memcpy(&bits, &tiny, sizeof bits);
    /* Negative values, which are NaN in the end, would overflow as signed. */
    const int64_t from = (int64_t)((uint64_t)bits - 0x3fe6a09e667f3bcd); /* sqrt 1/2 */
    const int64_t exponent = from >> 52;
    const uint64_t mantissa = (uint64_t)bits - ((uint64_t)exponent << 52);
    f64 m;
    memcpy(&m, &mantissa, sizeof m);
    const f64 k = (f64)exponent - (x < 0x1p-1022 ? 54.0 : 0.0);
    const f64 f = m - 1.0, s = f / (2.0 + f), z = s * s;
    f64 p = 2.0 / 23.0;
    p = p * z + 2.0 / 21.0;
    p = p * z + 2.0 / 19.0;
    p = p * z + 2.0 / 17.0;
    p = p * z + 2.0 / 15.0;
    p = p * z + 2.0 / 13.0;
    p = p * z + 2.0 / 11.0;
    p = p * z + 2.0 / 9.0;
    p = p * z + 2.0 / 7.0;
    p = p * z + 2.0 / 5.0;
    p = p * z + 2.0 / 3.0;
    p = p * z;
    /* log(1 + f) = f - (f^2/2 - s (f^2/2 + p)): f and k times the first part of ln 2 are exact, and the correction to
     * them is half as large as that of f - s (f - p), which is off by more than a unit where the two cancel: just
     * beyond sqrt 2 and below sqrt 1/2. */
    const f64 half = 0.5 * f * f;
    const f64 result = k * 0x1.62e42fefa3800p-1 + (f - (half - (s * (half + p) + k * 0x1.ef35793c76730p-45)));
    return x != x || x < 0.0 ? NAN : x == 0.0 ? -INFINITY : x - x != 0.0 ? x : result;
}

UNARY(exp_f64, f64, f64, exp_one(x))
UNARY(log_f64, f64, f64, log_one(x))

/* ---- along a row ------------------------------------------------------------------------------------------- */

#define ACCUMULATE(VALUE)                                                \
    do {                                                                 \
        len i = 0;                                                       \
        f64 part[LANES];                                                 \
        memcpy(part, lanes, sizeof part);                                \
        for (; i + LANES <= n; i += LANES)                               \
            for (int l = 0; l < LANES; l++) {                            \
                const len j = i + l;                                     \
                part[l] += (VALUE);                                      \
            }                                                            \
        for (int l = 0; i + l < n; l++) {                                \
            const len j = i + l;                                         \
            part[l] += (VALUE);                                          \
        }                                                                \
        memcpy(lanes, part, sizeof part);                                \
    } while (0)

static void row_sum_f64(const code *c, state *s) {
    const f64 *a = REGISTER(f64, c->a);
    const len n = s->n;
    f64 lanes[LANES] = {0};
    ACCUMULATE(a[j]);
    REGISTER(f64, c->out)[0] = joined(lanes);
}

#define ROW_MAX(T)                                                       \
    static void row_max_##T(const code *c, state *s) {                   \
        const T *a = REGISTER(T, c->a);                                  \
        T part[LANES];                                                   \
        m32 lost[LANES];                                                 \
        for (int l = 0; l < LANES; l++) part[l] = -INFINITY, lost[l] = 0;\
        len i = 0;                                                       \
        for (; i + LANES <= s->n; i += LANES)                            \
            for (int l = 0; l < LANES; l++) {                            \
                const T x = a[i + l];                                    \
                part[l] = x > part[l] ? x : part[l];                     \
                lost[l] |= MASK(x != x);                                 \
            }                                                            \
        for (int l = 0; i + l < s->n; l++) {                             \
            const T x = a[i + l];                                        \
            part[l] = x > part[l] ? x : part[l];                         \
            lost[l] |= MASK(x != x);                                     \
        }                                                                \
        T result = part[0];                                              \
        m32 nan = 0;                                                     \
        for (int l = 0; l < LANES; l++) {                                \
            result = part[l] > result ? part[l] : result;                \
            nan |= lost[l];                                              \
        }                                                                \
        REGISTER(T, c->out)[0] = nan ? (T)NAN : result;                  \
    }
ROW_MAX(f32)
ROW_MAX(f64)

/* A bit pattern that orders as the value does: zeros of both signs are equal, and so is every NaN, above all others. */
static inline uint32_t order_of(uint32_t bits) {
    const uint32_t size = bits & 0x7fffffff, sign = bits >> 31;
    const uint32_t signed_size = sign ? 0x80000000u - size : 0x80000000u + size;
    return size > 0x7f800000 ? 0xffffffffu : signed_size;
}

/* The rank of every value within the row, from 0 to n - 1; equal values in order of position. Sorts bit patterns by 11
 * bits at a time; digits that all values share are passed over. */
static void row_rank_f32(const code *c, state *s) {
    const uint32_t *a = REGISTER(uint32_t, c->a);
    f32 *o = REGISTER(f32, c->out);
    const len n = s->n;
    uint32_t *histogram = (uint32_t *)(s->scratch + 2 * n);
    uint64_t *from = s->scratch, *to = s->scratch + n;
    memset(histogram, 0, 3 * 2048 * sizeof *histogram);
    for (len i = 0; i < n; i++) {
        const uint32_t key = order_of(a[i]);
        from[i] = (uint64_t)key << 32 | (uint32_t)i;
        histogram[key & 2047]++;
        histogram[2048 + (key >> 11 & 2047)]++;
        histogram[4096 + (key >> 22)]++;
    }
    for (int digit = 0; digit < 3; digit++) {
        uint32_t *count = histogram + 2048 * digit;
        const int shift = 32 + 11 * digit;
        const uint32_t mask = digit == 2 ? 1023 : 2047;
        if (count[from[0] >> shift & mask] == (uint32_t)n) continue;
        uint32_t before = 0;
        for (int i = 0; i < 2048; i++) {
            const uint32_t here = count[i];
            count[i] = before;
            before += here;
        }
        for (len i = 0; i < n; i++) {
            const uint64_t item = from[i];
            to[count[item >> shift & mask]++] = item;
        }
        uint64_t *swap = from;
        from = to;
        to = swap;
    }
    for (len i = 0; i < n; i++) o[(uint32_t)from[i]] = (f32)i;
}

/* ---- random numbers ---------------------------------------------------------------------------------------- */

/* Philox4x32-10 (Salmon et al., SC 2011). Element p takes word p % 4 of counter p / 4; see kernels/philox.py. */
#define WIDTH 16
static void uniform_f32(const code *c, state *s) {
    const uint64_t first = (uint64_t)s->index / 4, last = ((uint64_t)s->index + (uint64_t)s->n + 3) / 4;
    const len skip = (len)((uint64_t)s->index - 4 * first);
    f32 *out = REGISTER(f32, c->out), *to = skip || s->n % (4 * WIDTH) ? (f32 *)s->scratch : out;
    for (uint64_t base = first; base < last; base += WIDTH, to += 4 * WIDTH) {
        uint64_t c0[WIDTH], c1[WIDTH], c2[WIDTH], c3[WIDTH];
        for (int l = 0; l < WIDTH; l++) {
            c0[l] = (base + (uint64_t)l) & 0xffffffff;
            c1[l] = (base + (uint64_t)l) >> 32;
            c2[l] = c3[l] = 0;
        }
        uint64_t k0 = (uint64_t)c->x, k1 = (uint64_t)c->y;
        for (int round = 0; round < 10; round++) {
            for (int l = 0; l < WIDTH; l++) {
                const uint64_t p0 = (c0[l] & 0xffffffff) * 0xD2511F53u, p1 = (c2[l] & 0xffffffff) * 0xCD9E8D57u;
                c0[l] = (p1 >> 32) ^ c1[l] ^ k0;
                c1[l] = p1 & 0xffffffff;
                c2[l] = (p0 >> 32) ^ c3[l] ^ k1;
                c3[l] = p0 & 0xffffffff;
            }
            k0 = (k0 + 0x9E3779B9) & 0xffffffff;
            k1 = (k1 + 0xBB67AE85) & 0xffffffff;
        }
        for (int l = 0; l < WIDTH; l++) {
            to[4 * l] = (f32)(int32_t)(c0[l] >> 8) * 0x1p-24f;
            to[4 * l + 1] = (f32)(int32_t)(c1[l] >> 8) * 0x1p-24f;
            to[4 * l + 2] = (f32)(int32_t)(c2[l] >> 8) * 0x1p-24f;
            to[4 * l + 3] = (f32)(int32_t)(c3[l] >> 8) * 0x1p-24f;
        }
    }
    if (skip || s->n % (4 * WIDTH)) memcpy(out, (f32 *)s->scratch + skip, (size_t)s->n * sizeof *out);
}

/* ---- loads and stores -------------------------------------------------------------------------------------- */

/* Loads count values that are NaN or infinite into counts[y], where y is not negative. */
#define LOAD(name, S, O, EXPRESSION, NONFINITE)                          \
    static void name(const code *c, state *s) {                          \
        const S##_anywhere *restrict a = (const S##_anywhere *)s->inputs[c->a] + s->done; \
        O *restrict o = REGISTER(O, c->out);                             \
        const len n = s->n;                                              \
        uint32_t bad = 0;                                                \
        for (len i = 0; i < n; i++) {                                    \
            const S x = a[i];                                            \
            o[i] = (EXPRESSION);                                         \
            bad += (NONFINITE);                                          \
        }                                                                \
        if (c->y >= 0) s->counts[c->y] += bad;                           \
    }

LOAD(load_bf16_f32, u16, f32, from_bits((uint32_t)x << 16), (x & 0x7f80) == 0x7f80)
LOAD(load_bf16_f64, u16, f64, (f64)from_bits((uint32_t)x << 16), (x & 0x7f80) == 0x7f80)
LOAD(load_f16_f32, u16, f32, from_half(x), (x & 0x7c00) == 0x7c00)
LOAD(load_f16_f64, u16, f64, (f64)from_half(x), (x & 0x7c00) == 0x7c00)
LOAD(load_f32_f32, f32, f32, x, !(x - x == 0))
LOAD(load_f32_f64, f32, f64, (f64)x, !(x - x == 0))
LOAD(load_f64_f64, f64, f64, x, !(x - x == 0))

/* One byte a value, by a table of 256 floats at address x. */
static void load_table_f32(const code *c, state *s) {
    const uint8_t *a = (const uint8_t *)s->inputs[c->a] + s->done;
    const f32 *table = (const f32 *)(uintptr_t)c->x;
    f32 *restrict o = REGISTER(f32, c->out);
    int64_t bad = 0;
    for (len i = 0; i < s->n; i++) {
        o[i] = table[a[i]];
        bad += !(o[i] - o[i] == 0);
    }
    if (c->y >= 0) s->counts[c->y] += bad;
}

/* To nearest, ties to even; a NaN keeps its sign and becomes quiet. */
static inline uint16_t to_bfloat16(f32 value) {
    const uint32_t bits = to_bits(value);
    const uint16_t rounded = (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    return (bits & 0x7fffffff) > 0x7f800000 ? (uint16_t)((bits >> 16 & 0x8000) | 0x7fc0) : rounded;
}
static inline uint16_t to_half(f32 value) {
    const _Float16 half = (_Float16)value;
    uint16_t bits;
    memcpy(&bits, &half, sizeof bits);
    return bits;
}
/* A float64 reduced to float32 such that rounding it once more, to 16 bits, is the correct single rounding. */
static inline f32 to_odd(f64 value) {
    const f32 near = (f32)value;
    uint32_t bits = to_bits(near);
    const int exact = (f64)near == value || value - value != 0;
    bits -= !exact && fabs((f64)near) > fabs(value);
    bits |= !exact;
    return from_bits(bits);
}

/* Stores count results that are NaN or infinite in the output's dtype into counts[y]. */
#define STORE(name, T, O, EXPRESSION, NONFINITE)                         \
    static void name(const code *c, state *s) {                          \
        const T *restrict a = REGISTER(T, c->a);                         \
        O##_anywhere *restrict o = (O##_anywhere *)s->outputs[c->out] + s->done; \
        const len n = s->n;                                              \
        uint32_t bad = 0;                                                \
        if (c->form & 1) {                                               \
            const T x = a[0];                                            \
            const O r = (EXPRESSION);                                    \
            for (len i = 0; i < n; i++) o[i] = r;                        \
            bad = (NONFINITE) ? (uint32_t)n : 0;                         \
        } else {                                                         \
            for (len i = 0; i < n; i++) {                                \
                const T x = a[i];                                        \
                const O r = (EXPRESSION);                                \
                o[i] = r;                                                \
                bad += (NONFINITE);                                      \
            }                                                            \
        }                                                                \
        if (c->y >= 0) s->counts[c->y] += bad;                           \
    }

STORE(store_f32_bf16, f32, u16, to_bfloat16(x), (r & 0x7f80) == 0x7f80)
STORE(store_f32_f16, f32, u16, to_half(x), (r & 0x7c00) == 0x7c00)
STORE(store_f32_f32, f32, f32, x, !(r - r == 0))
STORE(store_f32_f64, f32, f64, (f64)x, !(r - r == 0))
STORE(store_f64_bf16, f64, u16, to_bfloat16(to_odd(x)), (r & 0x7f80) == 0x7f80)
STORE(store_f64_f16, f64, u16, to_half(to_odd(x)), (r & 0x7c00) == 0x7c00)
STORE(store_f64_f32, f64, f32, (f32)x, !(r - r == 0))
STORE(store_f64_f64, f64, f64, x, !(r - r == 0))

/* What a value becomes in a narrower dtype, in the working dtype. */
UNARY(round_bf16_f32, f32, f32, from_bits((uint32_t)to_bfloat16(x) << 16))
UNARY(round_f16_f32, f32, f32, from_half(to_half(x)))
UNARY(round_bf16_f64, f64, f64, (f64)from_bits((uint32_t)to_bfloat16(to_odd(x)) << 16))
UNARY(round_f16_f64, f64, f64, (f64)from_half(to_half(to_odd(x))))

/* ---- reductions -------------------------------------------------------------------------------------------- */

static void sum_f64(const code *c, state *s) {
    const f64 *a = REGISTER(f64, c->a);
    f64 *lanes = s->sums + LANES * c->out;
    const len n = s->n;
    ACCUMULATE(a[j]);
}
static void dot_f64(const code *c, state *s) {
    const f64 *a = REGISTER(f64, c->a), *b = REGISTER(f64, c->b);
    f64 *lanes = s->sums + LANES * c->out;
    const len n = s->n;
    ACCUMULATE(a[j] * b[j]);
}
/* The product of two float32 is exact in float64. */
static void dot_f32(const code *c, state *s) {
    const f32 *a = REGISTER(f32, c->a), *b = REGISTER(f32, c->b);
    f64 *lanes = s->sums + LANES * c->out;
    const len n = s->n;
    ACCUMULATE((f64)a[j] * (f64)b[j]);
}
static void sum_f32(const code *c, state *s) {
    const f32 *a = REGISTER(f32, c->a);
    f64 *lanes = s->sums + LANES * c->out;
    const len n = s->n;
    ACCUMULATE((f64)a[j]);
}

#define COUNT(T)                                                         \
    static void count_##T(const code *c, state *s) {                     \
        const T *a = REGISTER(T, c->a);                                  \
        uint32_t total = 0;                                              \
        for (len i = 0; i < s->n; i++) total += a[i] != 0;               \
        s->counts[c->out] += total;                                      \
    }
COUNT(m32)
COUNT(f32)
COUNT(f64)

/* Selection by rank among non-negative values, whose bit patterns order as they do: adds the number above y to
 * counts[out], and puts those from x to y down behind the counts[b] that are there. Every value is put down, and what
 * comes next takes the place of one that does not count: cheaper than a branch that is taken now and then. There is
 * room for as many as the stretch has elements. */
#define COLLECT(T, U)                                                    \
    static void collect_##T(const code *c, state *s) {                   \
        const U *restrict a = REGISTER(U, c->a);                         \
        const U low = (U)c->x, high = (U)c->y;                           \
        U *restrict to = (U *)s->found[c->c] + s->counts[c->b];          \
        const len n = s->n;                                              \
        U above = 0;                                                     \
        for (len i = 0; i < n; i++) above += a[i] > high;                \
        len next = 0;                                                    \
        for (len i = 0; i < n; i++) {                                    \
            to[next] = a[i];                                             \
            next += (a[i] >= low) & (a[i] <= high);                      \
        }                                                                \
        s->counts[c->out] += (int64_t)above;                             \
        s->counts[c->b] += next;                                         \
    }
COLLECT(f32, uint32_t)
COLLECT(f64, uint64_t)

/* Counts of the patterns from x on, 2^y of them in each of BINS bins. */
#define HISTOGRAM(T, U)                                                  \
    static void histogram_##T(const code *c, state *s) {                 \
        const U *a = REGISTER(U, c->a);                                  \
        const U low = (U)c->x;                                           \
        int64_t *bins = s->found[c->c];                                  \
        for (len i = 0; i < s->n; i++) {                                 \
            const U bin = (a[i] - low) >> c->y;                          \
            if (a[i] >= low && bin < BINS) bins[bin]++;                  \
        }                                                                \
    }
HISTOGRAM(f32, uint32_t)
HISTOGRAM(f64, uint64_t)

/* ---- the machine ------------------------------------------------------------------------------------------- */

#define EACH_OPERATION(X)                                                                                      \
    X(add_f32) X(sub_f32) X(mul_f32) X(div_f32) X(min_f32) X(max_f32) X(lt_f32) X(le_f32) X(eq_f32) X(ne_f32)  \
    X(neg_f32) X(gate_f32) X(isnan_f32) X(isfinite_f32) X(where_f32) X(constant_f32) X(abs_f32) X(sqrt_f32)                \
    X(add_f64) X(sub_f64) X(mul_f64) X(div_f64) X(min_f64) X(max_f64) X(lt_f64) X(le_f64) X(eq_f64) X(ne_f64)  \
    X(neg_f64) X(gate_f64) X(isnan_f64) X(isfinite_f64) X(where_f64) X(constant_f64) X(abs_f64) X(sqrt_f64)                \
    X(widen_f32) X(narrow_f64) X(float_f32) X(float_f64) X(and_m32) X(or_m32) X(xor_m32) X(not_m32)            \
    X(position_le_m32) X(exp_f64) X(log_f64) X(row_sum_f64) X(row_max_f32) X(row_max_f64) X(row_rank_f32)          \
    X(uniform_f32) X(load_bf16_f32) X(load_bf16_f64) X(load_f16_f32) X(load_f16_f64) X(load_f32_f32)           \
    X(load_f32_f64) X(load_f64_f64) X(load_table_f32) X(store_f32_bf16) X(store_f32_f16) X(store_f32_f32)      \
    X(store_f32_f64) X(store_f64_bf16) X(store_f64_f16) X(store_f64_f32) X(store_f64_f64) X(round_bf16_f32)    \
    X(round_f16_f32) X(round_bf16_f64) X(round_f16_f64) X(sum_f64) X(dot_f64) X(dot_f32) X(sum_f32)            \
    X(count_m32) X(count_f32) X(count_f64) X(collect_f32) X(collect_f64) X(histogram_f32) X(histogram_f64)

typedef void operation(const code *, state *);
#define POINTER(name) name,
static operation *const OPERATIONS[] = {EACH_OPERATION(POINTER)};
#define NAME(name) #name,
static const char *const NAMES[] = {EACH_OPERATION(NAME)};

/* The name of an operation, or null beyond the last. */
EXPORT const char *OF_LEVEL(ws_name_)(int64_t op) {
    return op < (int64_t)(sizeof NAMES / sizeof *NAMES) ? NAMES[op] : NULL;
}

/* Runs a program over `count` elements; 0, or 1 where memory is short.
 *
 * Registers hold `tile` values of `item` bytes. The first `once` operations set constants and run before the first
 * tile. A tile is `tile` elements; programs with
 * operations along a row are given tiles of one row. `sums` and `counts` are set, not added to. */
EXPORT int OF_LEVEL(ws_run_)(const code *program, int64_t once, int64_t operations, int64_t registers, int64_t item,
                    int64_t tile, int64_t count, const char *const *inputs, char *const *outputs, f64 *sums, int64_t n_sums,
                    int64_t *counts, int64_t n_counts, int64_t *const *found, int64_t index,
                    int64_t position) {
    const len stride = (len)(((uint64_t)(tile * item) + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT + ALIGNMENT);
    const size_t scratch = ((size_t)tile * 2 + 3 * 2048 + 8 + 4 * WIDTH) * sizeof(uint64_t);
    const size_t lanes = (size_t)n_sums * LANES * sizeof(f64);
    char *memory = malloc((size_t)(stride * registers) + scratch + lanes + 3 * ALIGNMENT);
    if (!memory) return 1;
    char *at = (char *)(((uintptr_t)memory + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
    state s = {.registers = at, .stride = stride, .inputs = inputs, .outputs = outputs, .counts = counts,
               .found = found, .n = 1};
    s.scratch = (uint64_t *)(at + stride * registers);
    s.sums = (f64 *)((char *)s.scratch + (scratch + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
    memset(s.sums, 0, lanes);
    memset(counts, 0, (size_t)n_counts * sizeof *counts);
    for (int64_t i = 0; i < once; i++) OPERATIONS[program[i].op](program + i, &s);
    for (int64_t done = 0; done < count; done += tile) {
        s.done = (len)done;
        s.n = (len)(count - done < tile ? count - done : tile);
        s.index = index + done;
        s.position = position + done;
        for (int64_t i = once; i < operations; i++) OPERATIONS[program[i].op](program + i, &s);
    }
    for (int64_t i = 0; i < n_sums; i++) sums[i] = joined(s.sums + LANES * i);
    free(memory);
    return 0;
}
