// For tests: what the emulated runtime pretends to run on.
#include <nanobind/nanobind.h>

#include "cuda_on_cpu/machine.h"

namespace nb = nanobind;

void bind_cuda_machine(nb::module_& m) {
  using cuda_on_cpu::machine;
  m.attr("cuda_is_emulated") = true;
  m.def(
      "set_cuda_machine",
      [](int driver, int devices, int major, int minor, size_t bytes, bool has_code, bool lost,
         int64_t calls_until_lost) {
        machine.driver_version = driver;
        machine.num_devices = devices;
        machine.major = major;
        machine.minor = minor;
        machine.total_bytes = bytes;
        machine.has_code = has_code;
        machine.lost = lost;
        machine.calls_until_lost = calls_until_lost;
      },
      nb::arg("driver") = 13000, nb::arg("devices") = 1, nb::arg("major") = 9, nb::arg("minor") = 0,
      nb::arg("bytes") = size_t{1} << 30, nb::arg("has_code") = true, nb::arg("lost") = false,
      nb::arg("calls_until_lost") = 0);
  m.def("cuda_bytes_used", [] { return machine.used_bytes; });
  m.def("cuda_graphs_recorded", [] { return machine.graphs_recorded.load(); });
}
