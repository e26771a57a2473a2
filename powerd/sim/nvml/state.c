/* The state file: creating, mapping, locking it, and knowing which processes still live.
 *
 * House rules: (1) the file is opened without O_CREAT by everyone but its creator, and is mode 0666; (2) liveness is a
 * kernel lock that dies with its process, never a remembered pid alone; (3) a mutex whose holder died is recovered.
 */
#define _GNU_SOURCE
#include "sim.h"
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define PROC_LOCK_BASE 0x100000000ll
#define MAX_MAPS 64

static pthread_mutex_t attach_mutex = PTHREAD_MUTEX_INITIALIZER;
static struct sim *maps[MAX_MAPS];
static struct sim *current;
static pthread_once_t fork_once = PTHREAD_ONCE_INIT;

static void init_mutex(pthread_mutex_t *mutex) {
    pthread_mutexattr_t attr;
    pthread_mutexattr_init(&attr);
    pthread_mutexattr_setpshared(&attr, PTHREAD_PROCESS_SHARED);
    pthread_mutexattr_setrobust(&attr, PTHREAD_MUTEX_ROBUST);
    pthread_mutex_init(mutex, &attr);
    pthread_mutexattr_destroy(&attr);
}

bool sim_lock(pthread_mutex_t *mutex) {
    int rc = pthread_mutex_lock(mutex);
    if (rc == EOWNERDEAD) {
        pthread_mutex_consistent(mutex);
        return true;
    }
    return rc == 0;
}

void sim_unlock(pthread_mutex_t *mutex) { pthread_mutex_unlock(mutex); }

static int byte_lock(int fd, int command, short type, int proc) {
    struct flock lock = {.l_type = type, .l_whence = SEEK_SET, .l_start = PROC_LOCK_BASE + proc, .l_len = 1};
    if (fcntl(fd, command, &lock) != 0) return -1;
    return command == F_OFD_GETLK ? lock.l_type : 0;
}

bool sim_proc_alive(struct sim *sim, uint32_t proc) {
    if ((int)proc == sim->proc) return true;
    if (proc >= SIM_MAX_PROCS || !sim->node->procs[proc].used) return false;
    return byte_lock(sim->fd, F_OFD_GETLK, F_WRLCK, (int)proc) != F_UNLCK;
}

int sim_proc_claim(struct sim *sim) {
    if (sim->proc >= 0) return sim->proc;
    sim_lock(&sim->node->mutex);
    for (int i = 0; i < SIM_MAX_PROCS && sim->proc < 0; i++) {
        if (byte_lock(sim->fd, F_OFD_SETLK, F_WRLCK, i) != 0) continue;
        /* Rows of a dead predecessor must not pass for ours. */
        for (int s = 0; s < SIM_MAX_SLOTS; s++)
            if (sim->node->slots[s].used && sim->node->slots[s].proc == (uint32_t)i) sim->node->slots[s].used = 0;
        sim->node->procs[i] = (struct sim_proc){1, (uint32_t)getpid()};
        sim->proc = i;
    }
    sim_unlock(&sim->node->mutex);
    if (sim->proc >= 0)
        for (uint32_t g = 0; g < sim->node->config.gpus; g++) {
            struct sim_gpu *gpu = &sim->node->gpus[g];
            sim_lock(&gpu->mutex);
            for (int w = 0; w < SIM_MAX_WORK; w++)
                if (gpu->work[w].used && gpu->work[w].proc == (uint32_t)sim->proc) gpu->work[w].used = 0;
            sim_unlock(&gpu->mutex);
        }
    return sim->proc;
}

void sim_gpu_defaults(struct sim_node *node, struct sim_gpu *gpu) {
    uint64_t now = sim_now(node);
    sim_advance_gpu(node, gpu, now);
    gpu->lock = gpu->lock_before = gpu->memory_lock = (struct sim_setting){0, 0};
    gpu->lock_at_ns = 0;
    gpu->limit_mw = node->config.model.limit_default_mw;
    gpu->compute_mode = 0;
    sim_changed(node, gpu);
}

/* With persistence off a GPU forgets its settings when its last client, NVML or workload, has gone. */
static void forget_settings(struct sim *sim) {
    for (uint32_t g = 0; g < sim->node->config.gpus; g++) {
        struct sim_gpu *gpu = &sim->node->gpus[g];
        sim_lock(&gpu->mutex);
        if (!gpu->persistence) sim_gpu_defaults(sim->node, gpu);
        sim_unlock(&gpu->mutex);
    }
}

void sim_settle_clients(struct sim *sim) {
    int fd = open(sim->path, O_RDWR | O_CLOEXEC);
    if (fd < 0) return;
    if (flock(fd, LOCK_EX | LOCK_NB) == 0) forget_settings(sim);
    close(fd);
}

void sim_lifetime_open(struct sim *sim) {
    bool cold = false;
    pthread_mutex_lock(&attach_mutex);
    if (sim->lifetime_users++ == 0) {
        sim->lifetime_fd = open(sim->path, O_RDWR | O_CLOEXEC);
        if (sim->lifetime_fd >= 0) {
            if (flock(sim->lifetime_fd, LOCK_EX | LOCK_NB) == 0) {
                for (uint32_t g = 0; g < sim->node->config.gpus; g++) cold |= !sim->node->gpus[g].persistence;
                forget_settings(sim);
            }
            flock(sim->lifetime_fd, LOCK_SH);
        }
    }
    pthread_mutex_unlock(&attach_mutex);
    double open_s = sim->node->config.first_open_s * sim->node->config.latency;
    if (cold && open_s > 0) sim_sleep_until(sim, sim_now(sim->node) + (uint64_t)(open_s * (double)SIM_SECOND));
}

void sim_lifetime_close(struct sim *sim) {
    pthread_mutex_lock(&attach_mutex);
    bool last = sim->lifetime_users > 0 && --sim->lifetime_users == 0;
    if (last && sim->lifetime_fd >= 0) {
        close(sim->lifetime_fd);
        sim->lifetime_fd = -1;
    }
    pthread_mutex_unlock(&attach_mutex);
    if (last) sim_settle_clients(sim);
}

void sim_drop_dead_work(struct sim *sim, struct sim_gpu *gpu) {
    for (int i = 0; i < SIM_MAX_WORK; i++)
        if (gpu->work[i].used && !sim_proc_alive(sim, gpu->work[i].proc)) {
            gpu->work[i].used = 0;
            sim_changed(sim->node, gpu);
        }
}

/* A forked child shares our open file descriptions; it must hold its own, or our locks outlive us in it. */
static void after_fork(void) {
    for (int i = 0; i < MAX_MAPS; i++) {
        struct sim *sim = maps[i];
        if (!sim) continue;
        close(sim->fd);
        sim->fd = open(sim->path, O_RDWR | O_CLOEXEC);
        sim->proc = -1;
        if (sim->lifetime_fd >= 0) {
            close(sim->lifetime_fd);
            sim->lifetime_fd = open(sim->path, O_RDWR | O_CLOEXEC);
            if (sim->lifetime_fd >= 0) flock(sim->lifetime_fd, LOCK_SH | LOCK_NB);
        }
    }
    pthread_mutex_init(&attach_mutex, NULL);
}

static void install_fork_handler(void) { pthread_atfork(NULL, NULL, after_fork); }

SIM_API int powerd_sim_create(const char *path, const struct sim_config *config, const struct sim_kernel *kernels) {
    if (config->gpus < 1 || config->gpus > SIM_MAX_GPUS || config->kernels > SIM_MAX_KERNELS) return EINVAL;
    int fd = open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (fd < 0) return errno;
    fchmod(fd, 0666);
    if (ftruncate(fd, sizeof(struct sim_node)) != 0) return errno;
    struct sim_node *node = mmap(NULL, sizeof *node, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (node == MAP_FAILED) return errno;
    node->config = *config;
    memcpy(node->kernels, kernels, config->kernels * sizeof *kernels);
    memcpy(node->driver_version, config->driver_version, SIM_NAME);
    node->start_boottime_ns = sim_real_ns();
    node->start_sim_ns = config->mode == SIM_STEPPED ? 1000 * SIM_SECOND : node->start_boottime_ns;
    node->stepped_ns = node->start_sim_ns;
    init_mutex(&node->mutex);
    for (uint32_t g = 0; g < config->gpus; g++) {
        struct sim_gpu *gpu = &node->gpus[g];
        const struct sim_model *model = &config->model;
        init_mutex(&gpu->mutex);
        gpu->index = g;
        gpu->t_ns = node->start_sim_ns;
        gpu->limit_mw = model->limit_default_mw;
        gpu->out_of_band_mw = UINT32_MAX;
        gpu->persistence = config->persistence;
        gpu->ecc = 1;
        gpu->clock_mhz = model->idle_clock_mhz;
        gpu->cap_clock_mhz = model->clock_max_mhz;
        gpu->power_w = model->idle_w;
        gpu->temperature_c = model->ambient_c + model->thermal_c_per_w * model->idle_w;
        gpu->cap_average_w = model->idle_w;
        /* Sensors of different GPUs do not tick together. */
        uint64_t phase = sim_hash(config->seed, g, 77) % (uint64_t)(model->sensor_period_s * 1e9);
        gpu->sensor_next_ns = gpu->t_ns + phase + 1;
        gpu->energy_next_ns = gpu->t_ns + phase % (uint64_t)(model->energy_period_s * 1e9) + 1;
        for (int i = 0; i < 10; i++) gpu->history_w[i] = model->idle_w;
        gpu->instant_mw = gpu->average_mw = (uint32_t)(model->idle_w * 1000);
        gpu->counter_offset_j = 1000.0 + (double)(sim_hash(config->seed, g, 78) % 9000000);
        gpu->counter_mj = (uint64_t)(gpu->counter_offset_j * 1000.0);
    }
    node->layout_version = SIM_LAYOUT_VERSION;
    node->size = sizeof *node;
    __atomic_store_n(&node->magic, SIM_MAGIC, __ATOMIC_RELEASE);
    munmap(node, sizeof *node);
    return 0;
}

SIM_API struct sim *powerd_sim_map(const char *path) {
    pthread_once(&fork_once, install_fork_handler);
    pthread_mutex_lock(&attach_mutex);
    int row = -1;
    for (int i = 0; i < MAX_MAPS; i++) {
        if (maps[i] && strcmp(maps[i]->path, path) == 0) {
            maps[i]->users++;
            pthread_mutex_unlock(&attach_mutex);
            return maps[i];
        }
        if (!maps[i] && row < 0) row = i;
    }
    struct sim *sim = NULL;
    struct stat info;
    int fd = open(path, O_RDWR | O_CLOEXEC);
    if (row >= 0 && fd >= 0 && strlen(path) < sizeof sim->path && fstat(fd, &info) == 0 &&
        info.st_size == (off_t)sizeof(struct sim_node)) {
        struct sim_node *node = mmap(NULL, sizeof *node, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        if (node != MAP_FAILED && node->magic == SIM_MAGIC && node->layout_version == SIM_LAYOUT_VERSION &&
            node->size == sizeof *node) {
            sim = calloc(1, sizeof *sim);
            sim->node = node;
            /* Locks get a file description of their own: the mapping, which a forked child keeps, holds this one. */
            sim->fd = open(path, O_RDWR | O_CLOEXEC);
            sim->lifetime_fd = sim->proc = -1;
            sim->users = 1;
            snprintf(sim->path, sizeof sim->path, "%s", path);
            maps[row] = sim;
        } else if (node != MAP_FAILED) {
            munmap(node, sizeof *node);
        }
    }
    if (fd >= 0) close(fd);
    pthread_mutex_unlock(&attach_mutex);
    return sim;
}

SIM_API void powerd_sim_unmap(struct sim *sim) {
    pthread_mutex_lock(&attach_mutex);
    if (--sim->users > 0) {
        pthread_mutex_unlock(&attach_mutex);
        return;
    }
    if (current == sim) current = NULL;
    sim_forget(sim);
    for (int i = 0; i < MAX_MAPS; i++)
        if (maps[i] == sim) maps[i] = NULL;
    close(sim->fd);
    if (sim->lifetime_fd >= 0) close(sim->lifetime_fd);
    munmap(sim->node, sizeof *sim->node);
    free(sim);
    pthread_mutex_unlock(&attach_mutex);
}

SIM_API void powerd_sim_attach(struct sim *sim) { current = sim; }

struct sim *sim_current(void) {
    struct sim *sim = current;
    if (sim) return sim;
    const char *path = getenv("POWERD_SIM_STATE");
    if (!path || !*path) return NULL;
    sim = powerd_sim_map(path);
    if (sim) current = sim;
    return sim;
}
