/* NVML: what a GPU measures and which settings it reports.
 *
 * House rules: (1) readings come from the published sensors, never from the truth; (2) a lock on clocks has no getter,
 * as in NVML; (3) with MIG on, utilisation is not supported.
 */
#include "sim.h"
#include <string.h>

uint32_t powerd_sim_memory_clock(const struct sim_model *model, const struct sim_gpu *gpu);

#define ENTER_GPU(cost) \
    struct sim *sim; struct sim_gpu *gpu; \
    nvml_return ret = sim_enter_gpu(__func__, device, &sim, &gpu, cost); if (ret) return ret; \
    const struct sim_model *model = &sim->node->config.model; (void)model
#define READ_GPU() \
    ENTER_GPU(COST_SENSOR); \
    if (!out) return NV_INVALID_ARGUMENT; \
    sim_refresh(sim, gpu)

NVML_API nvml_return nvmlDeviceGetPowerUsage(nvml_device device, unsigned int *out) {
    READ_GPU();
    *out = model->power_usage_is_average ? gpu->average_mw : gpu->instant_mw;
    return NV_SUCCESS;
}

NVML_API nvml_return nvmlDeviceGetTotalEnergyConsumption(nvml_device device, unsigned long long *out) {
    READ_GPU();
    *out = __atomic_load_n(&gpu->counter_mj, __ATOMIC_ACQUIRE);
    return NV_SUCCESS;
}

static uint32_t shown_clock(const struct sim_model *model, const struct sim_gpu *gpu) {
    return gpu->frozen ? gpu->frozen_clock : sim_snap_clock(model, gpu->clock_mhz);
}

NVML_API nvml_return nvmlDeviceGetClockInfo(nvml_device device, unsigned int type, unsigned int *out) {
    READ_GPU();
    if (type >= NV_CLOCK_COUNT) return NV_INVALID_ARGUMENT;
    if (type == NV_CLOCK_MEM) *out = powerd_sim_memory_clock(model, gpu);
    else *out = type == NV_CLOCK_VIDEO ? shown_clock(model, gpu) * 9 / 10 : shown_clock(model, gpu);
    return NV_SUCCESS;
}

NVML_API nvml_return nvmlDeviceGetClock(nvml_device device, unsigned int type, unsigned int id, unsigned int *out) {
    if (id != 0) {
        ENTER_GPU(COST_CACHED);
        return id > 3 ? NV_INVALID_ARGUMENT : NV_NOT_SUPPORTED;
    }
    return nvmlDeviceGetClockInfo(device, type, out);
}

NVML_API nvml_return nvmlDeviceGetMaxClockInfo(nvml_device device, unsigned int type, unsigned int *out) {
    ENTER_GPU(COST_CACHED);
    if (!out || type >= NV_CLOCK_COUNT) return NV_INVALID_ARGUMENT;
    *out = type == NV_CLOCK_MEM ? model->memory_clock_mhz[0] : type == NV_CLOCK_VIDEO ? model->clock_max_mhz * 9 / 10 : model->clock_max_mhz;
    return NV_SUCCESS;
}

NVML_API nvml_return nvmlDeviceGetMaxCustomerBoostClock(nvml_device device, unsigned int type, unsigned int *out) {
    return nvmlDeviceGetMaxClockInfo(device, type, out);
}

NVML_API nvml_return nvmlDeviceGetSupportedMemoryClocks(nvml_device device, unsigned int *count, unsigned int *out) {
    ENTER_GPU(COST_CACHED);
    if (!count) return NV_INVALID_ARGUMENT;
    unsigned int room = *count;
    *count = model->memory_clock_count;
    if (!out || room < model->memory_clock_count) return NV_INSUFFICIENT_SIZE;
    memcpy(out, model->memory_clock_mhz, model->memory_clock_count * sizeof *out);
    return NV_SUCCESS;
}

NVML_API nvml_return nvmlDeviceGetSupportedGraphicsClocks(nvml_device device, unsigned int memory_mhz, unsigned int *count, unsigned int *out) {
    ENTER_GPU(COST_CACHED);
    if (!count) return NV_INVALID_ARGUMENT;
    bool known = false;
    for (uint32_t i = 0; i < model->memory_clock_count; i++) known |= model->memory_clock_mhz[i] == memory_mhz;
    if (!known) return NV_NOT_FOUND;
    unsigned int room = *count, need = (model->clock_max_mhz - model->clock_min_mhz) / model->clock_step_mhz + 1;
    *count = need;
    if (!out || room < need) return NV_INSUFFICIENT_SIZE;
    for (unsigned int i = 0; i < need; i++) out[i] = model->clock_max_mhz - i * model->clock_step_mhz;
    return NV_SUCCESS;
}

NVML_API nvml_return nvmlDeviceGetPerformanceState(nvml_device device, unsigned int *out) {
    READ_GPU();
    *out = 0;
    if (gpu->reasons & NV_REASON_IDLE && gpu->clock_mhz <= model->idle_clock_mhz && model->architecture == 7 && model->cc_minor == 6) *out = 8;
    return NV_SUCCESS;
}

NVML_API nvml_return nvmlDeviceGetPowerState(nvml_device device, unsigned int *out) { return nvmlDeviceGetPerformanceState(device, out); }

NVML_API nvml_return nvmlDeviceGetCurrentClocksEventReasons(nvml_device device, unsigned long long *out) {
    READ_GPU();
    *out = gpu->reasons;
    return NV_SUCCESS;
}

NVML_API nvml_return nvmlDeviceGetCurrentClocksThrottleReasons(nvml_device device, unsigned long long *out) {
    return nvmlDeviceGetCurrentClocksEventReasons(device, out);
}

NVML_API nvml_return nvmlDeviceGetSupportedClocksEventReasons(nvml_device device, unsigned long long *out) {
    ENTER_GPU(COST_CACHED);
    if (!out) return NV_INVALID_ARGUMENT;
    *out = NV_REASONS_SUPPORTED;
    return NV_SUCCESS;
}

NVML_API nvml_return nvmlDeviceGetSupportedClocksThrottleReasons(nvml_device device, unsigned long long *out) {
    return nvmlDeviceGetSupportedClocksEventReasons(device, out);
}

static int shown_temperature(const struct sim_gpu *gpu) {
    return gpu->frozen ? (int)gpu->frozen_temperature : (int)(gpu->temperature_c + 0.5);
}

NVML_API nvml_return nvmlDeviceGetTemperature(nvml_device device, unsigned int sensor, unsigned int *out) {
    READ_GPU();
    if (sensor != 0) return NV_INVALID_ARGUMENT;
    *out = (unsigned int)shown_temperature(gpu);
    return NV_SUCCESS;
}

NVML_API nvml_return nvmlDeviceGetTemperatureV(nvml_device device, nvml_temperature *out) {
    READ_GPU();
    if (out->version != NV_STRUCT_VERSION(nvml_temperature, 1)) return NV_ARGUMENT_VERSION_MISMATCH;
    if (out->sensorType != 0) return NV_INVALID_ARGUMENT;
    out->temperature = shown_temperature(gpu);
    return NV_SUCCESS;
}

NVML_API nvml_return nvmlDeviceGetTemperatureThreshold(nvml_device device, unsigned int which, unsigned int *out) {
    ENTER_GPU(COST_CACHED);
    if (!out || which > 7) return NV_INVALID_ARGUMENT;
    if (which > 3) return NV_NOT_SUPPORTED;
    *out = (unsigned int)(which == 0 ? model->shutdown_c : which == 1 ? model->slowdown_c : model->slowdown_c - 2);
    return NV_SUCCESS;
}

NVML_API nvml_return nvmlDeviceGetMarginTemperature(nvml_device device, nvml_margin_temperature *out) {
    READ_GPU();
    if (out->version != NV_STRUCT_VERSION(nvml_margin_temperature, 1)) return NV_ARGUMENT_VERSION_MISMATCH;
    out->marginTemperature = (int)model->slowdown_c - shown_temperature(gpu);
    return NV_SUCCESS;
}

NVML_API nvml_return nvmlDeviceGetFanSpeed(nvml_device device, unsigned int *out) {
    ENTER_GPU(COST_CACHED);
    if (!out) return NV_INVALID_ARGUMENT;
    return NV_NOT_SUPPORTED; /* all models here are passively cooled */
}

NVML_API nvml_return nvmlDeviceGetNumFans(nvml_device device, unsigned int *out) {
    ENTER_GPU(COST_CACHED);
    if (!out) return NV_INVALID_ARGUMENT;
    *out = 0;
    return NV_SUCCESS;
}

NVML_API nvml_return nvmlDeviceGetUtilizationRates(nvml_device device, nvml_utilization *out) {
    READ_GPU();
    if (gpu->mig) return NV_NOT_SUPPORTED;
    out->gpu = gpu->utilization;
    out->memory = gpu->memory_utilization;
    return NV_SUCCESS;
}

#define CODEC(function) \
    NVML_API nvml_return function(nvml_device device, unsigned int *out, unsigned int *period_us) { \
        ENTER_GPU(COST_CACHED); \
        if (!out || !period_us) return NV_INVALID_ARGUMENT; \
        if (gpu->mig) return NV_NOT_SUPPORTED; \
        *out = 0; \
        *period_us = 167000; \
        return NV_SUCCESS; \
    }
CODEC(nvmlDeviceGetEncoderUtilization)
CODEC(nvmlDeviceGetDecoderUtilization)
CODEC(nvmlDeviceGetJpgUtilization)
CODEC(nvmlDeviceGetOfaUtilization)

static unsigned long long used_memory(const struct sim_gpu *gpu) {
    unsigned long long used = 0;
    for (int i = 0; i < SIM_MAX_WORK; i++)
        if (gpu->work[i].used) used += gpu->work[i].memory;
    return used;
}

#define RESERVED_BYTES (512ull << 20)

NVML_API nvml_return nvmlDeviceGetMemoryInfo(nvml_device device, nvml_memory *out) {
    ENTER_GPU(COST_CACHED);
    if (!out) return NV_INVALID_ARGUMENT;
    out->total = model->memory_bytes;
    out->used = used_memory(gpu) + RESERVED_BYTES;
    if (out->used > out->total) out->used = out->total;
    out->free = out->total - out->used;
    return NV_SUCCESS;
}

NVML_API nvml_return nvmlDeviceGetMemoryInfo_v2(nvml_device device, nvml_memory_v2 *out) {
    ENTER_GPU(COST_CACHED);
    if (!out) return NV_INVALID_ARGUMENT;
    if (out->version != NV_STRUCT_VERSION(nvml_memory_v2, 2)) return NV_ARGUMENT_VERSION_MISMATCH;
    out->total = model->memory_bytes;
    out->reserved = RESERVED_BYTES;
    out->used = used_memory(gpu);
    if (out->used > out->total - out->reserved) out->used = out->total - out->reserved;
    out->free = out->total - out->reserved - out->used;
    return NV_SUCCESS;
}

NVML_API nvml_return nvmlDeviceGetBAR1MemoryInfo(nvml_device device, nvml_bar1_memory *out) {
    ENTER_GPU(COST_CACHED);
    if (!out) return NV_INVALID_ARGUMENT;
    out->bar1Total = 128ull << 30;
    out->bar1Used = 1ull << 20;
    out->bar1Free = out->bar1Total - out->bar1Used;
    return NV_SUCCESS;
}

NVML_API nvml_return nvmlDeviceGetPcieThroughput(nvml_device device, unsigned int counter, unsigned int *out) {
    ENTER_GPU(COST_PCIE);
    if (!out || counter > 1) return NV_INVALID_ARGUMENT;
    sim_refresh(sim, gpu);
    *out = gpu->utilization * 1000u;
    return NV_SUCCESS;
}

#define LIMIT(function, value) \
    NVML_API nvml_return function(nvml_device device, unsigned int *out) { \
        ENTER_GPU(COST_CACHED); \
        if (!out) return NV_INVALID_ARGUMENT; \
        *out = (value); \
        return NV_SUCCESS; \
    }
LIMIT(nvmlDeviceGetPowerManagementLimit, gpu->limit_mw)
LIMIT(nvmlDeviceGetPowerManagementDefaultLimit, model->limit_default_mw)
LIMIT(nvmlDeviceGetEnforcedPowerLimit, sim_enforced_mw(gpu))

NVML_API nvml_return nvmlDeviceGetPowerManagementLimitConstraints(nvml_device device, unsigned int *low, unsigned int *high) {
    ENTER_GPU(COST_CACHED);
    if (!low || !high) return NV_INVALID_ARGUMENT;
    *low = model->limit_min_mw;
    *high = model->limit_max_mw;
    return NV_SUCCESS;
}

NVML_API nvml_return nvmlDeviceGetC2cModeInfoV(nvml_device device, nvml_c2c_mode_info *out) {
    ENTER_GPU(COST_CACHED);
    if (!out) return NV_INVALID_ARGUMENT;
    return NV_NOT_SUPPORTED; /* no Grace */
}

NVML_API nvml_return nvmlGpmQueryDeviceSupport(nvml_device device, nvml_gpm_support *out) {
    ENTER_GPU(COST_CACHED);
    if (!out) return NV_INVALID_ARGUMENT;
    out->isSupportedDevice = 0;
    return NV_SUCCESS;
}

NVML_API nvml_return nvmlDeviceGetViolationStatus(nvml_device device, unsigned int policy, nvml_violation_time *out) {
    READ_GPU();
    if (policy > 11) return NV_INVALID_ARGUMENT;
    out->referenceTime = gpu->t_ns / 1000;
    out->violationTime = policy == 0 ? gpu->reason_ns[2] : policy == 1 ? gpu->reason_ns[5] + gpu->reason_ns[6] : 0;
    return NV_SUCCESS;
}
