// The product on the tensor core, for 16-bit numbers: one chunked sweep with the state in registers, used four ways.
//
//   out[t] = sum_i turn_a[t, i] a[t] . S_i  +  sum over s <= t of w(t, s) (a[t] . b[s] + ea[t] eb[s]) c[s]
//   S_i    = start_i + sum_s turn_b[s, i] [b[s], eb[s]] c[s]^T
//
// forward: a, b, c = phi_q, phi_k, v and a column of ones. d_q: g / c, v, phi_k; d_k: v, g / c, phi_q; d_v: phi_k, phi_q,
// g / c, with ea or eb the cotangent of the denominator; those of the keys run backwards in time by negative strides.
//
// Definition  backends/reference/linear.py, product
// Operands    rounded to the 16 bits of the input: features, scores, states; sums, denominators and states are float32
// Ones        never a column of c: a constant fragment, an eighth tile of columns; every lane has its rows' denominators
// ea, eb      a step of 16 of the contraction of which two columns are used: the number's upper and lower half
// Not finite  c[s] reaches earlier rows of its 16 rows as 0 * NaN: such a diagonal block is done again with zeros, and
//             what sees it is set to NaN
// Launch      grid heads x segments x tiles of 64 columns, block 128, shared: plan.py, sweep_shared
// Ownership   a warp owns 16 rows of out and a quarter of the state: no atomics, the same bits in every run
// Compiled    -DLA_STORED=la::bf16|la::f16 -DLA_WIDTH=64|128 -DLA_SUMS=1|2 -DLA_ONES=0|1 -DLA_EXTRA=0|1
//             -DLA_MODE=la::SWEEP|la::SUMS|la::APPLY -DLA_BLOCKS=(a multiprocessor) -DLA_NAME=..
namespace la {
template <class T, int R, int N, bool ONES_, bool EXTRA, int MODE> struct Sweep {
  static constexpr int C = 64, X = 64, WARPS = 4, THREADS = 32 * WARPS;
  static constexpr bool ROWS = MODE != SUMS, KEYS = MODE != APPLY;
  static constexpr int ROW_TILES = R / 16 / WARPS, TILES = X / 8 + ONES_;  // of the state, a warp's
  static constexpr int PITCH = R + 8, PITCH_X = X + 8;                     // rows of 8 numbers meet 8 different banks
  static constexpr int B = 0, C_ = B + (KEYS ? C * PITCH : 0), A = C_ + (KEYS ? C * PITCH_X : 0);
  static constexpr int STAGE = A + (ROWS ? C * PITCH : 0), STATE_ROWS = R + (EXTRA ? 16 : 0);
  static constexpr int STATE = ROWS ? N * STATE_ROWS * PITCH_X : 0;
  // a number a token: of a's rows, of b's and c's; twice, for this chunk and the next
  enum { TURN_A, TURN_A1, EXTRA_A, FACTOR_A, TURN_B, TURN_B1, EXTRA_B, FACTOR_B, FACTOR_C, VALID, TOKENS };
  static constexpr int TABLE = TOKENS * C;
  static constexpr int BYTES = 2 * (2 * STAGE + STATE) + 4 * (2 * TABLE + C + 128 + 8);
  static_assert(R % 64 == 0, "each warp owns whole tiles of the state");

  struct Numbers {
    float x[6];
  };

  // -- loading -----------------------------------------------------------------------------------------------------

  // This thread's share of C rows of W numbers: 16 bytes each; from a pointer to its own first row and column.
  template <int W>
  static __device__ __forceinline__ void fetch(u16* to, const u16* from, i64 step, int first, int last) {
    constexpr int PARTS = W / 8, ROWS_AT_ONCE = THREADS / PARTS;
    const int r = threadIdx.x / PARTS, x = threadIdx.x % PARTS * 8;
    #pragma unroll
    for (int i = 0; i < C / ROWS_AT_ONCE; i++) {
      const int row = r + i * ROWS_AT_ONCE;
      const bool there = first + row < last;
      copy_async(to + row * (W + 8) + x, there ? from : nullptr, there);
      from += ROWS_AT_ONCE * step;
    }
  }
  static __device__ __forceinline__ u32 halves(float x) {  // x to 16 bits and what that leaves
    const float high = real(stored<T>(x));
    return pair_of<T>(high, x - high);
  }
  static __device__ __forceinline__ float factor(const Params& p, const Place& here, int map, int scaled, i64 t) {
    if (map == DIVIDED) {
      const Divisor<float> by = divisor(head_of<float>(p.den, here)[t * p.den.token], p.rule, float(p.eps));
      return by.dead ? 0.f : 1.f / by.c;
    }
    return scaled == READ ? head_of<float>(p.scale, here)[t * p.scale.token] : 1.f;
  }
  static __device__ __forceinline__ float extra(const Params& p, const Place& here, int kind, i64 t) {
    float x = kind == ONES ? 1.f : 0.f;
    if (kind == VECTOR)
      for (int i = 0; i < p.extra_tiles; i++) x += head_of<float>(p.extra, here)[t * p.extra.token + i * p.extra_tile];
    return as_float(kind == ONES ? pair_of<T>(x, x) : halves(x));
  }
  // The numbers of a token: threads 0 .. 63 have those of a's rows, 64 .. 127 those of b's and c's.
  static __device__ __noinline__ Numbers numbers(const Params& p, const Place& here, int first, int last) {
    Numbers n = {};
    const int tid = threadIdx.x;
    const i64 t = first + tid % C;
    if (t >= last) return n;
    if (tid < C && ROWS) {
      if (N == 2) {
        const float* turn = head_of<float>(p.turn_a, here) + t * p.turn_a.token;
        n.x[0] = turn[0];
        n.x[1] = turn[p.turn_a.column];
      }
      if (EXTRA) n.x[2] = extra(p, here, p.a_extra, t);
      n.x[3] = factor(p, here, p.a_map, p.a_scaled, t);
    }
    if (tid >= C && KEYS) {
      if (N == 2) {
        const float* turn = head_of<float>(p.turn_b, here) + t * p.turn_b.token;
        n.x[0] = turn[0];
        n.x[1] = turn[p.turn_b.column];
      }
      n.x[5] = !p.mask_keys || head_of<unsigned char>(p.mask, here)[t * p.mask.token];
      if (EXTRA && n.x[5] != 0.f) n.x[2] = extra(p, here, p.b_extra, t);
      n.x[3] = factor(p, here, p.b_map, p.b_scaled, t);
      n.x[4] = factor(p, here, p.c_map, p.c_scaled, t);
    }
    return n;
  }
  static __device__ __forceinline__ void keep(float* table, const Numbers& n) {
    const int tid = threadIdx.x;
    #pragma unroll
    for (int i = 0; i < 6; i++)
      if (tid >= C || i < 4) table[((tid < C ? TURN_A : TURN_B) + i) * C + tid % C] = n.x[i];
  }

  // The map, in place; a row that is masked or past the end is zero afterwards, for phi(0) need not be.
  template <int W>
  static __device__ __noinline__ void prepare(
      u16* rows, int map, bool make, const float* factors, const float* valid, int n_rows, const float* mean,
      float* made) {
    constexpr int PARTS = W / 8;
    #pragma unroll 1
    for (int i = threadIdx.x; i < C * PARTS; i += THREADS) {
      const int r = i / PARTS;
      Sixteen* at = (Sixteen*)(rows + r * (W + 8) + i % PARTS * 8);
      Sixteen w = *at;
      float x[8];
      #pragma unroll
      for (int e = 0; e < 8; e++) x[e] = half_of<T>(w.word[e / 2], e % 2);
      if (map == CENTRED) {
        #pragma unroll
        for (int e = 0; e < 8; e++) x[e] -= mean[i % PARTS * 8 + e];
      } else if (map != DIVIDED) {
        #pragma unroll
        for (int e = 0; e < 8; e++) x[e] = feature(map, x[e]);
      }
      const bool there = r < n_rows && (!valid || valid[r] != 0.f);
      float by = factors[r];
      if (make) {
        float largest = 0;
        #pragma unroll
        for (int e = 0; e < 8; e++) largest = largest < size_of(x[e]) ? size_of(x[e]) : largest;
        #pragma unroll
        for (int step = PARTS / 2; step; step /= 2) {
          const float theirs = __shfl_xor_sync(~0u, largest, step);
          largest = largest < theirs ? theirs : largest;
        }
        by = power_of_two(largest);
        if (i % PARTS == 0) made[r] = by;
      }
      const bool zero = !there || by == 0.f;  // no weight at all: not 0 * NaN
      #pragma unroll
      for (int e = 0; e < 4; e++) w.word[e] = zero ? 0u : pair_of<T>(x[2 * e] * by, x[2 * e + 1] * by);
      *at = w;
    }
  }

  // -- the state ---------------------------------------------------------------------------------------------------

  float state[N][ROW_TILES][TILES][4];  // rows of this warp: accumulators
  float extra_state[N][2][4];           // rows 0 and 1 of the extra step, 16 columns a warp

  // Call f(element, row, column) for each element of a sum that this lane holds.
  template <class F> __device__ __forceinline__ void each(int i, const F& f) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, q = lane % 4;
    #pragma unroll
    for (int m = 0; m < ROW_TILES; m++)
      #pragma unroll
      for (int j = 0; j < TILES; j++)
        #pragma unroll
        for (int e = 0; e < 4; e++)
          f(state[i][m][j][e], (warp * ROW_TILES + m) * 16 + g + 8 * (e / 2), j * 8 + 2 * q + e % 2);
  }
  // One of the sums passes through shared memory, where rows of it lie as they do outside: rolled loops, whole lines.
  static constexpr int PITCH_STATE = X + 8;
  static_assert(4 * (R + 2) * PITCH_STATE <= 2 * 2 * STAGE || !KEYS, "a sum has room where the operands will be");
  __device__ __forceinline__ void begin(float* room, const Params& p, const Place& here, int x0) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, q = lane % 4;
    const bool begins = !p.start_once || here.owns(p.start.axis);
    const float* start = begins ? head_of<float>(p.start, here) : nullptr;
    const float* rest = begins ? head_of<float>(p.rest, here) : nullptr;
    #pragma unroll
    for (int i = 0; i < N; i++) {
      #pragma unroll 1
      for (int at = threadIdx.x; at < (R + EXTRA) * PITCH_STATE; at += THREADS) {
        const int row = at / PITCH_STATE, x = at % PITCH_STATE;
        const i64 column = x < X ? x0 + x : p.columns;
        float value = 0.f;
        if (start && (x < X || ONES_)) value = start[i * p.start.sum + row * p.start.row + column * p.start.column];
        if (rest && (x < X || ONES_)) value += rest[i * p.rest.sum + row * p.rest.row + column * p.rest.column];
        room[at] = value;
      }
      __syncthreads();
      each(i, [&](float& x, int row, int column) { x = room[row * PITCH_STATE + column]; });
      if (EXTRA)
        #pragma unroll
        for (int u = 0; u < 2; u++)
          #pragma unroll
          for (int e = 0; e < 4; e++)  // both rows if b's column is ones, the first if it is split into halves
            extra_state[i][u][e] = e < 2 && (g == 0 || (g == 1 && p.b_extra == ONES))
                                       ? room[R * PITCH_STATE + (2 * warp + u) * 8 + 2 * q + e] : 0.f;
      __syncthreads();
    }
  }
  __device__ __forceinline__ void end(float* room, const Params& p, const Place& here, int x0) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, q = lane % 4;
    const bool ends = !p.final_once || here.owns(p.final.axis);
    float* final = ends ? head_of<float>(p.final, here) : nullptr;
    float* rest = ends ? head_of<float>(p.final_rest, here) : nullptr;
    if (MODE == SWEEP && final) final -= here.segment * p.final.segment;  // of the last segment: not one of many
    if (MODE == SWEEP && rest) rest -= here.segment * p.final_rest.segment;
    if (!final) return;
    #pragma unroll
    for (int i = 0; i < N; i++) {
      each(i, [&](float& x, int row, int column) { room[row * PITCH_STATE + column] = x; });
      if (EXTRA && g < 2)
        #pragma unroll
        for (int u = 0; u < 2; u++)
          #pragma unroll
          for (int e = 0; e < 2; e++)
            room[(R + g) * PITCH_STATE + (2 * warp + u) * 8 + 2 * q + e] = extra_state[i][u][e];
      __syncthreads();
      #pragma unroll 1
      for (int at = threadIdx.x; at < (R + EXTRA) * PITCH_STATE; at += THREADS) {
        const int row = at / PITCH_STATE, x = at % PITCH_STATE;
        if (x > X || (x == X && (!ONES_ || here.tile))) continue;
        const i64 column = x < X ? x0 + x : p.columns;
        float value = room[at];
        if (row == R && p.b_extra != ONES) value += room[at + PITCH_STATE];  // the halves
        final[i * p.final.sum + row * p.final.row + column * p.final.column] = value;
        if (rest) rest[i * p.final_rest.sum + row * p.final_rest.row + column * p.final_rest.column] = 0.f;
      }
      __syncthreads();
    }
  }
  // Rounded to 16 bits, as an operand; for float16 times a power of two that keeps it in range.
  __device__ __forceinline__ void show(u16* to, float by) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, q = lane % 4;
    #pragma unroll
    for (int i = 0; i < N; i++) {
      #pragma unroll
      for (int m = 0; m < ROW_TILES; m++)
        #pragma unroll
        for (int j = 0; j < TILES; j++) {
          const float(&s)[4] = state[i][m][j];
          u32* at = (u32*)(to + (i * STATE_ROWS + (warp * ROW_TILES + m) * 16 + g) * PITCH_X + j * 8 + 2 * q);
          at[0] = pair_of<T>(s[0] * by, s[1] * by);
          at[8 * PITCH_X / 2] = pair_of<T>(s[2] * by, s[3] * by);
        }
      if (EXTRA && g < 2)
        #pragma unroll
        for (int u = 0; u < 2; u++)
          *(u32*)(to + (i * STATE_ROWS + R + g) * PITCH_X + (2 * warp + u) * 8 + 2 * q) =
              pair_of<T>(extra_state[i][u][0] * by, extra_state[i][u][1] * by);
    }
  }
  __device__ __forceinline__ float largest() {
    float most = 0;
    #pragma unroll
    for (int i = 0; i < N; i++) each(i, [&](float& x, int, int) { most = most < size_of(x) ? size_of(x) : most; });
    #pragma unroll
    for (int step = 16; step; step /= 2) {
      const float theirs = __shfl_xor_sync(~0u, most, step);
      most = most < theirs ? theirs : most;
    }
    return most;
  }

  // Which of this lane's 32 elements see something in the diagonal block that is not finite, a bit each.
  static __device__ __forceinline__ u32 spoils(const u16* c) {
    const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    u32 which = 0;
    #pragma unroll 1
    for (int e = 0; e < 32; e++)
      #pragma unroll 1
      for (int s = 0; s <= g + 8 * (e % 4 / 2); s++)
        if (not_finite<T>(c[s * PITCH_X + e / 4 * 8 + 2 * q + e % 2]) & 0xFFFFu) which |= 1u << e;
    return which;
  }

  // -- the sweep ---------------------------------------------------------------------------------------------------

  __device__ __forceinline__ void run(const Params& p) {
    LA_SHARED(raw);
    u16* stages = (u16*)raw;
    u16* shown = stages + 2 * STAGE;
    float* tables = (float*)(shown + STATE);
    float* made = tables + 2 * TABLE;
    float* mean = made + C;
    float* peaks = mean + 128;
    const int tid = threadIdx.x, lane = tid % 32, g = lane / 4, q = lane % 4;
    const int warp = __shfl_sync(~0u, tid / 32, 0);  // the compiler sees that it is one for all lanes
    const Place here = place_of(p, blockIdx.x, p.tiles, p.segments);
    const int x0 = here.tile * X, tokens = ROWS ? p.rows : p.keys, first = here.segment * p.segment;
    const int last = tokens - first < p.segment ? tokens : first + p.segment;
    const int n_chunks = last > first ? (last - first + C - 1) / C : 0;
    const bool a_prepared = p.a_map != IDENTITY || p.a_scaled != AS_IS;
    const bool b_prepared = p.b_map != IDENTITY || p.b_scaled != AS_IS || p.mask_keys;
    const bool c_prepared = p.c_map != IDENTITY || p.c_scaled != AS_IS || p.mask_keys;

    begin((float*)raw, p, here, x0);
    if (p.mean.data) {
      const int offset = p.c_map == CENTRED ? x0 : 0, width = p.c_map == CENTRED ? X : R;
      for (int i = tid; i < width; i += THREADS)
        mean[i] = head_of<float>(p.mean, here)[(offset + i) * p.mean.column];
    }
    if (EXTRA && ROWS)
      for (int i = tid; i < N * 14 * PITCH_X / 2; i += THREADS) {
        const int s = i / (14 * PITCH_X / 2), rest = i % (14 * PITCH_X / 2);
        ((u32*)(shown + (s * STATE_ROWS + R + 2) * PITCH_X))[rest] = 0u;
      }
    constexpr int PARTS = R / 8, PARTS_X = X / 8;
    const u16* a_from = head_of<u16>(p.a, here) + (first + tid / PARTS) * p.a.token + tid % PARTS * 8;
    const u16* b_from = head_of<u16>(p.b, here) + (first + tid / PARTS) * p.b.token + tid % PARTS * 8;
    const u16* c_from = head_of<u16>(p.c, here) + (first + tid / PARTS_X) * p.c.token + x0 + tid % PARTS_X * 8;
    auto ahead = [&](int chunk) {
      u16* stage = stages + chunk % 2 * STAGE;
      const int row = first + chunk * C;
      if (chunk < n_chunks) {
        if (KEYS) {
          fetch<R>(stage + B, b_from, p.b.token, row, last);
          fetch<X>(stage + C_, c_from, p.c.token, row, last);
          b_from += C * p.b.token;
          c_from += C * p.c.token;
        }
        if (ROWS) {
          fetch<R>(stage + A, a_from, p.a.token, row, last);
          a_from += C * p.a.token;
        }
      }
      copies_end_group();
    };
    ahead(0);
    keep(tables, numbers(p, here, first, last));
    float shown_by = 1.f, shown_back = 1.f;
    constexpr bool NARROW = sizeof(T) && T::EXPONENT == f16::EXPONENT;

    for (int chunk = 0; chunk < n_chunks; chunk++) {
      const int row0 = first + chunk * C;
      u16* stage = stages + chunk % 2 * STAGE;
      u16 *b = stage + B, *c = stage + C_, *a = stage + A;
      const float* table = tables + chunk % 2 * TABLE;
      ahead(chunk + 1);
      const Numbers next = numbers(p, here, row0 + C, last);
      if (NARROW && ROWS) {
        const float most = largest();
        if (lane == 0) peaks[warp + chunk % 2 * WARPS] = most;
      }
      wait_for_copies<1>();
      __syncthreads();  // this chunk and its table are there
      if (KEYS && b_prepared)
        prepare<R>(b, p.b_map, false, table + FACTOR_B * C, table + VALID * C, last - row0, mean, made);
      if (KEYS && c_prepared)
        prepare<X>(c, p.c_map, false, table + FACTOR_C * C, table + VALID * C, last - row0, mean, made);
      if (ROWS && a_prepared)
        prepare<R>(a, p.a_map, p.a_scaled == MAKE, table + FACTOR_A * C, nullptr, last - row0, mean, made);
      if (ROWS && (KEYS || chunk == 0)) {
        if (NARROW) {
          float most = 0;
          #pragma unroll
          for (int i = 0; i < WARPS; i++) {
            const float theirs = peaks[i + chunk % 2 * WARPS];
            most = most < theirs ? theirs : most;
          }
          shown_by = power_of_two(most);
          shown_back = 1.f / shown_by;
        }
        show(shown, shown_by);
      }
      __syncthreads();  // operands and state are ready

      float acc[TILES][4];
      u32 scores[C / 16][4];
      if (ROWS) {
        u32 rows[R / 16][4];
        #pragma unroll
        for (int k = 0; k < R / 16; k++)
          load_rows(rows[k], a + (warp * 16 + lane % 16) * PITCH + k * 16 + lane / 16 * 8);
        u32 extra_rows[4] = {0u, 0u, 0u, 0u};
        if (EXTRA && q == 0) {
          extra_rows[0] = bits_of(table[EXTRA_A * C + warp * 16 + g]);
          extra_rows[1] = bits_of(table[EXTRA_A * C + warp * 16 + g + 8]);
        }
        float turn[2][2];  // of rows g and g + 8
        if (N == 2)
          #pragma unroll
          for (int e = 0; e < 2; e++) {
            turn[e][0] = table[TURN_A * C + warp * 16 + g + 8 * e];
            turn[e][1] = table[TURN_A1 * C + warp * 16 + g + 8 * e];
          }
        // sum_i turn_a[t, i] a[t] . S_i
        #pragma unroll
        for (int j = 0; j < TILES; j++) acc[j][0] = acc[j][1] = acc[j][2] = acc[j][3] = 0.f;
        #pragma unroll
        for (int i = 0; i < N; i++) {
          float past[TILES][4];
          #pragma unroll
          for (int j = 0; j < TILES; j++) past[j][0] = past[j][1] = past[j][2] = past[j][3] = 0.f;
          const u16* s = shown + i * STATE_ROWS * PITCH_X;
          #pragma unroll
          for (int k = 0; k < R / 16 + EXTRA; k++)
            #pragma unroll
            for (int j = 0; j < X / 16; j++) {
              u32 f[4];
              load_turned(f, s + (k * 16 + lane % 16) * PITCH_X + j * 16 + lane / 16 * 8);
              multiply<T>(past[2 * j], k < R / 16 ? rows[k < R / 16 ? k : 0] : extra_rows, f[0], f[1]);
              multiply<T>(past[2 * j + 1], k < R / 16 ? rows[k < R / 16 ? k : 0] : extra_rows, f[2], f[3]);
            }
          if (ONES_)
            #pragma unroll
            for (int k = 0; k < R / 32; k++) {
              u32 f[4];
              load_turned(f, s + (k * 32 + lane) * PITCH_X + X);
              multiply<T>(past[TILES - 1], rows[2 * k], f[0], f[1]);
              multiply<T>(past[TILES - 1], rows[2 * k + 1], f[2], f[3]);
            }
          #pragma unroll
          for (int j = 0; j < TILES; j++)
            #pragma unroll
            for (int e = 0; e < 4; e++) {
              const float x = NARROW ? past[j][e] * shown_back : past[j][e];
              acc[j][e] += N == 2 ? turn[e / 2][i] * x : x;
            }
        }
        // scores: an accumulator's layout is that of an operand's half, so they stay in registers
        if (KEYS)
          #pragma unroll
          for (int k = 0; k < C / 16; k++) {
            float w[2][4] = {};
            if (k <= warp) {
              #pragma unroll
              for (int r = 0; r < R / 16; r++) {
                u32 f[4];
                load_rows(f, b + (k * 16 + lane % 8 + lane / 16 * 8) * PITCH + r * 16 + lane / 8 % 2 * 8);
                multiply<T>(w[0], rows[r], f[0], f[1]);
                multiply<T>(w[1], rows[r], f[2], f[3]);
              }
              if (EXTRA)
                #pragma unroll
                for (int u = 0; u < 2; u++) {
                  const u32 column = q == 0 ? bits_of(table[EXTRA_B * C + k * 16 + u * 8 + g]) : 0u;
                  multiply<T>(w[u], extra_rows, column, 0u);
                }
              #pragma unroll
              for (int u = 0; u < 2; u++)
                #pragma unroll
                for (int e = 0; e < 4; e++) {
                  const int t = warp * 16 + g + 8 * (e / 2), s = k * 16 + u * 8 + 2 * q + e % 2;
                  if (N == 2) w[u][e] *= turn[e / 2][0] * table[TURN_B * C + s] + turn[e / 2][1] * table[TURN_B1 * C + s];
                  w[u][e] = s <= t ? w[u][e] : 0.f;
                }
            }
            scores[k][0] = pair_of<T>(w[0][0], w[0][1]);
            scores[k][1] = pair_of<T>(w[0][2], w[0][3]);
            scores[k][2] = pair_of<T>(w[1][0], w[1][1]);
            scores[k][3] = pair_of<T>(w[1][2], w[1][3]);
          }
      }
      u32 spoiled = 0;
      // every fragment of c serves the rows of out and the state
      if (KEYS)
        #pragma unroll
        for (int k = 0; k < C / 16; k++) {
          u32 columns[N][ROW_TILES][4];
          #pragma unroll
          for (int m = 0; m < ROW_TILES; m++)
            load_turned(columns[0][m], b + (k * 16 + lane % 8 + lane / 16 * 8) * PITCH +
                                           (warp * ROW_TILES + m) * 16 + lane / 8 % 2 * 8);
          u32 extra_columns[N][4];
          if (EXTRA)
            #pragma unroll
            for (int i = 0; i < N; i++) extra_columns[i][0] = extra_columns[i][1] = extra_columns[i][2] = extra_columns[i][3] = 0u;
          if (EXTRA && g < 2)  // row 0: upper halves, row 1: lower halves of two tokens each
            #pragma unroll
            for (int e = 0; e < 2; e++) {
              const int s = k * 16 + 2 * q + 8 * e;
              const u32 one = bits_of(table[EXTRA_B * C + s]), two = bits_of(table[EXTRA_B * C + s + 1]);
              extra_columns[0][2 * e] = g == 0 ? (one & 0xFFFFu) | two << 16 : one >> 16 | (two & 0xFFFF0000u);
            }
          if (N == 2) {
            #pragma unroll
            for (int e = 0; e < 4; e++) {
              const int s = k * 16 + 2 * q + 8 * (e / 2);
              const float u0 = table[TURN_B * C + s], u1 = table[TURN_B * C + s + 1];
              const float w0 = table[TURN_B1 * C + s], w1 = table[TURN_B1 * C + s + 1];
              auto turned = [&](u32& cosine, u32& sine) {
                const u32 pair = cosine;
                const float x0_ = half_of<T>(pair, 0), x1_ = half_of<T>(pair, 1);
                cosine = pair_of<T>(x0_ * u0, x1_ * u1);
                sine = pair_of<T>(x0_ * w0, x1_ * w1);
              };
              #pragma unroll
              for (int m = 0; m < ROW_TILES; m++) turned(columns[0][m][e], columns[N - 1][m][e]);
              if (EXTRA) turned(extra_columns[0][e], extra_columns[N - 1][e]);
            }
          }
          #pragma unroll
          for (int j = 0; j < X / 16; j++) {
            u32 f[4];
            load_turned(f, c + (k * 16 + lane % 16) * PITCH_X + j * 16 + lane / 16 * 8);
            if (ROWS && k < warp) {
              multiply<T>(acc[2 * j], scores[k], f[0], f[1]);
              multiply<T>(acc[2 * j + 1], scores[k], f[2], f[3]);
            } else if (ROWS && k == warp) {
              const u32 bad[4] = {not_finite<T>(f[0]), not_finite<T>(f[1]), not_finite<T>(f[2]), not_finite<T>(f[3])};
              multiply<T>(acc[2 * j], scores[k], f[0] & ~bad[0], f[1] & ~bad[1]);
              multiply<T>(acc[2 * j + 1], scores[k], f[2] & ~bad[2], f[3] & ~bad[3]);
              spoiled |= bad[0] | bad[1] | bad[2] | bad[3];
            }
            #pragma unroll
            for (int i = 0; i < N; i++) {
              #pragma unroll
              for (int m = 0; m < ROW_TILES; m++) {
                multiply<T>(state[i][m][2 * j], columns[i][m], f[0], f[1]);
                multiply<T>(state[i][m][2 * j + 1], columns[i][m], f[2], f[3]);
              }
              if (EXTRA && j == warp) {
                multiply<T>(extra_state[i][0], extra_columns[i], f[0], f[1]);
                multiply<T>(extra_state[i][1], extra_columns[i], f[2], f[3]);
              }
            }
          }
          if (ONES_) {
            const u32 one = pair_of<T>(1.f, 1.f);
            if (ROWS && k <= warp) multiply<T>(acc[TILES - 1], scores[k], one, one);
            #pragma unroll
            for (int i = 0; i < N; i++)
              #pragma unroll
              for (int m = 0; m < ROW_TILES; m++) multiply<T>(state[i][m][TILES - 1], columns[i][m], one, one);
          }
        }
      if (ROWS && KEYS && __any_sync(~0u, spoiled != 0u)) {
        const u32 which = spoils(c + warp * 16 * PITCH_X);
        #pragma unroll
        for (int e = 0; e < 32; e++)
          if (which >> e & 1) acc[e / 4][e % 4] = as_float(0x7FC00000u);
      }
      if (ROWS) finish(p, here, acc, a, made, row0, last, x0, warp);
      keep(tables + (chunk + 1) % 2 * TABLE, next);
      __syncthreads();  // everyone is done with this stage
    }
    if (KEYS && (MODE == SUMS || here.segment == p.segments - 1)) end((float*)raw, p, here, x0);
  }

  // The outputs of forward: divided, rounded, and over this warp's own rows of a, which it is done with, to 16 bytes a lane.
  static __device__ __forceinline__ void at_once(
      const Params& p, const Place& here, float (&acc)[TILES][4], u16* own, int row0, int last, int x0) {
    const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    __syncwarp();
    #pragma unroll
    for (int e = 0; e < 2; e++) {
      float by = 1.f;
      bool dead = false;
      if (ONES_) {
        const float den = acc[TILES - 1][2 * e];
        const Divisor<float> d = divisor(den, p.rule, float(p.eps));
        by = 1.f / d.c;
        dead = d.dead;
        const i64 t = row0 + g + 8 * e;
        if (t < last && q == 0 && here.tile == 0) ((float*)head_of<float>(p.den, here))[t * p.den.token] = den;
      }
      #pragma unroll
      for (int j = 0; j < X / 8; j++) {
        const u32 pair = pair_of<T>(acc[j][2 * e] * by, acc[j][2 * e + 1] * by);
        *(u32*)(own + (g + 8 * e) * PITCH + j * 8 + 2 * q) = dead ? 0u : pair;
      }
    }
    __syncwarp();
    const int r = lane / (X / 8), x = lane % (X / 8) * 8;
    u16* to = (u16*)head_of<u16>(p.out, here) + (row0 + r) * p.out.token + x0 + x;
    #pragma unroll
    for (int i = 0; i < 16; i += 32 / (X / 8)) {
      if (row0 + r + i < last) *(Sixteen*)to = *(const Sixteen*)(own + (r + i) * PITCH + x);
      to += 32 / (X / 8) * p.out.token;
    }
  }
  // From rows of the product to what is asked for. Half of the columns at a time, in float32, over this warp's own rows
  // of a, which it is done with; then 8 columns a lane, four lanes a row.
  __device__ __forceinline__ void finish(
      const Params& p, const Place& here, float (&acc)[TILES][4], u16* a, float* made, int row0, int last, int x0,
      int warp) {
    constexpr int HALF = X / 2, PITCH_HALF = HALF + 4;
    static_assert(4 * PITCH_HALF <= 2 * PITCH, "half of a row of the product has room in a row of a");
    const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    if (p.epilogue == DIVIDE || (p.epilogue == PLAIN && !p.out_real && !p.mask_rows)) {
      at_once(p, here, acc, a + warp * 16 * PITCH, row0 + warp * 16, last, x0);
      return;
    }
    float* own = (float*)(a + warp * 16 * PITCH);
    float num[2] = {0.f, 0.f}, mean[2] = {0.f, 0.f};
    __syncwarp();
    #pragma unroll
    for (int h = 0; h < 2; h++) {
      #pragma unroll
      for (int j = 0; j < HALF / 8; j++)
        #pragma unroll
        for (int e = 0; e < 4; e++)
          own[(g + 8 * (e / 2)) * PITCH_HALF + j * 8 + 2 * q + e % 2] = acc[h * HALF / 8 + j][e];
      __syncwarp();
      #pragma unroll
      for (int e = 0; e < 2; e++)
        if (row0 + warp * 16 + g + 8 * e < last)
          deliver(p, here, own + (g + 8 * e) * PITCH_HALF + 8 * q, row0 + warp * 16 + g + 8 * e,
                  x0 + h * HALF + 8 * q, num[e], mean[e]);
      __syncwarp();
    }
    if (p.epilogue != DELTA) return;
    #pragma unroll
    for (int e = 0; e < 2; e++) {
      #pragma unroll
      for (int step = 2; step; step /= 2) {
        num[e] += __shfl_xor_sync(~0u, num[e], step);
        mean[e] += __shfl_xor_sync(~0u, mean[e], step);
      }
      const int row = warp * 16 + g + 8 * e;
      const i64 t = row0 + row;
      if (t >= last || q) continue;
      const float den = head_of<float>(p.den, here)[t * p.den.token];
      const Divisor<float> by = divisor(den, p.rule, float(p.eps));
      // d_den[t] = -c' (g . num) / c + (g . mean) (1 - c' den / c), g = d_out / c: this tile's part
      float d_den = by.dead ? 0.f : -by.slope * num[e] / by.c;
      if (p.rule != SAFE) d_den += mean[e] * (1.f - by.slope * den / by.c);
      ((float*)head_of<float>(p.extra, here))[t * p.extra.token + here.tile * p.extra_tile] = d_den;
      if (p.a_scaled == MAKE && here.tile == 0) ((float*)head_of<float>(p.scale, here))[t * p.scale.token] = made[row];
    }
  }
  // 8 columns of a row.
  static __device__ __noinline__ void deliver(
      const Params& p, const Place& here, const float* from, i64 t, int x, float& num, float& mean) {
    float y[8];
    #pragma unroll
    for (int e = 0; e < 8; e++) y[e] = from[e];
    Sixteen pairs = {};
    if (p.epilogue == DELTA || (p.epilogue == CHAIN && p.out_map != IDENTITY))
      pairs = *(const Sixteen*)(head_of<u16>(p.other, here) + t * p.other.token + x);
    if (p.epilogue == DELTA) {
      const Divisor<float> by = divisor(head_of<float>(p.den, here)[t * p.den.token], p.rule, float(p.eps));
      if (by.dead) return;
      const float back = 1.f / by.c;
      #pragma unroll
      for (int e = 0; e < 8; e++) {
        const float g = half_of<T>(pairs.word[e / 2], e % 2) * back;
        num += g * y[e];
        if (p.rule != SAFE) mean += g * head_of<float>(p.mean, here)[(x + e) * p.mean.column];
      }
      return;
    }
    const bool seen = !p.mask_rows || head_of<unsigned char>(p.mask, here)[t * p.mask.token];
    const float scale = p.scaled_rows ? head_of<float>(p.scale, here)[t * p.scale.token] : 1.f;
    #pragma unroll
    for (int e = 0; e < 8; e++) {
      y[e] *= scale;
      if (p.epilogue == CHAIN) y[e] = chained(p.out_map, half_of<T>(pairs.word[e / 2], e % 2), y[e]);
      if (!seen) y[e] = 0.f;
    }
    const i64 at = here.of(p.out.axis) + t * p.out.token + x;
    if (p.out_real) {
      #pragma unroll
      for (int e = 0; e < 8; e++) ((float*)p.out.data)[at + e] = y[e];
    } else {
      #pragma unroll
      for (int e = 0; e < 4; e++) pairs.word[e] = pair_of<T>(y[2 * e], y[2 * e + 1]);
      *(Sixteen*)((u16*)p.out.data + at) = pairs;
    }
  }
};
}  // namespace la

extern "C" __global__ void __launch_bounds__(128, LA_BLOCKS) LA_NAME(const la::Params p) {
  la::Sweep<LA_STORED, LA_WIDTH, LA_SUMS, LA_ONES, LA_EXTRA, LA_MODE> sweep;
  sweep.run(p);
}
