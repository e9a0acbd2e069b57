#include <string.h>
/* Stands in for the CUDA runtime entry points that an AOT object of the CuTe DSL imports. Launches go to a callback;
   a kernel handle is a copy of the kernel's name. */
typedef int (*launch_callback)(const void *config, const char *kernel, void **params);
static launch_callback on_launch;
void capture_set_callback(launch_callback f) { on_launch = f; }
int _cudaLaunchKernelEx(const void *config, const void *kernel, void **params) { return on_launch(config, kernel, params); }
int _cudaLibraryGetKernel(const void **kernel, const void *library, const char *name) { (void)library; *kernel = strdup(name); return 0; } /* the name may live on the caller's stack */
int _cudaLibraryLoadData(void **library) { *library = (void *)1; return 0; }
int _cudaLibraryUnload(void *library) { (void)library; return 0; }
int _cuKernelGetAttribute(int *value) { *value = 0; return 0; }
int _cudaDeviceGetAttribute(int *value, int attribute) { *value = attribute == 16 ? 132 : 232448; return 0; }
int _cudaFuncSetAttribute(void) { return 0; }
int _cudaGetDevice(int *device) { *device = 0; return 0; }
int _cudaGetDeviceCount(int *count) { *count = 1; return 0; }
int _cudaSetDevice(int device) { (void)device; return 0; }
int _cudaKernelSetAttributeForDevice(void) { return 0; }
int _cudaGetLastError(void) { return 0; }
const char *_cudaGetErrorString(int e) { (void)e; return "captured"; }
const char *_cudaGetErrorName(int e) { (void)e; return "captured"; }
