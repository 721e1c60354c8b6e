/* One tile of attention: KEYS keys against a few rows of queries. */
#ifndef FLASHCORE_TILE_H
#define FLASHCORE_TILE_H

#include "multiply.h"

/* Keys of a tile. A few more than fit the L1 cache pay off: rows are loaded and stored once per tile. */
#define KEYS 128
#define PANEL (LANES * MAX_COLUMNS)

/* How the numbers come and are multiplied: fp32; bf16 widened to fp32; bf16 in pairs. */
enum { FP32, BF16, PAIRS };

/* What every tile of a call shares. A word is 32 bits: a float or a pair of bf16. */
typedef struct {
    int kind;
    int64_t head_dim;      /* numbers */
    int64_t depth;         /* words of a packed key */
    int64_t width;         /* floats of an output row: head_dim rounded up to whole vectors */
    int64_t key_words;     /* of a packed tile's keys */
    int64_t words;         /* of a packed tile: keys, then values */
    float factor;          /* on a dot product, to the exponent of 2; with softcap to the argument of v_tanh_base2 */
    float cap;             /* softcap times log2 e, or 0 */
} Shape;

/* The rows one work item computes, and what is known of them so far. */
typedef struct {
    int direct;            /* keys and values are read where the caller has them, not packed */
    int kind;
    int64_t depth;         /* words of a row of queries */
    float *queries;        /* [rows, depth] */
    float *out;            /* [rows, width], not yet divided by the totals */
    float *totals;         /* [rows, LANES], lane by lane */
    float *peaks;          /* [rows] the exponent that counts as 0; no weight is above LARGEST */
    int64_t *low, *high;   /* [rows] the keys a row sees */
    float *scores;         /* [ROWS, KEYS] */
    float *weights;        /* [ROWS, KEYS] */
    float *room;           /* for a tile nobody has packed */
} Rows;

/* Keys and values of a tile; steps in bytes, 0 where packed. */
typedef struct {
    const char *keys, *values;
    int64_t key_step, value_step;
} Tile;

#define NOTHING_SEEN (-3e38f)
/* A row is rescaled only when a total of its tile exceeds this; a running maximum would rescale at every new peak. */
#define LARGEST 16777216.0f

/* Raise a row's peak to the highest of its scores and shrink what was summed under the old one. */
static __attribute__((noinline)) void raise_peak(const Shape *shape, const Rows *rows, int64_t row, const float *scores,
                                                 int64_t count, float factor) {
    vf best = v_set(NOTHING_SEEN);
    for (int64_t i = 0; i < count; i += LANES) best = v_max(best, v_load(scores + i) * factor);
    const float old = rows->peaks[row], highest = v_highest(best), peak = highest > old ? highest : old;
    rows->peaks[row] = peak;
    if (old == NOTHING_SEEN) return;
    const vf shrink = v_exp2(v_set(old - peak));
    float *total = rows->totals + row * LANES, *out = rows->out + row * shape->width;
    v_store(total, v_load(total) * shrink);
    for (int64_t i = 0; i < shape->width; i += LANES) v_store(out + i, v_load(out + i) * shrink);
}

/* Turn `count` scores of a row into weights; returns their sum lane by lane. */
INLINE vf weigh(const Rows *rows, int64_t row, const float *scores, float *weights, int64_t count, float factor) {
    const vf peak = v_set(rows->peaks[row]);
    vf sum = {0};
#if HAS_DOTS
    if (rows->kind == PAIRS) {
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
    if (rows->peaks[row] == NOTHING_SEEN) raise_peak(shape, rows, row, scores, count, factor);
    vf sum = weigh(rows, row, scores, weights, count, factor);
    if (v_any(~(sum <= LARGEST))) {
        raise_peak(shape, rows, row, scores, count, factor);
        sum = weigh(rows, row, scores, weights, count, factor);
    }
    float *total = rows->totals + row * LANES;
    v_store(total, v_load(total) + sum);
}

/* The output row is computed in panels of at most MAX_COLUMNS vectors, all of about the same width. */
INLINE int64_t panels(const Shape *shape) { return (shape->width + PANEL - 1) / PANEL; }
INLINE int64_t panel_start(const Shape *shape, int64_t panel) {
    return shape->width / LANES * panel / panels(shape) * LANES;
}

#include "direct.h"
#include "packed.h"

/* Let `count` rows from `row` on attend to the keys [from, to) of a tile whose first key is `first`. */
static void attend_tile(const Shape *shape, const Rows *rows, int64_t row, int64_t count, const Tile *tile,
                        int64_t first, int64_t from, int64_t to) {
    const int64_t start = (rows->direct ? direct_scores : packed_scores)(shape, rows, row, count, tile, from - first,
                                                                         to - first);
    const int64_t together = rows->kind == PAIRS ? 2 : 1, wide = (to - first - start + LANES - 1) / LANES * LANES;
    for (int64_t i = 0; i < count; i++)
        soften(shape, rows, row + i, rows->scores + i * KEYS + start, rows->weights + (i * KEYS + start) / together,
               first + start, wide);
    (rows->direct ? direct_mix : packed_mix)(shape, rows, row, count, tile, from - first, to - first);
}

#endif
