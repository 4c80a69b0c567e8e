// The test-only module _kernels_test: every kernel on numpy arrays, on any instruction set that this machine
// runs.
#include <nanobind/nanobind.h>

void bind_linear(nanobind::module_& m);
void bind_ops(nanobind::module_& m);

NB_MODULE(_kernels_test, m) {
  bind_linear(m);
  bind_ops(m);
}
