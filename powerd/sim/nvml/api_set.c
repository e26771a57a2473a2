/* NVML: everything that changes a GPU. All of it needs permission.
 *
 * House rules: (1) order of checks: handle, lost, supported, permission, range; (2) a setter pays its time first and
 * takes effect when it returns, clocks a settle time later; (3) success means installed, not obeyed.
 */
#include "sim.h"

#define ENTER_SETTER(supported) \
    struct sim *sim; struct sim_gpu *gpu; \
    nvml_return ret = sim_enter_setter(__func__, device, &sim, &gpu, supported); if (ret) return ret; \
    const struct sim_model *model = &sim->node->config.model; (void)model

/* Support is a property of the model, known only once the handle is. */
#define ENTER_SETTER_IF(flag) ENTER_SETTER(sim_current() && sim_current()->node->config.model.flag)

static void hold(struct sim *sim, struct sim_gpu *gpu) {
    sim_lock(&gpu->mutex);
    sim_advance_gpu(sim->node, gpu, sim_now(sim->node));
    gpu->setter_calls++;
}

static void let_go(struct sim *sim, struct sim_gpu *gpu) {
    sim_changed(sim->node, gpu);
    sim_unlock(&gpu->mutex);
}

static nvml_return set_limit(struct sim *sim, struct sim_gpu *gpu, unsigned int limit_mw) {
    const struct sim_model *model = &sim->node->config.model;
    if (limit_mw < model->limit_min_mw || limit_mw > model->limit_max_mw) return NV_INVALID_ARGUMENT;
    sim_pay(sim, gpu, COST_LIMIT);
    if (gpu->lost) return NV_GPU_IS_LOST;
    hold(sim, gpu);
    gpu->limit_mw = limit_mw;
    let_go(sim, gpu);
    return NV_SUCCESS;
}

NVML_API nvml_return nvmlDeviceSetPowerManagementLimit(nvml_device device, unsigned int limit_mw) {
    ENTER_SETTER(true);
    return set_limit(sim, gpu, limit_mw);
}

NVML_API nvml_return nvmlDeviceSetPowerManagementLimit_v2(nvml_device device, const nvml_power_value_v2 *value) {
    ENTER_SETTER(true);
    if (!value) return NV_INVALID_ARGUMENT;
    if (value->version != NV_STRUCT_VERSION(nvml_power_value_v2, 2)) return NV_ARGUMENT_VERSION_MISMATCH;
    if ((value->powerScope & 0xff) != 0) return NV_NOT_SUPPORTED;
    return set_limit(sim, gpu, value->powerValueMw);
}

static nvml_return install_lock(struct sim *sim, struct sim_gpu *gpu, uint32_t min_mhz, uint32_t max_mhz) {
    sim_pay(sim, gpu, COST_CLOCKS);
    if (gpu->lost) return NV_GPU_IS_LOST;
    hold(sim, gpu);
    uint64_t settle = (uint64_t)(sim->node->config.model.settle_s * 1e9);
    if (gpu->t_ns >= gpu->lock_at_ns) gpu->lock_before = gpu->lock;
    gpu->lock = (struct sim_setting){min_mhz, max_mhz};
    gpu->lock_at_ns = gpu->t_ns + settle;
    let_go(sim, gpu);
    return NV_SUCCESS;
}

NVML_API nvml_return nvmlDeviceSetGpuLockedClocks(nvml_device device, unsigned int min_mhz, unsigned int max_mhz) {
    ENTER_SETTER(true);
    bool low = min_mhz >= NV_LIMIT_ID_START, high = max_mhz >= NV_LIMIT_ID_START;
    if (low != high) return NV_INVALID_ARGUMENT;
    if (low) {
        /* TDP: the rated clock, modelled as the top one; both UNLIMITED is a reset. */
        if (min_mhz > NV_LIMIT_ID_UNLIMITED || max_mhz > NV_LIMIT_ID_UNLIMITED || min_mhz == NV_LIMIT_ID_START || max_mhz == NV_LIMIT_ID_START)
            return NV_INVALID_ARGUMENT;
        if (min_mhz == NV_LIMIT_ID_UNLIMITED && max_mhz == NV_LIMIT_ID_UNLIMITED) return install_lock(sim, gpu, 0, 0);
        return install_lock(sim, gpu, min_mhz == NV_LIMIT_ID_TDP ? model->clock_max_mhz : model->clock_min_mhz, model->clock_max_mhz);
    }
    if (min_mhz > max_mhz) return NV_INVALID_ARGUMENT;
    return install_lock(sim, gpu, sim_snap_clock(model, min_mhz), sim_snap_clock(model, max_mhz));
}

NVML_API nvml_return nvmlDeviceResetGpuLockedClocks(nvml_device device) {
    ENTER_SETTER(true);
    return install_lock(sim, gpu, 0, 0);
}

static uint32_t nearest_memory_clock(const struct sim_model *model, uint32_t mhz) {
    uint32_t best = model->memory_clock_mhz[0];
    for (uint32_t i = 1; i < model->memory_clock_count; i++) {
        uint32_t clock = model->memory_clock_mhz[i];
        uint32_t far = best > mhz ? best - mhz : mhz - best, near = clock > mhz ? clock - mhz : mhz - clock;
        if (near < far) best = clock;
    }
    return best;
}

static nvml_return install_memory_lock(struct sim *sim, struct sim_gpu *gpu, uint32_t min_mhz, uint32_t max_mhz) {
    sim_pay(sim, gpu, COST_CLOCKS);
    if (gpu->lost) return NV_GPU_IS_LOST;
    hold(sim, gpu);
    gpu->memory_lock = (struct sim_setting){min_mhz, max_mhz};
    let_go(sim, gpu);
    return NV_SUCCESS;
}

NVML_API nvml_return nvmlDeviceSetMemoryLockedClocks(nvml_device device, unsigned int min_mhz, unsigned int max_mhz) {
    ENTER_SETTER_IF(memory_lock_supported);
    if (min_mhz > max_mhz) return NV_INVALID_ARGUMENT;
    return install_memory_lock(sim, gpu, nearest_memory_clock(model, min_mhz), nearest_memory_clock(model, max_mhz));
}

NVML_API nvml_return nvmlDeviceResetMemoryLockedClocks(nvml_device device) {
    ENTER_SETTER_IF(memory_lock_supported);
    return install_memory_lock(sim, gpu, 0, 0);
}

NVML_API nvml_return nvmlDeviceSetPersistenceMode(nvml_device device, unsigned int mode) {
    ENTER_SETTER(true);
    if (mode > 1) return NV_INVALID_ARGUMENT;
    hold(sim, gpu);
    gpu->persistence = mode;
    let_go(sim, gpu);
    return NV_SUCCESS;
}

NVML_API nvml_return nvmlDeviceSetComputeMode(nvml_device device, unsigned int mode) {
    ENTER_SETTER(true);
    if (mode > 3 || mode == 1) return NV_INVALID_ARGUMENT;
    hold(sim, gpu);
    gpu->compute_mode = mode;
    let_go(sim, gpu);
    return NV_SUCCESS;
}

NVML_API nvml_return nvmlDeviceSetMigMode(nvml_device device, unsigned int mode, nvml_return *status) {
    ENTER_SETTER_IF(mig_supported);
    if (mode > 1 || !status) return NV_INVALID_ARGUMENT;
    hold(sim, gpu);
    bool busy = false;
    for (int i = 0; i < SIM_MAX_WORK; i++) busy |= gpu->work[i].used != 0;
    *status = busy ? NV_IN_USE : NV_SUCCESS;
    if (!busy) gpu->mig = mode;
    let_go(sim, gpu);
    return NV_SUCCESS;
}

NVML_API nvml_return nvmlDeviceSetEccMode(nvml_device device, unsigned int mode) {
    ENTER_SETTER(true);
    return mode > 1 ? NV_INVALID_ARGUMENT : NV_SUCCESS; /* pending until a reboot, which does not come */
}

NVML_API nvml_return nvmlDeviceClearEccErrorCounts(nvml_device device, unsigned int counter) {
    ENTER_SETTER(true);
    return counter > 1 ? NV_INVALID_ARGUMENT : NV_SUCCESS;
}
