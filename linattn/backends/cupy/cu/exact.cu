// The product with everything in the accumulation dtype, on CUDA cores: any strides, any width, every option.
//
//   out[t] = sum_i turn_a[t, i] a[t] . S_i  +  sum over s <= t of w(t, s) (a[t] . b[s]) c[s]
//   S_i    = start_i + sum_s turn_b[s, i] b[s] c[s]^T          w(t, s) = turn_a[t] . turn_b[s], 1 without turns
//
// Definition  backends/reference/linear.py, product; plan.py says how forward and backward are made of it
// Launch      grid heads x segments x tiles of TILE columns, block 256 = 16 x 16, shared: plan.py, exact_shared
// Ownership   a thread owns its rows and columns of out and state: no atomics, the same bits in every run
// Compiled    -DLA_STORED=float|double|la::f16|la::bf16 -DLA_CHUNK=.. -DLA_TILE=.. -DLA_NAME=..
namespace la {
template <class Stored, int C, int X> struct Exact {
  static_assert(X <= 32 && X <= C, "a lane a column; rows of the product take the place of the scores");
  typedef typename RealOf<Stored>::type Real;
  static constexpr int THREADS = 256, SIDE = 16, WARPS = THREADS / 32, RC = C / SIDE, RX = X / SIDE, RR = 4;
  static constexpr bool COMPENSATED = sizeof(Real) == 4;

  // A slot's rows first .. first + C - 1 in shared memory; what is masked or past the end is zero after the map.
  static __device__ __noinline__ void load(
      Real* to, int pitch, const Params& p, const Place& here, const Array& x, int map, int scaled, int extra,
      bool masked, int first, int last, int column, int width, int room, Real* made) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const Stored* from = head_of<Stored>(x, here);
    const unsigned char* mask = masked ? head_of<unsigned char>(p.mask, here) : nullptr;
    const Real* mean = head_of<Real>(p.mean, here);
    for (int r = warp; r < C; r += WARPS) {
      const i64 t = first + r;
      const bool there = t < last && (!mask || mask[t * p.mask.token]);
      Divisor<Real> by = {Real(1), Real(1), false};
      if (map == DIVIDED && there) by = divisor(head_of<Real>(p.den, here)[t * p.den.token], p.rule, Real(p.eps));
      Real* row = to + r * pitch;
      Real largest = 0;
      #pragma unroll 2
      for (int x_ = lane; x_ < room; x_ += 32) {
        Real y = 0;
        if (there && x_ < width && !by.dead) {
          y = real(from[t * x.token + i64(column + x_) * x.column]);
          y = map == DIVIDED ? y / by.c : map == CENTRED ? y - mean[i64(column + x_) * p.mean.column] : feature(map, y);
        }
        largest = largest < size_of(y) ? size_of(y) : largest;
        row[x_] = y;
      }
      if (scaled != AS_IS) {
        Real factor = 1;
        if (scaled == MAKE) {
          #pragma unroll
          for (int step = 16; step; step /= 2) {
            const Real theirs = __shfl_xor_sync(~0u, largest, step);
            largest = largest < theirs ? theirs : largest;
          }
          factor = power_of_two(largest);
          if (lane == 0) made[r] = factor;
        } else if (there) {
          factor = head_of<Real>(p.scale, here)[t * p.scale.token];
        }
        #pragma unroll 1
        for (int x_ = lane; x_ < width; x_ += 32) row[x_] *= factor;
      }
      if (extra != NONE && lane == 0) {
        Real y = extra == ONES ? Real(1) : Real(0);
        if (extra == VECTOR && there)
          #pragma unroll 1
          for (int i = 0; i < p.extra_tiles; i++)
            y += head_of<Real>(p.extra, here)[t * p.extra.token + i * p.extra_tile];
        row[width] = there ? y : Real(0);
      }
    }
  }
  static __device__ __forceinline__ void turns(Real* to, const Array& x, const Place& here, int first, int last) {
    const Real* from = head_of<Real>(x, here);
    #pragma unroll 1
    for (int i = threadIdx.x; i < 2 * C; i += THREADS)
      to[i] = first + i / 2 < last ? from[i64(first + i / 2) * x.token + i % 2 * x.column] : Real(0);
  }
  // sum += x, and what that rounds away goes to rest: |rest| stays below a rounding of sum.
  static __device__ __forceinline__ void add(Real& sum, Real& rest, Real x) {
    const Real total = sum + x, seen = total - sum, lost = (sum - (total - seen)) + (x - seen) + rest;
    sum = total + lost;
    rest = lost - (sum - total);
  }

  static __device__ __forceinline__ void run(const Params& p) {
    LA_SHARED(raw);
    const int width = p.width + (p.a_extra != NONE), pitch = width | 1, n = p.n_sums, size = width * X;
    Real* a = (Real*)raw;
    Real* b = a + C * pitch;
    Real* c = b + C * pitch;
    Real* scores = c + C * X;
    Real* turn_a = scores + C * (C + 1);
    Real* turn_b = turn_a + 2 * C;
    Real* den = turn_b + 2 * C;
    Real* factor = den + C;
    Real* sums = factor + C;
    Real* ones = sums + n * size;  // the column of the denominators
    Real* rests = ones + n * width;
    Real* ones_rest = rests + (COMPENSATED ? n * size : 0);

    const int tid = threadIdx.x, tx = tid % SIDE, ty = tid / SIDE;
    const Place here = place_of(p, blockIdx.x, p.tiles, p.segments);
    const int x0 = here.tile * X, columns = p.columns - x0 < X ? p.columns - x0 : X;
    const int tokens = p.mode == SUMS ? p.keys : p.rows, first = here.segment * p.segment;
    const int last = tokens - first < p.segment ? tokens : first + p.segment;
    const bool turned = n == 2, sweep = p.mode == SWEEP;

    const bool begins = !p.start_once || here.owns(p.start.axis);
    const Real* start = begins ? head_of<Real>(p.start, here) : nullptr;
    const Real* rest = begins ? head_of<Real>(p.rest, here) : nullptr;
    #pragma unroll 1
    for (int j = tid; j < n * width * (X + 1); j += THREADS) {
      const int x = j % (X + 1), r = j / (X + 1) % width, i = j / (X + 1) / width;
      if (x == X && !p.normalize) continue;
      const bool there = x == X || x < columns;
      const i64 column = x == X ? p.columns : x0 + x;
      Real s = there && start ? start[i * p.start.sum + r * p.start.row + column * p.start.column] : Real(0);
      Real low = there && rest ? rest[i * p.rest.sum + r * p.rest.row + column * p.rest.column] : Real(0);
      const Real whole = s + low;
      low -= whole - s;
      (x == X ? ones[i * width + r] : sums[i * size + r * X + x]) = whole;
      if (COMPENSATED) (x == X ? ones_rest[i * width + r] : rests[i * size + r * X + x]) = low;
    }

    for (int chunk = first; chunk < last; chunk += C) {
      if (p.mode != SUMS) {
        load(a, pitch, p, here, p.a, p.a_map, p.a_scaled, p.a_extra, false, chunk, last, 0, p.width, p.width, factor);
        if (turned) turns(turn_a, p.turn_a, here, chunk, last);
      }
      if (p.mode != APPLY) {
        load(b, pitch, p, here, p.b, p.b_map, p.b_scaled, p.b_extra, p.mask_keys, chunk, last, 0, p.width, p.width,
             nullptr);
        load(c, X, p, here, p.c, p.c_map, p.c_scaled, NONE, p.mask_keys, chunk, last, x0, columns, X, nullptr);
        if (turned) turns(turn_b, p.turn_b, here, chunk, last);
      }
      __syncthreads();  // the operands are there
      if (sweep) {
        // scores[t, s] = w(t, s) a[t] . b[s]
        Real acc[RC][RC] = {};
        #pragma unroll 4
        for (int r = 0; r < width; r++) {
          Real u[RC], w[RC];
          #pragma unroll
          for (int i = 0; i < RC; i++) {
            u[i] = a[(ty + i * SIDE) * pitch + r];
            w[i] = b[(tx + i * SIDE) * pitch + r];
          }
          #pragma unroll
          for (int i = 0; i < RC; i++)
            #pragma unroll
            for (int j = 0; j < RC; j++) acc[i][j] += u[i] * w[j];
        }
        #pragma unroll
        for (int i = 0; i < RC; i++)
          #pragma unroll
          for (int j = 0; j < RC; j++) {
            const int t = ty + i * SIDE, s = tx + j * SIDE;
            if (turned) acc[i][j] *= turn_a[2 * t] * turn_b[2 * s] + turn_a[2 * t + 1] * turn_b[2 * s + 1];
            scores[t * (C + 1) + s] = acc[i][j];
          }
        __syncthreads();  // the scores are there
      }
      if (p.mode != SUMS) {
        if (p.normalize && tid < C) {
          // den[t] = sum_s scores[t, s] + sum_i turn_a[t, i] a[t] . S_i[:, E]
          Real own = 0;
          if (sweep)
            #pragma unroll 1
            for (int s = 0; s <= tid; s++) own += scores[tid * (C + 1) + s];
          for (int i = 0; i < n; i++) {
            Real past = 0;
            #pragma unroll 4
            for (int r = 0; r < width; r++) past += a[tid * pitch + r] * ones[i * width + r];
            own += turned ? turn_a[2 * tid + i] * past : past;
          }
          den[tid] = own;
        }
        Real acc[RC][RX] = {};
        for (int i = 0; i < n; i++) {
          Real past[RC][RX] = {};
          #pragma unroll 4
          for (int r = 0; r < width; r++) {
            Real u[RC], w[RX];
            #pragma unroll
            for (int j = 0; j < RC; j++) u[j] = a[(ty + j * SIDE) * pitch + r];
            #pragma unroll
            for (int j = 0; j < RX; j++) w[j] = sums[i * size + r * X + tx + j * SIDE];
            #pragma unroll
            for (int j = 0; j < RC; j++)
              #pragma unroll
              for (int x = 0; x < RX; x++) past[j][x] += u[j] * w[x];
          }
          #pragma unroll
          for (int j = 0; j < RC; j++)
            #pragma unroll
            for (int x = 0; x < RX; x++)
              acc[j][x] += turned ? turn_a[2 * (ty + j * SIDE) + i] * past[j][x] : past[j][x];
        }
        if (sweep)
          #pragma unroll 2
          for (int s = 0; s < C; s++) {
            Real w[RX];
            #pragma unroll
            for (int x = 0; x < RX; x++) w[x] = c[s * X + tx + x * SIDE];
            #pragma unroll
            for (int j = 0; j < RC; j++)
              if (s <= ty + j * SIDE) {  // not a product with zero: what is not finite stays with those that see it
                const Real u = scores[(ty + j * SIDE) * (C + 1) + s];
                #pragma unroll
                for (int x = 0; x < RX; x++) acc[j][x] += u * w[x];
              }
          }
        __syncthreads();  // the denominators are there; scores and state have been read
        #pragma unroll
        for (int j = 0; j < RC; j++)
          #pragma unroll
          for (int x = 0; x < RX; x++) scores[(ty + j * SIDE) * X + tx + x * SIDE] = acc[j][x];
        __syncthreads();  // the product's rows are there
        finish(p, here, scores, den, factor, chunk, last, x0, columns);
      }
      if (p.mode != APPLY) {
        // S_i += sum_s turn_b[s, i] b[s] c[s]^T
        for (int i = 0; i < n; i++) {
          for (int r0 = ty; r0 < width; r0 += RR * SIDE) {
            Real acc[RR][RX] = {};
            #pragma unroll 4
            for (int s = 0; s < C; s++) {
              const Real turn = turned ? turn_b[2 * s + i] : Real(1);
              Real w[RX];
              #pragma unroll
              for (int x = 0; x < RX; x++) w[x] = c[s * X + tx + x * SIDE];
              #pragma unroll
              for (int j = 0; j < RR; j++) {
                const int r = r0 + j * SIDE;
                const Real u = r < width ? turn * b[s * pitch + r] : Real(0);
                #pragma unroll
                for (int x = 0; x < RX; x++) acc[j][x] += u * w[x];
              }
            }
            #pragma unroll
            for (int j = 0; j < RR; j++)
              #pragma unroll
              for (int x = 0; x < RX; x++) {
                const int r = r0 + j * SIDE, at = i * size + r * X + tx + x * SIDE;
                if (r >= width) continue;
                if (COMPENSATED) add(sums[at], rests[at], acc[j][x]);
                else sums[at] += acc[j][x];
              }
          }
          if (p.normalize)
            #pragma unroll 1
            for (int r = tid; r < width; r += THREADS) {
              Real own = 0;
              #pragma unroll 4
              for (int s = 0; s < C; s++) own += turned ? turn_b[2 * s + i] * b[s * pitch + r] : b[s * pitch + r];
              if (COMPENSATED) add(ones[i * width + r], ones_rest[i * width + r], own);
              else ones[i * width + r] += own;
            }
        }
      }
      __syncthreads();  // everyone is done with this chunk
    }
    if (first >= last) __syncthreads();  // no chunk: the state is as it was loaded

    if (p.mode == APPLY || (sweep && here.segment < p.segments - 1)) return;
    const bool ends = !p.final_once || here.owns(p.final.axis);
    Real* final = ends ? head_of<Real>(p.final, here) : nullptr;
    Real* final_rest = ends ? head_of<Real>(p.final_rest, here) : nullptr;
    if (sweep && final) final -= here.segment * p.final.segment;  // of the last segment: not one of many
    if (sweep && final_rest) final_rest -= here.segment * p.final_rest.segment;
    if (!final) return;
    #pragma unroll 1
    for (int j = tid; j < n * width * (X + 1); j += THREADS) {
      const int x = j % (X + 1), r = j / (X + 1) % width, i = j / (X + 1) / width;
      if (x == X ? !p.normalize || here.tile : x >= columns) continue;
      const i64 column = x == X ? p.columns : x0 + x;
      final[i * p.final.sum + r * p.final.row + column * p.final.column] =
          x == X ? ones[i * width + r] : sums[i * size + r * X + x];
      Real low = 0;
      if (COMPENSATED) low = x == X ? ones_rest[i * width + r] : rests[i * size + r * X + x];
      if (final_rest)
        final_rest[i * p.final_rest.sum + r * p.final_rest.row + column * p.final_rest.column] =
            is_finite(low) ? low : Real(0);
    }
  }

  // From rows of the product, in shared memory, to what is asked for: a warp a row, a lane a column.
  static __device__ __noinline__ void finish(
      const Params& p, const Place& here, const Real* product, const Real* den, const Real* factor, int chunk, int last,
      int x0, int columns) {
    const int lane = threadIdx.x % 32;
    #pragma unroll 1
    for (int row = threadIdx.x / 32; row < C && chunk + row < last; row += WARPS) {
      const i64 t = chunk + row, x = x0 + lane;
      const bool there = lane < columns;
      Real own = 0;
      Divisor<Real> by = {Real(1), Real(1), false};
      if (p.epilogue == DIVIDE || p.epilogue == DELTA) {
        Real* at = (Real*)head_of<Real>(p.den, here) + t * p.den.token;
        own = p.epilogue == DIVIDE ? den[row] : *at;
        by = divisor(own, p.rule, Real(p.eps));
        if (p.epilogue == DIVIDE && lane == 0 && here.tile == 0) *at = own;
      }
      Real y = there ? product[row * X + lane] : Real(0);
      if (p.epilogue == DELTA) {
        // d_den[t] = -c' (g . num) / c + (g . mean) (1 - c' den / c), g = d_out / c, num of centred values: this tile's part
        Real g = 0, mean = 0;
        if (there && !by.dead) g = real(head_of<Stored>(p.other, here)[t * p.other.token + x * p.other.column]) / by.c;
        if (there && p.rule != SAFE) mean = g * head_of<Real>(p.mean, here)[x * p.mean.column];
        Real num = there && !by.dead ? g * y : Real(0);
        #pragma unroll
        for (int step = 16; step; step /= 2) {
          num += __shfl_xor_sync(~0u, num, step);
          mean += __shfl_xor_sync(~0u, mean, step);
        }
        Real d_den = by.dead ? Real(0) : -by.slope * num / by.c;
        if (p.rule != SAFE) d_den += mean * (Real(1) - by.slope * own / by.c);
        if (lane == 0) {
          ((Real*)head_of<Real>(p.extra, here))[t * p.extra.token + here.tile * p.extra_tile] = d_den;
          if (p.a_scaled == MAKE && here.tile == 0) ((Real*)head_of<Real>(p.scale, here))[t * p.scale.token] = factor[row];
        }
      } else if (there) {
        if (p.epilogue == DIVIDE) y = by.dead ? Real(0) : y / by.c;
        if (p.scaled_rows) y *= head_of<Real>(p.scale, here)[t * p.scale.token];
        if (p.epilogue == CHAIN)
          y = chained(p.out_map, real(head_of<Stored>(p.other, here)[t * p.other.token + x * p.other.column]), y);
        if (p.mask_rows && !head_of<unsigned char>(p.mask, here)[t * p.mask.token]) y = 0;
        const i64 at = here.of(p.out.axis) + t * p.out.token + x * p.out.column;
        if (p.out_real) ((Real*)p.out.data)[at] = y;
        else ((Stored*)p.out.data)[at] = stored<Stored>(y);
      }
    }
  }
};
}  // namespace la

extern "C" __global__ void __launch_bounds__(256) LA_NAME(const la::Params p) {
  la::Exact<LA_STORED, LA_CHUNK, LA_TILE>::run(p);
}
