#include "cuda/sample.h"

#include "cuda/common.cuh"
#include "cuda/select.cuh"

namespace engine::cuda {
namespace {

// A row of logits, seen through the masks. A NaN counts as -inf, +inf as the largest number.
struct Logits {
  View<float> x;
  View<const uint32_t> mask, allowed;

  __device__ static bool allows(View<const uint32_t> bits, int token) {
    return !bits || (bits[static_cast<size_t>(token / 32)] >> (token % 32) & 1) != 0;
  }
  __device__ static float comparable(float x) { return x > kLowest ? fminf(x, kHighest) : kLowest; }
  __device__ float operator()(int token) const {
    const bool seen = allows(mask, token) && allows(allowed, token);
    return seen ? comparable(x[static_cast<size_t>(token)]) : kLowest;
  }
};

__device__ View<const uint32_t> mask_at(View<const uint32_t> masks, int64_t start) {
  return start < 0 ? View<const uint32_t>() : masks.from(static_cast<size_t>(start));
}

// A thread for each token: the edits of one follow one another.
__device__ void apply_edits(const Logits& logits, const DrawRow& row, View<const LogitEdit> edits,
                            View<float> saved) {
  for (int i = row.first_edit + static_cast<int>(threadIdx.x); i < row.end_edit; i += kThreads) {
    const auto first = static_cast<size_t>(i);
    const int32_t token = edits[first].token;
    if (i > row.first_edit && edits[first - 1].token == token) continue;
    float& place = logits.x[static_cast<size_t>(token)];
    saved[first] = place;
    float x = Logits::comparable(place);
    for (size_t j = first; j < static_cast<size_t>(row.end_edit) && edits[j].token == token; ++j) {
      const float value = edits[j].value;
      x = !edits[j].penalty ? x + value : x > 0 ? x / value : x * value;
    }
    place = x;
  }
}

__device__ void undo_edits(const Logits& logits, const DrawRow& row, View<const LogitEdit> edits,
                           View<const float> saved) {
  for (int i = row.first_edit + static_cast<int>(threadIdx.x); i < row.end_edit; i += kThreads) {
    const int32_t token = edits[static_cast<size_t>(i)].token;
    if (i > row.first_edit && edits[static_cast<size_t>(i) - 1].token == token) continue;
    logits.x[static_cast<size_t>(token)] = saved[static_cast<size_t>(i)];
  }
}

// The greatest logit; of equals that of the lowest token.
__device__ Ranked find_greatest(const Logits& logits, int vocab, SelectRoom& room) {
  uint64_t best = 0;
  for (int i = static_cast<int>(threadIdx.x); i < vocab; i += kThreads)
    best = Greater()(best, Ranked{order_of(logits(i)), i}.bits());
  best = block_combine(best, room.partial, Greater());
  return Ranked::from(best);
}

// The weights that temperature, top_k and min_p leave.
struct Weights {
  Logits logits;
  float greatest, factor, min_p;
  Cut top_k;

  __device__ float operator()(int token) const {
    const float x = logits(token);
    if (!top_k.keeps(order_of(x), token)) return 0;
    const float weight = exp_f32((x - greatest) * factor);
    return weight >= min_p ? weight : 0;
  }
};

// As in cpu/sample.cpp.
__device__ int64_t mass(float weight) {
  return static_cast<int64_t>(weight * 0x1p42f);
}

__device__ int draw(const Logits& logits, const DrawRow& row, float greatest, int vocab, SelectRoom& room) {
  Weights weights{logits, greatest, row.factor, row.min_p, Cut{}};
  if (row.top_k > 0 && row.top_k < vocab)
    weights.top_k = select(vocab, row.top_k, room, [&](int i) { return Item{order_of(logits(i)), 1}; });
  int64_t total = 0;
  for (int i = static_cast<int>(threadIdx.x); i < vocab; i += kThreads) total += mass(weights(i));
  total = block_combine(total, room.sums, Plus());
  Cut top_p;
  if (row.top_p < 1) {
    const auto least = static_cast<int64_t>(ceil(row.top_p * static_cast<double>(total)));
    top_p = select(vocab, least < 1 ? 1 : (least < total ? least : total), room, [&](int i) {
      const float weight = weights(i);
      return Item{float_to_bits(weight), mass(weight)};
    });
    total = top_p.mass;
  }
  const auto drawn = static_cast<int64_t>(row.uniform * static_cast<double>(total));
  return locate(vocab, (drawn < total ? drawn : total - 1) + 1, room,
                [&](int i) {
                  const float weight = weights(i);
                  return top_p.keeps(float_to_bits(weight), i) ? mass(weight) : 0;
                })
      .index;
}

__global__ void __launch_bounds__(kThreads, 1)
    draw_kernel(View<const DrawRow> rows, View<float> logits, int vocab, View<const uint32_t> masks,
                View<const LogitEdit> edits, View<float> saved, View<int32_t> tokens) {
  __shared__ SelectRoom room;
  const DrawRow row = rows[blockIdx.x];
  const Logits seen{logits.from(static_cast<size_t>(blockIdx.x) * static_cast<size_t>(vocab)),
                    mask_at(masks, row.mask), mask_at(masks, row.allowed)};
  apply_edits(seen, row, edits, saved);
  __syncthreads();
  const Ranked best = find_greatest(seen, vocab, room);
  const float greatest = seen(best.token);
  int token = best.token;
  if (greatest == kLowest)
    token = row.fallback;
  else if (!row.greedy)
    token = draw(seen, row, greatest, vocab, room);
  __syncthreads();
  undo_edits(seen, row, edits, saved);
  if (threadIdx.x == 0) tokens[blockIdx.x] = token;
}

// The greatest logits of the row, in no order.
__device__ void find_top(const Logits& logits, const LogprobRow& row, int vocab, View<TokenLogit> found,
                         SelectRoom& room) {
  if (row.num_top == 0) return;
  const Cut cut = select(vocab, row.num_top, room, [&](int i) { return Item{order_of(logits(i)), 1}; });
  __syncthreads();
  if (threadIdx.x == 0) room.count[0] = 0;
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < vocab; i += kThreads) {
    const float x = logits(i);
    if (cut.keeps(order_of(x), i))
      found[static_cast<size_t>(row.first_found) + room.count.add(0, 1)] = {i, x};
  }
}

__global__ void __launch_bounds__(kThreads, 1)
    logprob_kernel(View<const LogprobRow> rows, View<float> logits, int vocab, View<const uint32_t> masks,
                   View<const int32_t> tokens, View<const int32_t> named, View<LogprobSums> sums,
                   View<TokenLogit> found) {
  __shared__ SelectRoom room;
  const LogprobRow row = rows[blockIdx.x];
  const Logits raw{logits.from(static_cast<size_t>(row.row) * static_cast<size_t>(vocab)),
                   mask_at(masks, row.mask), View<const uint32_t>()};
  const int32_t token = row.token < 0 ? tokens[static_cast<size_t>(row.row)] : row.token;
  const float chosen = raw(token), greatest = raw(find_greatest(raw, vocab, room).token);
  double sum = 0;
  int64_t greater_ones = 0;
  for (int i = static_cast<int>(threadIdx.x); i < vocab; i += kThreads) {
    const float x = raw(i);
    sum += exp_f32(x - greatest);
    greater_ones += x > chosen;
  }
  sum = block_combine(sum, room.doubles, Plus());
  greater_ones = block_combine(greater_ones, room.sums, Plus());
  if (threadIdx.x == 0)
    sums[blockIdx.x] = {token, static_cast<int32_t>(greater_ones) + 1, chosen, greatest, sum};
  find_top(raw, row, vocab, found, room);
  for (int i = static_cast<int>(threadIdx.x); i < row.end_named - row.first_named; i += kThreads) {
    const int32_t other = named[static_cast<size_t>(row.first_named + i)];
    found[static_cast<size_t>(row.first_found + i)] = {other, raw(other)};
  }
}

View<float> logits_of(const SampleArrays& arrays) {
  return {arrays.logits, static_cast<size_t>(arrays.num_rows) * static_cast<size_t>(arrays.vocab)};
}

}  // namespace

void draw_rows(cudaStream_t stream, const SampleArrays& arrays, const DrawRow* rows) {
  const auto n = static_cast<size_t>(arrays.num_rows);
  launch(stream, dim3(static_cast<unsigned>(n)), kThreads, draw_kernel, View<const DrawRow>(rows, n),
         logits_of(arrays), arrays.vocab, View<const uint32_t>(arrays.masks, arrays.num_mask_words),
         View<const LogitEdit>(arrays.edits, arrays.num_edits), View<float>(arrays.saved, arrays.num_edits),
         View<int32_t>(arrays.tokens, n));
}

void find_logprobs(cudaStream_t stream, const SampleArrays& arrays, const LogprobArrays& wanted) {
  const auto n = static_cast<size_t>(wanted.num_rows);
  launch(stream, dim3(static_cast<unsigned>(n)), kThreads, logprob_kernel,
         View<const LogprobRow>(wanted.rows, n), logits_of(arrays), arrays.vocab,
         View<const uint32_t>(arrays.masks, arrays.num_mask_words),
         View<const int32_t>(arrays.tokens, static_cast<size_t>(arrays.num_rows)),
         View<const int32_t>(wanted.named, wanted.num_named), View<LogprobSums>(wanted.sums, n),
         View<TokenLogit>(wanted.found, wanted.num_found));
}

}  // namespace engine::cuda
