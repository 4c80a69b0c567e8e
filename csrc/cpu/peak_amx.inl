// peak.inl's yardstick where bytes are multiplied by tiles. Included by isa_amx.cpp alone, after it.
#pragma once

#include "cpu/peak.h"

namespace engine {
namespace {

void peak_dot_amx(int64_t rounds) {
  constexpr int64_t products = kRowTile * 16 * RowTile::kCols;  // of a tile
  configure_tiles(RowTile::kCols);
  tile_zero<4>();
  tile_zero<6>();
  for (int64_t left = rounds * 4 * kPeakOps; left > 0; left -= 4 * products) {
    tile_multiply_add<0, 4, 6>();
    tile_multiply_add<1, 4, 6>();
    tile_multiply_add<2, 4, 6>();
    tile_multiply_add<3, 4, 6>();
  }
  __asm__ volatile("tilerelease");
}

constexpr PeakKernels kPeakAmx = {peak_dot_amx, peak_fma, peak_read};

}  // namespace
}  // namespace engine
