/* Work on simulated GPUs: it progresses at the simulated clock, and whoever waits for it wakes at its exact end.
 *
 * House rules: (1) the end is found by running the physics ahead on a copy, so waiting and history always agree;
 * (2) anything that changes a GPU wakes its waiters, who look again; (3) work of a dead process disappears.
 */
#define _GNU_SOURCE
#include "sim.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define LOOK_FOR_DEAD_NS 100000000ull /* real time between looks for work whose process died */
#define HORIZON_NS (120 * SIM_SECOND)

void sim_changed(struct sim_node *node, struct sim_gpu *gpu) {
    sim_futex_wake(&gpu->change_word);
    if (node->config.mode != SIM_STEPPED) return;
    for (int i = 0; i < SIM_MAX_WORK; i++)
        if (gpu->work[i].used && gpu->work[i].slot >= 0) sim_wake_slot(node, gpu->work[i].slot);
}

/* Brings a GPU up to now. Under load from many readers the last millisecond is not recomputed. */
void sim_refresh(struct sim *sim, struct sim_gpu *gpu) {
    uint64_t now = sim_now(sim->node), at = __atomic_load_n(&gpu->t_ns, __ATOMIC_ACQUIRE);
    if (now <= at || (sim->node->config.mode != SIM_STEPPED && now - at < 1000000)) return;
    sim_lock(&gpu->mutex);
    sim_advance_gpu(sim->node, gpu, now);
    uint64_t real = sim_real_ns();
    if (real - gpu->looked_real_ns > LOOK_FOR_DEAD_NS) {
        gpu->looked_real_ns = real;
        sim_drop_dead_work(sim, gpu);
    }
    sim_unlock(&gpu->mutex);
}

SIM_API int powerd_sim_kernel_index(struct sim *sim, const char *name) {
    for (uint32_t i = 0; i < sim->node->config.kernels; i++)
        if (strcmp(sim->node->kernels[i].name, name) == 0) return (int)i;
    return -1;
}

/* A process opens a context on a GPU: it holds memory, appears in process lists, and keeps settings alive. */
SIM_API int powerd_sim_work_open(struct sim *sim, int index, const char *name, uint64_t memory) {
    int proc = sim_proc_claim(sim), found = -1;
    if (proc < 0 || index < 0 || (uint32_t)index >= sim->node->config.gpus) return -1;
    sim_lifetime_open(sim);
    struct sim_gpu *gpu = &sim->node->gpus[index];
    sim_lock(&gpu->mutex);
    sim_advance_gpu(sim->node, gpu, sim_now(sim->node));
    sim_drop_dead_work(sim, gpu);
    for (int i = 0; i < SIM_MAX_WORK && found < 0; i++)
        if (!gpu->work[i].used) found = i;
    if (found >= 0) {
        struct sim_work *work = &gpu->work[found];
        memset(work, 0, sizeof *work);
        work->proc = (uint32_t)proc;
        work->pid = (uint32_t)getpid();
        work->memory = memory;
        work->slot = -1;
        snprintf(work->name, sizeof work->name, "%s", name);
        work->used = 1;
        sim_changed(sim->node, gpu);
    }
    sim_unlock(&gpu->mutex);
    if (found < 0) sim_lifetime_close(sim);
    return found;
}

SIM_API void powerd_sim_work_close(struct sim *sim, int index, int row) {
    struct sim_gpu *gpu = &sim->node->gpus[index];
    sim_lock(&gpu->mutex);
    sim_advance_gpu(sim->node, gpu, sim_now(sim->node));
    gpu->work[row].used = 0;
    sim_changed(sim->node, gpu);
    sim_unlock(&gpu->mutex);
    sim_lifetime_close(sim);
}

/* Starts a queue of kernels, a steady load or a blocked wait on an open context; returns 0 or an NVML code, and in
 * begin_ns when the GPU began. */
SIM_API int powerd_sim_work_submit(struct sim *sim, int index, int row, uint32_t state, const struct sim_item *items,
                                   uint32_t count, double activity, uint32_t kernel, uint64_t duration_ns, uint64_t *begin_ns) {
    struct sim_gpu *gpu = &sim->node->gpus[index];
    struct sim_work *work = &gpu->work[row];
    if (count > SIM_MAX_QUEUE || kernel >= sim->node->config.kernels) return NV_INVALID_ARGUMENT;
    for (uint32_t i = 0; i < count; i++)
        if (items[i].kernel >= sim->node->config.kernels || !(items[i].units >= 0)) return NV_INVALID_ARGUMENT;
    if (gpu->lost) return NV_GPU_IS_LOST;
    sim_lock(&gpu->mutex);
    sim_advance_gpu(sim->node, gpu, sim_now(sim->node));
    work->start_energy_j = work->end_energy_j = gpu->energy_j;
    work->finished_ns = *begin_ns = gpu->t_ns;
    work->length = state == WORK_RUN ? count : 0;
    work->position = 0;
    if (state == WORK_RUN) {
        memcpy(work->queue, items, count * sizeof *items);
        if (count) work->left = items[0].units;
    }
    work->activity = activity;
    work->kernel = kernel;
    work->until_ns = gpu->t_ns + duration_ns;
    work->state = state == WORK_RUN && count == 0 ? WORK_CONTEXT : state;
    sim_changed(sim->node, gpu);
    sim_unlock(&gpu->mutex);
    return 0;
}

/* Keeps the GPU busy so that it draws `power_w` at the clock of this moment; with the clock it follows the kernel's shape. */
SIM_API int powerd_sim_work_declare(struct sim *sim, int index, int row, uint32_t kernel, double power_w, uint64_t duration_ns) {
    struct sim_gpu *gpu = &sim->node->gpus[index];
    if (kernel >= sim->node->config.kernels || !(power_w >= 0)) return NV_INVALID_ARGUMENT;
    sim_lock(&gpu->mutex);
    sim_advance_gpu(sim->node, gpu, sim_now(sim->node));
    double share = sim_share_of(sim->node, &sim->node->kernels[kernel], gpu->clock_mhz, power_w);
    sim_unlock(&gpu->mutex);
    uint64_t begin_ns;
    return powerd_sim_work_submit(sim, index, row, WORK_LOAD, NULL, 0, share, kernel, duration_ns, &begin_ns);
}

static __thread struct sim_gpu *ahead;

static uint64_t predict_end(struct sim_node *node, struct sim_gpu *gpu, int row) {
    if (!ahead) ahead = malloc(sizeof *ahead);
    memcpy(ahead, gpu, sizeof *ahead);
    for (uint64_t span = 50000000; span < HORIZON_NS; span *= 2) {
        sim_advance_gpu(node, ahead, gpu->t_ns + span);
        if (ahead->work[row].state == WORK_CONTEXT) return ahead->work[row].finished_ns;
    }
    return gpu->t_ns + HORIZON_NS / 2;
}

/* Waits for the end of what was submitted; 0 done, 1 not yet (max_real_ms passed), else an NVML code.
 * out: when the GPU ended, and the energy of the whole GPU since it began. */
SIM_API int powerd_sim_work_wait(struct sim *sim, int index, int row, int max_real_ms, uint64_t *end_ns, double *energy_j) {
    struct sim_node *node = sim->node;
    struct sim_gpu *gpu = &node->gpus[index];
    struct sim_work *work = &gpu->work[row];
    bool stepped = node->config.mode == SIM_STEPPED;
    int own = stepped ? sim_thread_slot(sim) : -1, slot = stepped ? sim_slot_join(sim, "work") : -1, ret = 1;
    uint64_t give_up = sim_real_ns() + (uint64_t)max_real_ms * 1000000ull;
    sim_slot_set_aside(sim, own, true);
    for (;;) {
        sim_lock(&gpu->mutex);
        work->slot = slot;
        uint64_t now = sim_now(node);
        sim_advance_gpu(node, gpu, now);
        uint32_t seen = __atomic_load_n(&gpu->change_word, __ATOMIC_SEQ_CST);
        bool done = work->state == WORK_CONTEXT;
        uint64_t end = done ? work->finished_ns : predict_end(node, gpu, row);
        if (done) {
            *end_ns = work->finished_ns;
            *energy_j = work->end_energy_j - work->start_energy_j;
        }
        sim_unlock(&gpu->mutex);
        uint64_t real = sim_real_ns();
        if (gpu->lost) ret = NV_GPU_IS_LOST;
        else if (done) ret = 0;
        else if (real < give_up) {
            int left_ms = (int)((give_up - real) / 1000000ull) + 1;
            if (stepped) sim_wait_slot(sim, slot, end, left_ms, false);
            else if (end > now) {
                uint64_t nap = sim_real_for(node, end - now) + 1000, most = give_up - real;
                sim_futex_wait(&gpu->change_word, seen, nap < most ? nap : most);
            }
            continue;
        }
        break;
    }
    sim_lock(&gpu->mutex);
    work->slot = -1;
    sim_unlock(&gpu->mutex);
    sim_slot_set_aside(sim, own, false);
    if (slot >= 0) sim_slot_leave(sim, slot);
    return ret;
}
