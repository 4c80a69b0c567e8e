// What Device::pack makes: a matrix as panels (panel.h), ready to be multiplied by linear().
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "base/quant.h"
#include "device/device.h"

namespace engine {

size_t panel_bytes(Format format, int64_t cols);

// What a segment is multiplied with: floats, bytes with a scale for 32 columns, or with one for a row, or
// bf16 (floats where the ISA does not round to it).
enum class Activations : uint8_t { F32, GROUPS, ROWS, BF16 };

// The rows of one source tensor, cut into panels of 16; the last panel is filled up with zeros.
struct Segment {
  Format format;
  Arithmetic arithmetic;  // EXACT for F32 and F16
  int64_t first_row;      // in the whole weight
  int64_t rows;
  int64_t first_panel;  // in the whole weight
  int64_t num_panels;
  size_t panel_bytes;
  size_t start;  // of its panels in `panels`

  Activations activations() const {
    if (arithmetic == Arithmetic::EXACT) return Activations::F32;
    if (format == Format::BF16) return Activations::BF16;
    return format == Format::INT8 ? Activations::ROWS : Activations::GROUPS;
  }
};

class PackedWeight : public Weight {
 public:
  size_t bytes() const override { return num_bytes + bias.size() * sizeof(float); }
  const std::byte* panel(const Segment& segment, int64_t index) const {
    return panels.get() + segment.start + static_cast<size_t>(index) * segment.panel_bytes;
  }

  bool takes(Activations form) const {
    return std::ranges::any_of(segments, [form](const Segment& s) { return s.activations() == form; });
  }

  std::vector<Segment> segments;
  std::vector<float> bias;  // (rows) or empty
  size_t num_bytes = 0;
  std::shared_ptr<std::byte> panels;  // (num_bytes), aligned to a cache line; a part of an Arena
  int64_t num_panels = 0;
};

}  // namespace engine
