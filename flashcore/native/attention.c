/* Attention on CPUs: FlashAttention-2's tiling (Dao 2023), forward only, one work item per block of queries of
   one key-value head. All query heads of a group are rows of the same item, so keys and values are packed and
   read once for the group. Few queries split over the keys instead, and the parts are merged by their totals
   (flash decoding). */
#include <math.h>
#include <stdlib.h>
#include <time.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "tile.h"

/* As packed by native.py: strides and sizes count elements, -1 is "no limit", segments are rows of five numbers. */
typedef struct {
    const char *q, *k, *v;
    char *out;
    float *lse;
    const int64_t *segments;
    int64_t segment_count, batch, heads, kv_heads, n, m, head_dim, kind, threads, left, right;
    int64_t q_step[3], k_step[3], v_step[3], out_step[3];
    double scale, softcap;
} Call;

typedef struct {
    int64_t row, query_start, queries, key_start, keys;
    int64_t block, chunk, chunks;      /* queries per item; keys per item and parts of the keys, if split */
    int64_t low, high;                 /* keys that some query sees */
    int direct;
    int64_t pack, part;                /* where its packed tiles and its parts begin, in words; -1 for none */
} Segment;

typedef struct {
    double cost;
    int64_t segment, kv_head, start, chunk;
} Item;

typedef struct {
    const Call *call;
    Shape shape;
    int64_t group, element, block_rows, item_count, scratch_words;
    double cost;
    Segment *segments;
    Item *items;
    float *memory;                     /* packed tiles and parts, then scratch of each thread */
    int64_t memory_words;
    int threads, packs;
} Plan;

#define MAX_ITEM_ROWS 192
#define FEW_ROWS 32                    /* up to here nothing is packed and the keys are split */
#define SPLIT_KEYS 512
#define SERIAL_COST 0.8e6              /* multiply-adds below which a second thread does not pay for waking it */

static int64_t up(int64_t size, int64_t unit) { return (size + unit - 1) / unit * unit; }
static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

/* First and one past the last key that query `i` of a segment sees. */
static int64_t low_key(const Call *call, const Segment *s, int64_t i) {
    return call->left < 0 ? 0 : most(0, i + s->keys - s->queries - call->left);
}
static int64_t high_key(const Call *call, const Segment *s, int64_t i) {
    if (call->right < 0) return s->keys;
    return most(0, least(s->keys, i + s->keys - s->queries + call->right + 1));
}

/* One buffer outlives the calls, because fresh memory costs a page fault every 4 KB. Concurrent calls get their own. */
static char *kept_memory;
static int64_t kept_bytes;
static volatile char kept_lock;
#define KEEP_AT_MOST (64 << 20)

static void exchange_kept(char **memory, int64_t *bytes) {
    while (__atomic_test_and_set(&kept_lock, __ATOMIC_ACQUIRE)) {}
    char *memory_before = kept_memory;
    const int64_t bytes_before = kept_bytes;
    kept_memory = *memory, kept_bytes = *bytes;
    __atomic_clear(&kept_lock, __ATOMIC_RELEASE);
    *memory = memory_before, *bytes = bytes_before;
}

static char *take_memory(int64_t *bytes) {
    char *memory = NULL;
    int64_t found = 0;
    exchange_kept(&memory, &found);
    if (found >= *bytes) {
        *bytes = found;
        return memory;
    }
    free(memory);
    return aligned_alloc(64, up(*bytes, 64));
}

static void give_memory(char *memory, int64_t bytes) {
    if (bytes <= KEEP_AT_MOST) exchange_kept(&memory, &bytes);
    free(memory);
}

static Shape make_shape(const Call *call) {
    Shape shape = {.kind = call->kind, .head_dim = call->head_dim, .width = up(call->head_dim, LANES)};
    const int together = shape.kind == PAIRS ? 2 : 1;
    const double log2_e = 1.4426950408889634, scale = fabs(call->scale);
    shape.depth = shape.head_dim / together;
    shape.key_words = shape.depth * KEYS;
    shape.words = up(shape.key_words + shape.width * KEYS / together, LANES);
    shape.factor = scale ? scale * log2_e : 1;
    if (call->softcap) {
        shape.cap = call->softcap * log2_e;
        shape.factor = scale ? 2 * log2_e * scale / call->softcap : 1;
    }
    return shape;
}

static void plan_segment(Plan *plan, Segment *s, int64_t block) {
    const Call *call = plan->call;
    s->low = s->queries ? least(s->keys, low_key(call, s, 0)) : 0;
    s->high = s->queries ? high_key(call, s, s->queries - 1) : 0;
    const int64_t rows = s->queries * plan->group, start = s->low / KEYS * KEYS, span = s->high - start;
    s->block = rows <= FEW_ROWS ? most(1, s->queries) : least(block, s->queries);
    s->direct = rows <= FEW_ROWS && direct_serves(&plan->shape);
    s->chunk = s->keys, s->chunks = 1, s->part = -1, s->pack = -1;
    if (rows <= FEW_ROWS && span >= 2 * SPLIT_KEYS) {
        s->chunk = up(most(SPLIT_KEYS, span / 16), KEYS);
        s->chunks = (span + s->chunk - 1) / s->chunk;
        s->part = plan->memory_words;
        plan->memory_words += up(call->kv_heads * (1 + s->chunks * rows * (plan->shape.width + 2)), LANES);
    } else if (s->queries > 2 * s->block) {
        s->pack = plan->memory_words;
        plan->packs = 1;
        plan->memory_words += call->kv_heads * ((s->keys + KEYS - 1) / KEYS) * plan->shape.words;
    }
    plan->item_count += call->kv_heads * ((s->queries + s->block - 1) / s->block) * s->chunks;
}

/* Queries per item: about MAX_ITEM_ROWS rows, fewer where that would leave threads without work. */
static int64_t choose_block(const Plan *plan) {
    const Call *call = plan->call;
    int64_t block = most(1, MAX_ITEM_ROWS / plan->group);
    for (; block * plan->group > 8 * ROWS; block = (block + 1) / 2) {
        int64_t items = 0;
        for (int64_t i = 0; i < call->segment_count; i++)
            items += call->kv_heads * ((plan->segments[i].queries + block - 1) / block);
        if (items >= 4 * call->threads) break;
    }
    return block;
}

static void list_items(Plan *plan) {
    const Call *call = plan->call;
    Item *item = plan->items;
    for (int64_t i = 0; i < call->segment_count; i++) {
        const Segment *s = plan->segments + i;
        /* The last blocks see most under causality, so this is nearly the order wanted. */
        for (int64_t start = (s->queries - 1) / s->block * s->block; s->queries && start >= 0; start -= s->block)
            for (int64_t chunk = 0; chunk < s->chunks; chunk++)
                for (int64_t head = 0; head < call->kv_heads; head++) {
                    const int64_t stop = least(s->queries, start + s->block);
                    const int64_t keys = most(0, high_key(call, s, stop - 1) - low_key(call, s, start));
                    const double cost = (double)least(keys, s->chunk) * (stop - start) * plan->group;
                    *item++ = (Item){cost, i, head, start, chunk};
                    plan->cost += cost * plan->shape.width * 2;
                }
    }
}

static int by_cost(const void *a, const void *b) {
    const double x = ((const Item *)a)->cost, y = ((const Item *)b)->cost;
    return (x < y) - (x > y);
}

/* What flashcore_attention returns. */
enum { DONE, NO_MEMORY, OUTSIDE };

static int inside(const Call *call, const Segment *s) {
    return s->row >= 0 && s->row < call->batch && s->query_start >= 0 && s->queries >= 0 && s->key_start >= 0 &&
           s->keys >= 0 && s->query_start + s->queries <= call->n && s->key_start + s->keys <= call->m;
}

static int make_plan(Plan *plan, const Call *call) {
    plan->call = call;
    plan->group = call->heads / call->kv_heads;
    plan->element = call->kind == FP32 ? 4 : 2;
    plan->shape = make_shape(call);
    plan->segments = malloc(most(1, call->segment_count) * sizeof(Segment));
    if (!plan->segments) return NO_MEMORY;
    for (int64_t i = 0; i < call->segment_count; i++) {
        memcpy(plan->segments + i, call->segments + 5 * i, 5 * sizeof(int64_t));
        if (!inside(call, plan->segments + i)) return OUTSIDE;
    }
    const int64_t block = choose_block(plan), rows = most(FEW_ROWS, block * plan->group);
    for (int64_t i = 0; i < call->segment_count; i++) plan_segment(plan, plan->segments + i, block);
    plan->items = malloc(most(1, plan->item_count) * sizeof(Item));
    if (!plan->items) return NO_MEMORY;
    list_items(plan);
    qsort(plan->items, plan->item_count, sizeof(Item), by_cost);
    plan->threads = plan->cost < SERIAL_COST ? 1 : call->threads;
    const Shape *shape = &plan->shape;
    plan->block_rows = rows;
    plan->scratch_words = up(rows * (shape->head_dim + shape->width + LANES + 5) + LANES, LANES);
    plan->scratch_words += 2 * ROWS * KEYS + shape->words;
    return DONE;
}

/* Lay the arrays of one thread out in its scratch memory. */
static Rows thread_rows(const Plan *plan, int thread) {
    const Shape *shape = &plan->shape;
    const int64_t count = plan->block_rows;
    float *at = plan->memory + plan->memory_words + thread * plan->scratch_words;
    Rows rows = {.scores = at, .weights = at + ROWS * KEYS, .room = at + 2 * ROWS * KEYS};
    rows.totals = rows.room + shape->words;
    rows.out = rows.totals + count * LANES;
    rows.low = (int64_t *)(rows.out + count * shape->width);
    rows.high = rows.low + count;
    rows.queries = (float *)(rows.high + count);
    rows.peaks = rows.queries + up(count * shape->head_dim, LANES);
    return rows;
}

#include "item.h"

/* A call that is not ragged is one segment per row. */
static int64_t *dense_segments(const Call *call) {
    int64_t *rows = malloc(most(1, call->batch) * 5 * sizeof *rows);
    for (int64_t i = 0; rows && i < call->batch; i++)
        memcpy(rows + 5 * i, (int64_t[]){i, 0, call->n, 0, call->m}, 5 * sizeof *rows);
    return rows;
}

/* Compute one packed Call; its `threads` is an upper limit. */
int flashcore_attention(const void *packed) {
    Call call;
    memcpy(&call, packed, sizeof call);
    int64_t *dense = NULL;
    if (!call.segments) {
        call.segments = dense = dense_segments(&call);
        call.segment_count = call.batch;
    }
    Plan plan = {0};
    int outcome = call.segments ? make_plan(&plan, &call) : NO_MEMORY;
    if (outcome == DONE) {
        int64_t bytes = (plan.memory_words + plan.threads * plan.scratch_words) * sizeof(float);
        plan.memory = (float *)take_memory(&bytes);
        if (plan.memory) {
            run(&plan);
            give_memory((char *)plan.memory, bytes);
        } else
            outcome = NO_MEMORY;
    }
    free(plan.segments), free(plan.items), free(dense);
    return outcome;
}

#if HAS_DOTS
static double seconds_of(Multiply *kernel, const float *a, const float *b, float *c) {
    struct timespec start, stop;
    clock_gettime(CLOCK_MONOTONIC, &start);
    for (int i = 0; i < 50; i++) kernel(a, KEYS, (char *)b, PANEL * 4, KEYS, c, PANEL, 1);
    clock_gettime(CLOCK_MONOTONIC, &stop);
    return (stop.tv_sec - start.tv_sec) + 1e-9 * (stop.tv_nsec - start.tv_nsec);
}
#endif

/* How many times faster bf16 pairs are than fp32, by trial (half a millisecond); 0 where there is no instruction. */
double flashcore_pairs_speedup(void) {
#if HAS_DOTS
    static float a[ROWS * KEYS], b[KEYS * PANEL], c[ROWS * PANEL];
    double best[2] = {1, 1};
    for (int i = 0; i < 6; i++)
        for (int dots = 0; dots < 2; dots++) {
            const double seconds = seconds_of(MULTIPLY[dots][ROWS - 1][MAX_COLUMNS - 1], a, b, c);
            if (seconds < best[dots]) best[dots] = seconds;
        }
    return 2 * best[0] / best[1];
#else
    return 0;
#endif
}
