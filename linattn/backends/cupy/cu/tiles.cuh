// The tensor core and the copies that feed it: inline PTX on the device, the same by hand on the host.
// Fragments     PTX ISA, mma.m16n8k16: lane = 4 g + i holds rows g, g + 8 and columns 2 i, 2 i + 1 (and + 8)
namespace la {
#ifdef LA_HOST
template <class T> inline float half_of(u32 pair, int which) {
  T x;
  x.bits = u16(pair >> 16 * which);
  return real(x);
}
template <class T> inline u32 pair_of(float low, float high) {
  return u32(stored<T>(low).bits) | u32(stored<T>(high).bits) << 16;
}
// d (16 x 8) += a (16 x 16) b (16 x 8)
template <class T> inline void multiply(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  const u32 mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
  auto all = sim::show(mine, sizeof mine);
  auto word = [&](int lane, int i) {
    u32 w;
    memcpy(&w, all[lane] + 4 * i, 4);
    return w;
  };
  const int g = sim::lane() / 4, i = sim::lane() % 4;
  for (int e = 0; e < 4; e++) {
    const int row = g + 8 * (e / 2), column = 2 * i + e % 2;
    double sum = d[e];
    for (int k = 0; k < 16; k++) {
      const u32 x = word(row % 8 * 4 + k % 8 / 2, row / 8 + 2 * (k / 8)), y = word(column * 4 + k % 8 / 2, 4 + k / 8);
      sum += double(half_of<T>(x, k % 2)) * half_of<T>(y, k % 2);
    }
    d[e] = float(sum);
  }
  sim::products += sim::lane() == 0;
}
// Four matrices of 8 x 8: lane 8 m + r gives the address of row r of matrix m.
inline void matrices(u32 (&to)[4], const void* row, bool turned) {
  auto all = sim::show(&row, sizeof row);
  const u16* rows[32];
  for (int i = 0; i < 32; i++) memcpy(&rows[i], all[i], sizeof rows[i]);
  for (int m = 0; m < 4 && sim::lane() == 0; m++) {
    unsigned banks = 0;
    for (int r = 0; r < 8; r++) {
      const uintptr_t at = uintptr_t(rows[8 * m + r]);
      if (at % 16) {
        fprintf(stderr, "simulator: a row of ldmatrix is not on a 16-byte boundary\n");
        abort();
      }
      sim::conflicts += banks >> (at / 16 % 8) & 1;
      banks |= 1u << (at / 16 % 8);
    }
  }
  const int g = sim::lane() / 4, i = sim::lane() % 4;
  for (int m = 0; m < 4; m++) {
    u32 pair = 0;
    for (int e = 0; e < 2; e++) pair |= u32(turned ? rows[8 * m + 2 * i + e][g] : rows[8 * m + g][2 * i + e]) << 16 * e;
    to[m] = pair;
  }
}
inline void load_rows(u32 (&to)[4], const void* row) { matrices(to, row, false); }
inline void load_turned(u32 (&to)[4], const void* row) { matrices(to, row, true); }

// A copy happens at the wait that covers it and no sooner: until then its place holds NaN.
struct Copy {
  void* to;
  const void* from;
  bool there;
  int group;
};
inline std::vector<std::vector<Copy>> copies;
inline std::vector<int> groups;
inline bool copies_begin = (sim::at_block_start.push_back([] {
  copies.assign(sim::threads.size(), {});
  groups.assign(sim::threads.size(), 0);
}), true);
inline void copy_async(void* to, const void* from, bool there) {
  memset(to, 0xFF, 16);
  copies[sim::current->number].push_back({to, from, there, groups[sim::current->number]});
}
inline void copies_end_group() { groups[sim::current->number]++; }
template <int LEFT> inline void wait_for_copies() {
  auto& mine = copies[sim::current->number];
  size_t kept = 0;
  for (const Copy& copy : mine) {
    if (copy.group >= groups[sim::current->number] - LEFT) mine[kept++] = copy;
    else if (copy.there) memcpy(copy.to, copy.from, 16);
    else memset(copy.to, 0, 16);
  }
  mine.resize(kept);
}
#else
template <class T> __device__ __forceinline__ float half_of(u32 pair, int which) {
  T x;
  x.bits = u16(pair >> 16 * which);
  return real(x);
}
template <> __device__ __forceinline__ float half_of<bf16>(u32 pair, int which) {
  return as_float(which ? pair & 0xFFFF0000u : pair << 16);
}
template <class T> __device__ __forceinline__ u32 pair_of(float low, float high);
template <> __device__ __forceinline__ u32 pair_of<bf16>(float low, float high) {
  u32 pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
template <> __device__ __forceinline__ u32 pair_of<f16>(float low, float high) {
  u32 pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
#define LA_MULTIPLY(T, NAME)                                                                                       \
  template <> __device__ __forceinline__ void multiply<T>(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {      \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME ".f32 "                                    \
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                                 \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                  \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                                  \
  }
template <class T> __device__ __forceinline__ void multiply(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1);
LA_MULTIPLY(bf16, "bf16")
LA_MULTIPLY(f16, "f16")
__device__ __forceinline__ u32 shared_address(const void* p) { return u32(__cvta_generic_to_shared(p)); }
__device__ __forceinline__ void load_rows(u32 (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void load_turned(u32 (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}
// 16 bytes from global to shared memory; zeros if the source is not there.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool there) {
  const int bytes = there ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void copies_end_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LEFT> __device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}
#endif

// Halves of a pair that are not finite: their exponent is all ones.
template <class T> __device__ __forceinline__ u32 not_finite(u32 pair) {
  const u32 low = T::EXPONENT, high = low << 16;
  return ((pair & low) == low ? 0xFFFFu : 0u) | ((pair & high) == high ? 0xFFFF0000u : 0u);
}

struct alignas(16) Sixteen {
  u32 word[4];
};
}  // namespace la
