/* Keys and values copied into the order in which the registers stream them: for many queries. */
#ifndef FLASHCORE_PACKED_H
#define FLASHCORE_PACKED_H

#include "tile.h"

/* Load up to LANES words of a row of numbers; what lies beyond them reads as zero. */
INLINE vf load_words(const int kind, const char *row, int64_t word, int64_t depth) {
    const int64_t size = kind == BF16 ? 2 : 4;
    const char *from = row + word * size;
    char copy[LANES * 4] = {0};
    if (word + LANES > depth) {
        memcpy(copy, from, (depth - word) * size);
        from = copy;
    }
    return kind == BF16 ? v_widen(from) : v_load(from);
}

/* Transpose LANES keys of LANES words, or what there is of them. */
INLINE void pack_block(const int kind, const char *keys, int64_t step, int64_t count, int64_t word, int64_t depth,
                       float *to) {
    vf block[LANES];
    if (count >= LANES && word + LANES <= depth) {
        UNROLL for (int i = 0; i < LANES; i++) block[i] = load_words(kind, keys + i * step, word, word + LANES);
        v_transpose(block);
        UNROLL for (int i = 0; i < LANES; i++) v_store(to + (word + i) * PANEL, block[i]);
        return;
    }
    for (int i = 0; i < LANES; i++) block[i] = i < count ? load_words(kind, keys + i * step, word, depth) : (vf){0};
    v_transpose(block);
    for (int i = 0; i < LANES && word + i < depth; i++) v_store(to + (word + i) * PANEL, block[i]);
}

/* Pack keys, `step` bytes apart, as [KEYS / PANEL][depth][PANEL]; missing keys of a vector are zero. */
INLINE void pack_keys(const int kind, const Shape *shape, const char *keys, int64_t step, int64_t count, float *to) {
    for (int64_t key = 0; key < count; key += LANES)
        for (int64_t word = 0; word < shape->depth; word += LANES)
            pack_block(kind, keys + key * step, step, count - key, word, shape->depth,
                       to + key / PANEL * PANEL * shape->depth + key % PANEL);
}

/* Pack values as one [KEYS (or pairs of keys)][panel width] after the other. */
INLINE void pack_values(const int kind, const Shape *shape, const char *values, int64_t step, int64_t count,
                        float *to) {
    const int together = kind == PAIRS ? 2 : 1, source = kind == FP32 ? FP32 : BF16;
    const int64_t d = shape->head_dim;
    for (int64_t panel = 0; panel < panels(shape); panel++) {
        const int64_t start = panel_start(shape, panel), stop = panel_start(shape, panel + 1);
        for (int64_t key = 0; key < count; key += together)
            for (int64_t column = start; column < stop; column += LANES, to += LANES) {
                vf packed = load_words(source, values + key * step, column, d);
                if (kind == PAIRS) {
                    vf next = {0};
                    if (key + 1 < count) next = load_words(source, values + (key + 1) * step, column, d);
                    packed = (vf)((vu)packed >> 16 | (vu)next);
                }
                v_store(to, packed);
            }
        to += (KEYS / together - (count + together - 1) / together) * (stop - start);
    }
}

static void pack_tile(const Shape *shape, const Tile *raw, int64_t count, float *to) {
#define PACK(kind)                                                                                           \
    pack_keys(kind, shape, raw->keys, raw->key_step, count, to),                                             \
        pack_values(kind, shape, raw->values, raw->value_step, count, to + shape->key_words)
    if (shape->kind == FP32) PACK(FP32);
    else if (shape->kind == BF16) PACK(BF16);
    else PACK(PAIRS);
#undef PACK
}

/* Scores of the keys [from, to) of the tile; returns the first key that has one. */
static int64_t packed_scores(const Shape *shape, const Rows *rows, int64_t row, int64_t count, const Tile *tile,
                             int64_t from, int64_t to) {
    (void)shape;
    Multiply *const *kernels = MULTIPLY[rows->kind == PAIRS ? DOTS : FLOATS][count - 1];
    const int64_t start = from / PANEL * PANEL;
    for (int64_t key = start; key < to; key += PANEL) {
        const int64_t left = (to - key + LANES - 1) / LANES, columns = left < MAX_COLUMNS ? left : MAX_COLUMNS;
        kernels[columns - 1](rows->queries + row * rows->depth, rows->depth, tile->keys + key * rows->depth * 4,
                             PANEL * 4, rows->depth, rows->scores + key, KEYS, 0);
    }
    return start;
}

/* Add the values of the keys [from, to), by weight, to the output rows. */
static void packed_mix(const Shape *shape, const Rows *rows, int64_t row, int64_t count, const Tile *tile, int64_t from,
                       int64_t to) {
    const int pairs = rows->kind == PAIRS, together = pairs ? 2 : 1;
    Multiply *const *kernels = MULTIPLY[pairs ? DOTS : FLOATS][count - 1];
    const int64_t begin = from / together, end = (to + together - 1) / together;
    for (int64_t panel = 0; panel < panels(shape); panel++) {
        const int64_t at = panel_start(shape, panel), width = panel_start(shape, panel + 1) - at;
        kernels[width / LANES - 1](rows->weights + begin, KEYS / together,
                                   tile->values + (at * (KEYS / together) + begin * width) * 4, width * 4, end - begin,
                                   rows->out + row * shape->width + at, shape->width, 1);
    }
}

#endif
