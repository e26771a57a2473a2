/* NVML: initialisation, system and device handles, identity.
 *
 * House rules: (1) init is reference-counted, after the last shutdown every call answers UNINITIALIZED; (2) a handle
 * is a small number, checked on every use; (3) strings that do not fit answer INSUFFICIENT_SIZE.
 */
#include "sim.h"
#include <stdio.h>
#include <string.h>

#define HANDLE_BASE 0x51500000ul

void sim_uuid(const struct sim_node *node, uint32_t index, char out[SIM_NAME]);

static int init_count;
static uint64_t init_generation, loaded_upgrades;
static struct sim *loaded_sim, *init_sim;

/* A client that never shut down stays initialised only for the node it was initialised on. */
bool sim_initialised(void) { return __atomic_load_n(&init_count, __ATOMIC_ACQUIRE) > 0 && init_sim && init_sim == sim_current(); }
/* The node is being unmapped under a client that has not shut down. */
void sim_forget(const struct sim *sim) {
    if (loaded_sim == sim) loaded_sim = NULL;
    if (init_sim != sim) return;
    init_sim = NULL;
    __atomic_store_n(&init_count, 0, __ATOMIC_SEQ_CST);
}

uint64_t sim_init_generation(void) { return init_generation; }
nvml_device sim_handle(const struct sim_gpu *gpu) { return (nvml_device)(HANDLE_BASE + gpu->index + 1); }

struct sim_gpu *sim_from_handle(struct sim *sim, nvml_device device) {
    unsigned long index = (unsigned long)device - HANDLE_BASE - 1;
    return index < sim->node->config.gpus ? &sim->node->gpus[index] : NULL;
}

static nvml_return init(const char *function) {
    struct sim *sim = sim_current();
    if (!sim) return NV_DRIVER_NOT_LOADED;
    if (loaded_sim != sim) {
        loaded_sim = sim;
        loaded_upgrades = sim->node->upgrades;
    }
    if (loaded_upgrades != sim->node->upgrades) return NV_LIB_RM_VERSION_MISMATCH;
    if (init_sim != sim) __atomic_store_n(&init_count, 0, __ATOMIC_SEQ_CST);
    if (__atomic_fetch_add(&init_count, 1, __ATOMIC_SEQ_CST) == 0) {
        init_generation = sim->node->generation;
        init_sim = sim;
        sim_lifetime_open(sim);
    }
    nvml_return ret = sim_enter(function, &sim, COST_CACHED);
    if (ret != NV_SUCCESS && __atomic_sub_fetch(&init_count, 1, __ATOMIC_SEQ_CST) == 0) sim_lifetime_close(sim);
    return ret;
}

NVML_API nvml_return nvmlInit(void) { return init("nvmlInit"); }
NVML_API nvml_return nvmlInit_v2(void) { return init("nvmlInit_v2"); }
NVML_API nvml_return nvmlInitWithFlags(unsigned int flags) { (void)flags; return init("nvmlInitWithFlags"); }

NVML_API nvml_return nvmlShutdown(void) {
    if (!init_sim || !sim_initialised()) return NV_UNINITIALIZED;
    if (__atomic_sub_fetch(&init_count, 1, __ATOMIC_SEQ_CST) == 0) sim_lifetime_close(init_sim);
    return NV_SUCCESS;
}

NVML_API const char *nvmlErrorString(nvml_return code) {
    switch (code) {
    case NV_SUCCESS: return "The operation was successful";
    case NV_UNINITIALIZED: return "NVML was not first initialized";
    case NV_INVALID_ARGUMENT: return "A supplied argument is invalid";
    case NV_NOT_SUPPORTED: return "The requested operation is not available on target device";
    case NV_NO_PERMISSION: return "The current user does not have permission for operation";
    case NV_GPU_IS_LOST: return "The GPU has fallen off the bus or has otherwise become inaccessible";
    default: return "Unknown Error";
    }
}

static nvml_return put(char *out, unsigned int length, const char *text) {
    if (!out) return NV_INVALID_ARGUMENT;
    if (strlen(text) + 1 > length) return NV_INSUFFICIENT_SIZE;
    strcpy(out, text);
    return NV_SUCCESS;
}

#define ENTER(cost) struct sim *sim; nvml_return ret = sim_enter(__func__, &sim, cost); if (ret) return ret
#define ENTER_GPU(cost) \
    struct sim *sim; struct sim_gpu *gpu; \
    nvml_return ret = sim_enter_gpu(__func__, device, &sim, &gpu, cost); if (ret) return ret; \
    const struct sim_model *model = &sim->node->config.model; (void)model

NVML_API nvml_return nvmlSystemGetDriverVersion(char *out, unsigned int length) {
    ENTER(COST_CACHED);
    return put(out, length, sim->node->driver_version);
}

NVML_API nvml_return nvmlSystemGetNVMLVersion(char *out, unsigned int length) {
    ENTER(COST_CACHED);
    return put(out, length, sim->node->config.nvml_version);
}

NVML_API nvml_return nvmlSystemGetCudaDriverVersion(int *out) {
    ENTER(COST_CACHED);
    if (!out) return NV_INVALID_ARGUMENT;
    *out = (int)sim->node->config.cuda_version;
    return NV_SUCCESS;
}

NVML_API nvml_return nvmlSystemGetCudaDriverVersion_v2(int *out) { return nvmlSystemGetCudaDriverVersion(out); }

NVML_API nvml_return nvmlSystemGetProcessName(unsigned int pid, char *out, unsigned int length) {
    ENTER(COST_CACHED);
    for (uint32_t g = 0; g < sim->node->config.gpus; g++)
        for (int i = 0; i < SIM_MAX_WORK; i++) {
            const struct sim_work *work = &sim->node->gpus[g].work[i];
            if (work->used && work->pid == pid) return put(out, length, work->name);
        }
    return NV_NOT_FOUND;
}

NVML_API nvml_return nvmlDeviceGetCount_v2(unsigned int *out) {
    ENTER(COST_CACHED);
    if (!out) return NV_INVALID_ARGUMENT;
    *out = sim->node->config.gpus;
    return NV_SUCCESS;
}

NVML_API nvml_return nvmlDeviceGetCount(unsigned int *out) { return nvmlDeviceGetCount_v2(out); }

static nvml_return hand_out(struct sim *sim, uint32_t index, nvml_device *out) {
    if (!out || index >= sim->node->config.gpus) return NV_INVALID_ARGUMENT;
    if (sim->node->gpus[index].lost) return NV_GPU_IS_LOST;
    *out = sim_handle(&sim->node->gpus[index]);
    return NV_SUCCESS;
}

NVML_API nvml_return nvmlDeviceGetHandleByIndex_v2(unsigned int index, nvml_device *out) {
    ENTER(COST_CACHED);
    return hand_out(sim, index, out);
}

NVML_API nvml_return nvmlDeviceGetHandleByIndex(unsigned int index, nvml_device *out) {
    return nvmlDeviceGetHandleByIndex_v2(index, out);
}

NVML_API nvml_return nvmlDeviceGetHandleByUUID(const char *uuid, nvml_device *out) {
    ENTER(COST_CACHED);
    char own[SIM_NAME];
    if (!uuid) return NV_INVALID_ARGUMENT;
    for (uint32_t g = 0; g < sim->node->config.gpus; g++) {
        sim_uuid(sim->node, g, own);
        if (strcmp(own, uuid) == 0) return hand_out(sim, g, out);
    }
    return NV_NOT_FOUND;
}

static void bus_id(uint32_t index, char *out, size_t length, bool legacy) {
    snprintf(out, length, legacy ? "%04x:%02X:00.0" : "%08x:%02X:00.0", 0u, 0x10u + index * 0x0cu);
}

NVML_API nvml_return nvmlDeviceGetHandleByPciBusId_v2(const char *id, nvml_device *out) {
    ENTER(COST_CACHED);
    char a[32], b[32];
    if (!id) return NV_INVALID_ARGUMENT;
    for (uint32_t g = 0; g < sim->node->config.gpus; g++) {
        bus_id(g, a, sizeof a, false);
        bus_id(g, b, sizeof b, true);
        if (strcmp(a, id) == 0 || strcmp(b, id) == 0) return hand_out(sim, g, out);
    }
    return NV_NOT_FOUND;
}

NVML_API nvml_return nvmlDeviceGetHandleByPciBusId(const char *id, nvml_device *out) {
    return nvmlDeviceGetHandleByPciBusId_v2(id, out);
}

NVML_API nvml_return nvmlDeviceGetIndex(nvml_device device, unsigned int *out) {
    ENTER_GPU(COST_CACHED);
    if (!out) return NV_INVALID_ARGUMENT;
    *out = gpu->index;
    return NV_SUCCESS;
}

NVML_API nvml_return nvmlDeviceGetMinorNumber(nvml_device device, unsigned int *out) { return nvmlDeviceGetIndex(device, out); }
NVML_API nvml_return nvmlDeviceGetModuleId(nvml_device device, unsigned int *out) { return nvmlDeviceGetIndex(device, out); }

NVML_API nvml_return nvmlDeviceGetName(nvml_device device, char *out, unsigned int length) {
    ENTER_GPU(COST_CACHED);
    return put(out, length, model->name);
}

NVML_API nvml_return nvmlDeviceGetUUID(nvml_device device, char *out, unsigned int length) {
    ENTER_GPU(COST_CACHED);
    char own[SIM_NAME];
    sim_uuid(sim->node, gpu->index, own);
    return put(out, length, own);
}

static nvml_return numbered(nvml_device device, char *out, unsigned int length, const char *function, const char *format) {
    struct sim *sim;
    struct sim_gpu *gpu;
    char text[SIM_NAME];
    nvml_return ret = sim_enter_gpu(function, device, &sim, &gpu, COST_CACHED);
    if (ret) return ret;
    snprintf(text, sizeof text, format, (unsigned)(sim_hash(sim->node->config.seed, gpu->index, 33) % 900000) + 100000u);
    return put(out, length, text);
}

NVML_API nvml_return nvmlDeviceGetSerial(nvml_device device, char *out, unsigned int length) {
    return numbered(device, out, length, __func__, "1650000%06u");
}
NVML_API nvml_return nvmlDeviceGetBoardPartNumber(nvml_device device, char *out, unsigned int length) {
    return numbered(device, out, length, __func__, "SIM-%06u");
}
NVML_API nvml_return nvmlDeviceGetVbiosVersion(nvml_device device, char *out, unsigned int length) {
    ENTER_GPU(COST_CACHED);
    return put(out, length, "00.00.00.00.51");
}
NVML_API nvml_return nvmlDeviceGetInforomImageVersion(nvml_device device, char *out, unsigned int length) {
    ENTER_GPU(COST_CACHED);
    return put(out, length, "G000.0000.00.51");
}

#define CONSTANT(function, value) \
    NVML_API nvml_return function(nvml_device device, unsigned int *out) { \
        ENTER_GPU(COST_CACHED); \
        if (!out) return NV_INVALID_ARGUMENT; \
        *out = (unsigned int)(value); \
        return NV_SUCCESS; \
    }
CONSTANT(nvmlDeviceGetBrand, model->brand)
CONSTANT(nvmlDeviceGetArchitecture, model->architecture)
CONSTANT(nvmlDeviceGetNumGpuCores, model->cores)
CONSTANT(nvmlDeviceGetBoardId, 0x1000u + gpu->index * 0x0cu)
CONSTANT(nvmlDeviceGetMultiGpuBoard, 0)
CONSTANT(nvmlDeviceGetBusType, 2)
CONSTANT(nvmlDeviceGetPowerSource, 0)
CONSTANT(nvmlDeviceGetDisplayMode, 0)
CONSTANT(nvmlDeviceGetDisplayActive, 0)
CONSTANT(nvmlDeviceGetPersistenceMode, gpu->persistence)
CONSTANT(nvmlDeviceGetPowerManagementMode, 1)
CONSTANT(nvmlDeviceGetComputeMode, gpu->compute_mode)
CONSTANT(nvmlDeviceGetMaxPcieLinkGeneration, model->architecture >= 9 ? 5 : 4)
CONSTANT(nvmlDeviceGetCurrPcieLinkGeneration, model->architecture >= 9 ? 5 : 4)
CONSTANT(nvmlDeviceGetMaxPcieLinkWidth, 16)
CONSTANT(nvmlDeviceGetCurrPcieLinkWidth, 16)
CONSTANT(nvmlDeviceGetPcieReplayCounter, 0)
CONSTANT(nvmlDeviceIsMigDeviceHandle, 0)
CONSTANT(nvmlDeviceGetMaxMigDeviceCount, model->mig_supported ? 7 : 0)

NVML_API nvml_return nvmlDeviceGetCudaComputeCapability(nvml_device device, int *major, int *minor) {
    ENTER_GPU(COST_CACHED);
    if (!major || !minor) return NV_INVALID_ARGUMENT;
    *major = (int)model->cc_major;
    *minor = (int)model->cc_minor;
    return NV_SUCCESS;
}

NVML_API nvml_return nvmlDeviceGetPciInfo_v3(nvml_device device, nvml_pci_info *out) {
    ENTER_GPU(COST_CACHED);
    if (!out) return NV_INVALID_ARGUMENT;
    memset(out, 0, sizeof *out);
    bus_id(gpu->index, out->busId, sizeof out->busId, false);
    bus_id(gpu->index, out->busIdLegacy, sizeof out->busIdLegacy, true);
    out->bus = 0x10u + gpu->index * 0x0cu;
    out->pciDeviceId = model->pci_device_id;
    out->pciSubSystemId = model->pci_subsystem_id;
    return NV_SUCCESS;
}

NVML_API nvml_return nvmlDeviceGetPciInfo_v2(nvml_device device, nvml_pci_info_v2 *out) {
    ENTER_GPU(COST_CACHED);
    if (!out) return NV_INVALID_ARGUMENT;
    memset(out, 0, sizeof *out);
    bus_id(gpu->index, out->busId, sizeof out->busId, true);
    out->bus = 0x10u + gpu->index * 0x0cu;
    out->pciDeviceId = model->pci_device_id;
    out->pciSubSystemId = model->pci_subsystem_id;
    return NV_SUCCESS;
}

NVML_API nvml_return nvmlDeviceGetPciInfo(nvml_device device, nvml_pci_info_v2 *out) { return nvmlDeviceGetPciInfo_v2(device, out); }

NVML_API nvml_return nvmlDeviceGetPciInfoExt(nvml_device device, nvml_pci_info_ext *out) {
    ENTER_GPU(COST_CACHED);
    if (!out) return NV_INVALID_ARGUMENT;
    if (out->version != NV_STRUCT_VERSION(nvml_pci_info_ext, 1)) return NV_ARGUMENT_VERSION_MISMATCH;
    out->domain = out->device = 0;
    out->bus = 0x10u + gpu->index * 0x0cu;
    out->pciDeviceId = model->pci_device_id;
    out->pciSubSystemId = model->pci_subsystem_id;
    out->baseClass = 3;
    out->subClass = 2;
    bus_id(gpu->index, out->busId, sizeof out->busId, false);
    return NV_SUCCESS;
}

NVML_API nvml_return nvmlDeviceGetMigMode(nvml_device device, unsigned int *now, unsigned int *pending) {
    ENTER_GPU(COST_CACHED);
    if (!now || !pending) return NV_INVALID_ARGUMENT;
    if (!model->mig_supported) return NV_NOT_SUPPORTED;
    *now = *pending = gpu->mig;
    return NV_SUCCESS;
}

NVML_API nvml_return nvmlDeviceGetEccMode(nvml_device device, unsigned int *now, unsigned int *pending) {
    ENTER_GPU(COST_CACHED);
    if (!now || !pending) return NV_INVALID_ARGUMENT;
    *now = *pending = gpu->ecc;
    return NV_SUCCESS;
}

NVML_API nvml_return nvmlDeviceGetTotalEccErrors(nvml_device device, unsigned int type, unsigned int counter, unsigned long long *out) {
    ENTER_GPU(COST_CACHED);
    if (!out || type > 1 || counter > 1) return NV_INVALID_ARGUMENT;
    *out = 0;
    return NV_SUCCESS;
}
