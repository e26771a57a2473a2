/* What people and tests do to a simulated node from outside: look at the truth, switch faults, move things.
 *
 * House rules: (1) nothing here is reachable through NVML, and product code never calls it; (2) every change brings
 * the physics up to now first; (3) a change that moves running work wakes whoever waits for it.
 */
#include "sim.h"
#include <stdio.h>
#include <string.h>

uint32_t powerd_sim_memory_clock(const struct sim_model *model, const struct sim_gpu *gpu);

SIM_API uint64_t powerd_sim_now_at(struct sim *sim) { return sim_now(sim->node); }

SIM_API uint64_t powerd_sim_sizeof(int what) {
    switch (what) {
    case 0: return sizeof(struct sim_config);
    case 1: return sizeof(struct sim_model);
    case 2: return sizeof(struct sim_kernel);
    case 3: return sizeof(struct sim_fault_rule);
    case 4: return sizeof(struct sim_view);
    case 5: return sizeof(struct sim_item);
    default: return 0;
    }
}

SIM_API void powerd_sim_config_at(struct sim *sim, struct sim_config *out) { *out = sim->node->config; }

static struct sim_gpu *hold(struct sim *sim, int index) {
    if (index < 0 || (uint32_t)index >= sim->node->config.gpus) return NULL;
    struct sim_gpu *gpu = &sim->node->gpus[index];
    sim_lock(&gpu->mutex);
    sim_advance_gpu(sim->node, gpu, sim_now(sim->node));
    return gpu;
}

SIM_API double powerd_sim_true_energy_mj_at(struct sim *sim, int index) {
    struct sim_gpu *gpu = hold(sim, index);
    if (!gpu) return -1.0;
    double energy = gpu->energy_j * 1000.0;
    sim_unlock(&gpu->mutex);
    return energy;
}

SIM_API double powerd_sim_true_energy_mj(int index) {
    struct sim *sim = sim_current();
    return sim ? powerd_sim_true_energy_mj_at(sim, index) : -1.0;
}

void sim_uuid(const struct sim_node *node, uint32_t index, char out[SIM_NAME]) {
    uint64_t a = sim_hash(node->config.seed, index, 31), b = sim_hash(node->config.seed, index, 32);
    snprintf(out, SIM_NAME, "GPU-%08x-%04x-%04x-%04x-%012llx", (uint32_t)a, (uint32_t)(a >> 32) & 0xffff,
             (uint32_t)(a >> 48), (uint32_t)b & 0xffff, (unsigned long long)(b >> 16));
}

SIM_API int powerd_sim_view_at(struct sim *sim, int index, struct sim_view *out) {
    sim_settle_clients(sim);
    struct sim_gpu *gpu = hold(sim, index);
    if (!gpu) return NV_NOT_FOUND;
    sim_drop_dead_work(sim, gpu);
    const struct sim_model *model = &sim->node->config.model;
    memset(out, 0, sizeof *out);
    sim_uuid(sim->node, gpu->index, out->uuid);
    out->now_ns = gpu->t_ns;
    out->true_energy_uj = (uint64_t)(gpu->energy_j * 1e6);
    out->counter_mj = gpu->counter_mj;
    out->power_w = gpu->power_w;
    out->clock_mhz = gpu->clock_mhz;
    out->temperature_c = gpu->temperature_c;
    out->lock_min_mhz = gpu->lock.min_mhz;
    out->lock_max_mhz = gpu->lock.max_mhz;
    out->memory_lock_min_mhz = gpu->memory_lock.min_mhz;
    out->memory_lock_max_mhz = gpu->memory_lock.max_mhz;
    out->limit_mw = gpu->limit_mw;
    out->enforced_mw = sim_enforced_mw(gpu);
    out->default_limit_mw = model->limit_default_mw;
    out->out_of_band_mw = gpu->out_of_band_mw;
    out->reasons = gpu->reasons;
    out->persistence = gpu->persistence;
    out->mig = gpu->mig;
    out->lost = gpu->lost;
    out->hung = gpu->hung;
    out->frozen = gpu->frozen;
    out->xid_count = gpu->xid_count;
    out->last_xid = gpu->last_xid;
    out->utilization = gpu->utilization;
    out->memory_clock_mhz = powerd_sim_memory_clock(model, gpu);
    out->capped = gpu->cap_engaged;
    out->setter_calls = gpu->setter_calls;
    for (int i = 0; i < SIM_MAX_WORK; i++)
        if (gpu->work[i].used) {
            out->processes++;
            out->busy |= gpu->work[i].state != WORK_CONTEXT;
            out->memory_used += gpu->work[i].memory;
        }
    sim_unlock(&gpu->mutex);
    return 0;
}

SIM_API int powerd_sim_rule_add(struct sim *sim, const struct sim_fault_rule *rule) {
    int found = -1;
    sim_lock(&sim->node->mutex);
    for (int i = 0; i < SIM_MAX_RULES && found < 0; i++)
        if (!sim->node->rules[i].used) found = i;
    if (found >= 0) {
        sim->node->rules[found] = (struct sim_rule){.rule = *rule, .used = 1};
        sim->node->rule_count++;
    }
    sim_unlock(&sim->node->mutex);
    return found;
}

SIM_API uint64_t powerd_sim_rule_fired(struct sim *sim, int row) {
    return row >= 0 && row < SIM_MAX_RULES ? sim->node->rules[row].fired : 0;
}

SIM_API void powerd_sim_rules_clear(struct sim *sim) {
    sim_lock(&sim->node->mutex);
    memset(sim->node->rules, 0, sizeof sim->node->rules);
    sim->node->rule_count = 0;
    sim_unlock(&sim->node->mutex);
}

/* Keep in step with powerd/sim/faults.py. */
enum knob {
    KNOB_LOST, KNOB_HUNG, KNOB_FROZEN, KNOB_BRAKE, KNOB_HW_THERMAL, KNOB_SW_THERMAL, KNOB_OUT_OF_BAND_MW, KNOB_LIMIT_MW,
    KNOB_XID, KNOB_COUNTER_RESET, KNOB_PERSISTENCE, KNOB_MIG, KNOB_HEAT_C, KNOB_RESET, KNOB_MEMORY_LOCK
};

SIM_API int powerd_sim_set(struct sim *sim, int index, int knob, int64_t value) {
    struct sim_gpu *gpu = hold(sim, index);
    if (!gpu) return NV_NOT_FOUND;
    uint32_t number = (uint32_t)value;
    switch (knob) {
    case KNOB_LOST:
        gpu->lost = number != 0;
        if (number) sim_raise_xid(sim, gpu, 79);
        break;
    case KNOB_HUNG: __atomic_store_n(&gpu->hung, number != 0, __ATOMIC_RELEASE); break;
    case KNOB_FROZEN:
        gpu->frozen = number != 0;
        gpu->frozen_clock = sim_snap_clock(&sim->node->config.model, gpu->clock_mhz);
        gpu->frozen_temperature = (uint32_t)(gpu->temperature_c + 0.5);
        break;
    case KNOB_BRAKE: gpu->brake = number != 0; break;
    case KNOB_HW_THERMAL: gpu->hw_thermal = number != 0; break;
    case KNOB_SW_THERMAL: gpu->sw_thermal = number != 0; break;
    case KNOB_OUT_OF_BAND_MW: gpu->out_of_band_mw = number ? number : UINT32_MAX; break;
    case KNOB_LIMIT_MW: gpu->limit_mw = number; break;
    case KNOB_XID: sim_raise_xid(sim, gpu, number); break;
    case KNOB_COUNTER_RESET:
        gpu->counter_base_j = gpu->energy_j;
        gpu->counter_offset_j = 0.0;
        __atomic_store_n(&gpu->counter_mj, 0, __ATOMIC_RELEASE);
        break;
    case KNOB_PERSISTENCE: gpu->persistence = number != 0; break;
    case KNOB_MIG: gpu->mig = number != 0; break;
    case KNOB_HEAT_C: gpu->ambient_shift_c = (double)value; break;
    case KNOB_RESET: sim_gpu_defaults(sim->node, gpu); break;
    case KNOB_MEMORY_LOCK: gpu->memory_lock = (struct sim_setting){number, number}; break;
    default: sim_unlock(&gpu->mutex); return NV_INVALID_ARGUMENT;
    }
    sim_changed(sim->node, gpu);
    sim_unlock(&gpu->mutex);
    sim_futex_wake(&sim->node->hang_word);
    return 0;
}

/* A foreign writer: somebody else's locked clocks, without permission checks or cost. */
SIM_API int powerd_sim_set_lock(struct sim *sim, int index, uint32_t min_mhz, uint32_t max_mhz) {
    struct sim_gpu *gpu = hold(sim, index);
    if (!gpu) return NV_NOT_FOUND;
    gpu->lock = gpu->lock_before = (struct sim_setting){min_mhz, max_mhz};
    gpu->lock_at_ns = 0;
    sim_changed(sim->node, gpu);
    sim_unlock(&gpu->mutex);
    return 0;
}

enum node_knob { NODE_RM_HUNG, NODE_PERM, NODE_LATENCY_PPM };

SIM_API int powerd_sim_set_node(struct sim *sim, int knob, int64_t value) {
    switch (knob) {
    case NODE_RM_HUNG: __atomic_store_n(&sim->node->rm_hung, (uint32_t)(value != 0), __ATOMIC_RELEASE); break;
    case NODE_PERM: sim->node->config.perm = (uint32_t)value; break;
    case NODE_LATENCY_PPM: sim->node->config.latency = (double)value / 1e6; break;
    default: return NV_INVALID_ARGUMENT;
    }
    sim_futex_wake(&sim->node->hang_word);
    return 0;
}

/* The driver is reloaded: settings and counters start anew, open handles are lost. An upgrade also changes the
 * version, so that a process that loaded the library before gets LIB_RM_VERSION_MISMATCH at its next init. */
SIM_API void powerd_sim_reload(struct sim *sim, const char *version) {
    struct sim_node *node = sim->node;
    for (uint32_t g = 0; g < node->config.gpus; g++) {
        powerd_sim_set(sim, (int)g, KNOB_RESET, 0);
        powerd_sim_set(sim, (int)g, KNOB_COUNTER_RESET, 0);
        powerd_sim_set(sim, (int)g, KNOB_MIG, 0);
    }
    sim_lock(&node->mutex);
    node->generation++;
    if (version && *version) {
        snprintf(node->driver_version, SIM_NAME, "%s", version);
        node->upgrades++;
    }
    sim_unlock(&node->mutex);
}
