/* How models differ from their base and from each other, in one pass: what a report needs to know of every entry.
 *
 * A tile of the base and of every model is widened to float32 and taken apart into task vectors (model - base); what is
 * asked of them is then computed from the tile, which stays in a core's first cache. Kept as one kernel rather than a
 * program of the machine: a program would read its registers again for each of some forty sums.
 */
#include "numbers.h"

#define TILE 256
#define HALF 8 /* lanes of a product's sum: four of them fit the registers of every level */
/* Beyond it, sums of magnitudes in float32 might overflow: such an entry is left out as if it were infinite. */
#define LARGEST 0x1p100f

enum { BF16, F16, F32 };

/* The product of two float32 is exact in float64: fused or not, the sum is the same. */
#ifdef __FMA__
#define ADD_PRODUCT(sum, x, y) __builtin_fma(x, y, sum)
#else
#define ADD_PRODUCT(sum, x, y) ((sum) + (x) * (y))
#endif

static void load(f32 *restrict to, const char *from, int64_t kind, len n) {
    const u16_anywhere *halves = (const u16_anywhere *)from;
    const f32_anywhere *singles = (const f32_anywhere *)from;
    if (kind == BF16)
        for (len i = 0; i < n; i++) to[i] = from_bits((uint32_t)halves[i] << 16);
    else if (kind == F16)
        for (len i = 0; i < n; i++) to[i] = from_half(halves[i]);
    else
        for (len i = 0; i < n; i++) to[i] = singles[i];
    for (len i = n; i < TILE; i++) to[i] = 0;
}

/* Marks entries that are NaN, infinite or too large, and counts the first two kinds. */
static void mark(const f32 *w, uint8_t *bad, int64_t *nan, int64_t *infinite) {
    for (len i = 0; i < TILE; i++) {
        bad[i] |= !(fabsf(w[i]) <= LARGEST);
        *nan += w[i] != w[i];
        *infinite += fabsf(w[i]) == INFINITY;
    }
}

static int within(const f32 *w) {
    uint32_t beyond = 0;
    for (len i = 0; i < TILE; i++) beyond |= !(fabsf(w[i]) <= LARGEST);
    return !beyond;
}

/* A sum is kept in lanes until the end of the stretch, so that nothing is joined for every tile. */
typedef struct {
    f64 lanes[LANES];
} sum;

/* The sums of the products of two vectors with two others: what is loaded is used twice. */
static void products(const f64 *restrict a0, const f64 *restrict a1, const f64 *restrict b0, const f64 *restrict b1,
                     sum *s00, sum *s01, sum *s10, sum *s11) {
    f64 p00[HALF], p01[HALF], p10[HALF], p11[HALF];
    memcpy(p00, s00->lanes, sizeof p00);
    memcpy(p01, s01->lanes, sizeof p01);
    memcpy(p10, s10->lanes, sizeof p10);
    memcpy(p11, s11->lanes, sizeof p11);
    for (len i = 0; i < TILE; i += HALF)
        for (int l = 0; l < HALF; l++) {
            const f64 x0 = a0[i + l], x1 = a1[i + l], y0 = b0[i + l], y1 = b1[i + l];
            p00[l] = ADD_PRODUCT(p00[l], x0, y0);
            p01[l] = ADD_PRODUCT(p01[l], x0, y1);
            p10[l] = ADD_PRODUCT(p10[l], x1, y0);
            p11[l] = ADD_PRODUCT(p11[l], x1, y1);
        }
    memcpy(s00->lanes, p00, sizeof p00);
    memcpy(s01->lanes, p01, sizeof p01);
    memcpy(s10->lanes, p10, sizeof p10);
    memcpy(s11->lanes, p11, sizeof p11);
}

/* Adds float32 of one sign, TILE / LANES in each lane, to a sum: exact to a millionth. */
#define ADD_UP(SUM, VALUE)                                               \
    do {                                                                 \
        f32 part[LANES] = {0};                                           \
        for (len i = 0; i < TILE; i += LANES)                            \
            for (int l = 0; l < LANES; l++) {                            \
                const len j = i + l;                                     \
                part[l] += (VALUE);                                      \
            }                                                            \
        for (int l = 0; l < LANES; l++) (SUM)->lanes[l] += part[l];      \
    } while (0)

static void add_mass(sum *to, const f32 *restrict a) { ADD_UP(to, fabsf(a[j])); }
static void add_mass_of_two(sum *to, const f32 *restrict a, const f32 *restrict b) { ADD_UP(to, fabsf(a[j] + b[j])); }
/* Twice what lies against the elected signs, which are 1, -1, or 0 where none is: half of an entry is against none. */
static void add_against(sum *to, const f32 *restrict a, const f32 *restrict signs) {
    ADD_UP(to, fabsf(a[j]) - a[j] * signs[j]);
}

/* Which entries of a tile something holds for: a bit for each. */
#define WORDS (TILE / 64)
typedef struct {
    uint64_t words[WORDS];
} set;

/* Sixteen comparisons give sixteen bits: one instruction where there is a name for it. */
#if defined(__clang__)
typedef f32 f32x16 __attribute__((vector_size(64)));
typedef _Bool boolx16 __attribute__((ext_vector_type(16)));
#define BITS(X, Y, COMPARISON)                                           \
    f32x16 x, y;                                                         \
    memcpy(&x, (X), sizeof x);                                           \
    memcpy(&y, (Y), sizeof y);                                           \
    const boolx16 holds = __builtin_convertvector(COMPARISON, boolx16);  \
    uint16_t bits;                                                       \
    memcpy(&bits, &holds, sizeof bits);                                  \
    return bits
#else
#define BITS(X, Y, COMPARISON)                                           \
    uint64_t bits = 0;                                                   \
    for (int l = 0; l < 16; l++) {                                       \
        const f32 x = (X)[l], y = (Y)[l];                                \
        bits |= (uint64_t)(COMPARISON) << l;                             \
    }                                                                    \
    return bits
#endif
static inline uint64_t bits_above(const f32 *a, const f32 *b) { BITS(a, b, x > y); }
static inline uint64_t bits_equal(const f32 *a, const f32 *b) { BITS(a, b, x == y); }

#define FILL(SET, FOUND)                                                 \
    for (len w = 0; w < WORDS; w++) {                                    \
        uint64_t word = 0;                                               \
        for (len at = 0; at < 64; at += 16) {                            \
            const len i = 64 * w + at;                                   \
            word |= (FOUND) << at;                                       \
        }                                                                \
        (SET).words[w] = word;                                           \
    }

static const f32 NOTHING[16];

static int64_t size_of(const set *a) {
    int64_t size = 0;
    for (len w = 0; w < WORDS; w++) size += __builtin_popcountll(a->words[w]);
    return size;
}
static int64_t size_of_both(const set *a, const set *b) {
    int64_t size = 0;
    for (len w = 0; w < WORDS; w++) size += __builtin_popcountll(a->words[w] & b->words[w]);
    return size;
}
static int64_t count_equal(const f32 *a, const f32 *b) {
    set equal;
    FILL(equal, bits_equal(a + i, b + i));
    return size_of(&equal);
}

static f32 largest(const f32 *restrict a) {
    f32 part[LANES] = {0};
    for (len i = 0; i < TILE; i += LANES)
        for (int l = 0; l < LANES; l++) {
            const f32 x = fabsf(a[i + l]);
            part[l] = x > part[l] ? x : part[l];
        }
    f32 found = 0;
    for (int l = 0; l < LANES; l++) found = part[l] > found ? part[l] : found;
    return found;
}

/* Measures a stretch; 0, or 1 where memory is short.
 *
 * inputs[0] is the base, and models follow, of which the first `voters` elect signs; what comes after is compared with
 * all but elects none. kinds: BF16, F16 or F32 of each. v = models + 1 vectors: the base and the task vectors.
 *
 * sums, set: products of each two of the v vectors, (0,0) (0,1) … (0,v-1) (1,1) …; the mass of each task vector; the
 * mass of the sum of all voters; twice what of each voter lies against the sign of that; the mass of the sum of each two
 * voters, (0,1) (0,2) … (1,2) ….
 * counts, set: entries that are finite everywhere; for the base and every model NaN, then infinities; entries moved by
 * each model; entries that at least two voters move, and of these those that they move in two directions; then for
 * each two voters entries that are equal, that both move, and that both move in one direction.
 * peaks, set: largest magnitude of each task vector. */
EXPORT int OF_LEVEL(ws_measure_)(int64_t models, int64_t voters, const char *const *inputs, const int64_t *kinds,
                                 int64_t count, f64 *sums, int64_t n_sums, int64_t *counts, int64_t n_counts,
                                 f32 *peaks) {
    const len v = (len)models + 1, n = (len)models, electing = (len)voters;
    /* Products are formed for two vectors at a time: one more than there are, or none, is zero. */
    const len even = v + v % 2;
    const size_t lanes = ((size_t)n_sums + 1) * sizeof(sum), doubles = (size_t)even * TILE * sizeof(f64);
    const size_t singles = (size_t)(v + n + 1) * TILE * sizeof(f32), sets = 3 * (size_t)n * sizeof(set);
    char *memory = malloc(lanes + doubles + singles + sets + ALIGNMENT);
    if (!memory) return 1;
    sum *first = (sum *)(((uintptr_t)memory + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT), unused;
    f64 *wide = (f64 *)(first + n_sums + 1);
    f32 *weights = (f32 *)(wide + even * TILE), *tau = weights + v * TILE, *total = tau + n * TILE;
    set *up = (set *)(total + TILE), *down = up + n, *moved = down + n;
    memset(first, 0, lanes);
    memset(&unused, 0, sizeof unused);
    memset(wide, 0, doubles);
    memset(counts, 0, (size_t)n_counts * sizeof *counts);
    memset(peaks, 0, (size_t)n * sizeof *peaks);

    for (len done = 0; done < (len)count; done += TILE) {
        const len here = (len)count - done < TILE ? (len)count - done : TILE;
        int clean = 1;
        for (len k = 0; k < v; k++) {
            load(weights + k * TILE, inputs[k] + done * (kinds[k] == F32 ? 4 : 2), kinds[k], here);
            clean &= within(weights + k * TILE);
        }
        len absent = TILE - here;
        if (!clean) {
            uint8_t bad[TILE] = {0};
            for (len k = 0; k < v; k++) mark(weights + k * TILE, bad, counts + 1 + k, counts + 1 + v + k);
            for (len k = 0; k < v; k++)
                for (len i = 0; i < TILE; i++) weights[k * TILE + i] = bad[i] ? 0 : weights[k * TILE + i];
            for (len i = 0; i < TILE; i++) absent += bad[i];
        }
        counts[0] += TILE - absent;

        for (len i = 0; i < TILE; i++) wide[i] = weights[i];
        for (len k = 0; k < n; k++) {
            const f32 *restrict w = weights + (k + 1) * TILE;
            f32 *restrict t = tau + k * TILE;
            f64 *restrict wider = wide + (k + 1) * TILE;
            for (len i = 0; i < TILE; i++) {
                t[i] = w[i] - weights[i];
                wider[i] = t[i];
            }
            const f32 peak = largest(t);
            peaks[k] = peak > peaks[k] ? peak : peaks[k];
        }

        for (len a = 0; a < v; a += 2)
            for (len b = a; b < v; b += 2) {
                /* Rows of the triangle follow one another: row a begins behind v + (v - 1) + … products. */
                sum *row0 = first + a * v - a * (a - 1) / 2 - a, *row1 = row0 + v - a - 1;
                products(wide + a * TILE, wide + (a + 1) * TILE, wide + b * TILE, wide + (b + 1) * TILE, row0 + b,
                         b + 1 < v ? row0 + b + 1 : &unused, a < b ? row1 + b : &unused,
                         b + 1 < v ? row1 + b + 1 : &unused);
            }
        sum *to = first + v * (v + 1) / 2;
        for (len k = 0; k < n; k++) add_mass(to++, tau + k * TILE);

        int64_t *number = counts + 1 + 2 * v;
        for (len k = 0; k < n; k++) {
            const f32 *t = tau + k * TILE;
            FILL(up[k], bits_above(t + i, NOTHING));
            FILL(down[k], bits_above(NOTHING, t + i));
            for (len w = 0; w < WORDS; w++) moved[k].words[w] = up[k].words[w] | down[k].words[w];
            *number++ += size_of(moved + k);
        }
        if (electing < 2) continue;

        set one = {{0}}, two = {{0}}, ups = {{0}}, downs = {{0}};
        memset(total, 0, TILE * sizeof *total);
        for (len k = 0; k < electing; k++) {
            const f32 *restrict t = tau + k * TILE;
            for (len i = 0; i < TILE; i++) total[i] += t[i];
            for (len w = 0; w < WORDS; w++) {
                two.words[w] |= one.words[w] & moved[k].words[w];
                one.words[w] |= moved[k].words[w];
                ups.words[w] |= up[k].words[w];
                downs.words[w] |= down[k].words[w];
            }
        }
        add_mass(to++, total);
        for (len i = 0; i < TILE; i++) total[i] = (f32)((total[i] > 0) - (total[i] < 0));
        for (len k = 0; k < electing; k++) add_against(to++, tau + k * TILE, total);
        *number++ += size_of(&two);
        *number++ += size_of_both(&ups, &downs);
        for (len a = 0; a < electing; a++)
            for (len b = a + 1; b < electing; b++) {
                add_mass_of_two(to++, tau + a * TILE, tau + b * TILE);
                *number++ += count_equal(weights + (a + 1) * TILE, weights + (b + 1) * TILE) - absent;
                *number++ += size_of_both(moved + a, moved + b);
                *number++ += size_of_both(up + a, up + b) + size_of_both(down + a, down + b);
            }
    }
    for (int64_t i = 0; i < n_sums; i++) sums[i] = joined(first[i].lanes);
    free(memory);
    return 0;
}

#define MIX(WORDS)                                                       \
    for (int l = 0; l < STRANDS; l++) {                                  \
        const uint64_t x = (WORDS)[l] ^ key[l];                          \
        any[l] |= (WORDS)[l] & mask;                                     \
        state[l] += (WORDS)[l] + (x & 0xffffffff) * (x >> 32);           \
        key[l] += 0xD1B54A32D192ED03u;                                   \
    }

/* A hash of each row's bytes, and whether all its values are zero of either sign.
 *
 * The two halves of every eight bytes are multiplied with each other, each under a key of its place. mask: the bits of
 * eight bytes that are not signs. */
EXPORT void OF_LEVEL(ws_rows_)(const char *rows, int64_t count, int64_t nbytes, uint64_t mask, uint64_t *hashes,
                               uint8_t *zero) {
    enum { STRANDS = 8 };
    const uint64_t odd = 0x9E3779B97F4A7C15u;
    for (int64_t row = 0; row < count; row++, rows += nbytes) {
        uint64_t state[STRANDS] = {0}, any[STRANDS] = {0}, key[STRANDS];
        for (int l = 0; l < STRANDS; l++) key[l] = odd * (uint64_t)(l + 1);
        int64_t at = 0;
        for (; at + 8 * STRANDS <= nbytes; at += 8 * STRANDS) {
            uint64_t words[STRANDS];
            memcpy(words, rows + at, sizeof words);
            MIX(words);
        }
        if (at < nbytes) {
            uint64_t words[STRANDS] = {0};
            memcpy(words, rows + at, (size_t)(nbytes - at));
            MIX(words);
        }
        uint64_t hash = (uint64_t)nbytes, found = 0;
        for (int l = 0; l < STRANDS; l++) {
            hash = (hash ^ state[l]) * odd;
            hash ^= hash >> 29;
            found |= any[l];
        }
        hashes[row] = hash;
        zero[row] = !found;
    }
}
