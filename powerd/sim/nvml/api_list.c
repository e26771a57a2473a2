/* NVML: lists and events: processes, field values, samples, XID events.
 *
 * House rules: (1) the two-call sizing pattern: too small a buffer answers INSUFFICIENT_SIZE with the needed count;
 * (2) every field value carries its own return code; (3) waiting for an event is a futex, bounded by the caller.
 */
#include "sim.h"
#include <stdlib.h>
#include <string.h>

uint32_t powerd_sim_memory_clock(const struct sim_model *model, const struct sim_gpu *gpu);

#define ENTER_GPU(cost) \
    struct sim *sim; struct sim_gpu *gpu; \
    nvml_return ret = sim_enter_gpu(__func__, device, &sim, &gpu, cost); if (ret) return ret; \
    const struct sim_model *model = &sim->node->config.model; (void)model

struct process { uint32_t pid, busy_percent, memory_percent; uint64_t memory; };

/* One row per process, however many contexts it holds. */
static unsigned int collect(struct sim *sim, struct sim_gpu *gpu, struct process out[SIM_MAX_WORK]) {
    unsigned int count = 0;
    sim_lock(&gpu->mutex);
    sim_advance_gpu(sim->node, gpu, sim_now(sim->node));
    sim_drop_dead_work(sim, gpu);
    for (int i = 0; i < SIM_MAX_WORK; i++) {
        const struct sim_work *work = &gpu->work[i];
        if (!work->used) continue;
        unsigned int row = 0;
        while (row < count && out[row].pid != work->pid) row++;
        if (row == count) out[count++] = (struct process){.pid = work->pid};
        out[row].memory += work->memory;
        if (work->state != WORK_CONTEXT) {
            out[row].busy_percent = gpu->utilization;
            out[row].memory_percent = gpu->memory_utilization;
        }
    }
    sim_unlock(&gpu->mutex);
    return count;
}

static nvml_return processes(const char *function, nvml_device device, unsigned int *count, void *out, bool v1) {
    struct sim *sim;
    struct sim_gpu *gpu;
    struct process found[SIM_MAX_WORK];
    nvml_return ret = sim_enter_gpu(function, device, &sim, &gpu, COST_PROCESSES);
    if (ret) return ret;
    if (!count) return NV_INVALID_ARGUMENT;
    unsigned int room = *count, n = collect(sim, gpu, found);
    *count = n;
    if (n == 0) return NV_SUCCESS;
    if (!out || room < n) return NV_INSUFFICIENT_SIZE;
    for (unsigned int i = 0; i < n; i++) {
        if (v1) ((nvml_process_info_v1 *)out)[i] = (nvml_process_info_v1){found[i].pid, found[i].memory};
        else ((nvml_process_info *)out)[i] = (nvml_process_info){found[i].pid, found[i].memory, 0xffffffffu, 0xffffffffu};
    }
    return NV_SUCCESS;
}

#define PROCESSES(function, v1) \
    NVML_API nvml_return function(nvml_device device, unsigned int *count, void *out) { \
        return processes(__func__, device, count, out, v1); \
    }
PROCESSES(nvmlDeviceGetComputeRunningProcesses, true)
PROCESSES(nvmlDeviceGetComputeRunningProcesses_v2, false)
PROCESSES(nvmlDeviceGetComputeRunningProcesses_v3, false)

#define NO_PROCESSES(function) \
    NVML_API nvml_return function(nvml_device device, unsigned int *count, void *out) { \
        ENTER_GPU(COST_PROCESSES); \
        (void)out; \
        if (!count) return NV_INVALID_ARGUMENT; \
        *count = 0; \
        return NV_SUCCESS; \
    }
NO_PROCESSES(nvmlDeviceGetGraphicsRunningProcesses)
NO_PROCESSES(nvmlDeviceGetGraphicsRunningProcesses_v2)
NO_PROCESSES(nvmlDeviceGetGraphicsRunningProcesses_v3)
NO_PROCESSES(nvmlDeviceGetMPSComputeRunningProcesses)
NO_PROCESSES(nvmlDeviceGetMPSComputeRunningProcesses_v2)
NO_PROCESSES(nvmlDeviceGetMPSComputeRunningProcesses_v3)

NVML_API nvml_return nvmlDeviceGetProcessUtilization(nvml_device device, nvml_process_utilization *out, unsigned int *count,
                                                     unsigned long long since_us) {
    ENTER_GPU(COST_PROCESSES);
    if (!count) return NV_INVALID_ARGUMENT;
    if (gpu->mig) return NV_NOT_SUPPORTED;
    struct process found[SIM_MAX_WORK];
    unsigned int room = *count, n = collect(sim, gpu, found);
    unsigned long long now_us = sim_now(sim->node) / 1000;
    *count = n;
    if (n == 0 || now_us <= since_us) {
        *count = 0;
        return NV_NOT_FOUND;
    }
    if (!out || room < n) return NV_INSUFFICIENT_SIZE;
    for (unsigned int i = 0; i < n; i++)
        out[i] = (nvml_process_utilization){found[i].pid, now_us, found[i].busy_percent, found[i].memory_percent, 0, 0};
    return NV_SUCCESS;
}

enum field {
    FIELD_POLICY_FIRST = 74, FIELD_POLICY_LAST = 81, FIELD_MEMORY_TEMP = 82, FIELD_ENERGY = 83, FIELD_POWER_AVERAGE = 185,
    FIELD_POWER_INSTANT = 186, FIELD_LIMIT_MIN = 187, FIELD_LIMIT_MAX = 188, FIELD_LIMIT_DEFAULT = 189,
    FIELD_LIMIT_CURRENT = 190, FIELD_LIMIT_REQUESTED = 192, FIELD_SW_THERMAL_NS = 269, FIELD_HW_THERMAL_NS = 270,
    FIELD_POWER_BRAKE_NS = 271
};

static void read_field(const struct sim_model *model, const struct sim_gpu *gpu, nvml_field_value *field) {
    unsigned int u32 = 0;
    unsigned long long u64 = 0;
    bool wide = false;
    field->nvmlReturn = NV_SUCCESS;
    /* 185/186 have scopes: 0 GPU, 1 module (Grace boards only), 2 memory (Hopper, average only; a rough share). */
    if ((field->fieldId == FIELD_POWER_AVERAGE || field->fieldId == FIELD_POWER_INSTANT) && field->scopeId != 0) {
        if (field->scopeId == 2 && field->fieldId == FIELD_POWER_AVERAGE && model->architecture >= 9) {
            field->valueType = NV_VALUE_UINT;
            field->value.ullVal = gpu->average_mw / 8 + gpu->memory_utilization * 600;
            return;
        }
        field->nvmlReturn = field->scopeId > 2 ? NV_INVALID_ARGUMENT : NV_NOT_SUPPORTED;
        return;
    }
    switch (field->fieldId) {
    case FIELD_ENERGY: u64 = __atomic_load_n(&gpu->counter_mj, __ATOMIC_ACQUIRE); wide = true; break;
    case FIELD_POWER_AVERAGE: u32 = gpu->average_mw; break;
    case FIELD_POWER_INSTANT: u32 = gpu->instant_mw; break;
    case FIELD_LIMIT_MIN: u32 = model->limit_min_mw; break;
    case FIELD_LIMIT_MAX: u32 = model->limit_max_mw; break;
    case FIELD_LIMIT_DEFAULT: u32 = model->limit_default_mw; break;
    case FIELD_LIMIT_CURRENT: u32 = sim_enforced_mw(gpu); break;
    case FIELD_LIMIT_REQUESTED: u32 = gpu->limit_mw; break;
    case FIELD_MEMORY_TEMP: u32 = (unsigned int)(gpu->temperature_c + 8.0); break;
    case FIELD_SW_THERMAL_NS: u64 = gpu->reason_ns[5]; wide = true; break;
    case FIELD_HW_THERMAL_NS: u64 = gpu->reason_ns[6]; wide = true; break;
    case FIELD_POWER_BRAKE_NS: u64 = gpu->reason_ns[7]; wide = true; break;
    default:
        if (field->fieldId < FIELD_POLICY_FIRST || field->fieldId > FIELD_POLICY_LAST) {
            field->nvmlReturn = NV_NOT_SUPPORTED;
            return;
        }
        u64 = field->fieldId == 74 ? gpu->reason_ns[2] : field->fieldId == 75 ? gpu->reason_ns[5] + gpu->reason_ns[6] : field->fieldId == 78 ? gpu->reason_ns[0] : 0;
        wide = true;
    }
    field->valueType = wide ? NV_VALUE_U64 : NV_VALUE_UINT;
    field->value.ullVal = wide ? u64 : u32;
}

NVML_API nvml_return nvmlDeviceGetFieldValues(nvml_device device, int count, nvml_field_value *fields) {
    ENTER_GPU(COST_SENSOR);
    if (!fields || count < 1) return NV_INVALID_ARGUMENT;
    sim_refresh(sim, gpu);
    for (int i = 0; i < count; i++) {
        memset(&fields[i].value, 0, sizeof fields[i].value);
        fields[i].timestamp = (long long)(sim_now(sim->node) / 1000);
        fields[i].latencyUsec = 150;
        read_field(model, gpu, &fields[i]);
    }
    return NV_SUCCESS;
}

/* Events: XIDs only. An event set is private to its process; counters in shared memory say what is new. */
struct event_set { uint32_t watched, seen[SIM_MAX_GPUS]; };

NVML_API nvml_return nvmlDeviceGetSupportedEventTypes(nvml_device device, unsigned long long *out) {
    ENTER_GPU(COST_CACHED);
    if (!out) return NV_INVALID_ARGUMENT;
    *out = NV_EVENT_XID;
    return NV_SUCCESS;
}

NVML_API nvml_return nvmlEventSetCreate(void **out) {
    struct sim *sim;
    nvml_return ret = sim_enter(__func__, &sim, COST_CACHED);
    if (ret) return ret;
    if (!out) return NV_INVALID_ARGUMENT;
    *out = calloc(1, sizeof(struct event_set));
    return *out ? NV_SUCCESS : NV_MEMORY;
}

NVML_API nvml_return nvmlDeviceRegisterEvents(nvml_device device, unsigned long long types, void *handle) {
    ENTER_GPU(COST_CACHED);
    struct event_set *set = handle;
    if (!set) return NV_INVALID_ARGUMENT;
    if (types & ~(unsigned long long)NV_EVENT_XID) return NV_NOT_SUPPORTED;
    set->watched |= 1u << gpu->index;
    set->seen[gpu->index] = gpu->xid_count;
    return NV_SUCCESS;
}

NVML_API nvml_return nvmlEventSetWait_v2(void *handle, nvml_event_data *out, unsigned int timeout_ms) {
    struct sim *sim;
    nvml_return ret = sim_enter(__func__, &sim, COST_NONE);
    if (ret) return ret;
    struct event_set *set = handle;
    if (!set || !out) return NV_INVALID_ARGUMENT;
    uint64_t give_up = sim_real_ns() + (uint64_t)timeout_ms * 1000000ull;
    for (;;) {
        uint32_t word = __atomic_load_n(&sim->node->xid_word, __ATOMIC_SEQ_CST);
        for (uint32_t g = 0; g < sim->node->config.gpus; g++) {
            struct sim_gpu *gpu = &sim->node->gpus[g];
            if (!(set->watched >> g & 1) || set->seen[g] == gpu->xid_count) continue;
            set->seen[g]++;
            *out = (nvml_event_data){sim_handle(gpu), NV_EVENT_XID, gpu->last_xid, 0xffffffffu, 0xffffffffu};
            return NV_SUCCESS;
        }
        uint64_t now = sim_real_ns();
        if (now >= give_up) return NV_TIMEOUT;
        sim_futex_wait(&sim->node->xid_word, word, give_up - now);
    }
}

NVML_API nvml_return nvmlEventSetWait(void *handle, nvml_event_data *out, unsigned int timeout_ms) {
    return nvmlEventSetWait_v2(handle, out, timeout_ms);
}

NVML_API nvml_return nvmlEventSetFree(void *handle) {
    free(handle);
    return NV_SUCCESS;
}
