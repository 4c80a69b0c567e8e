// The test-only module _kernels_test: every kernel on numpy arrays, on any instruction set that this machine
// runs, and on the CUDA device, emulated where there is no GPU.
#include <nanobind/nanobind.h>

void bind_arena(nanobind::module_& m);
void bind_cuda_machine(nanobind::module_& m);
void bind_cuda_on_cpu(nanobind::module_& m);
void bind_linear(nanobind::module_& m);
void bind_ops(nanobind::module_& m);

NB_MODULE(_kernels_test, m) {
  bind_arena(m);
  bind_cuda_machine(m);
  bind_cuda_on_cpu(m);
  bind_linear(m);
  bind_ops(m);
}
