// From the scheduler's decision to the arrays that a device works on.
#pragma once

#include "device/batch.h"
#include "engine/scheduler.h"

namespace engine {

// Lays the step's sequences end to end, in step order; those that sample get a row of logits. The batch
// points into the sequences, so it lives no longer than the step: commit() ends it.
Batch make_batch(const Step& step);

}  // namespace engine
