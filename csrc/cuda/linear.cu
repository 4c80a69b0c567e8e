#include "cuda/linear.h"

#include "base/check.h"
#include "cuda/linear_kernels.cuh"

namespace engine::cuda {
namespace {

constexpr int kWarpsPerBlock = 8;  // of the kernels that prepare activations
constexpr unsigned kMaxGridRows = 65535;

template <class T>
View<T> part(const CudaWeight& weight, size_t offset, size_t bytes) {
  return {reinterpret_cast<T*>(weight.memory.as<std::byte>() + offset), bytes / sizeof(T)};
}

Matrix matrix(const CudaWeight& weight, const PackedSegment& s) {
  return {part<const uint8_t>(weight, s.lanes, s.extras - s.lanes),
          part<const uint8_t>(weight, s.extras, s.scales - s.extras),
          part<const uint8_t>(weight, s.scales, s.supers - s.scales),
          part<const uint8_t>(weight, s.supers, s.row_scales - s.supers),
          part<const float>(weight, s.row_scales, static_cast<size_t>(s.panels) * kPanelRows * sizeof(float)),
          static_cast<int>(weight.steps()),
          static_cast<int>(s.panels)};
}

int steps_of(int cols) {
  return (cols + kStepCols - 1) / kStepCols;
}

// A multiplication's tokens: as many tiles as there may be, and how they are multiplied.
struct Work {
  Tokens tokens;
  int tiles, at_once, num_matrices;
};

dim3 preparation_grid(int steps, int tiles) {
  return {blocks_for(static_cast<size_t>(steps), kWarpsPerBlock), static_cast<unsigned>(tiles)};
}

Terms split(cudaStream_t stream, View<const float> x, const Work& work, int cols, LinearScratch& scratch) {
  const int steps = steps_of(cols);
  const size_t places = LinearScratch::places(work.tiles, cols);
  scratch.reserve_terms(places);
  const View<uint16_t> terms(scratch.terms.as<uint16_t>(), kTerms * places * kWarpSize * 8);
  launch(stream, preparation_grid(steps, work.tiles), kWarpsPerBlock * kWarpSize, split_kernel, x, terms,
         work.tokens, cols, work.tiles, steps);
  return {terms, work.tiles, steps};
}

Bytes quantise(cudaStream_t stream, View<const float> x, const Work& work, int cols, LinearScratch& scratch) {
  const int steps = steps_of(cols);
  const size_t places = LinearScratch::places(work.tiles, cols);
  scratch.reserve_quants(places);
  const View<uint8_t> quants(scratch.quants.as<uint8_t>(), places * kWarpSize * 8);
  const View<float> scales(scratch.scales.as<float>(), places * kTileTokens);
  const View<int> sums(scratch.sums.as<int>(), places * kTileTokens * 2);
  launch(stream, preparation_grid(steps, work.tiles), kWarpsPerBlock * kWarpSize, quantise_kernel, x, quants,
         scales, sums, work.tokens, cols, steps);
  return {quants, scales, sums, work.tiles, steps};
}

template <class Route>
void multiply_segment(cudaStream_t stream, const Matrix& m, const typename Route::Rows& x, const Result& out,
                      const Work& work) {
  // The rows of a matrix begin anywhere in a panel.
  const auto panels = static_cast<unsigned>(
      work.num_matrices == 1 ? m.panels : min(m.panels, (out.height + kPanelRows - 2) / kPanelRows + 1));
  const unsigned groups = blocks_for(static_cast<size_t>(work.tiles), work.at_once);
  if (work.at_once == 1)
    launch(stream, dim3(panels, groups), kNarrowWarps * kWarpSize, narrow_kernel<Route, 1>, m, x, out);
  else if (work.at_once == 4)
    launch(stream, dim3(panels, groups), kNarrowWarps * kWarpSize, narrow_kernel<Route, 4>, m, x, out);
  else
    launch(stream, dim3(blocks_for(panels, kWideWarps), groups), kWideWarps * kWarpSize,
           wide_kernel<Route, 8>, m, x, out);
}

// visit.operator()<format>().
template <class Visit>
void visit_format(Format format, Visit visit) {
  switch (format) {
    case Format::F32:
      return visit.template operator()<Format::F32>();
    case Format::F16:
      return visit.template operator()<Format::F16>();
    case Format::BF16:
      return visit.template operator()<Format::BF16>();
    case Format::Q8_0:
      return visit.template operator()<Format::Q8_0>();
    case Format::Q4_0:
      return visit.template operator()<Format::Q4_0>();
    case Format::Q4_1:
      return visit.template operator()<Format::Q4_1>();
    case Format::Q5_0:
      return visit.template operator()<Format::Q5_0>();
    case Format::Q5_1:
      return visit.template operator()<Format::Q5_1>();
    case Format::Q4_K:
      return visit.template operator()<Format::Q4_K>();
    case Format::Q5_K:
      return visit.template operator()<Format::Q5_K>();
    case Format::Q6_K:
      return visit.template operator()<Format::Q6_K>();
    case Format::INT8:
      return visit.template operator()<Format::INT8>();
  }
}

// A block for each (step, token), a thread for each column.
template <Format kFormat>
__global__ void embed_kernel(Matrix m, View<const int32_t> tokens, View<float> out, int cols) {
  const int token = tokens[blockIdx.y], step = static_cast<int>(blockIdx.x),
            lane = static_cast<int>(threadIdx.x);
  const int panel = token / kPanelRows, row = token % kPanelRows;
  if (row % 8 != lane / 4) return;
  float w[kLaneWeights];
  dequantise<kFormat>(m, panel, step, lane, w);
  for (int i = 0; i < 8; ++i) {
    const int col = step * kStepCols + i / 4 * 16 + lane % 4 * 4 + i % 4;
    const float value = row < 8 ? w[i] : w[8 + i];
    if (col < cols)
      out[static_cast<size_t>(blockIdx.y) * static_cast<size_t>(cols) + static_cast<size_t>(col)] = value;
  }
}

void multiply(cudaStream_t stream, const CudaWeight& weight, const Work& work, const float* x, float* y,
              LinearScratch& scratch) {
  check(work.tiles <= static_cast<int>(kMaxGridRows), "linear: fewer tokens at once");
  const auto n = static_cast<size_t>(work.tokens.n);
  const int cols = static_cast<int>(weight.cols), rows = static_cast<int>(weight.rows);
  const int height = rows / work.num_matrices;
  const View<const float> in(x, n * static_cast<size_t>(cols));
  const View<float> out(y, n * static_cast<size_t>(height));
  const View<const float> bias =
      weight.has_bias ? part<const float>(weight, weight.bias, static_cast<size_t>(rows) * sizeof(float))
                      : View<const float>();
  Terms terms{};
  Bytes bytes{};
  for (const PackedSegment& s : weight.segments) {
    const Matrix m = matrix(weight, s);
    const Result result{out,        bias, height, static_cast<int>(s.first_row), static_cast<int>(s.rows),
                        work.tokens};
    if (s.arithmetic == Arithmetic::EXACT) {
      if (!terms.data) terms = split(stream, in, work, cols, scratch);
      visit_format(s.format, [&]<Format kFormat>() {
        multiply_segment<Exact<kFormat>>(stream, m, terms, result, work);
      });
    } else {
      if (!bytes.quants) bytes = quantise(stream, in, work, cols, scratch);
      visit_format(s.format, [&]<Format kFormat>() {
        if constexpr (requires { Stored<kFormat>::kBits; })
          multiply_segment<Int8<kFormat>>(stream, m, bytes, result, work);
      });
    }
  }
}

}  // namespace

int tiles_of(int n) {
  return (n + kTileTokens - 1) / kTileTokens;
}

int tiles_at_once(int tokens) {
  return tokens <= kTileTokens ? 1 : tokens <= 4 * kTileTokens ? 4 : 8;
}

size_t LinearScratch::places(int tiles, int cols) {
  return static_cast<size_t>(tiles) * static_cast<size_t>(steps_of(cols));
}

void LinearScratch::reserve(size_t places) {
  reserve_terms(places);
  reserve_quants(places);
}

void LinearScratch::reserve_terms(size_t places) {
  terms.reserve(kTerms * places * kWarpSize * 8 * sizeof(uint16_t));
}

void LinearScratch::reserve_quants(size_t places) {
  quants.reserve(places * kWarpSize * 8);
  scales.reserve(places * kTileTokens * sizeof(float));
  sums.reserve(places * kTileTokens * sizeof(int2));
}

void multiply(cudaStream_t stream, const CudaWeight& weight, const float* x, float* y, int n,
              LinearScratch& scratch) {
  multiply(stream, weight, Work{{n, {}, {}}, tiles_of(n), tiles_at_once(n), 1}, x, y, scratch);
}

void multiply_experts(cudaStream_t stream, const CudaWeight& experts, const ExpertTiles& tiles,
                      const float* x, float* y, int n, LinearScratch& scratch) {
  check(experts.rows % tiles.num_experts == 0, "linear_experts: experts have equally many rows");
  const auto count = static_cast<size_t>(tiles.count);
  const Tokens tokens{n, View<const int32_t>(tiles.experts, count),
                      View<const int32_t>(tiles.choices, count * kTileTokens)};
  multiply(stream, experts, Work{tokens, tiles.count, tiles.at_once, tiles.num_experts}, x, y, scratch);
}

void embed_rows(cudaStream_t stream, const CudaWeight& table, const int32_t* tokens, int n, float* out) {
  check(table.segments.size() == 1, "an embedding table has one source");
  const int cols = static_cast<int>(table.cols);
  const Matrix m = matrix(table, table.segments[0]);
  for (int first = 0; first < n; first += static_cast<int>(kMaxGridRows)) {
    const int count = min(n - first, static_cast<int>(kMaxGridRows));
    const View<const int32_t> ids(tokens + first, static_cast<size_t>(count));
    const View<float> rows(out + static_cast<size_t>(first) * static_cast<size_t>(cols),
                           static_cast<size_t>(count) * static_cast<size_t>(cols));
    visit_format(table.segments[0].format, [&]<Format kFormat>() {
      launch(stream, dim3(static_cast<unsigned>(m.steps), static_cast<unsigned>(count)), kWarpSize,
             embed_kernel<kFormat>, m, ids, rows, cols);
    });
  }
}

}  // namespace engine::cuda
