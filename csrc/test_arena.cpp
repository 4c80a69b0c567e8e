// A GPU's memory in pieces, for the tests; addresses as numbers.
#include <nanobind/nanobind.h>

#include "cuda/arena.h"

namespace nb = nanobind;
using engine::cuda::Arena;

void bind_arena(nb::module_& m) {
  nb::class_<Arena>(m, "CudaArena")
      .def(nb::init<>())
      .def("reserve", &Arena::reserve)
      .def("available", &Arena::available)
      .def("take", [](Arena& arena, size_t bytes) { return reinterpret_cast<uintptr_t>(arena.take(bytes)); })
      .def("give_back",
           [](Arena& arena, uintptr_t piece) { arena.give_back(reinterpret_cast<void*>(piece)); });
}
