// Stands for CUDA's driver: it loads every kernel, runs none, and tells a watcher of each launch.
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef void (*Watcher)(void *function, const unsigned *grid, unsigned threads, unsigned shared, void *stream,
                        void **parameters);

// The beginning of CUlaunchConfig (cuda.h).
typedef struct {
  unsigned grid[3], block[3], shared;
  void *stream;
} Config;

void *stub_context = (void *)1;
int stub_error = 0;
static Watcher watcher;

void watch(Watcher found) { watcher = found; }

static int launched(void *function, const unsigned *grid, unsigned threads, unsigned shared, void *stream,
                    void **parameters) {
  if (watcher && !stub_error) watcher(function, grid, threads, shared, stream, parameters);
  return stub_error;
}

int cuLaunchKernelEx(const Config *config, void *function, void **parameters, void **extra) {
  (void)extra;
  return launched(function, config->grid, config->block[0], config->shared, config->stream, parameters);
}

int cuLaunchKernel(void *function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned block_y,
                   unsigned block_z, unsigned shared, void *stream, void **parameters, void **extra) {
  const unsigned grid[3] = {x, y, z};
  (void)extra;
  return block_y == 1 && block_z == 1 ? launched(function, grid, threads, shared, stream, parameters) : 1;
}

// Attributes by number: shared memory a program may have by choice, threads of a warp, multiprocessors.
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  (void)device;
  *value = attribute == 97 ? 232448 : attribute == 10 ? 32 : attribute == 16 ? 132 : 1024;
  return 0;
}

int cuModuleGetFunction(void **function, void *module, const char *name) {
  (void)module;
  *function = strdup(name);  // an address of its own for each that is loaded
  return 0;
}

int cuGetErrorString(int number, const char **text) {
  (void)number;
  *text = "as the test wanted";
  return 0;
}

int cuPointerGetAttribute(uint64_t *found, int attribute, uint64_t pointer) {
  (void)attribute;
  *found = pointer;
  return 0;
}

int cuCtxGetCurrent(void **found) {
  *found = stub_context;
  return 0;
}

int cuDriverGetVersion(int *version) {
  *version = 13000;
  return 0;
}

int cuFuncGetAttribute(int *value, int attribute, void *function) {
  (void)function;
  *value = attribute == 0 ? 1024 : 0;  // threads a program may have
  return 0;
}

int cuModuleLoadData(void **module, const void *image) {
  (void)image;
  *module = (void *)1;
  return 0;
}

int cuDeviceGet(int *device, int ordinal) {
  *device = ordinal;
  return 0;
}

int cuDevicePrimaryCtxRetain(void **found, int device) {
  (void)device;
  *found = (void *)1;
  return 0;
}

int cuCtxSetCurrent(void *chosen) {
  (void)chosen;
  return 0;
}

int cuFuncSetAttribute(void *function, int attribute, int value) {
  (void)function, (void)attribute, (void)value;
  return 0;
}

int cuFuncSetCacheConfig(void *function, int config) {
  (void)function, (void)config;
  return 0;
}

int cuCtxGetLimit(size_t *value, int limit) {
  (void)limit;
  *value = 0;
  return 0;
}

int cuCtxSetLimit(int limit, size_t value) {
  (void)limit, (void)value;
  return 0;
}

int cuTensorMapEncodeTiled(void) { return 1; }

int cuOccupancyMaxActiveClusters(int *clusters, void *function, const void *config) {
  (void)function, (void)config;
  *clusters = 1;
  return 0;
}
