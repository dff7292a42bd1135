// From the sums of each segment to those before it, and the total.
//
//   work[j] <- start + work[0] + ... + work[j - 1]           final = start + all of them (mode TOTAL: this alone)
//
// Launch      a thread an element of a head's state, grid-stride over heads; block 256
// Ownership   a thread owns its element of all segments, and adds from left to right with what rounding loses
// Compiled    -DLA_STORED=float|double -DLA_NAME=..
namespace la {
template <class Real> struct Scan {
  static __device__ __forceinline__ void run(const Params& p) {
    const i64 rows = p.width, columns = p.columns, size = p.n_sums * rows * columns;
    i64 heads = 1;
    #pragma unroll
    for (int i = 0; i < AXES; i++) heads *= p.size[i];
    for (i64 at = blockIdx.x * i64(blockDim.x) + threadIdx.x; at < heads * size; at += i64(gridDim.x) * blockDim.x) {
      const Place here = place_of(p, u32(at / size), 1, 1);
      const i64 x = at % columns, r = at / columns % rows, i = at % size / (rows * columns);
      const bool begins = p.start.data && (!p.start_once || here.owns(p.start.axis));
      Real sum = 0, rest = 0;
      if (begins) sum = head_of<Real>(p.start, here)[i * p.start.sum + r * p.start.row + x * p.start.column];
      if (begins && p.rest.data) rest = head_of<Real>(p.rest, here)[i * p.rest.sum + r * p.rest.row + x * p.rest.column];
      Real* work = head_of<Real>(p.work, here) + i * p.work.sum + r * p.work.row + x * p.work.column;
      for (int j = 0; j < p.segments; j++) {
        const bool given = p.mode == TOTAL || j < p.segments - 1;
        const Real own = given ? work[j * p.work.segment] : Real(0);
        if (p.mode != TOTAL) work[j * p.work.segment] = sum + rest;
        if (!given) break;
        const Real total = sum + own, seen = total - sum, lost = (sum - (total - seen)) + (own - seen) + rest;
        sum = total + lost;
        rest = lost - (sum - total);
      }
      if (p.mode != TOTAL || (p.final_once && !here.owns(p.final.axis))) continue;
      head_of<Real>(p.final, here)[i * p.final.sum + r * p.final.row + x * p.final.column] = sum;
      if (p.final_rest.data)
        head_of<Real>(p.final_rest, here)[i * p.final_rest.sum + r * p.final_rest.row + x * p.final_rest.column] =
            is_finite(rest) ? rest : Real(0);
    }
  }
};
}  // namespace la

extern "C" __global__ void __launch_bounds__(256) LA_NAME(const la::Params p) { la::Scan<LA_STORED>::run(p); }
