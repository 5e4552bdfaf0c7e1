// Vectors of float32, read from and written to either type of element: bfloat16 with -DBFLOAT16,
// else float32. Compilers split them into what the processor has.

#include <stdint.h>
#include <string.h>

#define LANES 16
#define INLINE static inline __attribute__((always_inline))

typedef float Lanes __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

// To bfloat16, to the nearest, ties to even; NaN stays one.
INLINE Halves to_bfloat16(Lanes value) {
  const Words bits = (Words)value, nan = (Words)(value != value);
  const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0), Halves);
}

#ifndef __cplusplus
#ifdef BFLOAT16
typedef uint16_t Element;

INLINE Lanes load(const Element *from) {
  Halves bits;
  memcpy(&bits, from, sizeof bits);
  return (Lanes)(__builtin_convertvector(bits, Words) << 16);
}

INLINE void store(Element *to, Lanes value) {
  Halves result = to_bfloat16(value);
  memcpy(to, &result, sizeof result);
}
#else
typedef float Element;

INLINE Lanes load(const Element *from) {
  Lanes value;
  memcpy(&value, from, sizeof value);
  return value;
}

INLINE void store(Element *to, Lanes value) { memcpy(to, &value, sizeof value); }
#endif

// The first `count` elements, and zeros.
INLINE Lanes load_some(const Element *from, int count) {
  if (count == LANES) return load(from);
  Element some[LANES] = {0};
  memcpy(some, from, count * sizeof(Element));
  return load(some);
}

INLINE void store_some(Element *to, Lanes value, int count) {
  Element some[LANES];
  store(some, value);
  memcpy(to, some, count * sizeof(Element));
}
#endif

INLINE float sum(Lanes value) {
  float lanes[LANES];
  memcpy(lanes, &value, sizeof lanes);
  for (int width = LANES / 2; width > 0; width /= 2)
    for (int i = 0; i < width; i++) lanes[i] += lanes[i + width];
  return lanes[0];
}

// e^x for x <= 0, to about one unit in the last place (the polynomial is Cephes' expf).
INLINE Lanes exponential(Lanes x) {
  Lanes bounded = (Lanes)((Ints)x & (x > -87.0f));
  Ints power = __builtin_convertvector(bounded * 1.44269504f - 0.5f, Ints);
  Lanes n = __builtin_convertvector(power, Lanes);
  Lanes r = bounded - n * 0.693359375f + n * 2.12194440e-4f;
  Lanes p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  p *= (Lanes)((power + 127) << 23);
  // 0 where x is too small; no number where x is none.
  return (Lanes)((Ints)p & (x > -87.0f)) + (x - x);
}
