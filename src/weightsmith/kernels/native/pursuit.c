/* Orthogonal matching pursuit of many targets among the same atoms; see transplantation/pursuit.py.
 *
 * The inner products of all atoms with the residual are estimated from rows of the atoms' Gram matrix, kept as 16-bit
 * cosines, with a bound on the error. The atoms that the bound leaves are compared in float64, so that the picks are
 * those of float64 whatever the estimates were made with. Everything that reaches a result is one IEEE 754 operation
 * after another in float64, in an order that neither the processor nor the level changes.
 */
#include "numbers.h"

/* Where a bound of the error stands beside them, products and sums may be rounded once. */
#ifdef __clang__
#define CONTRACT _Pragma("clang fp contract(fast)")
#else
#define CONTRACT
#endif

#define TILE 1024
#define COLUMNS 256
#define COSINE 32767.0 /* a cosine of 1 in the Gram matrix */
#define UNIT 0x1p-24   /* of the rounding of float32 */

/* Laid out as Job in kernels/pursuit.py. */
typedef struct {
    const f32 *atoms;     /* [S, d] */
    const f32 *norms;     /* [S] of the atoms */
    const int16_t *gram;  /* [R, S] cosines */
    const int32_t *slots; /* [S] an atom's row of gram, or -1 */
    int64_t count, width, most;
    int64_t crowd;        /* candidates beyond which better estimates are asked for */
    f64 product_error;    /* of an estimate in base, as a share of both norms */
    f64 cosine_error;     /* of a cosine in gram */
    f64 done;             /* norm of a residual, as a share of the target's, that is zero but for rounding */
    f64 least;            /* inner product, as a share of both norms, that is zero but for rounding */
    f64 dependent;        /* squared sine of the angle to the picked atoms' span that is zero but for rounding */
    /* Of every target: */
    const f32 *targets;   /* [B, d] */
    f32 *base;            /* [B, S] inner products of the atoms with `residual` as it was; NaN for an atom to leave */
    f64 *base_norm;       /* [B] norm of that residual */
    f64 *base_weights;    /* [B, k] the weights then */
    int32_t *picked;      /* [B, k] */
    f64 *weights;         /* [B, k] */
    f64 *lower;           /* [B, k, k] Cholesky's factor of the picked atoms' Gram matrix */
    f64 *solved;          /* [B, k] lower^-1 times the picked atoms' products with the target */
    int32_t *steps;       /* [B] how many atoms are picked */
    int32_t *waiting;     /* [B] for what */
    f64 *residual;        /* [B, d] */
    f64 *left;            /* [B] norm of the residual as a share of the target's, where it is done */
} job;

enum { RUNNING, DONE, WANTS_ROW, WANTS_BASE };

/* ---- what reaches a result: float64 in a fixed order ---------------------------------------------------------- */

#define DOT(name, T)                                                                            \
    static f64 name(const T *restrict a, const f32 *restrict b, int64_t n) {                    \
        f64 part[LANES] = {0};                                                                  \
        int64_t i = 0;                                                                          \
        for (; i + LANES <= n; i += LANES)                                                      \
            for (int l = 0; l < LANES; l++) part[l] += (f64)a[i + l] * (f64)b[i + l];           \
        for (int l = 0; i + l < n; l++) part[l] += (f64)a[i + l] * (f64)b[i + l];               \
        return joined(part);                                                                    \
    }
DOT(dot_f32, f32)
DOT(dot_f64, f64)

static f64 norm(const f64 *a, int64_t n) {
    f64 part[LANES] = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int l = 0; l < LANES; l++) part[l] += a[i + l] * a[i + l];
    for (int l = 0; i + l < n; l++) part[l] += a[i + l] * a[i + l];
    return sqrt(joined(part));
}

/* The target less what is picked of it. */
static void make_residual(const job *w, int64_t t) {
    const int64_t d = w->width;
    const int32_t steps = w->steps[t], *picked = w->picked + t * w->most;
    const f64 *weights = w->weights + t * w->most;
    for (int64_t from = 0; from < d; from += COLUMNS) {
        const int64_t n = d - from < COLUMNS ? d - from : COLUMNS;
        const f32 *target = w->targets + t * d + from;
        f64 part[COLUMNS];
        for (int64_t c = 0; c < n; c++) part[c] = target[c];
        for (int32_t i = 0; i < steps; i++) {
            const f64 weight = weights[i];
            const f32 *atom = w->atoms + picked[i] * d + from;
            for (int64_t c = 0; c < n; c++) part[c] -= weight * (f64)atom[c];
        }
        memcpy(w->residual + t * d + from, part, (size_t)n * sizeof *part);
    }
}

/* Adds an atom to those that are picked and fits all weights anew; 0 where it adds nothing to their span. */
static int add(const job *w, int64_t t, int32_t atom) {
    const int64_t k = w->most, d = w->width;
    const int32_t steps = w->steps[t];
    f64 *lower = w->lower + t * k * k, *row = lower + steps * k, *solved = w->solved + t * k;
    f64 *weights = w->weights + t * k;
    int32_t *picked = w->picked + t * k;
    const f32 *new = w->atoms + atom * d;
    const f64 square = dot_f32(new, new, d);
    f64 pivot = square, rest = dot_f32(w->targets + t * d, new, d);
    for (int32_t i = 0; i < steps; i++) {
        f64 value = dot_f32(new, w->atoms + picked[i] * d, d);
        for (int32_t j = 0; j < i; j++) value -= row[j] * lower[i * k + j];
        row[i] = value / lower[i * k + i];
        pivot -= row[i] * row[i];
        rest -= row[i] * solved[i];
    }
    if (!(pivot > w->dependent * square)) return 0;
    row[steps] = sqrt(pivot);
    solved[steps] = rest / row[steps];
    picked[steps] = atom;
    for (int32_t i = steps; i >= 0; i--) {
        f64 value = solved[i];
        for (int32_t j = i + 1; j <= steps; j++) value -= lower[j * k + i] * weights[j];
        weights[i] = value / lower[i * k + i];
    }
    w->steps[t] = steps + 1;
    return 1;
}

/* ---- estimates ------------------------------------------------------------------------------------------------ */

/* What |<residual, atom>| is at most for every atom, and for the atoms of every tile; returns what it is at least for
 * the best of them. */
static f32 estimate(const job *w, int64_t t, f32 *restrict upper, f32 *restrict tiles) {
    CONTRACT
    const int64_t k = w->most;
    const int32_t steps = w->steps[t];
    f32 scales[steps + 1];
    const int16_t *rows[steps + 1];
    f64 moved = 0;
    int32_t used = 0;
    for (int32_t i = 0; i < steps; i++) {
        const int32_t atom = w->picked[t * k + i];
        const f64 change = (w->weights[t * k + i] - w->base_weights[t * k + i]) * w->norms[atom];
        if (change == 0) continue;
        moved += fabs(change);
        scales[used] = (f32)(change / COSINE);
        rows[used++] = w->gram + w->slots[atom] * w->count;
    }
    const f64 start = w->base_norm[t];
    /* 1.001 is for norms that were rounded, and for terms of second order. */
    const f32 error = (f32)(1.001 * (start * (w->product_error + 8 * UNIT) + moved * (w->cosine_error + (used + 12) * UNIT)));
    const f32 *base = w->base + t * w->count;
    f32 best = -INFINITY;
    for (int64_t from = 0; from < w->count; from += TILE) {
        const int64_t n = w->count - from < TILE ? w->count - from : TILE;
        f32 sum[TILE];
        for (int64_t s = 0; s < n; s++) sum[s] = 0;
        int32_t i = 0;
        for (; i + 4 <= used; i += 4) {
            const int16_t *restrict a = rows[i] + from, *restrict b = rows[i + 1] + from;
            const int16_t *restrict c = rows[i + 2] + from, *restrict d = rows[i + 3] + from;
            const f32 x = scales[i], y = scales[i + 1], z = scales[i + 2], v = scales[i + 3];
            for (int64_t s = 0; s < n; s++)
                sum[s] += (x * (f32)a[s] + y * (f32)b[s]) + (z * (f32)c[s] + v * (f32)d[s]);
        }
        for (; i < used; i++) {
            const int16_t *restrict a = rows[i] + from;
            const f32 x = scales[i];
            for (int64_t s = 0; s < n; s++) sum[s] += x * (f32)a[s];
        }
        f32 most[LANES], least[LANES];
        for (int l = 0; l < LANES; l++) most[l] = least[l] = -INFINITY;
        /* Comparisons with NaN are false: atoms to leave are never the best. */
        #define BOUND(s, l)                                                                     \
            do {                                                                                \
                const f32 value = fabsf(base[from + (s)] - w->norms[from + (s)] * sum[s]);      \
                const f32 off = error * w->norms[from + (s)];                                   \
                upper[from + (s)] = value + off;                                                \
                most[l] = value + off > most[l] ? value + off : most[l];                        \
                least[l] = value - off > least[l] ? value - off : least[l];                     \
            } while (0)
        int64_t s = 0;
        for (; s + LANES <= n; s += LANES)
            for (int l = 0; l < LANES; l++) BOUND(s + l, l);
        for (int l = 0; s + l < n; l++) BOUND(s + l, l);
        for (int l = 1; l < LANES; l++) {
            most[0] = most[l] > most[0] ? most[l] : most[0];
            least[0] = least[l] > least[0] ? least[l] : least[0];
        }
        tiles[from / TILE] = most[0];
        best = least[0] > best ? least[0] : best;
    }
    return best;
}

/* Collects the atoms that may be the best one, in rising order; returns how many there are. */
static int64_t candidates(const job *w, const f32 *upper, const f32 *tiles, f32 bound, int32_t *found) {
    int64_t n = 0;
    for (int64_t from = 0; from < w->count; from += TILE) {
        if (!(tiles[from / TILE] >= bound)) continue;
        const int64_t end = w->count - from < TILE ? w->count : from + TILE;
        for (int64_t s = from; s < end; s++)
            if (upper[s] >= bound) found[n++] = (int32_t)s;
    }
    return n;
}

/* ---- the pursuit ---------------------------------------------------------------------------------------------- */

static int finish(const job *w, int64_t t, f64 size) {
    make_residual(w, t);
    w->left[t] = size > 0 ? norm(w->residual + t * w->width, w->width) / size : 0;
    return DONE;
}

/* Whether a target is a multiple of an atom, which then is all it takes: the first such atom. */
static int alone(const job *w, int64_t t, f64 size) {
    const int64_t d = w->width;
    const f32 *base = w->base + t * w->count, *target = w->targets + t * d;
    const f32 least = (f32)(size * (1 - 2 * w->product_error - 1e-6));
    for (int64_t s = 0; s < w->count; s++) {
        if (!(fabsf(base[s]) >= least * w->norms[s]) || w->norms[s] == 0) continue;
        const f32 *atom = w->atoms + s * d;
        w->picked[t * w->most] = (int32_t)s;
        w->weights[t * w->most] = dot_f32(target, atom, d) / dot_f32(atom, atom, d);
        w->steps[t] = 1;
        make_residual(w, t);
        if (norm(w->residual + t * d, d) <= w->done * size) return 1;
        w->picked[t * w->most] = -1;
        w->weights[t * w->most] = 0;
        w->steps[t] = 0;
    }
    return 0;
}

/* Takes a target on as far as it goes; returns what it waits for. */
static int pursue(const job *w, int64_t t, f32 *upper, f32 *tiles, int32_t *found) {
    const int64_t k = w->most, d = w->width;
    const f32 *target = w->targets + t * d;
    f64 *residual = w->residual + t * d;
    const f64 square = dot_f32(target, target, d), size = sqrt(square);
    if (size > 0 && w->steps[t] == 0 && alone(w, t, size)) return finish(w, t, size);
    for (;;) {
        const int32_t steps = w->steps[t];
        f64 rest = square;
        for (int32_t i = 0; i < steps; i++) rest -= w->solved[t * k + i] * w->solved[t * k + i];
        /* What is left of the squares is no better than their rounding: where little is left it is measured. */
        if (steps && rest < 1e-6 * square) {
            make_residual(w, t);
            if (norm(residual, d) <= w->done * size) return finish(w, t, size);
        }
        if (steps == k || size == 0) return finish(w, t, size);
        int moved = 0;
        for (int32_t i = 0; i < steps; i++) {
            if (w->weights[t * k + i] == w->base_weights[t * k + i]) continue;
            moved = 1;
            if (w->slots[w->picked[t * k + i]] < 0) return WANTS_ROW;
        }
        const f32 bound = estimate(w, t, upper, tiles);
        const int64_t n = candidates(w, upper, tiles, bound, found);
        if (n > w->crowd && moved) {
            make_residual(w, t);
            return WANTS_BASE;
        }
        if (n == 0) return finish(w, t, size);
        int32_t best = found[0];
        f64 most = bound;
        if (n > 1 || !(most > 2 * w->least * size * (f64)w->norms[best])) {
            make_residual(w, t);
            most = -1;
            for (int64_t c = 0; c < n; c++) {
                const f64 product = fabs(dot_f64(residual, w->atoms + found[c] * d, d));
                if (product > most) most = product, best = found[c];
            }
            if (!(most > w->least * size * (f64)w->norms[best])) return finish(w, t, size);
        }
        w->base[t * w->count + best] = NAN;
        add(w, t, best);
    }
}

/* Takes targets `first` to `last` on, those that are not done; 0, or 1 where memory is short. */
EXPORT int OF_LEVEL(ws_pursue_)(const job *w, int64_t first, int64_t last) {
    const size_t tiles = (size_t)((w->count + TILE - 1) / TILE);
    f32 *upper = malloc(((size_t)w->count * 2 + tiles) * sizeof(f32));
    if (!upper) return 1;
    for (int64_t t = first; t < last; t++)
        if (w->waiting[t] != DONE)
            w->waiting[t] = pursue(w, t, upper, upper + 2 * w->count, (int32_t *)(upper + w->count));
    free(upper);
    return 0;
}
