/* One work item: a block of queries of one key-value head against the keys it sees, and what becomes of its rows. */
#ifndef FLASHCORE_ITEM_H
#define FLASHCORE_ITEM_H

INLINE float read_number(const char *p, int64_t element) {
    if (element == 4) return *(const float *)p;
    const uint32_t bits = (uint32_t)*(const uint16_t *)p << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

/* Round to nearest even; a NaN keeps its upper bits and stays one. */
INLINE uint16_t to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (x != x) return bits >> 16 | 64;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

/* Copy a row of queries in the form its item needs, times the sign of the scale. */
static void load_query(const Shape *shape, const Rows *rows, const char *from, float sign, float *to) {
    const int64_t d = shape->head_dim;
    if (rows->kind == PAIRS)
        for (int64_t c = 0; c < d; c++) ((uint16_t *)to)[c] = to_bf16(read_number(from + 2 * c, 2) * sign);
    else if (shape->kind == FP32)
        for (int64_t c = 0; c < d; c++) to[c] = read_number(from + 4 * c, 4) * sign;
    else if (rows->direct)
        for (int64_t c = 0; c < d; c++) to[direct_place(shape, c)] = read_number(from + 2 * c, 2) * sign;
    else
        for (int64_t c = 0; c < d; c++) to[c] = read_number(from + 2 * c, 2) * sign;
}

/* Start an item. Rows are ordered by position, then head, so that neighbours see nearly the same keys. */
static void load_rows(const Plan *plan, const Item *item, int64_t count, Rows *rows) {
    const Call *call = plan->call;
    const Segment *s = plan->segments + item->segment;
    const Shape *shape = &plan->shape;
    const float sign = call->scale > 0 ? 1 : call->scale < 0 ? -1 : 0;
    rows->direct = s->direct;
    rows->kind = s->direct && shape->kind == PAIRS ? BF16 : shape->kind;
    rows->depth = s->direct ? shape->head_dim : shape->depth;
    for (int64_t r = 0; r < count; r++) {
        const int64_t i = item->start + r / plan->group, head = item->kv_head * plan->group + r % plan->group;
        const int64_t at = s->row * call->q_step[0] + head * call->q_step[1] + (s->query_start + i) * call->q_step[2];
        load_query(shape, rows, call->q + at * plan->element, sign, rows->queries + r * rows->depth);
        rows->low[r] = low_key(call, s, i), rows->high[r] = high_key(call, s, i);
        rows->peaks[r] = NOTHING_SEEN;
    }
    memset(rows->out, 0, count * shape->width * sizeof(float));
    memset(rows->totals, 0, count * LANES * sizeof(float));
}

/* Write a finished row: divided by its total, rounded to the dtype asked for. */
static void store_row(const Plan *plan, const Segment *s, int64_t kv_head, int64_t r, const float *out, float total,
                      float peak) {
    const Call *call = plan->call;
    const Shape *shape = &plan->shape;
    const int64_t i = s->query_start + r / plan->group, head = kv_head * plan->group + r % plan->group;
    const int64_t at = s->row * call->out_step[0] + head * call->out_step[1] + i * call->out_step[2];
    float *to = (float *)(call->out + at * plan->element);
    uint16_t *half = (uint16_t *)to;
    const float share = total == 0 ? 0 : 1 / total;
    if (shape->kind == FP32)
        for (int64_t c = 0; c < shape->head_dim; c++) to[c] = out[c] * share;
    else if (s->direct)
        for (int64_t c = 0; c < shape->head_dim; c++) half[c] = to_bf16(out[direct_place(shape, c)] * share);
    else
        for (int64_t c = 0; c < shape->head_dim; c++) half[c] = to_bf16(out[c] * share);
    if (call->lse)
        call->lse[(s->row * call->heads + head) * call->n + i] =
            total == 0 ? -__builtin_inff() : peak * 0.6931471805599453f + logf(total);
}

/* Parts of a split segment: for each head how many of its chunks are done, then for each head, chunk and row an
   output row, its total and its peak. */
static int32_t *chunks_done(const Plan *plan, const Segment *s) { return (int32_t *)(plan->memory + s->part); }
static float *part_row(const Plan *plan, const Segment *s, int64_t kv_head, int64_t chunk, int64_t r) {
    const int64_t rows = s->queries * plan->group;
    const int64_t index = (kv_head * s->chunks + chunk) * rows + r;
    return plan->memory + s->part + plan->call->kv_heads + index * (plan->shape.width + 2);
}

static void finish_row(const Plan *plan, const Item *item, const Rows *rows, int64_t r) {
    const Segment *s = plan->segments + item->segment;
    const int64_t width = plan->shape.width;
    const float total = v_sum(v_load(rows->totals + r * LANES));
    if (s->part < 0) {
        store_row(plan, s, item->kv_head, item->start * plan->group + r, rows->out + r * width, total, rows->peaks[r]);
        return;
    }
    float *part = part_row(plan, s, item->kv_head, item->chunk, r);
    memcpy(part, rows->out + r * width, width * sizeof(float));
    part[width] = total, part[width + 1] = rows->peaks[r];
}

/* Add the parts of one row, each weighted by how far its peak lies below the highest. */
static void merge_row(const Plan *plan, const Segment *s, int64_t kv_head, int64_t r) {
    const int64_t width = plan->shape.width;
    float *sum = part_row(plan, s, kv_head, 0, r), peak = NOTHING_SEEN, total = 0;
    for (int64_t chunk = 0; chunk < s->chunks; chunk++) {
        const float other = part_row(plan, s, kv_head, chunk, r)[width + 1];
        peak = other > peak ? other : peak;
    }
    for (int64_t chunk = 0; chunk < s->chunks; chunk++) {
        const float *part = part_row(plan, s, kv_head, chunk, r);
        const float shrink = exp2f(part[width + 1] - peak);
        total += part[width] * shrink;
        for (int64_t c = 0; c < width; c++) sum[c] = (chunk ? sum[c] : 0) + part[c] * shrink;
    }
    store_row(plan, s, kv_head, r, sum, total, peak);
}

/* The tile that starts at `key`, where the caller has it. */
static Tile raw_tile(const Plan *plan, const Segment *s, int64_t kv_head, int64_t key) {
    const int64_t *k = plan->call->k_step, *v = plan->call->v_step, size = plan->element, at = s->key_start + key;
    return (Tile){plan->call->k + (s->row * k[0] + kv_head * k[1] + at * k[2]) * size,
                  plan->call->v + (s->row * v[0] + kv_head * v[1] + at * v[2]) * size, k[2] * size, v[2] * size};
}

static float *packed_place(const Plan *plan, const Segment *s, int64_t kv_head, int64_t key) {
    return plan->memory + s->pack + (kv_head * ((s->keys + KEYS - 1) / KEYS) + key / KEYS) * plan->shape.words;
}

static Tile find_tile(const Plan *plan, const Segment *s, const Rows *rows, int64_t kv_head, int64_t key) {
    const Tile raw = raw_tile(plan, s, kv_head, key);
    if (s->direct) return raw;
    float *words = s->pack < 0 ? rows->room : packed_place(plan, s, kv_head, key);
    if (s->pack < 0) pack_tile(&plan->shape, &raw, least(KEYS, s->keys - key), words);
    return (Tile){(char *)words, (char *)(words + plan->shape.key_words), 0, 0};
}

static void run_item(const Plan *plan, const Item *item, Rows *rows) {
    const Segment *s = plan->segments + item->segment;
    const int64_t count = least(s->block, s->queries - item->start) * plan->group;
    load_rows(plan, item, count, rows);
    const int64_t first = s->low / KEYS * KEYS + item->chunk * s->chunk;
    const int64_t low = most(first, rows->low[0]), high = least(rows->high[count - 1], first + s->chunk);
    const int64_t bundles = (count + ROWS - 1) / ROWS;
    for (int64_t key = low / KEYS * KEYS; key < high; key += KEYS) {
        const Tile tile = find_tile(plan, s, rows, item->kv_head, key);
        for (int64_t b = 0; b < bundles; b++) {
            const int64_t row = count * b / bundles, stop = count * (b + 1) / bundles;
            const int64_t from = most(key, rows->low[row]), to = least(key + KEYS, rows->high[stop - 1]);
            if (from < to) attend_tile(&plan->shape, rows, row, stop - row, &tile, key, from, to);
        }
    }
    for (int64_t r = 0; r < count; r++) finish_row(plan, item, rows, r);
    if (s->part < 0) return;
    /* Whoever finishes last merges: a barrier would cost far more than the merge where cores are shared. */
    if (__atomic_add_fetch(chunks_done(plan, s) + item->kv_head, 1, __ATOMIC_ACQ_REL) == s->chunks)
        for (int64_t r = 0; r < count; r++) merge_row(plan, s, item->kv_head, r);
}

static void pack_all(const Plan *plan, const Segment *s) {
    const int64_t tiles = (s->keys + KEYS - 1) / KEYS;
#pragma omp for schedule(dynamic, 4) nowait
    for (int64_t i = 0; i < plan->call->kv_heads * tiles; i++) {
        const int64_t key = i % tiles * KEYS;
        const Tile raw = raw_tile(plan, s, i / tiles, key);
        pack_tile(&plan->shape, &raw, least(KEYS, s->keys - key), packed_place(plan, s, i / tiles, key));
    }
}

static void run(const Plan *plan) {
    const int64_t segments = plan->call->segment_count;
    for (int64_t i = 0; i < segments; i++)
        if (plan->segments[i].part >= 0)
            memset(chunks_done(plan, plan->segments + i), 0, plan->call->kv_heads * sizeof(int32_t));
#pragma omp parallel num_threads(plan->threads) if (plan->threads > 1)
    {
        int thread = 0;
#ifdef _OPENMP
        thread = omp_get_thread_num();
#endif
        Rows rows = thread_rows(plan, thread);
        for (int64_t i = 0; i < segments; i++)
            if (plan->segments[i].pack >= 0) pack_all(plan, plan->segments + i);
        if (plan->packs) {
#pragma omp barrier
        }
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t i = 0; i < plan->item_count; i++) run_item(plan, plan->items + i, &rows);
    }
}

#endif
