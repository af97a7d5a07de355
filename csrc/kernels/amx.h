// Tile registers: eight of 16 rows of 64 bytes.  tile_product adds to 16 x 16 floats the product of
// 16 rows of 32 bf16 and of 16 rows of 16 pairs: row r of the second holds, for each of 16 columns,
// the elements 2r and 2r + 1 of that column, side by side.
//
// Written as assembly, because GCC's own intrinsics (12 and 13) do not say that they read memory.

#if FPT_AMX

struct TileShapes {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};  // of a row, by tile
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

FPT_INLINE void set_tiles(const TileShapes& shapes) {
  asm volatile("ldtilecfg %0" : : "m"(shapes) : "memory");
}

// Sets the shapes of the tiles, for as long as it lives.
struct Tiles {
  explicit Tiles(const TileShapes& shapes = {}) { set_tiles(shapes); }
  ~Tiles() { asm volatile("tilerelease" : : : "memory"); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

template <int TILE>
FPT_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(TILE));
}

// Rows `stride` bytes apart.
template <int TILE>
FPT_INLINE void tile_load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(TILE) : "memory");
}

template <int TILE>
FPT_INLINE void tile_store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(TILE) : "memory");
}

template <int SUM, int ROWS, int PAIRS>
FPT_INLINE void tile_product() {
  asm volatile("tdpbf16ps %%tmm%c0, %%tmm%c1, %%tmm%c2" : : "i"(PAIRS), "i"(ROWS), "i"(SUM));
}

#endif

// A core that has multiplied no tiles for a while stops when it next does, and is slow at first (seen on
// an Emerald Rapids): vectors' work that stands between products says this on its way, which costs less.
// It adds to a sum that nobody reads, and may be said only where a product of these tiles may be.
template <int SUM, int ROWS, int PAIRS>
FPT_INLINE void keep_awake() {
#if FPT_AMX
  tile_product<SUM, ROWS, PAIRS>();
#endif
}
