/* What a decoding step does between its GEMMs, for float32 on CPUs; fused.py compiles and calls it.
 *
 * At a few rows a step is some twenty tiny tensor operations a layer, each of which costs more to
 * dispatch than to compute. Here they are four calls, one of them the whole Bridge block and the norm
 * after it. What they read is told once a step, in `Step` and `Layer`, which fused.py mirrors. Sums may
 * be taken in any order, NaN and infinity stay what they are: see the compiler's options in fused.py.
 *
 * Axes: L layers, R rows, D model width, I FFN width, H query heads, K key heads, d head width,
 * P tokens of a prompt, T timesteps. All arrays are contiguous, in the order their axes are named.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "narrow.c" /* PARALLEL_FROM too */

#define PIECE 512 /* of a row that one thread takes at a time */
#define INLINE static inline __attribute__((always_inline))

/* What vector registers hold: 32 of 16 floats with AVX-512, or else about half of both. */
#if defined(__AVX512F__)
enum { LANES = 16, ROWS = 8, OUTS = 3 };
#else
enum { LANES = 8, ROWS = 4, OUTS = 3 };
#endif
typedef float lanes __attribute__((vector_size(LANES * sizeof(float))));
typedef float unaligned __attribute__((vector_size(LANES * sizeof(float)), aligned(4)));

typedef struct {             /* of a matrix of 8-bit integers; of another both are NULL */
  const float *scales, *bias;
} Integers;

typedef struct {             /* what a layer has besides its GEMMs; NULL: it has no such thing */
  const float *input_norm, *q_norm, *k_norm, *post_norm;
  const float *block_norm;   /* [D] */
  const float *inward;       /* [3 E, D]: q, k and v; P-Match: [E, D] */
  const float *outward;      /* [D, E] */
  Integers qkv, o, gate_up, down;
  int64_t window;            /* how many timesteps are read; 0: all */
} Layer;

typedef struct {
  const Layer *layers;
  const float *last_norm;    /* [D], after the last layer */
  Integers head;
  const int32_t *sums;       /* [R, O] of the last product of integers */
  int8_t *rounded;           /* [R, K] for the next, and */
  float *units;              /* [R] what they count */
  float *const *own;         /* [R] of [L, 2, K, rooms[r], d]: keys and values of each row */
  const float *const *prefixes; /* [R] of [L, 2, K, lengths[r], d]: those of its group's prompt */
  const int64_t *rooms, *lengths;
  const int64_t *steps;      /* [R]: which of its own timesteps this is */
  const int64_t *first, *last; /* [R]: rows of a group lie together, from the first until the last */
  const float *rope;         /* [2, R, d]: cos and sin */
  float *scratch;            /* R (H read + D + 4 E + heads R) floats */
  int64_t L, R, D, I, H, K, d, E;
  int64_t heads;             /* of a block; 0: P-Match (clause 8.1), where E is twice as wide */
  int64_t read;              /* timesteps of the row with most of them, this one too */
  int64_t alone;             /* whether every group is one row */
  float eps, block_eps;
} Step;

/* Calls f with a head width that the compiler knows, where it is a usual one: twice as fast. */
#define BY_WIDTH(f, d, ...)                       \
  do {                                            \
    switch (d) {                                  \
      case 32: f(__VA_ARGS__, 32); break;         \
      case 48: f(__VA_ARGS__, 48); break;         \
      case 64: f(__VA_ARGS__, 64); break;         \
      case 128: f(__VA_ARGS__, 128); break;       \
      default: f(__VA_ARGS__, d);                 \
    }                                             \
  } while (0)

INLINE float dot(const float *a, const float *b, int64_t n) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; i++) sum += a[i] * b[i];
  return sum;
}

/* x / sqrt(mean(x^2) + eps) * weight (clause 3.2); y may be x. */
static void norm(float *y, const float *x, const float *weight, float eps, int64_t n) {
  float scale = 1 / sqrtf(dot(x, x, n) / n + eps);
  for (int64_t i = 0; i < n; i++) y[i] = x[i] * scale * weight[i];
}

static void norms(float *y, const float *x, const float *weight, float eps, int64_t R, int64_t D) {
#pragma omp parallel for if (R * D > PARALLEL_FROM)
  for (int64_t r = 0; r < R; r++) norm(y + r * D, x + r * D, weight, eps, D);
}

/* e^x to about one ulp, in a form that compilers can vectorise: 2^n e^r with |r| <= ln(2) / 2, and
 * e^r by its series. Below the normal numbers it is 0. */
INLINE float exponential(float x) {
  float n = rintf(x * 1.44269504f);
  float r = fmaf(n, -1.42860677e-6f, fmaf(n, -0.693145752f, x)); /* no reordering spoils this */
  float series = 1 + r * (1 + r * (1 / 2.f + r * (1 / 6.f + r * (1 / 24.f + r * (1 / 120.f +
                 r * (1 / 720.f + r * (1 / 5040.f)))))));
  int32_t bits = (int32_t)((uint32_t)((int32_t)n + 127) << 23);
  float power;
  memcpy(&power, &bits, sizeof power);
  return x < -87 ? 0 : x > 88 ? INFINITY : series * power;
}

static void silu(float *y, const float *x, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) y[i] = x[i] / (1 + exponential(-x[i]));
}

/* score [n] becomes its softmax. */
static void softmax(float *score, int64_t n) {
  float top = score[0], total = 0;
#pragma omp simd reduction(max : top)
  for (int64_t i = 1; i < n; i++) top = score[i] > top ? score[i] : top;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < n; i++) total += score[i] = exponential(score[i] - top);
  for (int64_t i = 0; i < n; i++) score[i] /= total;
}

/* y [d] += the rows of values [n, stride] weighted by p [n]. Four at once: y is read less often. */
INLINE void weigh(float *restrict y, const float *p, const float *values, int64_t n,
                  int64_t stride, int64_t d) {
  int64_t j = 0;
  for (; j + 4 <= n; j += 4) {
    const float *a = values + j * stride, *b = a + stride, *c = b + stride, *e = c + stride;
    for (int64_t i = 0; i < d; i++)
      y[i] += p[j] * a[i] + p[j + 1] * b[i] + p[j + 2] * c[i] + p[j + 3] * e[i];
  }
  for (; j < n; j++)
    for (int64_t i = 0; i < d; i++) y[i] += p[j] * values[j * stride + i];
}

/* Turn a head by its position, in Hugging Face's layout of halves (clause 5.6); the sign of
 * rotate_half is in the table of sin. With a weight, norm it before (Qwen3). */
static void place(float *head, const float *weight, float eps, const float *cos, const float *sin,
                  int64_t d) {
  if (weight) norm(head, head, weight, eps, d);
  for (int64_t i = 0; i < d / 2; i++) {
    float a = head[i], b = head[i + d / 2];
    head[i] = a * cos[i] + b * sin[i];
    head[i + d / 2] = b * cos[i + d / 2] + a * sin[i + d / 2];
  }
}

/* Around a product of integers (clause 10.5): what it gave, as y [R, O], or added to it; and what the
 * next one is to read, from x [R, K]. Of other matrices torch gives and reads floats itself. */
static void take(const Step *s, const Integers *from, float *y, int64_t O, int add) {
  if (from->scales)
    scale_back(y, s->sums, s->units, from->scales, from->bias, add ? y : NULL, s->R, O);
}

static void give(const Step *s, const Integers *to, const float *x, int64_t K) {
  if (to->scales) round_rows(s->rounded, s->units, x, s->R, K);
}

/* x [R, D] is h [R, D] normed for the layer's FFN. */
void post_norm(const Step *s, int64_t i, float *x, float *h) {
  const Layer *layer = s->layers + i;
  take(s, &layer->o, h, s->D, 1);
  norms(x, h, layer->post_norm, s->eps, s->R, s->D);
  give(s, &layer->gate_up, x, s->D);
}

/* SwiGLU (clause 5.8): y [R, I] from gate and up, [R, 2, I]. */
void swiglu(const Step *s, int64_t i, float *y, float *gate_up) {
  int64_t R = s->R, I = s->I;
  take(s, &s->layers[i].gate_up, gate_up, 2 * I, 0);
#pragma omp parallel for collapse(2) if (R * I * 8 > PARALLEL_FROM)
  for (int64_t r = 0; r < R; r++)
    for (int64_t c = 0; c < I; c += PIECE) {
      int64_t n = I - c < PIECE ? I - c : PIECE;
      const float *gate = gate_up + 2 * r * I + c, *up = gate + I;
      float *out = y + r * I + c;
      silu(out, gate, n);
      for (int64_t j = 0; j < n; j++) out[j] *= up[j];
    }
  give(s, &s->layers[i].down, y, I);
}

/* One row and query head of `attend`: q on n1 slots of the prefix and n2 timesteps of its own. */
INLINE void read(float *y, const float *q, float *score, const float *prefix_k,
                 const float *prefix_v, const float *keys, const float *values, int64_t n1,
                 int64_t n2, int64_t d) {
  float scale = 1 / sqrtf(d);
  for (int64_t j = 0; j < n1; j++) score[j] = dot(q, prefix_k + j * d, d) * scale;
  for (int64_t j = 0; j < n2; j++) score[n1 + j] = dot(q, keys + j * d, d) * scale;
  softmax(score, n1 + n2);
  memset(y, 0, d * sizeof(float));
  weigh(y, score, prefix_v, n1, d, d);
  weigh(y, score + n1, values, n2, d, d);
}

/* A host's attention at one timestep (clauses 4.1, 5.4 to 5.6), in layer i: y [R, H, d] from
 * qkv [R, H + 2K, d], which is changed. Row r puts its new keys and values at its timestep, and reads
 * them after those of its prompt. */
void attend(const Step *s, int64_t i, float *y, float *qkv) {
  const Layer *layer = s->layers + i;
  int64_t R = s->R, H = s->H, K = s->K, d = s->d, M = H / K, window = layer->window;
  take(s, &layer->qkv, qkv, (H + 2 * K) * d, 0);
#pragma omp parallel for schedule(static)
  for (int64_t unit = 0; unit < K * R; unit++) { /* rows of a group in turn: its prefix stays near */
    int64_t k = unit / R, r = unit % R, P = s->lengths[r], T = s->rooms[r], step = s->steps[r];
    const float *cos = s->rope + r * d, *sin = s->rope + (R + r) * d;
    float *heads = qkv + r * (H + 2 * K) * d, *key = heads + (H + k) * d;
    float *keys = s->own[r] + (2 * i * K + k) * T * d, *values = keys + K * T * d;
    place(key, layer->k_norm, s->eps, cos, sin, d);
    memcpy(keys + step * d, key, d * sizeof(float));
    memcpy(values + step * d, key + K * d, d * sizeof(float));

    int64_t lost = window && P + step + 1 > window ? P + step + 1 - window : 0;
    int64_t p0 = lost < P ? lost : P, t0 = lost - p0;
    const float *prefix_k = s->prefixes[r] + ((2 * i * K + k) * P + p0) * d;
    const float *prefix_v = prefix_k + K * P * d;
    for (int64_t h = k * M; h < (k + 1) * M; h++) {
      float *q = heads + h * d;
      place(q, layer->q_norm, s->eps, cos, sin, d);
      BY_WIDTH(read, d, y + (r * H + h) * d, q, s->scratch + (r * H + h) * s->read, prefix_k,
               prefix_v, keys + t0 * d, values + t0 * d, P - p0, step + 1 - t0);
    }
  }
  give(s, &layer->o, y, H * d);
}

/* One row and head of `block`: q on the N rows of its group, whose k and v lie `stride` apart. */
INLINE void look(float *y, const float *q, float *score, const float *k, const float *v,
                 int64_t N, int64_t stride, int64_t d) {
  float scale = 1 / sqrtf(d);
  for (int64_t j = 0; j < N; j++) score[j] = dot(q, k + j * stride, d) * scale;
  softmax(score, N);
  memset(y, 0, d * sizeof(float));
  weigh(y, score, v, N, stride, d);
}

/* A tile of y [R, O] += x [R, D] w [O, D]^T: rows x outs sums, each in lanes of its own, so that every
 * float of w that is loaded serves all rows. w is asked for ahead of time: it comes from memory. */
INLINE void tile(float *y, const float *x, const float *w, int64_t O, int64_t D, int rows,
                 int outs) {
  lanes sum[ROWS][OUTS];
  for (int r = 0; r < rows; r++)
    for (int o = 0; o < outs; o++) sum[r][o] = (lanes){0};
  int64_t i = 0;
  for (; i + LANES <= D; i += LANES) {
    lanes weights[OUTS];
    for (int o = 0; o < outs; o++) {
      weights[o] = *(const unaligned *)(w + o * D + i);
      __builtin_prefetch(w + (o + OUTS) * D + i);
    }
    for (int r = 0; r < rows; r++) {
      lanes inputs = *(const unaligned *)(x + r * D + i);
      for (int o = 0; o < outs; o++) sum[r][o] += inputs * weights[o];
    }
  }
  for (int r = 0; r < rows; r++)
    for (int o = 0; o < outs; o++) {
      float total = 0;
#pragma omp simd reduction(+ : total)
      for (int l = 0; l < LANES; l++) total += sum[r][o][l];
      for (int64_t j = i; j < D; j++) total += x[r * D + j] * w[o * D + j];
      y[r * O + o] += total;
    }
}

/* `tile` with numbers that the compiler knows, so that the sums stay in registers. */
INLINE void tile_of_rows(float *y, const float *x, const float *w, int64_t O, int64_t D, int rows,
                         int outs) {
  switch (rows) {
#define ROWS_ARE(n) case n: tile(y, x, w, O, D, n < ROWS ? n : ROWS, outs); break;
    ROWS_ARE(1) ROWS_ARE(2) ROWS_ARE(3) ROWS_ARE(4) ROWS_ARE(5) ROWS_ARE(6) ROWS_ARE(7) ROWS_ARE(8)
  }
}

/* y [R, O] += x [R, D] w [O, D]^T, shared out among the threads that call it. */
static void linear(float *y, const float *x, const float *w, int64_t R, int64_t O, int64_t D) {
#pragma omp for schedule(static)
  for (int64_t t = 0; t < (O + OUTS - 1) / OUTS; t++)
    for (int64_t r = 0; r < R; r += ROWS) {
      int64_t o = t * OUTS;
      int rows = R - r < ROWS ? R - r : ROWS;
      if (o + OUTS <= O)
        tile_of_rows(y + r * O + o, x + r * D, w + o * D, O, D, rows, OUTS);
      else
        for (; o < O; o++) tile_of_rows(y + r * O + o, x + r * D, w + o * D, O, D, rows, 1);
    }
}

/* The Bridge block of layer i at one timestep, every cell active (chapter 3): adds to h [R, D] what
 * each row reads from its group. Of rows that are alone v is all there is to read (clause 3.8). To be
 * called by all threads of a region. */
static void block(const Step *s, const Layer *layer, float *h) {
  int64_t R = s->R, D = s->D, E = s->E, H = s->heads, d = H ? E / H : 0;
  int64_t parts = H && !s->alone ? 3 : 1, F = parts * E;
  const float *inward = layer->inward + (H && s->alone ? 2 * E * D : 0);
  float *x = s->scratch, *in = x + R * D, *out = in + R * F, *scores = out + R * E;
#pragma omp for schedule(static)
  for (int64_t r = 0; r < R; r++) {
    norm(x + r * D, h + r * D, layer->block_norm, s->block_eps, D);
    memset(in + r * F, 0, F * sizeof(float));
  }
  linear(in, x, inward, R, F, D);
  if (parts == 3) {
#pragma omp for schedule(static)
    for (int64_t unit = 0; unit < R * H; unit++) {
      int64_t r = unit / H, n = unit % H, first = s->first[r];
      const float *q = in + r * F + n * d, *k = in + first * F + E + n * d;
      BY_WIDTH(look, d, out + r * E + n * d, q, scores + unit * R, k, k + E, s->last[r] - first, F);
    }
  } else if (!H) {
#pragma omp for schedule(static)
    for (int64_t r = 0; r < R; r++) silu(out + r * E, in + r * E, E);
  } else {
    out = in;
  }
  linear(h, out, layer->outward, R, D, E);
}

/* What follows the FFN of layer i (-1: the embedding): its block, if it has one, on h [R, D], and the
 * norm before the next layer, or before the head: x [R, D]. */
void go_on(const Step *s, int64_t i, float *x, float *h) {
  const Layer *last = s->layers + i, *next = i + 1 < s->L ? last + 1 : NULL;
  const float *weight = next ? next->input_norm : s->last_norm;
  int64_t R = s->R, D = s->D;
  if (i >= 0) take(s, &last->down, h, D, 1);
  if (i >= 0 && last->block_norm) {
#pragma omp parallel
    {
      block(s, last, h);
#pragma omp for schedule(static)
      for (int64_t r = 0; r < R; r++) norm(x + r * D, h + r * D, weight, s->eps, D);
    }
  } else {
    norms(x, h, weight, s->eps, R, D);
  }
  give(s, next ? &next->qkv : &s->head, x, D);
}
