/* What the parts of the simulated driver call of one another.
 *
 * House rules: (1) `struct sim` is this process's view of one node, everything shared lives in `struct sim_node`;
 * (2) the GPU mutex is never held while sleeping; (3) exported control functions begin with powerd_sim_.
 */
#ifndef POWERD_SIM_H
#define POWERD_SIM_H
#include "nvml_abi.h"
#include "sim_state.h"
#include <stdbool.h>
#include <stddef.h>

#define SIM_API __attribute__((visibility("default")))
#define SIM_SECOND 1000000000ull

struct sim {
    struct sim_node *node;
    int fd;          /* byte-range locks: which of our processes and participants live */
    int lifetime_fd; /* shared flock while NVML or a workload is open here, else -1 */
    int lifetime_users;
    int users;       /* how often this process has mapped it */
    int proc;        /* our row in node->procs, -1 = none */
    char path[512];
};

/* state.c */
struct sim *sim_current(void);
bool sim_lock(pthread_mutex_t *mutex);
void sim_unlock(pthread_mutex_t *mutex);
int sim_proc_claim(struct sim *sim);
bool sim_proc_alive(struct sim *sim, uint32_t proc);
void sim_lifetime_open(struct sim *sim);
void sim_lifetime_close(struct sim *sim);
void sim_settle_clients(struct sim *sim);
void sim_gpu_defaults(struct sim_node *node, struct sim_gpu *gpu);
void sim_drop_dead_work(struct sim *sim, struct sim_gpu *gpu);

/* clock.c */
uint64_t sim_real_ns(void);
uint64_t sim_now(const struct sim_node *node);
uint64_t sim_real_for(const struct sim_node *node, uint64_t sim_ns);
void sim_sleep_until(struct sim *sim, uint64_t deadline_ns);
void sim_wake_slot(struct sim_node *node, int slot);
uint64_t sim_wait_slot(struct sim *sim, int slot, uint64_t deadline_ns, int max_real_ms, bool keep_wake);
int sim_slot_join(struct sim *sim, const char *name);
void sim_slot_leave(struct sim *sim, int slot);
void sim_slot_set_aside(struct sim *sim, int slot, bool aside);
int sim_thread_slot(const struct sim *sim);
void sim_futex_wait(uint32_t *word, uint32_t seen, uint64_t timeout_ns);
void sim_futex_wake(uint32_t *word);

/* physics.c */
double sim_table(const struct sim_kernel *kernel, const double *column, double clock_mhz);
double sim_share_of(const struct sim_node *node, const struct sim_kernel *kernel, double clock_mhz, double power_w);
void sim_advance_gpu(const struct sim_node *node, struct sim_gpu *gpu, uint64_t to_ns);
void sim_refresh(struct sim *sim, struct sim_gpu *gpu);
uint32_t sim_enforced_mw(const struct sim_gpu *gpu);
uint32_t sim_snap_clock(const struct sim_model *model, double clock_mhz);
void sim_changed(struct sim_node *node, struct sim_gpu *gpu);
uint64_t sim_hash(uint64_t a, uint64_t b, uint64_t c);
double sim_gauss(uint64_t key);
double sim_uniform(uint64_t key);

/* faults.c */
enum sim_cost { COST_NONE, COST_CACHED, COST_SENSOR, COST_PROCESSES, COST_PCIE, COST_LIMIT, COST_CLOCKS };
nvml_return sim_enter(const char *function, struct sim **sim, enum sim_cost cost);
nvml_return sim_enter_gpu(const char *function, nvml_device device, struct sim **sim, struct sim_gpu **gpu, enum sim_cost cost);
nvml_return sim_enter_setter(const char *function, nvml_device device, struct sim **sim, struct sim_gpu **gpu, bool supported);
void sim_pay(struct sim *sim, struct sim_gpu *gpu, enum sim_cost cost);
void sim_raise_xid(struct sim *sim, struct sim_gpu *gpu, uint32_t xid);

/* api_core.c */
bool sim_initialised(void);
void sim_forget(const struct sim *sim);
nvml_device sim_handle(const struct sim_gpu *gpu);
struct sim_gpu *sim_from_handle(struct sim *sim, nvml_device device);
uint64_t sim_init_generation(void);
#endif
