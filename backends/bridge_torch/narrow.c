/* What stands around a product of 8-bit integers (clause 10.5), on CPUs; narrow.py compiles and calls
 * it, and does the same with torch where there is no compiler; fused.c takes it in. The product itself
 * is torch's, and exact: a row's numbers are the same beside whatever other rows.
 *
 * Axes: R rows, O outputs, K inputs. Arrays are contiguous, in the order their axes are named.
 */
#include <math.h>
#include <stdint.h>

#define PARALLEL_FROM 50000 /* numbers: below, waking threads costs more than it saves */
#define NOTHING 0x1p-100f   /* a row with no larger number counts as zeros */

/* q [R, K] = rint(127 x / max |x|) by rows; units [R] is what q counts, NaN in a row that holds NaN
 * or infinity. */
void round_rows(int8_t *q, float *units, const float *x, int64_t R, int64_t K) {
#pragma omp parallel for if (R * K > PARALLEL_FROM)
  for (int64_t r = 0; r < R; r++) {
    const float *row = x + r * K;
    float top = 0, nan = 0;
#pragma omp simd reduction(max : top) reduction(+ : nan)
    for (int64_t k = 0; k < K; k++) {
      float size = fabsf(row[k]);
      top = size > top ? size : top;
      nan += row[k] * 0;
    }
    float steps = top > NOTHING ? 127 / top : 0;
    units[r] = top / 127 + nan;
#pragma omp simd
    for (int64_t k = 0; k < K; k++) q[r * K + k] = (int8_t)(int32_t)rintf(row[k] * steps);
  }
}

/* y [R, O] = sums * unit of the row * scale of the output + bias + residual; the last two may be NULL,
 * and the residual may be y. */
void scale_back(float *y, const int32_t *sums, const float *units, const float *scales,
                const float *bias, const float *residual, int64_t R, int64_t O) {
#pragma omp parallel for if (R * O > PARALLEL_FROM)
  for (int64_t r = 0; r < R; r++)
#pragma omp simd
    for (int64_t o = 0; o < O; o++) {
      float sum = (float)sums[r * O + o] * units[r] * scales[o];
      if (bias) sum += bias[o];
      if (residual) sum += residual[r * O + o];
      y[r * O + o] = sum;
    }
}
