// What a launch is told. plan.py builds the same struct, field by field; a test compares the sizes.
namespace la {
constexpr int AXES = 6;  // leading axes

// Element (head, t, x) lies at head's index . axis + t token + x column, in elements; 64 bits throughout.
struct Array {
  const void* data;
  i64 axis[AXES], token, column;
};
// S[i][r][x] of a head and a segment of tokens.
struct State {
  void* data;
  i64 axis[AXES], segment, sum, row, column;
};

enum Mode { SWEEP, SUMS, APPLY, TOTAL };    // out and state; state alone; out from a state; scan: total alone
enum Epilogue { PLAIN, DIVIDE, DELTA, CHAIN };
enum Scaled { AS_IS, MAKE, READ };          // rows times a power of two: of their own maximum, or read from `scale`
enum Extra { NONE, ONES, VECTOR };          // the contraction's extra column

struct Params {
  Array a, b, c, out, other;                 // other: d_out for DELTA, the map's argument for CHAIN
  Array turn_a, turn_b, mask, mean;
  Array den, scale, extra;                   // a number a token each; extra: the sum of `extra_tiles` parts
  State start, rest, final, final_rest, work;
  i64 size[AXES], extra_tile;
  double eps;
  int rows, keys, width, columns;            // tokens of a, tokens of b and c; contraction; columns of c
  int n_sums, tiles, segments, segment;      // segment: tokens in one
  int mode, epilogue, rule, normalize;
  int a_map, b_map, c_map, out_map;
  int a_scaled, b_scaled, c_scaled, a_extra;
  int b_extra, mask_keys, mask_rows, extra_tiles;
  int start_once, final_once, out_real, scaled_rows;
};

// Where this block stands.
struct Place {
  int tile, segment;
  i64 index[AXES];
  __device__ __forceinline__ i64 of(const i64 (&axis)[AXES]) const {
    i64 offset = 0;
    #pragma unroll
    for (int i = 0; i < AXES; i++) offset += index[i] * axis[i];
    return offset;
  }
  // The first of the heads that share what has these strides.
  __device__ __forceinline__ bool owns(const i64 (&axis)[AXES]) const {
    bool first = true;
    #pragma unroll
    for (int i = 0; i < AXES; i++) first = first && (index[i] == 0 || axis[i] != 0);
    return first;
  }
};
__device__ __forceinline__ Place place_of(const Params& p, u32 block, u32 tiles, u32 segments) {
  Place here;
  u32 left = block;
  here.tile = left % tiles;
  left /= tiles;
  here.segment = left % segments;
  left /= segments;
  #pragma unroll
  for (int i = AXES - 1; i >= 0; i--) {
    const u32 size = u32(p.size[i]);
    here.index[i] = left % size;
    left /= size;
  }
  return here;
}
template <class T> __device__ __forceinline__ const T* head_of(const Array& x, const Place& here) {
  return (const T*)x.data + here.of(x.axis);
}
template <class Real> __device__ __forceinline__ Real* head_of(const State& x, const Place& here) {
  return x.data ? (Real*)x.data + here.of(x.axis) + here.segment * x.segment : nullptr;
}
}  // namespace la
