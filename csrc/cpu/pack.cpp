// From rows of blocks, as a checkpoint has them, to the panels that linear.inl reads.
#include <algorithm>
#include <bit>
#include <cstring>
#include <span>

#include "base/check.h"
#include "cpu/linear.h"
#include "cpu/packed_weight.h"
#include "cpu/panel.h"

namespace engine {
namespace {

static_assert(std::endian::native == std::endian::little, "panels hold columns as the bytes of integers");

constexpr int64_t kMaxInt8Cols = 65536;  // of products of 127 and 255, which have to fit 32 bits

constexpr int64_t kPackCols =
    256;  // packed at a time, so that the panel's part stays in the first-level cache

template <class T>
T read(const std::byte* data) {
  T value;
  std::memcpy(&value, data, sizeof value);
  return value;
}

// Number `i` of runs of four columns, as an integer.
uint32_t four(const uint8_t* q, int i) {
  return read<uint32_t>(reinterpret_cast<const std::byte*>(q + 4 * i));
}

// Eight columns to a lane's 32 bits.
void pack_nibbles(const uint8_t* q, int cols, uint32_t (*out)[16], int lane) {
  for (int i = 0; i < cols / 8; ++i) {
    out[i][lane] = (four(q, 2 * i) & 0x0f0f0f0f) | (four(q, 2 * i + 1) & 0x0f0f0f0f) << 4;
  }
}

// What each quant has above its nibble, `bits` bits of it.
void pack_high(const uint8_t* q, int cols, int bits, uint32_t (&out)[16], int lane) {
  uint32_t packed = 0;
  for (int i = 0; i < cols / 4; ++i) packed |= (four(q, i) >> 4 & 0x0f0f0f0f) << (bits * i);
  out[lane] = packed;
}

void pack_quants(const uint8_t* q, Panel<BlockQ8_0>& p, int, int lane) {
  for (int i = 0; i < 8; ++i) p.q[i][lane] = four(q, i);
}
void pack_quants(const uint8_t* q, Panel<BlockQ4_0>& p, int, int lane) {
  pack_nibbles(q, 32, p.q, lane);
}
void pack_quants(const uint8_t* q, Panel<BlockQ4_1>& p, int, int lane) {
  pack_nibbles(q, 32, p.q, lane);
}
void pack_quants(const uint8_t* q, Panel<BlockQ5_0>& p, int, int lane) {
  pack_nibbles(q, 32, p.q, lane);
  pack_high(q, 32, 1, p.high, lane);
}
void pack_quants(const uint8_t* q, Panel<BlockQ5_1>& p, int, int lane) {
  pack_nibbles(q, 32, p.q, lane);
  pack_high(q, 32, 1, p.high, lane);
}
void pack_quants(const uint8_t* q, Panel<BlockQ4_K>& p, int group, int lane) {
  pack_nibbles(q, 32, p.q[group], lane);
}
void pack_quants(const uint8_t* q, Panel<BlockQ5_K>& p, int group, int lane) {
  pack_nibbles(q, 32, p.groups[group].q, lane);
  pack_high(q, 32, 1, p.groups[group].high, lane);
}
void pack_quants(const uint8_t* q, Panel<BlockQ6_K>& p, int group, int lane) {
  pack_nibbles(q, 16, p.groups[group].q, lane);
  pack_high(q, 16, 2, p.groups[group].high, lane);
}

// What scales a channel's quants, copied as it is stored.
template <class Block>
void pack_scales(const Block& b, Panel<Block>& p, int lane) {
  p.d[lane] = b.d;
  if constexpr (requires { p.m; }) p.m[lane] = b.m;
  if constexpr (requires { p.dmin; }) {
    p.dmin[lane] = b.dmin;
    for (int g = 0; g < 8; ++g) p.scales[g][lane] = six_bits(b.scales, 0, g);
    for (int g = 0; g < 8; ++g) p.mins[g][lane] = six_bits(b.scales, 1, g);
  } else if constexpr (requires { p.scales; }) {
    for (int g = 0; g < 16; ++g) p.scales[g][lane] = b.scales[g];
  }
}

void pack_quants(const uint8_t* q, Panel<BlockInt8>& p, int, int lane) {
  for (int i = 0; i < 8; ++i) p.q[i][lane] = four(q, i);
}
void pack_scales(const BlockInt8&, Panel<BlockInt8>&, int) {}

// Columns [begin, end) of one channel.
template <class Block>
void pack_quantised(const std::byte* row, int64_t begin, int64_t end, int lane, std::byte* out) {
  using Layout = BlockLayout<Block>;
  if constexpr (kHeaderBytes<Block> > 0) {  // the row begins with its scale
    std::memcpy(out + static_cast<size_t>(lane) * sizeof(float), row, sizeof(float));
    row += sizeof(float);
  }
  auto* panels = reinterpret_cast<Panel<Block>*>(out + kHeaderBytes<Block>);
  for (int64_t b = begin / Layout::kCols; b < end / Layout::kCols; ++b) {
    const auto block = read<Block>(row + static_cast<size_t>(b) * sizeof(Block));
    pack_scales(block, panels[b], lane);
    for (int g = 0; g < Layout::kCols / Layout::kGroup; ++g) {
      uint8_t q[Layout::kGroup];
      Layout::quants(block, g, q);
      pack_quants(q, panels[b], g, lane);
    }
  }
}

// A channel's numbers of kTogether columns stand side by side.
template <class T, size_t kTogether = 1>
void pack_plain(const std::byte* row, int64_t begin, int64_t end, int lane, std::byte* out) {
  constexpr size_t kBytes = kTogether * sizeof(T);
  const std::byte* from = row + static_cast<size_t>(begin) * sizeof(T);
  std::byte* to = out + static_cast<size_t>(begin) * kLanes * sizeof(T) + static_cast<size_t>(lane) * kBytes;
  auto left = static_cast<size_t>(end - begin) * sizeof(T);
  for (; left >= kBytes; left -= kBytes, from += kBytes, to += kLanes * kBytes) std::memcpy(to, from, kBytes);
  std::memcpy(to, from, left);
}

void pack_channel(Format format, const std::byte* row, int64_t begin, int64_t end, int lane, std::byte* out) {
  switch (format) {
    case Format::F32:
      return pack_plain<uint32_t>(row, begin, end, lane, out);
    case Format::F16:
      return pack_plain<uint16_t>(row, begin, end, lane, out);
    case Format::BF16:
      return pack_plain<uint16_t, 2>(row, begin, end, lane, out);
    default:
      visit_block(format, [=]<class Block>(Block) { pack_quantised<Block>(row, begin, end, lane, out); });
  }
}

// Sixteen rows, or the fewer that there are, of one format. Channels and columns beyond the last are zeros.
void pack_rows(Format format, const std::byte* rows, int count, int64_t cols, std::byte* panel) {
  if (count < kLanes || cols % kPaddedCols != 0) std::memset(panel, 0, panel_bytes(format, cols));
  const size_t bytes = row_bytes(format, cols);
  for (int64_t begin = 0; begin < cols; begin += kPackCols) {
    const int64_t end = std::min(begin + kPackCols, cols);
    for (int lane = 0; lane < count; ++lane)
      pack_channel(format, rows + static_cast<size_t>(lane) * bytes, begin, end, lane, panel);
  }
}

// What a worker turns a panel into on its way to another format.
struct Scratch {
  std::vector<std::byte> stored;  // (panel_bytes) as the checkpoint has it
  std::vector<float> columns;     // (cols, 16)
};

// Panel number `index` of a tensor.
void pack_panel(const Kernels& kernels, const Tensor& t, int64_t index, Scratch& scratch, std::byte* panel) {
  const int64_t first = index * kLanes;
  const std::byte* rows = t.data + static_cast<size_t>(first) * row_bytes(t.format, t.cols);
  const int count = static_cast<int>(std::min<int64_t>(kLanes, t.rows - first));
  if (t.format == t.target) return pack_rows(t.format, rows, count, t.cols, panel);
  scratch.stored.resize(panel_bytes(t.format, t.cols));
  scratch.columns.resize(static_cast<size_t>(kLanes * t.cols));
  pack_rows(t.format, rows, count, t.cols, scratch.stored.data());
  kernels.linear->expand(t.format, scratch.stored.data(), 0, t.cols, scratch.columns.data());
  kernels.linear->round_weights(t.target, scratch.columns.data(), t.cols, panel);
}

Segment next_segment(const PackedWeight& weight, const Tensor& source, Arithmetic arithmetic) {
  const bool rounded = !is_plain(source.target) || source.target == Format::BF16;
  return {source.target,
          rounded ? arithmetic : Arithmetic::EXACT,
          weight.rows,
          source.rows,
          weight.num_panels,
          (source.rows + kLanes - 1) / kLanes,
          panel_bytes(source.target, source.cols),
          weight.num_bytes};
}

}  // namespace

size_t panel_bytes(Format format, int64_t cols) {
  const int64_t columns =
      format == Format::BF16 ? (cols + kPaddedCols - 1) / kPaddedCols * kPaddedCols : cols;
  size_t bytes = kLanes * row_bytes(format, columns);
  visit_block(format, [&]<class Block>(Block) {
    int64_t blocks = cols / BlockLayout<Block>::kCols;
    if (format == Format::INT8) blocks += blocks % 2;  // a tile of AMX reads 64 columns, its activations 0
    bytes = kHeaderBytes<Block> + static_cast<size_t>(blocks) * sizeof(Panel<Block>);
  });
  return bytes;
}

std::unique_ptr<Weight> pack_weight(const Kernels& kernels, ThreadPool& pool, Arena& arena,
                                    std::span<const Tensor> sources, std::span<const float> bias,
                                    Arithmetic arithmetic) {
  check(!sources.empty(), "a weight needs a source");
  auto weight = std::make_unique<PackedWeight>();
  weight->cols = sources[0].cols;
  for (const Tensor& source : sources) {
    check(source.cols == weight->cols, "stacked sources differ in columns");
    check(source.target == source.format || is_plain(source.format), "plain floats only are converted");
    require(source.target != Format::INT8 || source.cols <= kMaxInt8Cols,
            "tensor " + source.name + " has " + std::to_string(source.cols) +
                " columns; int8 quantization takes at most " + std::to_string(kMaxInt8Cols));
    const Segment& s = weight->segments.emplace_back(next_segment(*weight, source, arithmetic));
    weight->rows += s.rows;
    weight->num_panels += s.num_panels;
    weight->num_bytes += static_cast<size_t>(s.num_panels) * s.panel_bytes;
  }
  check(bias.empty() || static_cast<int64_t>(bias.size()) == weight->rows, "a bias has one number per row");
  weight->bias.assign(bias.begin(), bias.end());
  weight->panels = arena.take(weight->num_bytes);
  std::vector<Scratch> scratch(static_cast<size_t>(pool.size()));
  for (size_t i = 0; i < sources.size(); ++i) {
    const Segment& s = weight->segments[i];
    pool.run(static_cast<int>(s.num_panels), [&](int panel, int worker) {
      pack_panel(kernels, sources[i], panel, scratch[static_cast<size_t>(worker)],
                 weight->panels.get() + s.start + static_cast<size_t>(panel) * s.panel_bytes);
    });
  }
  return weight;
}

}  // namespace engine
