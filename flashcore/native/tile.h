/* One tile of attention: KEYS keys, packed so that the registers can stream them, against a few rows of queries. */
#ifndef FLASHCORE_TILE_H
#define FLASHCORE_TILE_H

#include "vector.h"

/* Rows of queries whose scores are held in registers at once, and keys of a tile: both its matrices fit the L1 cache
   for heads of 64. */
#define ROWS 6
#ifndef KEYS
#define KEYS 64
#endif
#define PANEL (LANES * MAX_COLUMNS)

/* Where the numbers come from and how they are multiplied: fp32; bf16 widened to fp32; bf16 two by two in one
   dot-product instruction. "Word" is 32 bits below: a float or a pair of bf16. */
enum { FP32, BF16, PAIRS };

#if defined(__AVX512BF16__) && LANES == 16
#define HAS_PAIRS 1
INLINE vf v_dot_pairs(vf sum, vf a, vf b) {
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}
INLINE void v_store_pairs(float *p, vf first, vf second) {
    *(vf_anywhere *)p = (vf)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
}
#else
#define HAS_PAIRS 0
#endif

/* C[rows, columns vectors] (+)= A[rows, depth words] B[depth words, columns vectors], C in registers meanwhile. */
#define MULTIPLY_ARGUMENTS                                                                                   \
    const float *a, int64_t a_step, const float *b, int64_t b_step, int64_t depth, float *c, int64_t c_step, int add

INLINE void multiply(const int pairs, const int rows, const int columns, MULTIPLY_ARGUMENTS) {
    vf sum[ROWS][MAX_COLUMNS];
    UNROLL for (int i = 0; i < rows; i++) UNROLL for (int j = 0; j < columns; j++)
        sum[i][j] = add ? v_load(c + i * c_step + j * LANES) : (vf){0};
    for (int64_t k = 0; k < depth; k++, b += b_step) {
        vf right[MAX_COLUMNS];
        UNROLL for (int j = 0; j < columns; j++) right[j] = v_load(b + j * LANES);
        UNROLL for (int i = 0; i < rows; i++) {
            vf left = v_set(a[i * a_step + k]);
#if HAS_PAIRS
            if (pairs) {
                UNROLL for (int j = 0; j < columns; j++) sum[i][j] = v_dot_pairs(sum[i][j], right[j], left);
                continue;
            }
#endif
            UNROLL for (int j = 0; j < columns; j++) sum[i][j] += left * right[j];
        }
    }
    UNROLL for (int i = 0; i < rows; i++) UNROLL for (int j = 0; j < columns; j++)
        v_store(c + i * c_step + j * LANES, sum[i][j]);
}

typedef void Multiply(MULTIPLY_ARGUMENTS);

#define DEFINE_MULTIPLY(kind, rows, columns)                                                                 \
    static void multiply_##kind##_##rows##_##columns(MULTIPLY_ARGUMENTS) {                                   \
        multiply(kind, rows, columns, a, a_step, b, b_step, depth, c, c_step, add);                          \
    }
#if MAX_COLUMNS == 4
#define DEFINE_ROWS(kind, rows)                                                                              \
    DEFINE_MULTIPLY(kind, rows, 1)                                                                           \
    DEFINE_MULTIPLY(kind, rows, 2) DEFINE_MULTIPLY(kind, rows, 3) DEFINE_MULTIPLY(kind, rows, 4)
#define NAME_ROWS(kind, rows)                                                                                \
    { multiply_##kind##_##rows##_1, multiply_##kind##_##rows##_2, multiply_##kind##_##rows##_3,              \
      multiply_##kind##_##rows##_4 }
#else
#define DEFINE_ROWS(kind, rows) DEFINE_MULTIPLY(kind, rows, 1) DEFINE_MULTIPLY(kind, rows, 2)
#define NAME_ROWS(kind, rows) { multiply_##kind##_##rows##_1, multiply_##kind##_##rows##_2 }
#endif
#define DEFINE_KIND(kind)                                                                                    \
    DEFINE_ROWS(kind, 1)                                                                                     \
    DEFINE_ROWS(kind, 2) DEFINE_ROWS(kind, 3) DEFINE_ROWS(kind, 4) DEFINE_ROWS(kind, 5) DEFINE_ROWS(kind, 6)
#define NAME_KIND(kind)                                                                                      \
    { NAME_ROWS(kind, 1), NAME_ROWS(kind, 2), NAME_ROWS(kind, 3),                                            \
      NAME_ROWS(kind, 4), NAME_ROWS(kind, 5), NAME_ROWS(kind, 6) }

DEFINE_KIND(0)
#if HAS_PAIRS
DEFINE_KIND(1)
static Multiply *const MULTIPLY[2][ROWS][MAX_COLUMNS] = {NAME_KIND(0), NAME_KIND(1)};
#else
static Multiply *const MULTIPLY[1][ROWS][MAX_COLUMNS] = {NAME_KIND(0)};
#endif

/* What every tile of a call shares. Sizes in words unless they say otherwise. */
typedef struct {
    int kind;
    int64_t head_dim;      /* numbers */
    int64_t depth;         /* of a query or key row */
    int64_t width;         /* of an output row: head_dim rounded up to whole vectors */
    int64_t key_words;     /* of a tile's keys */
    int64_t words;         /* of a tile: keys, then values */
    float factor;          /* on a dot product, to the exponent of 2; with softcap: to the argument of v_tanh_base2 */
    float cap;             /* softcap times log2 e, or 0 */
} Shape;

/* The rows one work item computes, and what is known of them so far. */
typedef struct {
    float *queries;        /* [rows, depth] */
    float *out;            /* [rows, width], not yet divided by the totals */
    float *totals;         /* [rows, LANES], lane by lane */
    float *peaks;          /* [rows] the exponent that counts as 0: within SLACK of the highest score seen */
    int64_t *low, *high;   /* [rows] the keys a row sees */
    float *scores;         /* [ROWS, KEYS] */
    float *weights;        /* [ROWS, KEYS] */
    float *tile;           /* room for a tile nobody has packed */
} Rows;

#define NOTHING_SEEN (-3e38f)
/* Totals may grow to this before a row is rescaled; the usual running maximum would rescale at every new peak. */
#define SLACK 16777216.0f

/* Load up to LANES words of a row of numbers; what lies beyond them reads as zero. */
INLINE vf load_words(const int kind, const char *row, int64_t word, int64_t depth) {
    const int64_t size = kind == BF16 ? 2 : 4;
    const char *from = row + word * size;
    char copy[LANES * 4] = {0};
    if (word + LANES > depth) {
        memcpy(copy, from, (depth - word) * size);
        from = copy;
    }
    return kind == BF16 ? v_widen((const uint16_t *)from) : v_load((const float *)from);
}

/* Pack keys (numbers, rows `step` bytes apart) as [KEYS / PANEL][depth][PANEL]; missing keys of a vector are zero. */
INLINE void pack_keys(const int kind, const Shape *shape, const char *keys, int64_t step, int64_t count, float *to) {
    const int64_t depth = shape->depth;
    for (int64_t key = 0; key < count; key += LANES) {
        float *column = to + key / PANEL * PANEL * depth + key % PANEL;
        for (int64_t word = 0; word < depth; word += LANES) {
            vf block[LANES];
            UNROLL for (int i = 0; i < LANES; i++)
                block[i] = key + i < count ? load_words(kind, keys + (key + i) * step, word, depth) : (vf){0};
            v_transpose(block);
            const int64_t rest = depth - word < LANES ? depth - word : LANES;
            for (int i = 0; i < rest; i++) v_store(column + (word + i) * PANEL, block[i]);
        }
    }
}

/* The output row is computed in panels of at most MAX_COLUMNS vectors, all of about the same width. */
INLINE int64_t panels(const Shape *shape) { return (shape->width + PANEL - 1) / PANEL; }
INLINE int64_t panel_start(const Shape *shape, int64_t panel) {
    return shape->width / LANES * panel / panels(shape) * LANES;
}

/* Pack values as one [KEYS (or pairs of keys)][panel width] after the other. */
INLINE void pack_values(const int kind, const Shape *shape, const char *values, int64_t step, int64_t count, float *to) {
    const int together = kind == PAIRS ? 2 : 1;
    for (int64_t panel = 0; panel < panels(shape); panel++) {
        const int64_t start = panel_start(shape, panel), stop = panel_start(shape, panel + 1);
        for (int64_t key = 0; key < count; key += together)
            for (int64_t column = start; column < stop; column += LANES, to += LANES) {
                const int source = kind == FP32 ? FP32 : BF16;
                vf packed = load_words(source, values + key * step, column, shape->head_dim);
                if (kind == PAIRS) {
                    vf next = {0};
                    if (key + 1 < count) next = load_words(source, values + (key + 1) * step, column, shape->head_dim);
                    packed = (vf)((vu)packed >> 16 | (vu)next);
                }
                v_store(to, packed);
            }
        to += (KEYS / together - (count + together - 1) / together) * (stop - start);
    }
}

static void pack_tile(const Shape *shape, const char *k, int64_t k_step, const char *v, int64_t v_step,
                      int64_t count, float *to) {
#define PACK(kind)                                                                                           \
    pack_keys(kind, shape, k, k_step, count, to), pack_values(kind, shape, v, v_step, count, to + shape->key_words)
    if (shape->kind == FP32) PACK(FP32);
    else if (shape->kind == BF16) PACK(BF16);
    else PACK(PAIRS);
#undef PACK
}

/* Raise a row's peak to the highest of its scores and shrink what was summed under the old one. */
static __attribute__((noinline)) vf raise_peak(const Shape *shape, const Rows *rows, int64_t row, const float *scores,
                                               int64_t count, float factor) {
    vf best = v_set(NOTHING_SEEN);
    for (int64_t i = 0; i < count; i += LANES) best = v_max(best, v_load(scores + i) * factor);
    const float old = rows->peaks[row], highest = v_highest(best), peak = highest > old ? highest : old;
    const vf shrink = v_exp2(v_set(old - peak));
    float *total = rows->totals + row * LANES, *out = rows->out + row * shape->width;
    v_store(total, v_load(total) * shrink);
    for (int64_t i = 0; i < shape->width; i += LANES) v_store(out + i, v_load(out + i) * shrink);
    rows->peaks[row] = peak;
    return v_set(peak);
}

/* Turn `count` scores of a row into weights; returns their sum lane by lane. */
INLINE vf weigh(const Shape *shape, const float *scores, float *weights, int64_t count, vf peak, float factor) {
    vf sum = {0};
#if HAS_PAIRS
    if (shape->kind == PAIRS) {
        for (int64_t i = 0; i < count; i += 2 * LANES) {
            const vf first = v_exp2(v_load(scores + i) * factor - peak);
            const vf second = i + LANES < count ? v_exp2(v_load(scores + i + LANES) * factor - peak) : (vf){0};
            v_store_pairs(weights + i / 2, first, second);
            sum += first + second;
        }
        return sum;
    }
#endif
    for (int64_t i = 0; i < count; i += LANES) {
        const vf weight = v_exp2(v_load(scores + i) * factor - peak);
        v_store(weights + i, weight);
        sum += weight;
    }
    return sum;
}

/* Softmax of one row of the tile; `first` is the index of its first score's key. */
INLINE void soften(const Shape *shape, const Rows *rows, int64_t row, float *scores, float *weights, int64_t first,
                   int64_t count) {
    const int64_t low = rows->low[row] - first, high = rows->high[row] - first;
    float factor = shape->factor;
    if (shape->cap) {
        for (int64_t i = 0; i < count; i += LANES)
            v_store(scores + i, v_tanh_base2(v_load(scores + i) * factor) * shape->cap);
        factor = 1;
    }
    if (low > 0 || high < count)
        for (int64_t i = 0; i < count; i++)
            if (i < low || i >= high) scores[i] = -__builtin_inff();
    vf sum = weigh(shape, scores, weights, count, v_set(rows->peaks[row]), factor);
    if (v_any(~(sum <= SLACK)))
        sum = weigh(shape, scores, weights, count, raise_peak(shape, rows, row, scores, count, factor), factor);
    float *total = rows->totals + row * LANES;
    v_store(total, v_load(total) + sum);
}

/* Let `count` rows from `row` on attend to the keys [from, to) of a packed tile whose first key is `first`. */
static void attend_tile(const Shape *shape, const Rows *rows, int64_t row, int64_t count, const float *tile,
                        int64_t first, int64_t from, int64_t to) {
    const int pairs = shape->kind == PAIRS, together = pairs ? 2 : 1;
    Multiply *const *kernels = MULTIPLY[pairs][count - 1];
    const int64_t start = (from - first) / PANEL * PANEL;
    for (int64_t key = start; first + key < to; key += PANEL) {
        const int64_t left = (to - first - key + LANES - 1) / LANES, columns = left < MAX_COLUMNS ? left : MAX_COLUMNS;
        kernels[columns - 1](rows->queries + row * shape->depth, shape->depth, tile + key * shape->depth, PANEL,
                             shape->depth, rows->scores + key, KEYS, 0);
    }
    const int64_t wide = (to - first - start + LANES - 1) / LANES * LANES;
    for (int64_t i = 0; i < count; i++)
        soften(shape, rows, row + i, rows->scores + i * KEYS + start, rows->weights + (i * KEYS + start) / together,
               first + start, wide);
    const int64_t begin = (from - first) / together, end = (to - first + together - 1) / together;
    for (int64_t panel = 0; panel < panels(shape); panel++) {
        const int64_t at = panel_start(shape, panel), width = panel_start(shape, panel + 1) - at;
        const float *values = tile + shape->key_words + at * (KEYS / together) + begin * width;
        kernels[width / LANES - 1](rows->weights + begin, KEYS / together, values, width, end - begin,
                                   rows->out + row * shape->width + at, shape->width, 1);
    }
}

#endif
