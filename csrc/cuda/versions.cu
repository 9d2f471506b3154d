// The CUDA versions of this library's runtime and of the machine's driver, for a warning when the driver is too old.
//
// Asking starts no driver and makes no context. 1000 * major + 10 * minor; driver 0: none.
#include <cuda_runtime_api.h>

extern "C" __attribute__((visibility("default"))) int tsam_cuda_versions(int* runtime, int* driver) {
  *runtime = *driver = 0;
  cudaRuntimeGetVersion(runtime);
  return static_cast<int>(cudaDriverGetVersion(driver));
}
