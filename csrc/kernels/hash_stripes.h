// XXH3, 128 bits, of inputs whose length is a multiple of 1024 bytes, by its published specification
// (github.com/Cyan4973/xxHash, doc/xxhash_spec.md): the digest of a cache's records.  Eight sums of 64
// bits take in stripes of 64 bytes; after a block of 16 stripes they are scrambled.

typedef uint64_t Q __attribute__((vector_size(8 * W / 2)));  // W floats are W / 2 of these
typedef uint64_t QM __attribute__((vector_size(8 * W / 2), aligned(1), may_alias));
constexpr int SUMS = 8, LANES = W / 2;

// Low halves times high halves: 32 by 32 bits to 64.
FPT_INLINE Q multiply_halves(Q x) {
#if FPT_WIDTH == 16
  // With a mask of ones, since GCC 12 warns of its own header otherwise.
  return reinterpret_cast<Q>(_mm512_maskz_mul_epu32(
      0xff, reinterpret_cast<__m512i>(x), reinterpret_cast<__m512i>(x >> 32)));
#elif FPT_WIDTH == 8
  return reinterpret_cast<Q>(
      _mm256_mul_epu32(reinterpret_cast<__m256i>(x), reinterpret_cast<__m256i>(x >> 32)));
#else
  return (x & 0xffffffff) * (x >> 32);
#endif
}

// Neighbours change places.
FPT_INLINE Q swap_neighbours(Q x) {
#if FPT_WIDTH == 16
  return reinterpret_cast<Q>(
      _mm512_maskz_shuffle_epi32(0xffff, reinterpret_cast<__m512i>(x), _MM_PERM_BADC));
#elif FPT_WIDTH == 8
  return reinterpret_cast<Q>(_mm256_shuffle_epi32(reinterpret_cast<__m256i>(x), 0x4e));
#else
  return Q{x[1], x[0]};
#endif
}

FPT_INLINE Q load_lanes(const uint8_t* from) { return *reinterpret_cast<const QM*>(from); }

// What a lane is multiplied with is added to its neighbour's sum: gathered in `plain`, in whose sums
// neighbours change places once a block, not once a stripe.
FPT_INLINE void take_stripe(Q* sums, Q* plain, const uint8_t* data, const uint8_t* secret) {
#pragma GCC unroll 4
  for (int i = 0; i < SUMS / LANES; ++i) {
    const Q value = load_lanes(data + 8 * LANES * i);
    plain[i] += value;
    sums[i] += multiply_halves(value ^ load_lanes(secret + 8 * LANES * i));
  }
}

FPT_INLINE void join(Q* sums, Q* plain) {
#pragma GCC unroll 4
  for (int i = 0; i < SUMS / LANES; ++i) {
    sums[i] += swap_neighbours(plain[i]);
    plain[i] = Q{};
  }
}

FPT_INLINE void scramble(Q* sums, const uint8_t* secret) {
#pragma GCC unroll 4
  for (int i = 0; i < SUMS / LANES; ++i) {
    const Q mixed = sums[i] ^ (sums[i] >> 47) ^ load_lanes(secret + 128 + 8 * LANES * i);
    sums[i] = mixed * uint64_t(0x9E3779B1);
  }
}

// Take stripes into the sums; scramble these when the first of the next block comes.
void hash_stripes(const HashTask& task) {
  const uint8_t *data = task.data, *secret = task.secret;
  auto* memory = reinterpret_cast<uint8_t*>(task.sums);
  Q sums[SUMS / LANES], plain[SUMS / LANES];
  for (int i = 0; i < SUMS / LANES; ++i) {
    sums[i] = load_lanes(memory + 8 * LANES * i);
    plain[i] = Q{};
  }
  const int64_t end = task.first + task.stripes;
  for (int64_t stripe = task.first; stripe < end;) {
    const int place = int(stripe & 15);
    if (place == 0 && stripe > 0) {
      join(sums, plain);
      scramble(sums, secret);
    }
    if (place == 0 && end - stripe >= 16) {
      for (int i = 0; i < 16; ++i) take_stripe(sums, plain, data + 64 * i, secret + 8 * i);
      stripe += 16, data += 1024;
    } else {
      take_stripe(sums, plain, data, secret + 8 * place);
      stripe += 1, data += 64;
    }
  }
  join(sums, plain);
  for (int i = 0; i < SUMS / LANES; ++i)
    *reinterpret_cast<QM*>(memory + 8 * LANES * i) = sums[i];
}
