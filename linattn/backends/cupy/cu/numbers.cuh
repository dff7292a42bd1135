// Numbers as they are stored and as they are computed with, feature maps with their derivatives, divisors.
// Definition  engines/features.py; backends/reference/linear.py, divisor and operands
// The only file, with tiles.cuh, that knows the device from the host simulator (LA_HOST).
#ifdef LA_HOST
#define LA_SHARED(name) unsigned char* name = sim::shared
#else
#define LA_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#endif

namespace la {
typedef long long i64;
typedef unsigned u32;
typedef unsigned short u16;

struct f16 {
  static constexpr u32 EXPONENT = 0x7C00;
  u16 bits;
};
struct bf16 {
  static constexpr u32 EXPONENT = 0x7F80;
  u16 bits;
};

template <class Stored> struct RealOf {
  typedef float type;
};
template <> struct RealOf<double> {
  typedef double type;
};

// -- 16-bit numbers: widened exactly, rounded to nearest even ------------------------------------------------------

__device__ __forceinline__ float as_float(u32 bits) {
#ifdef LA_HOST
  float x;
  memcpy(&x, &bits, 4);
  return x;
#else
  return __uint_as_float(bits);
#endif
}
__device__ __forceinline__ u32 bits_of(float x) {
#ifdef LA_HOST
  u32 bits;
  memcpy(&bits, &x, 4);
  return bits;
#else
  return __float_as_uint(x);
#endif
}
__device__ __forceinline__ double as_double(i64 bits) {
#ifdef LA_HOST
  double x;
  memcpy(&x, &bits, 8);
  return x;
#else
  return __longlong_as_double(bits);
#endif
}
__device__ __forceinline__ i64 bits_of(double x) {
#ifdef LA_HOST
  i64 bits;
  memcpy(&bits, &x, 8);
  return bits;
#else
  return __double_as_longlong(x);
#endif
}

__device__ __forceinline__ float real(float x) { return x; }
__device__ __forceinline__ double real(double x) { return x; }
__device__ __forceinline__ float real(bf16 x) { return as_float(u32(x.bits) << 16); }
__device__ __forceinline__ float real(f16 x) {
#ifdef LA_HOST
  _Float16 h;
  memcpy(&h, &x.bits, 2);
  return float(h);
#else
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#endif
}

template <class Stored> __device__ __forceinline__ Stored stored(typename RealOf<Stored>::type x) { return x; }
template <> __device__ __forceinline__ bf16 stored<bf16>(float x) {
#ifdef LA_HOST
  u32 u = bits_of(x);
  return {u16(x != x ? 0x7FFF : (u + 0x7FFF + (u >> 16 & 1)) >> 16)};
#else
  bf16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
#endif
}
template <> __device__ __forceinline__ f16 stored<f16>(float x) {
  f16 y;
#ifdef LA_HOST
  _Float16 h = _Float16(x);
  memcpy(&y.bits, &h, 2);
#else
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
#endif
  return y;
}

template <class Real> __device__ __forceinline__ bool is_finite(Real x) { return x - x == Real(0); }
template <class Real> __device__ __forceinline__ Real size_of(Real x) { return x < Real(0) ? -x : x; }  // NaN stays
__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }

// -- what is done to an operand while it is loaded -----------------------------------------------------------------

enum Map { IDENTITY, RELU, ELU1, EXP, DIVIDED, CENTRED };  // x; phi(x); x / c[t]; x - mean[column]

template <class Real> __device__ __forceinline__ Real feature(int map, Real x) {
  if (map == RELU) return x <= Real(0) ? Real(0) : x;  // x > 0 would swallow NaN
  if (map == ELU1) return x > Real(0) ? Real(1) + x : exponential(x);
  if (map == EXP) return exponential(x);
  return x;
}
// The cotangent of x from that of phi(x).
template <class Real> __device__ __forceinline__ Real chained(int map, Real x, Real d_phi) {
  if (map == RELU) return x <= Real(0) ? Real(0) : d_phi;  // relu'(0) = 0
  if (map == ELU1) return x > Real(0) ? d_phi : d_phi * exponential(x);
  if (map == EXP) return d_phi * exponential(x);
  return d_phi;
}

// -- divisors ------------------------------------------------------------------------------------------------------

enum Rule { SAFE, CLAMP, ADD };

template <class Real> struct Divisor {
  Real c, slope;  // c(den), dc / d_den
  bool dead;      // no weight at all: out = 0 and no gradient passes
};
template <class Real> __device__ __forceinline__ Divisor<Real> divisor(Real den, int rule, Real eps) {
  Divisor<Real> d = {den, Real(1), false};
  if (rule == SAFE) {
    d.dead = den == Real(0);
    if (d.dead) d.c = Real(1);
  } else if (rule == ADD) {
    d.c = den + eps;
  } else if (den < eps) {  // NaN is not low and passes
    d.c = eps;
    d.slope = Real(0);
  }
  if (!is_finite(d.c)) d.c = d.c - d.c;  // NaN: finite numerators over infinity would be a wrong finite number
  return d;
}

// 2^-floor(log2 x) where x is positive and finite, else 1: it cancels in num / den, exactly.
__device__ __forceinline__ float power_of_two(float x) {
  if (!(x > 0.f) || !is_finite(x)) return 1.f;
  int e = int(bits_of(x) >> 23) - 127;
  e = e > 126 ? 126 : e < -126 ? -126 : e;
  return as_float(u32(127 - e) << 23);
}
__device__ __forceinline__ double power_of_two(double x) {
  if (!(x > 0.) || !is_finite(x)) return 1.;
  int e = int(bits_of(x) >> 52) - 1023;
  e = e > 1022 ? 1022 : e < -1022 ? -1022 : e;
  return as_double(i64(1023 - e) << 52);
}
}  // namespace la
