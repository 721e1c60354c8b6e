/* Keys and values read once, where the caller has them: for few queries, when memory is what limits the speed. */
#ifndef FLASHCORE_DIRECT_H
#define FLASHCORE_DIRECT_H

#include "tile.h"

/* Whether rows of numbers are whole vectors: a vector must not reach past the end of the caller's tensor. */
INLINE int direct_serves(const Shape *shape) {
    return shape->head_dim % (shape->kind == FP32 ? LANES : 2 * LANES) == 0;
}

/* Where number `c` of a row stands in queries and out: bf16 comes apart into vectors of even and of odd numbers. */
INLINE int64_t direct_place(const Shape *shape, int64_t c) {
    return shape->kind == FP32 ? c : c / (2 * LANES) * 2 * LANES + c % 2 * LANES + c % (2 * LANES) / 2;
}

/* Add the products of up to MAX_COLUMNS vectors of one key with those of every row to parts[row][key]. */
INLINE void add_products(const int split, const int columns, int64_t count, const char *key, const float *queries,
                         int64_t depth, vf (*parts)[LANES], int fresh) {
    vf numbers[MAX_COLUMNS];
    UNROLL for (int j = 0; j < columns; j++) {
        const vf words = v_load(key + (split ? j / 2 : j) * LANES * 4);
        numbers[j] = !split ? words : j % 2 ? v_odd(words) : v_even(words);
    }
    for (int64_t i = 0; i < count; i++, queries += depth, parts++) {
        vf sum = fresh ? (vf){0} : **parts;
        UNROLL for (int j = 0; j < columns; j++) sum += numbers[j] * v_load(queries + j * LANES);
        **parts = sum;
    }
}

INLINE void score_key(const int split, const Shape *shape, int64_t count, const char *key, const float *queries,
                      vf (*parts)[LANES]) {
    const int64_t vectors = shape->head_dim / LANES, size = split ? 2 : 4;
    for (int64_t at = 0; at < vectors; at += MAX_COLUMNS) {
        const char *from = key + at * LANES * size;
        const float *with = queries + at * LANES;
        const int64_t left = vectors - at;
        if (left >= MAX_COLUMNS) add_products(split, MAX_COLUMNS, count, from, with, shape->head_dim, parts, at == 0);
        else if (left == 1) add_products(split, 1, count, from, with, shape->head_dim, parts, at == 0);
#if MAX_COLUMNS > 2
        else if (left == 2) add_products(split, 2, count, from, with, shape->head_dim, parts, at == 0);
        else add_products(split, 3, count, from, with, shape->head_dim, parts, at == 0);
#endif
    }
}

/* Ask for a row that is soon to be read. What limits this path is memory, and between keys and values the processor's
   own prefetching starts anew with every page; an address past the end is no fault. */
INLINE void fetch_ahead(const char *row, int64_t bytes) {
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(row + at);
}

static int64_t direct_scores(const Shape *shape, const Rows *rows, int64_t row, int64_t count, const Tile *tile,
                             int64_t from, int64_t to) {
    const int64_t start = from / LANES * LANES;
    const float *queries = rows->queries + row * rows->depth;
    const int64_t bytes = shape->head_dim * (shape->kind == FP32 ? 4 : 2);
    for (int64_t block = start; block < to; block += LANES) {
        vf parts[ROWS][LANES];
        const int64_t left = to - block < LANES ? to - block : LANES;
        if (left < LANES) memset(parts, 0, sizeof parts);
        for (int64_t i = 0; i < left; i++) {
            const char *key = tile->keys + (block + i) * tile->key_step;
            fetch_ahead(key + KEYS * tile->key_step, bytes);
            fetch_ahead(tile->values + (block + i) * tile->value_step, bytes);
            vf(*into)[LANES] = (vf(*)[LANES])&parts[0][i];
            if (shape->kind == FP32) score_key(0, shape, count, key, queries, into);
            else score_key(1, shape, count, key, queries, into);
        }
        for (int64_t i = 0; i < count; i++) v_store(rows->scores + i * KEYS + block, v_sums(parts[i]));
    }
    return start;
}

static void direct_mix(const Shape *shape, const Rows *rows, int64_t row, int64_t count, const Tile *tile, int64_t from,
                       int64_t to) {
    const int split = shape->kind != FP32;
    for (int64_t at = 0; at < shape->width; at += PANEL) {
        const int64_t width = shape->width - at < PANEL ? shape->width - at : PANEL;
        MULTIPLY[split ? SPLIT : FLOATS][count - 1][width / LANES - 1](
            rows->weights + from, KEYS, tile->values + from * tile->value_step + at * (split ? 2 : 4), tile->value_step,
            to - from, rows->out + row * shape->width + at, shape->width, 1);
    }
}

#endif
