/* One clock for driver, daemon and workloads: real, scaled, or stepped.
 *
 * House rules: (1) stepped time moves only when every participant waits and nothing is in flight; (2) waiting is a
 * futex, never a busy loop; (3) a participant whose process died is dropped, found by its kernel lock.
 */
#define _GNU_SOURCE
#include "sim.h"
#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define LIVENESS_NS 20000000ull    /* how often a waiting participant looks for dead ones */
#define FLIGHT_STALL_NS SIM_SECOND /* in-flight messages of a dead process are given up after this real time */

static __thread int thread_slot = -1;
static __thread const struct sim *thread_sim;

uint64_t sim_real_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_BOOTTIME, &t);
    return (uint64_t)t.tv_sec * SIM_SECOND + (uint64_t)t.tv_nsec;
}

uint64_t sim_now(const struct sim_node *node) {
    if (node->config.mode == SIM_STEPPED) return __atomic_load_n(&node->stepped_ns, __ATOMIC_ACQUIRE);
    uint64_t real = sim_real_ns();
    if (node->config.mode == SIM_REAL) return real;
    return node->start_sim_ns + (uint64_t)((double)(real - node->start_boottime_ns) * node->config.scale);
}

uint64_t sim_real_for(const struct sim_node *node, uint64_t sim_ns) {
    return node->config.mode == SIM_SCALED ? (uint64_t)((double)sim_ns / node->config.scale) : sim_ns;
}

void sim_futex_wait(uint32_t *word, uint32_t seen, uint64_t timeout_ns) {
    struct timespec t = {(time_t)(timeout_ns / SIM_SECOND), (long)(timeout_ns % SIM_SECOND)};
    syscall(SYS_futex, word, FUTEX_WAIT, seen, &t, NULL, 0);
}

void sim_futex_wake(uint32_t *word) {
    __atomic_fetch_add(word, 1, __ATOMIC_SEQ_CST);
    syscall(SYS_futex, word, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}

static void release(struct sim_slot *slot) {
    slot->waiting = 0;
    sim_futex_wake(&slot->word);
}

/* Called with the node mutex held: moves stepped time to the next deadline if everybody waits. */
static void try_advance(struct sim *sim, bool look_for_dead) {
    struct sim_node *node = sim->node;
    if (node->config.mode != SIM_STEPPED) return;
    uint64_t next = UINT64_MAX;
    bool awake = false;
    for (int i = 0; i < SIM_MAX_SLOTS; i++) {
        struct sim_slot *slot = &node->slots[i];
        if (slot->used != 1) continue;
        if (look_for_dead && !sim_proc_alive(sim, slot->proc)) {
            slot->used = 0;
            continue;
        }
        if (!slot->waiting) awake = true;
        else if (slot->deadline_ns < next) next = slot->deadline_ns;
    }
    if (awake) return;
    if (__atomic_load_n(&node->flight, __ATOMIC_ACQUIRE) != 0) {
        if (sim_real_ns() - node->flight_changed_real_ns < FLIGHT_STALL_NS) return;
        node->flight = 0;
    }
    if (next == UINT64_MAX) return;
    if (next > node->stepped_ns) __atomic_store_n(&node->stepped_ns, next, __ATOMIC_RELEASE);
    for (int i = 0; i < SIM_MAX_SLOTS; i++) {
        struct sim_slot *slot = &node->slots[i];
        if (slot->used == 1 && slot->waiting && slot->deadline_ns <= node->stepped_ns) release(slot);
    }
}

int sim_slot_join(struct sim *sim, const char *name) {
    int proc = sim_proc_claim(sim), found = -1;
    if (proc < 0) return -1;
    sim_lock(&sim->node->mutex);
    for (int i = 0; i < SIM_MAX_SLOTS && found < 0; i++)
        if (!sim->node->slots[i].used) found = i;
    if (found >= 0) {
        struct sim_slot *slot = &sim->node->slots[found];
        uint32_t word = slot->word;
        memset(slot, 0, sizeof *slot);
        slot->word = word;
        slot->used = 1;
        slot->proc = (uint32_t)proc;
        slot->thread = (uint64_t)(uintptr_t)&thread_slot;
        snprintf(slot->name, sizeof slot->name, "%s", name ? name : "");
    }
    sim_unlock(&sim->node->mutex);
    return found;
}

void sim_slot_leave(struct sim *sim, int index) {
    if (index < 0 || index >= SIM_MAX_SLOTS) return;
    sim_lock(&sim->node->mutex);
    struct sim_slot *slot = &sim->node->slots[index];
    if (slot->used && (int)slot->proc == sim->proc) {
        slot->used = 0;
        release(slot);
        try_advance(sim, false);
    }
    sim_unlock(&sim->node->mutex);
}

void sim_wake_slot(struct sim_node *node, int index) {
    if (index < 0 || index >= SIM_MAX_SLOTS) return;
    sim_lock(&node->mutex);
    struct sim_slot *slot = &node->slots[index];
    if (slot->used) {
        slot->woken = 1;
        release(slot);
    }
    sim_unlock(&node->mutex);
}

uint64_t sim_wait_slot(struct sim *sim, int index, uint64_t deadline_ns, int max_real_ms, bool keep_wake) {
    struct sim_node *node = sim->node;
    if (index < 0 || index >= SIM_MAX_SLOTS) return sim_now(node);
    struct sim_slot *slot = &node->slots[index];
    bool stepped = node->config.mode == SIM_STEPPED;
    uint64_t began = sim_real_ns();
    uint64_t bound = max_real_ms < 0 ? UINT64_MAX : (uint64_t)max_real_ms * 1000000ull;
    sim_lock(&node->mutex);
    if (sim_now(node) >= deadline_ns || (slot->woken && !keep_wake)) {
        if (!keep_wake) slot->woken = 0;
        sim_unlock(&node->mutex);
        return sim_now(node);
    }
    slot->deadline_ns = deadline_ns;
    slot->waiting = 1;
    try_advance(sim, false);
    for (;;) {
        uint64_t now = sim_now(node);
        if (!slot->used || (slot->woken && !keep_wake) || now >= deadline_ns) break;
        slot->waiting = 1; /* a wake that we keep for later does not end this wait */
        uint64_t spent = sim_real_ns() - began;
        if (spent >= bound) break;
        uint64_t nap = stepped ? LIVENESS_NS : UINT64_MAX / 4;
        if (!stepped && deadline_ns != UINT64_MAX) nap = sim_real_for(node, deadline_ns - now) + 1;
        if (bound != UINT64_MAX && bound - spent < nap) nap = bound - spent;
        if (nap > 3600 * SIM_SECOND) nap = 3600 * SIM_SECOND;
        uint32_t seen = __atomic_load_n(&slot->word, __ATOMIC_SEQ_CST);
        sim_unlock(&node->mutex);
        sim_futex_wait(&slot->word, seen, nap);
        sim_lock(&node->mutex);
        if (stepped && slot->waiting) try_advance(sim, true);
    }
    slot->waiting = 0;
    if (!keep_wake) slot->woken = 0;
    sim_unlock(&node->mutex);
    return sim_now(node);
}

/* Takes a participant out of the count while its thread waits for GPU work under another slot. */
void sim_slot_set_aside(struct sim *sim, int index, bool aside) {
    if (index < 0) return;
    sim_lock(&sim->node->mutex);
    struct sim_slot *slot = &sim->node->slots[index];
    if (slot->used) slot->used = aside ? 2 : 1;
    sim_unlock(&sim->node->mutex);
}

/* The participant that the calling thread is: the one it last joined or waited as, unless another thread took it over. */
int sim_thread_slot(const struct sim *sim) {
    if (thread_sim != sim || thread_slot < 0) return -1;
    const struct sim_slot *slot = &sim->node->slots[thread_slot];
    bool ours = slot->used && (int)slot->proc == sim->proc && slot->thread == (uint64_t)(uintptr_t)&thread_slot;
    return ours ? thread_slot : -1;
}

/* Lets simulated time pass in the calling thread; in stepped mode only participants can. */
void sim_sleep_until(struct sim *sim, uint64_t deadline_ns) {
    struct sim_node *node = sim->node;
    if (node->config.mode == SIM_STEPPED) {
        int slot = sim_thread_slot(sim);
        if (slot >= 0) sim_wait_slot(sim, slot, deadline_ns, -1, true);
        return;
    }
    uint64_t now = sim_now(node);
    if (now >= deadline_ns) return;
    uint64_t until = sim_real_ns() + sim_real_for(node, deadline_ns - now);
    struct timespec t = {(time_t)(until / SIM_SECOND), (long)(until % SIM_SECOND)};
    while (clock_nanosleep(CLOCK_BOOTTIME, TIMER_ABSTIME, &t, NULL) == EINTR) {}
}

SIM_API uint32_t powerd_sim_version(void) { return SIM_LAYOUT_VERSION; }

SIM_API uint64_t powerd_sim_now_ns(void) {
    struct sim *sim = sim_current();
    return sim ? sim_now(sim->node) : sim_real_ns();
}

SIM_API double powerd_sim_scale(void) {
    struct sim *sim = sim_current();
    if (!sim || sim->node->config.mode == SIM_REAL) return 1.0;
    return sim->node->config.mode == SIM_STEPPED ? 0.0 : sim->node->config.scale;
}

SIM_API int powerd_sim_join(const char *name) {
    struct sim *sim = sim_current();
    if (!sim) return -1;
    int slot = sim_slot_join(sim, name);
    thread_slot = slot;
    thread_sim = sim;
    return slot;
}

SIM_API void powerd_sim_leave(int slot) {
    struct sim *sim = sim_current();
    if (!sim) return;
    if (thread_slot == slot) thread_slot = -1;
    sim_slot_leave(sim, slot);
}

SIM_API uint64_t powerd_sim_wait(int slot, uint64_t deadline_ns, int max_real_ms) {
    struct sim *sim = sim_current();
    if (!sim) return sim_real_ns();
    if (slot >= 0 && slot < SIM_MAX_SLOTS) {
        sim->node->slots[slot].thread = (uint64_t)(uintptr_t)&thread_slot;
        thread_slot = slot;
        thread_sim = sim;
    }
    return sim_wait_slot(sim, slot, deadline_ns, max_real_ms, false);
}

SIM_API void powerd_sim_wake(int slot) {
    struct sim *sim = sim_current();
    if (sim) sim_wake_slot(sim->node, slot);
}

/* The calling thread blocks on something else than the clock: meanwhile it does not hold stepped time. */
SIM_API void powerd_sim_aside(int aside) {
    struct sim *sim = sim_current();
    int slot = sim ? sim_thread_slot(sim) : -1;
    if (slot < 0) return;
    sim_slot_set_aside(sim, slot, aside != 0);
    sim_lock(&sim->node->mutex);
    if (aside) try_advance(sim, false);
    sim_unlock(&sim->node->mutex);
}

SIM_API void powerd_sim_flight(int delta) {
    struct sim *sim = sim_current();
    if (!sim) return;
    sim_lock(&sim->node->mutex);
    sim->node->flight += delta;
    if (sim->node->flight < 0) sim->node->flight = 0;
    sim->node->flight_changed_real_ns = sim_real_ns();
    if (sim->node->flight == 0) try_advance(sim, false);
    sim_unlock(&sim->node->mutex);
}

/* Moves stepped time on behalf of a test driver, stopping at every deadline that participants wait for. */
SIM_API uint64_t powerd_sim_advance_at(struct sim *sim, uint64_t to_ns, int max_real_ms) {
    int slot = sim_thread_slot(sim), own = slot;
    if (own < 0) slot = sim_slot_join(sim, "advance");
    uint64_t now = sim_wait_slot(sim, slot, to_ns, max_real_ms, true);
    if (own < 0) sim_slot_leave(sim, slot);
    return now;
}

SIM_API uint64_t powerd_sim_advance(uint64_t to_ns) {
    struct sim *sim = sim_current();
    return sim ? powerd_sim_advance_at(sim, to_ns, 60000) : sim_real_ns();
}
