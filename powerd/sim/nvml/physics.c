/* What a simulated GPU does with time: clocks, power, heat, energy, work, and what its sensors make of that.
 *
 * House rules: (1) pure functions of (node constants, GPU state, time): no clock, no locking, no I/O; (2) time passes
 * in steps that end at every event, so that results do not depend on who looks when; (3) truth and readings are kept
 * apart: noise, windows and refresh periods touch readings only.
 */
#include "sim.h"
#include <math.h>
#include <string.h>

#define LONG_IDLE_NS (120 * SIM_SECOND)

uint64_t sim_hash(uint64_t a, uint64_t b, uint64_t c) {
    uint64_t x = a * 0x9e3779b97f4a7c15ull ^ (b + 0x632be59bd9b4e019ull) * 0xbf58476d1ce4e5b9ull ^ (c + 1) * 0x94d049bb133111ebull;
    for (int i = 0; i < 2; i++) {
        x ^= x >> 31;
        x *= 0xd6e8feb86659fd93ull;
        x ^= x >> 29;
    }
    return x;
}

double sim_uniform(uint64_t key) { return ((double)(key >> 11) + 0.5) / 9007199254740992.0; }

double sim_gauss(uint64_t key) {
    return sqrt(-2.0 * log(sim_uniform(key))) * cos(6.283185307179586 * sim_uniform(sim_hash(key, 3, 5)));
}

double sim_table(const struct sim_kernel *kernel, const double *column, double clock_mhz) {
    uint32_t n = kernel->points, low = 0, high = n;
    if (n == 0) return 0.0;
    if (clock_mhz <= kernel->clock_mhz[0]) return column[0];
    if (clock_mhz >= kernel->clock_mhz[n - 1]) return column[n - 1];
    while (high - low > 1) {
        uint32_t middle = (low + high) / 2;
        if (kernel->clock_mhz[middle] <= clock_mhz) low = middle;
        else high = middle;
    }
    double share = (clock_mhz - kernel->clock_mhz[low]) / (kernel->clock_mhz[low + 1] - kernel->clock_mhz[low]);
    return column[low] + share * (column[low + 1] - column[low]);
}

SIM_API double powerd_sim_kernel_rate(const struct sim_kernel *kernel, double clock_mhz) {
    return sim_table(kernel, kernel->units_per_s, clock_mhz);
}

SIM_API double powerd_sim_kernel_power(const struct sim_kernel *kernel, double clock_mhz) {
    return sim_table(kernel, kernel->power_w, clock_mhz);
}

uint32_t sim_snap_clock(const struct sim_model *model, double clock_mhz) {
    double steps = floor((clock_mhz - model->clock_min_mhz) / model->clock_step_mhz + 0.5);
    double most = (model->clock_max_mhz - model->clock_min_mhz) / model->clock_step_mhz;
    if (steps < 0) steps = 0;
    if (steps > most) steps = most;
    return model->clock_min_mhz + (uint32_t)steps * model->clock_step_mhz;
}

uint32_t sim_enforced_mw(const struct sim_gpu *gpu) {
    return gpu->limit_mw < gpu->out_of_band_mw ? gpu->limit_mw : gpu->out_of_band_mw;
}

static uint32_t memory_clock(const struct sim_model *model, const struct sim_gpu *gpu) {
    uint32_t best = model->memory_clock_mhz[0];
    if (!gpu->memory_lock.max_mhz) return best;
    for (uint32_t i = 0; i < model->memory_clock_count; i++)
        if (model->memory_clock_mhz[i] <= gpu->memory_lock.max_mhz) return model->memory_clock_mhz[i];
    return model->memory_clock_mhz[model->memory_clock_count - 1];
}

SIM_API uint32_t powerd_sim_memory_clock(const struct sim_model *model, const struct sim_gpu *gpu) { return memory_clock(model, gpu); }

/* Power of a GPU that holds contexts but computes nothing: part of it follows the clock (P ~ x V^2). */
static double context_power(const struct sim_model *model, double clock_mhz, double top_w) {
    double x = clock_mhz / model->clock_max_mhz, knee = model->voltage_knee, v = model->voltage_floor;
    if (x > knee) v += (1.0 - v) * (x - knee) / (1.0 - knee);
    return model->idle_w + (top_w - model->idle_w) * (0.3 + 0.7 * x * v * v);
}

/* The share of a kernel at which a GPU draws so many watts at a clock; above 1 when it draws more than the kernel would. */
double sim_share_of(const struct sim_node *node, const struct sim_kernel *kernel, double clock_mhz, double power_w) {
    double idle = context_power(&node->config.model, clock_mhz, node->config.model.context_idle_w);
    double full = sim_table(kernel, kernel->power_w, clock_mhz);
    return power_w > idle && full > idle ? (power_w - idle) / (full - idle) : 0.0;
}

struct moment {
    double power_w, busy, memory_busy;
    int running, loads, blocked, contexts;
    double slow; /* of memory-bound work under a memory lock */
};

static struct moment look(const struct sim_node *node, const struct sim_gpu *gpu, double clock_mhz) {
    const struct sim_model *model = &node->config.model;
    struct moment m = {0};
    double power = 0.0;
    m.slow = (double)memory_clock(model, gpu) / model->memory_clock_mhz[0];
    for (int i = 0; i < SIM_MAX_WORK; i++) {
        const struct sim_work *work = &gpu->work[i];
        if (!work->used) continue;
        if (work->state == WORK_RUN) m.running++;
        else if (work->state == WORK_LOAD) m.loads++;
        else if (work->state == WORK_BLOCKED) m.blocked++;
        else m.contexts++;
    }
    int sharing = m.running + m.loads;
    double idle = context_power(model, clock_mhz, model->context_idle_w);
    for (int i = 0; i < SIM_MAX_WORK && sharing; i++) {
        const struct sim_work *work = &gpu->work[i];
        if (!work->used || (work->state != WORK_RUN && work->state != WORK_LOAD)) continue;
        const struct sim_kernel *kernel = &node->kernels[work->state == WORK_RUN ? work->queue[work->position].kernel : work->kernel];
        double activity = work->state == WORK_RUN ? 1.0 : work->activity;
        double full = sim_table(kernel, kernel->power_w, clock_mhz);
        full -= kernel->memory_share * (1.0 - m.slow) * 0.3 * full;
        power += (idle + activity * (full - idle)) / sharing;
        if (activity > 1.0) activity = 1.0; /* of declared power, which may be above the kernel's */
        m.busy += activity / sharing;
        m.memory_busy += activity * kernel->memory_share / sharing;
    }
    if (!sharing) {
        if (m.blocked) power = context_power(model, clock_mhz, model->blocked_w);
        else if (m.contexts) power = idle;
        else power = gpu->lock.min_mhz ? context_power(model, clock_mhz, model->context_idle_w) : model->idle_w;
        if (m.blocked) m.busy = 1.0;
    }
    /* Tables hold power at the steady temperature of that power: leakage is the departure from it. */
    double steady_c = model->ambient_c + model->thermal_c_per_w * power;
    m.power_w = power + model->leak_w_per_c * (gpu->temperature_c - steady_c);
    if (m.power_w < 1.0) m.power_w = 1.0;
    return m;
}

/* The arbiter: what the SM clock is now, and why it is not higher. */
static double arbitrate(const struct sim_node *node, struct sim_gpu *gpu, bool context, bool busy) {
    const struct sim_model *model = &node->config.model;
    struct sim_setting lock = gpu->t_ns >= gpu->lock_at_ns ? gpu->lock : gpu->lock_before;
    double clock = context ? model->clock_max_mhz : model->idle_clock_mhz;
    if (lock.max_mhz) {
        if (clock > lock.max_mhz) clock = lock.max_mhz;
        if (clock < lock.min_mhz) clock = lock.min_mhz;
    }
    uint64_t reasons = busy ? 0 : NV_REASON_IDLE;
    if (gpu->cap_engaged && gpu->cap_clock_mhz < clock) {
        clock = gpu->cap_clock_mhz;
        if (busy) reasons |= NV_REASON_SW_POWER_CAP;
    }
    double ceiling = model->clock_max_mhz;
    if (gpu->sw_thermal || gpu->thermal_engaged) {
        reasons |= NV_REASON_SW_THERMAL;
        ceiling = 0.7 * model->clock_max_mhz;
    }
    if (gpu->hw_thermal) {
        reasons |= NV_REASON_HW_THERMAL | NV_REASON_HW_SLOWDOWN;
        ceiling = 0.5 * model->clock_max_mhz;
    }
    if (gpu->brake) {
        reasons |= NV_REASON_POWER_BRAKE | NV_REASON_HW_SLOWDOWN;
        ceiling = 0.5 * model->clock_max_mhz;
    }
    if (clock > ceiling) clock = sim_snap_clock(model, ceiling);
    gpu->reasons = reasons;
    return clock;
}

static void publish_power(const struct sim_node *node, struct sim_gpu *gpu) {
    const struct sim_model *model = &node->config.model;
    uint64_t seed = node->config.seed;
    double gain = 1.0 + model->sensor_gain_spread * (2.0 * sim_uniform(sim_hash(seed, gpu->index, 11)) - 1.0);
    double period_mean = gpu->period_s > 0 ? gpu->period_j / gpu->period_s : gpu->power_w;
    double window_mean = gpu->window_s > 0 ? gpu->window_j / gpu->window_s : gpu->power_w;
    double noise = sim_gauss(sim_hash(seed, gpu->index + 100, gpu->slot));
    double instant = window_mean * gain * (1.0 + model->sensor_noise * noise) + 0.15 * noise;
    uint64_t row = gpu->slot % 10;
    gpu->history_w[row] = period_mean * gain;
    gpu->history_busy[row] = gpu->period_s > 0 ? gpu->busy_s / gpu->period_s : 0.0;
    gpu->history_memory[row] = gpu->period_s > 0 ? gpu->memory_busy_s / gpu->period_s : 0.0;
    double average = 0.0, busy = 0.0, memory = 0.0;
    for (int i = 0; i < 10; i++) {
        average += gpu->history_w[i] / 10.0;
        busy += gpu->history_busy[i] / 10.0;
        memory += gpu->history_memory[i] / 10.0;
    }
    average = average * (1.0 + 0.3 * model->sensor_noise * noise) + 0.05 * noise;
    gpu->slot++;
    gpu->window_j = gpu->period_j = gpu->window_s = gpu->period_s = gpu->busy_s = gpu->memory_busy_s = 0.0;
    if (gpu->frozen) return;
    gpu->instant_mw = (uint32_t)(instant * 1000.0);
    gpu->average_mw = (uint32_t)(average * 1000.0);
    gpu->utilization = (uint32_t)(busy * 100.0 + 0.5);
    gpu->memory_utilization = (uint32_t)(memory * 100.0 + 0.5);
}

static void publish_energy(const struct sim_node *node, struct sim_gpu *gpu) {
    double spread = node->config.model.energy_gain_spread;
    double gain = 1.0 + spread * (2.0 * sim_uniform(sim_hash(node->config.seed, gpu->index, 12)) - 1.0);
    double counted = (gpu->energy_j - gpu->counter_base_j) * gain + gpu->counter_offset_j;
    uint64_t value = (uint64_t)(counted * 1000.0);
    if (!gpu->frozen && value > gpu->counter_mj) __atomic_store_n(&gpu->counter_mj, value, __ATOMIC_RELEASE);
}

/* The power cap: an integral controller on the SM clock that sees a lagging average of board power. */
static void cap_tick(const struct sim_node *node, struct sim_gpu *gpu, double wish_mhz) {
    const struct sim_model *model = &node->config.model;
    double limit = sim_enforced_mw(gpu) / 1000.0;
    if (!gpu->cap_engaged) {
        if (gpu->cap_average_w <= limit * model->cap_bind) return;
        gpu->cap_engaged = 1;
        gpu->cap_clock_mhz = gpu->clock_mhz;
    }
    /* Boards differ in how close to a binding limit they settle. */
    double target = model->cap_target + 0.015 * (2.0 * sim_uniform(sim_hash(node->config.seed, gpu->index, 13)) - 1.0);
    double error = (target * limit - gpu->cap_average_w) / limit;
    gpu->cap_clock_mhz += model->clock_max_mhz * model->cap_gain * error;
    if (gpu->cap_clock_mhz < model->clock_min_mhz) gpu->cap_clock_mhz = model->clock_min_mhz;
    /* Let go once the clock is back, or once the wished clock would stay within the limit by itself. */
    struct moment free_run = look(node, gpu, wish_mhz);
    bool within = (free_run.running || free_run.loads) && free_run.power_w <= 0.99 * limit * model->cap_bind;
    if (within || (gpu->cap_clock_mhz >= wish_mhz && error > 0)) {
        gpu->cap_engaged = 0;
        gpu->cap_clock_mhz = model->clock_max_mhz;
    }
}

static uint64_t ns(double seconds) { return (uint64_t)ceil(seconds * 1e9); }

static void finish(struct sim_gpu *gpu, struct sim_work *work) {
    work->position++;
    if (work->position < work->length) {
        work->left = work->queue[work->position].units;
        return;
    }
    work->state = WORK_CONTEXT;
    work->finished_ns = gpu->t_ns;
    work->end_energy_j = gpu->energy_j;
}

/* Nothing runs and nobody looked for minutes: one step instead of thousands. */
static void skip_idle(const struct sim_node *node, struct sim_gpu *gpu, uint64_t to_ns) {
    const struct sim_model *model = &node->config.model;
    uint64_t period = ns(model->sensor_period_s), until = to_ns - 30 * SIM_SECOND;
    uint64_t slots = (until - gpu->sensor_next_ns) / period;
    gpu->energy_j += gpu->power_w * (double)(until - gpu->t_ns) * 1e-9;
    gpu->reason_ns[0] += until - gpu->t_ns;
    gpu->sensor_next_ns += slots * period;
    gpu->slot += slots;
    while (gpu->energy_next_ns <= until) gpu->energy_next_ns += ns(model->energy_period_s) * (1 + (until - gpu->energy_next_ns) / ns(model->energy_period_s));
    if (gpu->cap_next_ns < until) gpu->cap_next_ns = until;
    gpu->window_j = gpu->period_j = gpu->window_s = gpu->period_s = gpu->busy_s = gpu->memory_busy_s = 0.0;
    gpu->t_ns = until;
}

void sim_advance_gpu(const struct sim_node *node, struct sim_gpu *gpu, uint64_t to_ns) {
    const struct sim_model *model = &node->config.model;
    uint64_t sensor_ns = ns(model->sensor_period_s), window_ns = ns(model->sensor_window_s);
    uint64_t energy_ns = ns(model->energy_period_s), tick_ns = ns(model->cap_tick_s);
    while (gpu->t_ns < to_ns) {
        /* 1. who wants what now */
        struct moment m = look(node, gpu, gpu->clock_mhz);
        bool busy = m.running || m.loads || m.blocked, context = busy || m.contexts;
        double clock = arbitrate(node, gpu, context, m.running || m.loads || m.blocked);
        if (clock != gpu->clock_mhz) {
            gpu->clock_mhz = clock;
            m = look(node, gpu, clock);
        }
        gpu->power_w = m.power_w;
        if (!busy && !gpu->cap_engaged && gpu->t_ns >= gpu->lock_at_ns && to_ns - gpu->t_ns > LONG_IDLE_NS &&
            fabs(gpu->temperature_c - (model->ambient_c + gpu->ambient_shift_c + model->thermal_c_per_w * m.power_w)) < 0.5) {
            skip_idle(node, gpu, to_ns);
            continue;
        }
        /* 2. how far can we go before something happens */
        uint64_t next = to_ns;
        if (gpu->lock_at_ns > gpu->t_ns && gpu->lock_at_ns < next) next = gpu->lock_at_ns;
        if (gpu->sensor_next_ns < next) next = gpu->sensor_next_ns;
        uint64_t window_start = gpu->sensor_next_ns > window_ns ? gpu->sensor_next_ns - window_ns : 0;
        if (window_start > gpu->t_ns && window_start < next) next = window_start;
        if (gpu->energy_next_ns < next) next = gpu->energy_next_ns;
        double limit = sim_enforced_mw(gpu) / 1000.0;
        bool controlled = gpu->cap_engaged || (m.power_w > 0.99 * limit * model->cap_bind) || gpu->cap_average_w > limit * model->cap_bind;
        if (controlled) {
            if (gpu->cap_next_ns <= gpu->t_ns) gpu->cap_next_ns = gpu->t_ns - gpu->t_ns % tick_ns + tick_ns;
            if (gpu->cap_next_ns < next) next = gpu->cap_next_ns;
        }
        int sharing = m.running + m.loads;
        for (int i = 0; i < SIM_MAX_WORK; i++) {
            struct sim_work *work = &gpu->work[i];
            if (!work->used) continue;
            if (work->state == WORK_RUN) {
                const struct sim_kernel *kernel = &node->kernels[work->queue[work->position].kernel];
                double rate = sim_table(kernel, kernel->units_per_s, clock) / sharing;
                rate *= 1.0 - kernel->memory_share * (1.0 - m.slow);
                uint64_t end = gpu->t_ns + ns(work->left / rate);
                if (end < next) next = end;
            } else if (work->state != WORK_CONTEXT && work->until_ns > gpu->t_ns && work->until_ns < next) {
                next = work->until_ns;
            }
        }
        if (next <= gpu->t_ns) next = gpu->t_ns + 1;
        /* 3. go there */
        double dt = (double)(next - gpu->t_ns) * 1e-9;
        double joules = m.power_w * dt;
        bool in_window = gpu->t_ns >= window_start;
        gpu->energy_j += joules;
        gpu->period_j += joules;
        gpu->period_s += dt;
        if (in_window) {
            gpu->window_j += joules;
            gpu->window_s += dt;
        }
        gpu->busy_s += m.busy * dt;
        gpu->memory_busy_s += m.memory_busy * dt;
        for (int bit = 0; bit < 9; bit++)
            if (gpu->reasons >> bit & 1) gpu->reason_ns[bit] += next - gpu->t_ns;
        gpu->cap_average_w += (m.power_w - gpu->cap_average_w) * -expm1(-dt / model->cap_tau_s);
        double steady = model->ambient_c + gpu->ambient_shift_c + model->thermal_c_per_w * m.power_w;
        gpu->temperature_c += (steady - gpu->temperature_c) * -expm1(-dt / model->thermal_tau_s);
        if (gpu->temperature_c > model->slowdown_c) gpu->thermal_engaged = 1;
        else if (gpu->temperature_c < model->slowdown_c - 4.0) gpu->thermal_engaged = 0;
        gpu->t_ns = next;
        for (int i = 0; i < SIM_MAX_WORK; i++) {
            struct sim_work *work = &gpu->work[i];
            if (!work->used || work->state == WORK_CONTEXT) continue;
            work->busy_s += dt / (sharing > 0 ? sharing : 1);
            if (work->state == WORK_RUN) {
                const struct sim_kernel *kernel = &node->kernels[work->queue[work->position].kernel];
                double rate = sim_table(kernel, kernel->units_per_s, clock) / sharing;
                rate *= 1.0 - kernel->memory_share * (1.0 - m.slow);
                work->left -= rate * dt;
                if (work->left <= rate * 1e-9) finish(gpu, work);
            } else if (work->until_ns <= next) {
                work->position = work->length = 0;
                finish(gpu, work);
            }
        }
        /* 4. what happens there */
        if (controlled && next >= gpu->cap_next_ns) {
            double wish = context ? model->clock_max_mhz : model->idle_clock_mhz;
            if (gpu->lock.max_mhz && wish > gpu->lock.max_mhz) wish = gpu->lock.max_mhz;
            cap_tick(node, gpu, wish);
            gpu->cap_next_ns = next + tick_ns;
        }
        if (next >= gpu->energy_next_ns) {
            publish_energy(node, gpu);
            gpu->energy_next_ns += energy_ns;
        }
        if (next >= gpu->sensor_next_ns) {
            publish_power(node, gpu);
            gpu->sensor_next_ns += sensor_ns;
        }
    }
}
