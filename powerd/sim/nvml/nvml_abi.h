/* The part of NVML's binary interface that the simulated driver serves.
 *
 * House rules: (1) written from the layouts that the BSD-licensed Python bindings use, never from the vendor's header;
 * (2) every structure here has a row in abi.c, and a test compares its size and the offset of every field with the
 * bindings; (3) nothing here knows about the simulation.
 */
#ifndef POWERD_NVML_ABI_H
#define POWERD_NVML_ABI_H
#include <stdint.h>

typedef int nvml_return;
typedef void *nvml_device;

enum {
    NV_SUCCESS = 0, NV_UNINITIALIZED = 1, NV_INVALID_ARGUMENT = 2, NV_NOT_SUPPORTED = 3, NV_NO_PERMISSION = 4,
    NV_NOT_FOUND = 6, NV_INSUFFICIENT_SIZE = 7, NV_DRIVER_NOT_LOADED = 9, NV_TIMEOUT = 10, NV_GPU_IS_LOST = 15,
    NV_RESET_REQUIRED = 16, NV_LIB_RM_VERSION_MISMATCH = 18, NV_IN_USE = 19, NV_MEMORY = 20,
    NV_ARGUMENT_VERSION_MISMATCH = 25, NV_UNKNOWN = 999
};

enum { NV_CLOCK_GRAPHICS = 0, NV_CLOCK_SM = 1, NV_CLOCK_MEM = 2, NV_CLOCK_VIDEO = 3, NV_CLOCK_COUNT = 4 };
enum { NV_LIMIT_ID_TDP = 0xffffff01u, NV_LIMIT_ID_UNLIMITED = 0xffffff02u, NV_LIMIT_ID_START = 0xffffff00u };
enum { NV_VALUE_UINT = 1, NV_VALUE_U64 = 3 };
enum { NV_EVENT_XID = 8 };

/* Clock event reasons, one bit each. */
enum {
    NV_REASON_IDLE = 0x1, NV_REASON_SW_POWER_CAP = 0x4, NV_REASON_HW_SLOWDOWN = 0x8, NV_REASON_SW_THERMAL = 0x20,
    NV_REASON_HW_THERMAL = 0x40, NV_REASON_POWER_BRAKE = 0x80
};
#define NV_REASONS_SUPPORTED 0x1ffull

typedef struct { unsigned int gpu, memory; } nvml_utilization;
typedef struct { unsigned long long total, free, used; } nvml_memory;
typedef struct { unsigned int version; unsigned long long total, reserved, free, used; } nvml_memory_v2;
typedef struct { unsigned long long bar1Total, bar1Free, bar1Used; } nvml_bar1_memory;
typedef struct {
    char busIdLegacy[16];
    unsigned int domain, bus, device, pciDeviceId, pciSubSystemId;
    char busId[32];
} nvml_pci_info;
typedef struct {
    char busId[16];
    unsigned int domain, bus, device, pciDeviceId, pciSubSystemId, reserved0, reserved1, reserved2, reserved3;
} nvml_pci_info_v2;
typedef struct {
    unsigned int version, domain, bus, device, pciDeviceId, pciSubSystemId, baseClass, subClass;
    char busId[32];
} nvml_pci_info_ext;
typedef struct { unsigned int pid; unsigned long long usedGpuMemory; } nvml_process_info_v1;
typedef struct {
    unsigned int pid;
    unsigned long long usedGpuMemory;
    unsigned int gpuInstanceId, computeInstanceId;
} nvml_process_info;
typedef union {
    double dVal;
    unsigned int uiVal;
    unsigned long ulVal;
    unsigned long long ullVal;
    long long sllVal;
    int siVal;
    unsigned short usVal;
} nvml_value;
typedef struct {
    unsigned int fieldId, scopeId;
    long long timestamp, latencyUsec;
    unsigned int valueType, nvmlReturn;
    nvml_value value;
} nvml_field_value;
typedef struct { unsigned int version, powerScope, powerValueMw; } nvml_power_value_v2; /* the scope is the low byte */
typedef struct {
    unsigned int pid;
    unsigned long long timeStamp;
    unsigned int smUtil, memUtil, encUtil, decUtil;
} nvml_process_utilization;
typedef struct { unsigned int version, sensorType; int temperature; } nvml_temperature;
typedef struct { unsigned int version; int marginTemperature; } nvml_margin_temperature;
typedef struct { unsigned int isC2cEnabled; } nvml_c2c_mode_info;
typedef struct {
    nvml_device device;
    unsigned long long eventType, eventData;
    unsigned int gpuInstanceId, computeInstanceId;
} nvml_event_data;
typedef struct { unsigned long long timeStamp; nvml_value sampleValue; } nvml_sample;
typedef struct { unsigned long long referenceTime, violationTime; } nvml_violation_time;
typedef struct { unsigned int version, isSupportedDevice; } nvml_gpm_support;

#define NV_STRUCT_VERSION(type, ver) ((unsigned int)(sizeof(type) | ((ver) << 24u)))
#define NVML_API __attribute__((visibility("default")))
#endif
