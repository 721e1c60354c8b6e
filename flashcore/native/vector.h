/* Vectors of floats in GCC's portable extension; the few operations it lacks are spelt per instruction set. */
#ifndef FLASHCORE_VECTOR_H
#define FLASHCORE_VECTOR_H

#include <stdint.h>
#include <string.h>
#ifdef __AVX__
#include <immintrin.h>
#endif

/* LANES floats per vector; a tile of scores is MAX_COLUMNS vectors wide, which with 6 rows fills the register file. */
#if defined(__AVX512F__) && defined(__AVX512DQ__)
#define LANES 16
#define MAX_COLUMNS 4
#elif defined(__AVX__)
#define LANES 8
#define MAX_COLUMNS 2
#elif defined(__aarch64__)
#define LANES 4
#define MAX_COLUMNS 4
#else
#define LANES 4
#define MAX_COLUMNS 2
#endif

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

typedef float vf __attribute__((vector_size(LANES * 4)));
typedef float vf_anywhere __attribute__((vector_size(LANES * 4), aligned(2), may_alias));
typedef int32_t vi __attribute__((vector_size(LANES * 4)));
typedef uint32_t vu __attribute__((vector_size(LANES * 4)));
typedef uint16_t vh __attribute__((vector_size(LANES * 2)));

INLINE vf v_load(const void *p) { return *(const vf_anywhere *)p; }
INLINE void v_store(float *p, vf x) { *(vf_anywhere *)p = x; }
INLINE vf v_set(float x) { return x - (vf){0}; }
INLINE vf v_select(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }

/* bf16 is the upper half of an fp32: widen consecutive ones, or the even or odd ones of a vector of pairs. */
INLINE vf v_widen(const void *p) {
    vh half;
    memcpy(&half, p, sizeof half);
    return (vf)(__builtin_convertvector(half, vu) << 16);
}
INLINE vf v_even(vf pairs) { return (vf)((vu)pairs << 16); }
INLINE vf v_odd(vf pairs) { return (vf)((vu)pairs & 0xffff0000u); }

/* Limits are written so that a NaN passes through: hiding one would hide the user's bug. */
INLINE vf v_at_most(vf x, float limit) { return v_select(x > limit, v_set(limit), x); }
INLINE vf v_at_least(vf x, float limit) { return v_select(x < limit, v_set(limit), x); }
INLINE vf v_max(vf a, vf b) { return v_select(a > b, a, b); }

INLINE int v_any(vi mask) {
#if LANES == 16
    return _mm512_movepi32_mask((__m512i)mask) != 0;
#elif LANES == 8
    return _mm256_movemask_ps((__m256)mask) != 0;
#else
    return (mask[0] | mask[1] | mask[2] | mask[3]) != 0;
#endif
}

INLINE float v_sum(vf x) {
#if LANES == 16
    return _mm512_reduce_add_ps((__m512)x);
#else
    float total = 0;
    for (int i = 0; i < LANES; i++) total += x[i];
    return total;
#endif
}

INLINE float v_highest(vf x) {
#if LANES == 16
    return _mm512_reduce_max_ps((__m512)x);
#else
    float best = x[0];
    for (int i = 1; i < LANES; i++) best = x[i] > best ? x[i] : best;
    return best;
#endif
}

/* Round to an integer: adding 1.5 * 2^23 leaves no bits for a fraction. For |x| < 2^22. */
INLINE vf v_round(vf x) {
    const float magic = 12582912.0f;
    return (x + magic) - magic;
}

/* 2^n for integers n in -127..128, which give 0 and infinity at the ends. */
INLINE vf v_power(vf n) { return (vf)((__builtin_convertvector(n, vi) + 127) << 23); }

/* 2^x within 2e-7 of the true value: a minimax polynomial on [0, 1) scaled by the integer part. */
INLINE vf v_exp2(vf x) {
#if LANES == 16
    vf r = (vf)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
#else
    x = v_at_least(v_at_most(x, 128.0f), -126.5f);
    vf n = v_round(x - 0.5f), r = x - n;
#endif
    vf p = r * 0.0018776748f + 0.0089893406f;
    p = p * r + 0.055826318f;
    p = p * r + 0.24015361f;
    p = p * r + 0.69315308f;
    p = p * r + 0.99999994f;
#if LANES == 16
    return (vf)_mm512_scalef_ps((__m512)p, (__m512)x);
#else
    return p * v_power(n);
#endif
}

/* tanh of z / (2 log2 e), that is (2^z - 1) / (2^z + 1), with 2^z - 1 exact to its last bits around zero. */
INLINE vf v_tanh_base2(vf z) {
    z = v_at_least(v_at_most(z, 26.0f), -26.0f);
    vf n = v_round(z), r = z - n;
    vf p = r * 0.00015403512f + 0.0013390735f;
    p = p * r + 0.0096182376f;
    p = p * r + 0.055503573f;
    p = p * r + 0.24022649f;
    p = p * r + 0.69314718f;
    vf power = v_power(n), less_one = power * (p * r) + (power - 1.0f), below = less_one + 2.0f;
#if LANES == 16
    vf inverse = (vf)_mm512_rcp14_ps((__m512)below);
    return less_one * (inverse * (2.0f - below * inverse));
#else
    return less_one / below;
#endif
}

/* Interleave the lower (upper) halves of two vectors. */
#if LANES == 16
#define V_MERGE(a, b, s)                                                                                     \
    __builtin_shufflevector(a, b, s, s + 16, s + 1, s + 17, s + 2, s + 18, s + 3, s + 19, s + 4, s + 20, s + 5, \
                            s + 21, s + 6, s + 22, s + 7, s + 23)
#elif LANES == 8
#define V_MERGE(a, b, s) __builtin_shufflevector(a, b, s, s + 8, s + 1, s + 9, s + 2, s + 10, s + 3, s + 11)
#else
#define V_MERGE(a, b, s) __builtin_shufflevector(a, b, s, s + 4, s + 1, s + 5)
#endif

/* Transpose LANES x LANES in registers: log2(LANES) perfect shuffles of the list of rows. */
INLINE void v_transpose(vf *rows) {
    vf next[LANES];
    UNROLL for (int step = 1; step < LANES; step *= 2) {
        UNROLL for (int i = 0; i < LANES / 2; i++) {
            next[2 * i] = V_MERGE(rows[i], rows[i + LANES / 2], 0);
            next[2 * i + 1] = V_MERGE(rows[i], rows[i + LANES / 2], LANES / 2);
        }
        UNROLL for (int i = 0; i < LANES; i++) rows[i] = next[i];
    }
}

/* Sum each of LANES vectors: lane i of the result is the sum of rows[i]. Destroys rows. */
INLINE vf v_sums(vf *rows) {
    UNROLL for (int n = LANES / 2; n; n /= 2)
        UNROLL for (int i = 0; i < n; i++)
            rows[i] = V_MERGE(rows[i], rows[i + n], 0) + V_MERGE(rows[i], rows[i + n], LANES / 2);
    return rows[0];
}

#endif
