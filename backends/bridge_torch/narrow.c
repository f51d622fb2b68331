/* The 8-bit linear map (clause 10.5) on processors with instructions for it, AVX-512 VNNI; narrow.py
 * compiles and calls it, and does the same with torch where there is no such processor.
 *
 * Integers add up exactly, so a row's numbers are the same either way, beside whatever other rows.
 * torch's own product takes the weights apart anew at each call, which for a few rows costs as much
 * again as reading them, and what stands around it, rounding rows and scaling sums, is more calls.
 *
 * Axes: R rows, O outputs, K inputs. Arrays are contiguous, in the order their axes are named.
 */
#if defined(__AVX512VNNI__)
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#define PARALLEL_FROM 50000 /* multiplications: below, waking threads costs more than it saves */
#define NOTHING 0x1p-100f   /* a row with no larger number counts as zeros */

/* q = rint(127 x / max |x|), whose sum is returned; unit is what q counts, NaN in a row that holds
 * NaN or infinity. */
static int32_t quantise_row(int8_t *q, float *unit, const float *x, int64_t K) {
  float top = 0, nan = 0;
  int32_t total = 0;
#pragma omp simd reduction(max : top) reduction(+ : nan)
  for (int64_t k = 0; k < K; k++) {
    float size = fabsf(x[k]);
    top = size > top ? size : top;
    nan += x[k] * 0;
  }
  float steps = top > NOTHING ? 127 / top : 0;
  *unit = top / 127 + nan;
#pragma omp simd reduction(+ : total)
  for (int64_t k = 0; k < K; k++) {
    int32_t number = (int32_t)rintf(x[k] * steps);
    q[k] = (int8_t)number;
    total += number;
  }
  return total;
}

enum { ROWS = 12, LANES = 16, PANEL = 2 * LANES }; /* as many sums as registers hold */

typedef struct {
  float *y;
  const int8_t *q;
  const uint8_t *w;
  const int32_t *totals;
  const float *units, *scales, *bias, *residual;
  int64_t O, K;
} Product;

/* Some rows from r on, and a panel of outputs from o on. A factor must be unsigned: w is the weight
 * + 128, and what that adds is taken off again: 128 times the total of a row's integers. */
static inline __attribute__((always_inline)) void tile(const Product *p, int64_t r, int64_t o,
                                                       int rows) {
  int64_t O = p->O, K = p->K;
  const int8_t *q = p->q + r * K;
  const uint8_t *w = p->w + o * K;
  __m512i sum[ROWS][2];
  for (int i = 0; i < rows; i++) sum[i][0] = sum[i][1] = _mm512_setzero_si512();
  for (int64_t k = 0; k < K; k += 4, w += 4 * PANEL) {
    __m512i left = _mm512_loadu_si512(w), right = _mm512_loadu_si512(w + 64);
    __builtin_prefetch(w + 4096), __builtin_prefetch(w + 4096 + 64);
    for (int i = 0; i < rows; i++) {
      int32_t four;
      memcpy(&four, q + i * K + k, sizeof four);
      sum[i][0] = _mm512_dpbusd_epi32(sum[i][0], left, _mm512_set1_epi32(four));
      sum[i][1] = _mm512_dpbusd_epi32(sum[i][1], right, _mm512_set1_epi32(four));
    }
  }
  for (int i = 0; i < rows; i++) {
    __m512i off = _mm512_set1_epi32(128 * p->totals[r + i]);
    for (int half = 0; half < 2; half++) {
      int64_t from = o + half * LANES, at = (r + i) * O + from;
      if (from >= O) continue;
      __mmask16 mask = O - from < LANES ? (__mmask16)((1 << (O - from)) - 1) : 0xffff;
      __m512 y = _mm512_cvtepi32_ps(_mm512_sub_epi32(sum[i][half], off));
      y = _mm512_mul_ps(y, _mm512_set1_ps(p->units[r + i]));
      y = _mm512_mul_ps(y, _mm512_maskz_loadu_ps(mask, p->scales + from));
      if (p->bias) y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(mask, p->bias + from));
      if (p->residual) y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(mask, p->residual + at));
      _mm512_mask_storeu_ps(p->y + at, mask, y);
    }
  }
}

/* y [R, O] from x [R, K] and w, from floats to floats, as `quantise`, an exact product and `rescale`
 * give it. w [O / 32, K / 4, 32, 4] has whole panels of outputs, K a multiple of 4. q [R, K],
 * units [R] and totals [R] are scratch. */
void linear(float *y, const float *x, const uint8_t *w, const float *scales, const float *bias,
            const float *residual, int8_t *q, float *units, int32_t *totals, int64_t R, int64_t O,
            int64_t K) {
  Product p = {y, q, w, totals, units, scales, bias, residual, O, K};
#pragma omp parallel for if (R * K > PARALLEL_FROM)
  for (int64_t r = 0; r < R; r++) totals[r] = quantise_row(q + r * K, units + r, x + r * K, K);
#pragma omp parallel for schedule(static) if (R * O * K > PARALLEL_FROM)
  for (int64_t o = 0; o < O; o += PANEL)
    for (int64_t r = 0; r < R; r += ROWS) switch (R - r) {
#define ROWS_ARE(n) case n: tile(&p, r, o, n); break;
        ROWS_ARE(1) ROWS_ARE(2) ROWS_ARE(3) ROWS_ARE(4) ROWS_ARE(5) ROWS_ARE(6) ROWS_ARE(7)
        ROWS_ARE(8) ROWS_ARE(9) ROWS_ARE(10) ROWS_ARE(11)
        default: tile(&p, r, o, ROWS);
      }
}
#endif
