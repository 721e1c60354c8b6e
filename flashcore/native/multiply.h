/* The inner loops: a few rows of a product with all its sums in registers. */
#ifndef FLASHCORE_MULTIPLY_H
#define FLASHCORE_MULTIPLY_H

#include "vector.h"

/* Rows whose sums are held in registers at once. */
#define ROWS 6

/* What the right-hand matrix holds: floats; pairs of bf16 to be multiplied pair by pair with pairs on the left; or
   pairs of bf16 to be widened, each vector of them into one of its even and one of its odd numbers. */
enum { FLOATS, DOTS, SPLIT };

#if defined(__AVX512BF16__) && LANES == 16
#define HAS_DOTS 1
INLINE vf v_dot(vf sum, vf a, vf b) { return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b); }
INLINE void v_store_pairs(float *p, vf first, vf second) {
    *(vf_anywhere *)p = (vf)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
}
#else
#define HAS_DOTS 0
#endif

/* C[rows, columns vectors] (+)= A[rows, depth words] B[depth, columns vectors]; a step is from row to row, in words
   of four bytes but for B, where it is in bytes. */
#define MULTIPLY_ARGUMENTS                                                                                   \
    const float *a, int64_t a_step, const char *b, int64_t b_step, int64_t depth, float *c, int64_t c_step, int add

INLINE void multiply(const int right, const int rows, const int columns, MULTIPLY_ARGUMENTS) {
    vf sum[ROWS][MAX_COLUMNS], row[MAX_COLUMNS];
    UNROLL for (int i = 0; i < rows; i++)
        UNROLL for (int j = 0; j < columns; j++) sum[i][j] = add ? v_load(c + i * c_step + j * LANES) : (vf){0};
    for (int64_t k = 0; k < depth; k++, b += b_step) {
        UNROLL for (int j = 0; j < columns; j++) {
            const vf words = v_load(b + (right == SPLIT ? j / 2 : j) * LANES * 4);
            row[j] = right != SPLIT ? words : j % 2 ? v_odd(words) : v_even(words);
        }
        UNROLL for (int i = 0; i < rows; i++) {
            const vf left = v_set(a[i * a_step + k]);
            UNROLL for (int j = 0; j < columns; j++)
#if HAS_DOTS
                sum[i][j] = right == DOTS ? v_dot(sum[i][j], row[j], left) : sum[i][j] + left * row[j];
#else
                sum[i][j] += left * row[j];
#endif
        }
    }
    UNROLL for (int i = 0; i < rows; i++)
        UNROLL for (int j = 0; j < columns; j++) v_store(c + i * c_step + j * LANES, sum[i][j]);
}

typedef void Multiply(MULTIPLY_ARGUMENTS);

#define DEFINE_MULTIPLY(right, rows, columns)                                                                \
    static void multiply_##right##_##rows##_##columns(MULTIPLY_ARGUMENTS) {                                  \
        multiply(right, rows, columns, a, a_step, b, b_step, depth, c, c_step, add);                         \
    }
#if MAX_COLUMNS == 4
#define DEFINE_ROWS(right, rows)                                                                             \
    DEFINE_MULTIPLY(right, rows, 1)                                                                          \
    DEFINE_MULTIPLY(right, rows, 2) DEFINE_MULTIPLY(right, rows, 3) DEFINE_MULTIPLY(right, rows, 4)
#define NAME_ROWS(right, rows)                                                                               \
    { multiply_##right##_##rows##_1, multiply_##right##_##rows##_2, multiply_##right##_##rows##_3,           \
      multiply_##right##_##rows##_4 }
#else
#define DEFINE_ROWS(right, rows) DEFINE_MULTIPLY(right, rows, 1) DEFINE_MULTIPLY(right, rows, 2)
#define NAME_ROWS(right, rows) { multiply_##right##_##rows##_1, multiply_##right##_##rows##_2 }
#endif
#define DEFINE_RIGHT(right)                                                                                  \
    DEFINE_ROWS(right, 1)                                                                                    \
    DEFINE_ROWS(right, 2)                                                                                    \
    DEFINE_ROWS(right, 3) DEFINE_ROWS(right, 4) DEFINE_ROWS(right, 5) DEFINE_ROWS(right, 6)
#define NAME_RIGHT(right)                                                                                    \
    { NAME_ROWS(right, 1), NAME_ROWS(right, 2), NAME_ROWS(right, 3),                                         \
      NAME_ROWS(right, 4), NAME_ROWS(right, 5), NAME_ROWS(right, 6) }

DEFINE_RIGHT(FLOATS)
DEFINE_RIGHT(SPLIT)
#if HAS_DOTS
DEFINE_RIGHT(DOTS)
#endif

static Multiply *const MULTIPLY[][ROWS][MAX_COLUMNS] = {
    [FLOATS] = NAME_RIGHT(FLOATS),
    [SPLIT] = NAME_RIGHT(SPLIT),
#if HAS_DOTS
    [DOTS] = NAME_RIGHT(DOTS),
#endif
};

#endif
