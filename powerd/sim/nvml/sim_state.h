/* The shared memory of one simulated node: layout, limits and the structures that Python fills in.
 *
 * House rules: (1) plain data only, no pointers: several processes map it at different addresses; (2) everything up to
 * `struct sim_config` is mirrored by powerd/sim/layout.py (sizes are compared when a node is created); (3) changing
 * anything here means a new SIM_LAYOUT_VERSION.
 */
#ifndef POWERD_SIM_STATE_H
#define POWERD_SIM_STATE_H
#include <pthread.h>
#include <stdint.h>

#define SIM_MAGIC 0x504f574552445349ull
#define SIM_LAYOUT_VERSION 1u
#define SIM_MAX_GPUS 16
#define SIM_MAX_CLOCKS 192
#define SIM_MAX_POINTS 192
#define SIM_MAX_KERNELS 64
#define SIM_MAX_WORK 16
#define SIM_MAX_QUEUE 64
#define SIM_MAX_PROCS 256
#define SIM_MAX_SLOTS 256
#define SIM_MAX_RULES 32
#define SIM_NAME 64

enum sim_mode { SIM_REAL = 0, SIM_SCALED = 1, SIM_STEPPED = 2 };
enum sim_perm { SIM_PERM_ROOT = 0, SIM_PERM_ANY = 1, SIM_PERM_NONE = 2 };

/* One kernel: how fast it runs and what it draws at each SM clock (ascending). Interpolated linearly in both. */
struct sim_kernel {
    char name[SIM_NAME];
    uint32_t points;
    uint32_t reserved;
    double memory_share; /* share of its time at the top clock that waits for memory, 0..1 */
    double clock_mhz[SIM_MAX_POINTS];
    double units_per_s[SIM_MAX_POINTS];
    double power_w[SIM_MAX_POINTS];
};

/* Constants of one GPU model, compiled by Python from powerd/sim/models.py. */
struct sim_model {
    char name[SIM_NAME];
    uint32_t architecture, cc_major, cc_minor, cores, brand, pci_device_id, pci_subsystem_id;
    uint32_t clock_min_mhz, clock_max_mhz, clock_step_mhz, idle_clock_mhz;
    uint32_t memory_clock_count, memory_clock_mhz[4];
    uint32_t memory_lock_supported;
    uint32_t power_usage_is_average; /* nvmlDeviceGetPowerUsage: 1 s average (1) or instantaneous (0) */
    uint32_t limit_min_mw, limit_max_mw, limit_default_mw;
    uint32_t fan_supported, mig_supported;
    uint64_t memory_bytes;
    double idle_w, context_idle_w, blocked_w;
    double voltage_floor, voltage_knee; /* V(x), relative to the top clock */
    double sensor_period_s, sensor_window_s, energy_period_s;
    double sensor_noise, sensor_gain_spread, energy_gain_spread;
    double ambient_c, thermal_c_per_w, thermal_tau_s, leak_w_per_c, slowdown_c, shutdown_c;
    double cap_bind, cap_target, cap_tau_s, cap_tick_s, cap_gain;
    double settle_s;
};

struct sim_config {
    uint32_t gpus, mode, perm, persistence;
    uint64_t seed;
    double scale;   /* simulated seconds per real second in SIM_SCALED */
    double latency; /* multiplier of every injected latency, 0 = none */
    double first_open_s;
    char driver_version[SIM_NAME], nvml_version[SIM_NAME];
    uint32_t cuda_version, kernels;
    struct sim_model model;
};

struct sim_fault_rule {
    char glob[SIM_NAME]; /* of function names, e.g. nvmlDeviceSet* */
    int32_t gpu;         /* -1 = any, also calls without a device */
    int32_t ret;         /* NVML return code, -1 = run the call after the delay */
    uint64_t delay_ns;
    int64_t count; /* how often it may fire, -1 = always */
    uint64_t skip; /* let this many matching calls pass first */
    double probability;
};

/* What `show` prints: the truth of one GPU, for tests and people, never for product code. */
struct sim_view {
    char uuid[SIM_NAME];
    uint64_t now_ns, true_energy_uj, counter_mj;
    double power_w, clock_mhz, temperature_c;
    uint32_t lock_min_mhz, lock_max_mhz, memory_lock_min_mhz, memory_lock_max_mhz;
    uint32_t limit_mw, enforced_mw, default_limit_mw, out_of_band_mw;
    uint64_t reasons;
    uint32_t persistence, mig, lost, hung, frozen, busy, processes, xid_count, last_xid, utilization, memory_clock_mhz;
    uint32_t capped;
    uint64_t setter_calls, memory_used;
};

struct sim_item { uint32_t kernel; uint32_t reserved; double units; };

/* ---- from here on the layout is private to the library ---- */

enum sim_work_state { WORK_CONTEXT = 0, WORK_RUN = 1, WORK_LOAD = 2, WORK_BLOCKED = 3 };

struct sim_work {
    uint32_t used, proc, pid, state;
    char name[SIM_NAME];
    uint64_t memory, until_ns, finished_ns;
    double activity, left, start_energy_j, end_energy_j, busy_s;
    uint32_t length, position;
    int32_t slot; /* participant that waits for the end, -1 = none */
    uint32_t kernel; /* of a steady load */
    struct sim_item queue[SIM_MAX_QUEUE];
};

struct sim_setting { uint32_t min_mhz, max_mhz; };

struct sim_gpu {
    pthread_mutex_t mutex;
    uint32_t index;
    uint32_t change_word; /* futex: something changed that moves the end of running work */
    uint64_t t_ns;        /* physics is exact up to here */
    uint64_t looked_real_ns;
    /* settings */
    struct sim_setting lock, lock_before, memory_lock;
    uint64_t lock_at_ns;
    uint32_t limit_mw, out_of_band_mw, persistence, mig, compute_mode, ecc;
    /* truth */
    double energy_j, power_w, clock_mhz, temperature_c, ambient_shift_c;
    double cap_average_w, cap_clock_mhz;
    uint32_t cap_engaged, thermal_engaged;
    uint64_t cap_next_ns, reasons;
    uint64_t reason_ns[9];
    /* sensors */
    uint64_t sensor_next_ns, energy_next_ns, slot;
    double window_j, period_j, window_s, period_s, busy_s, memory_busy_s;
    double history_w[10], history_busy[10], history_memory[10];
    uint64_t counter_mj;
    double counter_base_j, counter_offset_j;
    uint32_t instant_mw, average_mw, utilization, memory_utilization;
    /* faults */
    uint32_t lost, hung, frozen, brake, hw_thermal, sw_thermal;
    uint32_t frozen_clock, frozen_temperature;
    uint32_t xid_count, last_xid;
    uint64_t lost_generation, setter_calls;
    struct sim_work work[SIM_MAX_WORK];
};

struct sim_rule { struct sim_fault_rule rule; uint32_t used, reserved; uint64_t seen, fired; };
struct sim_proc { uint32_t used, pid; };
struct sim_slot {
    uint32_t used, proc; /* used: 1 = counts, 2 = set aside while its thread waits for GPU work */
    uint32_t waiting, word, woken, reserved;
    uint64_t deadline_ns;
    uint64_t thread; /* which thread of its process is this participant */
    char name[SIM_NAME];
};

struct sim_node {
    uint64_t magic;
    uint32_t layout_version, size;
    struct sim_config config;
    pthread_mutex_t mutex; /* participants, processes, rules */
    uint64_t start_boottime_ns, start_sim_ns, stepped_ns;
    int64_t flight;
    uint64_t flight_changed_real_ns;
    uint64_t rm_free_ns, calls, generation, upgrades;
    uint32_t rm_hung, rule_count, xid_word, hang_word;
    char driver_version[SIM_NAME];
    struct sim_proc procs[SIM_MAX_PROCS];
    struct sim_slot slots[SIM_MAX_SLOTS];
    struct sim_rule rules[SIM_MAX_RULES];
    struct sim_gpu gpus[SIM_MAX_GPUS];
    struct sim_kernel kernels[SIM_MAX_KERNELS];
};
#endif
