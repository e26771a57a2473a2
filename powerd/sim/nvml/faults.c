/* The door of every NVML call: faults that are switched on, permission, and what the call costs.
 *
 * House rules: (1) checks run in one order: uninitialised, bad handle, lost, not supported, permission, range;
 * (2) a hang waits without holding any lock of ours; (3) costs are simulated time and scale along with it.
 */
#define _GNU_SOURCE
#include "sim.h"
#include <fnmatch.h>
#include <linux/capability.h>
#include <math.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define DEBT_NS 60000 /* shorter costs are saved up: a real sleep of 5 us takes 60 */

static __thread int64_t debt_ns;

static uint64_t draw_cost(struct sim_node *node, enum sim_cost cost) {
    uint64_t call = __atomic_fetch_add(&node->calls, 1, __ATOMIC_RELAXED);
    uint64_t key = sim_hash(node->config.seed, call, 21);
    double ms = 0.0;
    switch (cost) {
    case COST_NONE: return 0;
    case COST_CACHED: ms = 0.005; break;
    case COST_SENSOR: ms = sim_uniform(key) < 0.01 ? 3.0 * exp(0.4 * sim_gauss(sim_hash(key, 1, 1))) : 0.15; break;
    case COST_PROCESSES: ms = 1.5 * exp(0.3 * sim_gauss(key)); break;
    case COST_PCIE: ms = 20.0; break;
    case COST_LIMIT: ms = 5.0 * exp(0.1 * sim_gauss(key)); break;
    case COST_CLOCKS: ms = 4.5 * exp(0.456 * sim_gauss(key)); break; /* p50 4.5, p99 13 */
    }
    return (uint64_t)(ms * 1e6 * node->config.latency);
}

void sim_pay(struct sim *sim, struct sim_gpu *gpu, enum sim_cost cost) {
    struct sim_node *node = sim->node;
    uint64_t price = draw_cost(node, cost);
    if (price == 0) return;
    uint64_t now = sim_now(node);
    if (cost == COST_LIMIT || cost == COST_CLOCKS) {
        /* Setters of a node queue up behind one driver lock. Simulated as a booking, so nobody can die holding it. */
        if (node->config.mode == SIM_STEPPED && sim_thread_slot(sim) < 0) return;
        uint64_t free_ns = __atomic_load_n(&node->rm_free_ns, __ATOMIC_RELAXED), end;
        do end = (free_ns > now ? free_ns : now) + price;
        while (!__atomic_compare_exchange_n(&node->rm_free_ns, &free_ns, end, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
        sim_sleep_until(sim, end);
        return;
    }
    (void)gpu;
    debt_ns += (int64_t)price;
    if (node->config.mode != SIM_STEPPED && (int64_t)sim_real_for(node, (uint64_t)debt_ns) < DEBT_NS) return;
    uint64_t owed = (uint64_t)debt_ns;
    debt_ns = 0;
    sim_sleep_until(sim, now + owed);
    if (node->config.mode != SIM_STEPPED) {
        int64_t late = (int64_t)(sim_now(node) - now) - (int64_t)owed;
        debt_ns = late > 0 && late < 1000000 ? -late : 0;
    }
}

static void hang_while(struct sim *sim, const uint32_t *flag) {
    int slot = sim_thread_slot(sim);
    while (__atomic_load_n(flag, __ATOMIC_ACQUIRE)) {
        if (sim->node->config.mode == SIM_STEPPED && slot >= 0) sim_wait_slot(sim, slot, UINT64_MAX, 50, true);
        else {
            uint32_t seen = __atomic_load_n(&sim->node->hang_word, __ATOMIC_SEQ_CST);
            if (__atomic_load_n(flag, __ATOMIC_ACQUIRE)) sim_futex_wait(&sim->node->hang_word, seen, SIM_SECOND);
        }
    }
}

/* Runs the rules that match; returns the code of the first that fires, or -1 to go on. */
static int apply_rules(struct sim *sim, const char *function, int gpu) {
    struct sim_node *node = sim->node;
    if (!__atomic_load_n(&node->rule_count, __ATOMIC_ACQUIRE)) return -1;
    uint64_t delay = 0;
    int ret = -1;
    sim_lock(&node->mutex);
    for (int i = 0; i < SIM_MAX_RULES && ret < 0; i++) {
        struct sim_rule *row = &node->rules[i];
        if (!row->used || (row->rule.gpu >= 0 && row->rule.gpu != gpu) || fnmatch(row->rule.glob, function, 0) != 0) continue;
        row->seen++;
        if (row->seen <= row->rule.skip) continue;
        if (row->rule.count >= 0 && row->fired >= (uint64_t)row->rule.count) continue;
        if (row->rule.probability < 1.0 &&
            sim_uniform(sim_hash(node->config.seed, (uint64_t)i + 900, row->seen)) >= row->rule.probability) continue;
        row->fired++;
        delay += row->rule.delay_ns;
        ret = row->rule.ret;
    }
    sim_unlock(&node->mutex);
    if (delay) sim_sleep_until(sim, sim_now(node) + delay);
    return ret;
}

nvml_return sim_enter(const char *function, struct sim **out, enum sim_cost cost) {
    struct sim *sim = sim_current();
    if (!sim || !sim_initialised()) return NV_UNINITIALIZED;
    *out = sim;
    int ret = apply_rules(sim, function, -1);
    if (ret >= 0) return ret;
    sim_pay(sim, NULL, cost);
    return NV_SUCCESS;
}

static nvml_return enter_device(const char *function, nvml_device device, struct sim **out, struct sim_gpu **gpu) {
    struct sim *sim = sim_current();
    if (!sim || !sim_initialised()) return NV_UNINITIALIZED;
    *out = sim;
    *gpu = sim_from_handle(sim, device);
    if (!*gpu) return NV_INVALID_ARGUMENT;
    hang_while(sim, &(*gpu)->hung);
    if ((*gpu)->lost || sim_init_generation() != sim->node->generation) return NV_GPU_IS_LOST;
    int ret = apply_rules(sim, function, (int)(*gpu)->index);
    return ret >= 0 ? ret : NV_SUCCESS;
}

nvml_return sim_enter_gpu(const char *function, nvml_device device, struct sim **sim, struct sim_gpu **gpu, enum sim_cost cost) {
    nvml_return ret = enter_device(function, device, sim, gpu);
    if (ret == NV_SUCCESS) sim_pay(*sim, *gpu, cost);
    return ret;
}

/* What SIM_PERM_ROOT asks for: root, or the capability that a service is given instead. */
static bool may_administer(void) {
    if (geteuid() == 0) return true;
    struct __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
    struct __user_cap_data_struct data[2] = {{0}};
    if (syscall(SYS_capget, &header, data) != 0) return false;
    return data[0].effective >> CAP_SYS_ADMIN & 1;
}

nvml_return sim_enter_setter(const char *function, nvml_device device, struct sim **sim, struct sim_gpu **gpu, bool supported) {
    nvml_return ret = enter_device(function, device, sim, gpu);
    if (ret != NV_SUCCESS) return ret;
    if (!supported) return NV_NOT_SUPPORTED;
    uint32_t perm = (*sim)->node->config.perm;
    if (perm == SIM_PERM_NONE || (perm == SIM_PERM_ROOT && !may_administer())) return NV_NO_PERMISSION;
    hang_while(*sim, &(*sim)->node->rm_hung);
    return NV_SUCCESS;
}

void sim_raise_xid(struct sim *sim, struct sim_gpu *gpu, uint32_t xid) {
    gpu->last_xid = xid;
    __atomic_fetch_add(&gpu->xid_count, 1, __ATOMIC_SEQ_CST);
    sim_futex_wake(&sim->node->xid_word);
}
