/* What Python calls: make a cluster, change it, let time pass, look at it. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "cluster.h"

bool grow(Cluster *c, void **array, int64_t *space, int64_t wanted, int64_t size) {
    if (wanted <= *space) return true;
    int64_t more = *space < 8 ? 16 : *space * 2;
    if (more < wanted) more = wanted;
    void *moved = realloc(*array, (size_t)(more * size));
    if (!moved) {
        c->failed = true;
        return false;
    }
    *array = moved;
    *space = more;
    return true;
}

EXPORT int64_t cluster_sizeof(int what) {
    static const int64_t sizes[] = {sizeof(Coefficients), sizeof(Config), sizeof(Requests), sizeof(Totals), sizeof(Observation)};
    return what >= 0 && what < 5 ? sizes[what] : 0;
}

EXPORT Cluster *cluster_new(const Config *config, const Requests *requests) {
    Cluster *c = calloc(1, sizeof(Cluster));
    if (!c) return NULL;
    c->config = *config;
    c->requests = *requests;
    c->now = config->begin_ns;
    c->log2s = malloc((size_t)(config->max_running + 2) * sizeof(double));
    if (!c->log2s) {
        free(c);
        return NULL;
    }
    for (int64_t n = 1; n <= config->max_running + 1; n++) c->log2s[n] = log2((double)n);
    c->log2s[0] = 0.0;
    return c;
}

static void release(Instance *in) {
    free(in->waiting);
    free(in->running);
    free(in->chunks);
    free(in->gaps);
    free(in->firsts);
    memset(in, 0, sizeof(Instance));
}

EXPORT void cluster_free(Cluster *c) {
    if (!c) return;
    for (int32_t slot = 0; slot < c->instance_count; slot++) release(&c->instances[slot]);
    for (int k = 0; k < CLASSES; k++) {
        free(c->routes[k].slots);
        free(c->routes[k].pool_ends);
    }
    free(c->instances);
    free(c->unplaced);
    free(c->moves);
    free(c->decodes);
    free(c->log2s);
    free(c->tick_j);
    free(c->tick_gpu_s);
    free(c->scratch);
    free(c);
}

/* Begin an instance; its slot, or -1 without memory. It serves from `ready_ns` on and draws from now on. */
EXPORT int32_t cluster_begin(Cluster *c, int32_t serial, int32_t tp, int role, int64_t kv_tokens, int64_t chunk_tokens, const Coefficients *at,
                             double park_idle_w, ns_t ready_ns) {
    int32_t slot = 0;
    while (slot < c->instance_count && c->instances[slot].phase != FREE) slot++;
    if (slot == c->instance_count) {
        Instance *more = realloc(c->instances, (size_t)(slot + 1) * sizeof(Instance));
        if (!more) return -1;
        c->instances = more;
        c->instance_count++;
    }
    Instance *in = &c->instances[slot];
    memset(in, 0, sizeof(Instance));
    in->running = malloc((size_t)c->config.max_running * sizeof(Running));
    if (!in->running) return -1;
    in->phase = STARTING;
    in->serial = serial;
    in->tp = tp;
    in->role = (Role)role;
    c->apart |= role != BOTH;
    in->kv_tokens = kv_tokens;
    in->chunk_tokens = chunk_tokens;
    in->now = in->next = *at;
    in->park_idle_w = park_idle_w;
    in->ready_ns = ready_ns;
    in->limit_ns = NEVER;
    in->charged_ns = in->at = c->now;
    in->partial = -1;
    c->special_known = false;
    return slot;
}

static void serve(Cluster *c, Instance *in, ns_t now) {
    meter_idle(c, in, now);
    in->phase = SERVING;
    in->idle = true;
    in->idle_since = in->free_ns = in->at = now;
}

static void stop(Cluster *c, Instance *in, ns_t now) {
    meter_idle(c, in, now);
    in->phase = STOPPED;
    in->stop_ns = now;
}

/* Wait requests of a slot that is going away for another one, in the order of arrival. */
static void scatter(Cluster *c, int32_t slot, ns_t now) {
    Instance *in = &c->instances[slot];
    int64_t count = in->waiting_count;
    if (count == 0) return;
    int64_t *moving = malloc((size_t)count * sizeof(int64_t));
    if (!moving) {
        c->failed = true;
        return;
    }
    count = engine_take_waiting(c, in, NEVER, moving, count);
    for (int64_t n = 0; n < count; n++) {
        int32_t to = route(c, moving[n], slot, now);
        bool moves = to >= 0 && need_on(c, &c->instances[to], moving[n]) <= c->instances[to].kv_tokens;
        if (moves) c->totals.resteered++;
        if (moves) engine_enqueue(c, &c->instances[to], moving[n], now);
        else if (in->phase == DRAINING && in->limit_ns <= now) place(c, moving[n], now);
        else engine_enqueue(c, in, moving[n], now);
    }
    free(moving);
}

static void find_special(Cluster *c) {
    c->special_ns = move_next_event(c);
    for (int32_t slot = 0; slot < c->instance_count; slot++) {
        const Instance *in = &c->instances[slot];
        ns_t at = NEVER;
        if (in->phase == STARTING) at = in->ready_ns;
        if (in->phase == SERVING && (in->role == PREFILL || (in->role == DECODE && c->moves_waiting > 0))) at = engine_next_event(in);
        if (in->phase == DRAINING) {
            at = engine_next_event(in);
            if (in->limit_ns < at) at = in->limit_ns;
        }
        if (at < c->special_ns) c->special_ns = at;
    }
    c->special_known = true;
}

/* Let instances become ready and drained ones end at `now`; whether any ended. */
static bool special(Cluster *c, ns_t now) {
    bool ready = false, ended = false;
    c->special_known = false;
    if (c->apart) moves_run(c, now);
    for (int32_t slot = 0; slot < c->instance_count; slot++) {
        Instance *in = &c->instances[slot];
        if (in->phase == STARTING && in->ready_ns <= now) {
            serve(c, in, now);
            ready = true;
        } else if (in->phase == DRAINING) {
            engine_run(c, in, now);
            if (!engine_empty(in) && in->limit_ns <= now) {
                scatter(c, slot, now);
                if (c->apart) moves_cut(c, slot, now);
                engine_cut(c, in, now);
            }
            if (engine_empty(in)) {
                stop(c, in, now);
                ended = true;
            }
        }
    }
    if (ready) place_waiting(c, now);
    if (c->moves_waiting > 0) moves_place(c, now);
    return ended;
}

static void arrive(Cluster *c, int64_t request) {
    const Requests *r = &c->requests;
    c->totals.arrived++;
    if (r->prompt_tokens[request] > c->config.context_limit) {
        reject(c, request, c->now, &c->totals.rejected_context);
        return;
    }
    int64_t *load = c->class_loads[r->routed_class[request]];
    load[0]++;
    load[1] += r->prompt_tokens[request];
    load[2] += r->predicted_tokens[request];
    place(c, request, c->now);
}

/* Let time pass until `until`; 1: instances ended at the time that it is now, call again; 0: done; -1: out of memory. */
EXPORT int cluster_advance(Cluster *c, ns_t until) {
    while (!c->failed) {
        if (!c->special_known) find_special(c);
        ns_t arrival = c->next < c->requests.count ? c->requests.arrival_ns[c->next] : NEVER;
        ns_t at = arrival < c->special_ns ? arrival : c->special_ns;
        if (at > until) {
            c->now = until;
            return 0;
        }
        if (at > c->now) c->now = at;
        if (c->special_ns <= arrival) {
            if (special(c, c->now)) return 1;
        } else {
            arrive(c, c->next++);
        }
    }
    return -1;
}

EXPORT ns_t cluster_now(const Cluster *c) { return c->now; }
EXPORT int cluster_phase(const Cluster *c, int32_t slot) { return (int)c->instances[slot].phase; }
EXPORT ns_t cluster_stopped_ns(const Cluster *c, int32_t slot) { return c->instances[slot].stop_ns; }
EXPORT void cluster_release(Cluster *c, int32_t slot) { release(&c->instances[slot]); }

EXPORT void cluster_set_clock(Cluster *c, int32_t slot, const Coefficients *to) {
    engine_run(c, &c->instances[slot], c->now);
    engine_set_clock(c, &c->instances[slot], to, c->now);
    c->special_known = false;
}

/* Take an instance out of the router; it ends when it is empty. One that has not begun to serve ends at once. */
EXPORT void cluster_drain(Cluster *c, int32_t slot) {
    Instance *in = &c->instances[slot];
    engine_run(c, in, c->now);
    c->special_known = false;
    if (in->phase == SERVING && !engine_empty(in)) {
        in->phase = DRAINING;
        in->limit_ns = c->config.drain_limit_ns == NEVER ? NEVER : c->now + c->config.drain_limit_ns;
        return;
    }
    stop(c, in, c->now);
}

/* Let a draining instance serve again. */
EXPORT void cluster_keep(Cluster *c, int32_t slot) {
    Instance *in = &c->instances[slot];
    engine_run(c, in, c->now);
    in->phase = SERVING;
    in->limit_ns = NEVER;
    c->special_known = false;
}

EXPORT void cluster_reorder(Cluster *c, int32_t slot, int by_deadline) {
    engine_run(c, &c->instances[slot], c->now);
    engine_reorder(c, &c->instances[slot], by_deadline != 0);
}

EXPORT void cluster_resteer(Cluster *c, int32_t slot) {
    engine_run(c, &c->instances[slot], c->now);
    scatter(c, slot, c->now);
}

/* Reject what has waited there for longer than `age_ns`; return how many. */
EXPORT int64_t cluster_shed(Cluster *c, int32_t slot, ns_t age_ns) {
    Instance *in = &c->instances[slot];
    engine_run(c, in, c->now);
    int64_t count = in->waiting_count;
    int64_t *gone = malloc((size_t)(count + 1) * sizeof(int64_t));
    if (!gone) return -1;
    count = engine_take_waiting(c, in, c->now - age_ns, gone, count);
    for (int64_t n = 0; n < count; n++) reject(c, gone[n], c->now, &c->totals.rejected_shed);
    free(gone);
    return count;
}

/* Replace the route of a class: `slots` of its pools one after another, pool n ends before `pool_ends[n]`. */
EXPORT int cluster_route(Cluster *c, int klass, int32_t pools, const int32_t *pool_ends, int32_t count, const int32_t *slots) {
    Route *way = &c->routes[klass];
    int32_t *ends = malloc((size_t)(pools + 1) * sizeof(int32_t)), *copy = malloc((size_t)(count + 1) * sizeof(int32_t));
    if (!ends || !copy) {
        free(ends);
        free(copy);
        return -1;
    }
    memcpy(ends, pool_ends, (size_t)pools * sizeof(int32_t));
    memcpy(copy, slots, (size_t)count * sizeof(int32_t));
    free(way->slots);
    free(way->pool_ends);
    *way = (Route){copy, ends, pools};
    return 0;
}

/* Say which instances only decode, in the plan's order. */
EXPORT int cluster_decodes(Cluster *c, int32_t count, const int32_t *slots) {
    int32_t *copy = malloc((size_t)(count + 1) * sizeof(int32_t));
    if (!copy) return -1;
    memcpy(copy, slots, (size_t)count * sizeof(int32_t));
    free(c->decodes);
    c->decodes = copy;
    c->decode_count = count;
    return 0;
}

/* KV caches move within a pool. */
EXPORT void cluster_pool(Cluster *c, int32_t slot, int32_t pool) { c->instances[slot].pool = pool; }

EXPORT void cluster_place_waiting(Cluster *c) {
    place_waiting(c, c->now);
    if (c->moves_waiting > 0) moves_place(c, c->now);
    c->special_known = false;
}

EXPORT void cluster_observe(Cluster *c, int32_t slot, Observation *out) {
    Instance *in = &c->instances[slot];
    engine_run(c, in, c->now);
    if (in->flying) {
        meter(c, in, in->charged_ns, c->now, in->watts);
        in->charged_ns = c->now;
    } else {
        meter_idle(c, in, c->now);
    }
    ns_t oldest = c->now;
    bool decodes = in->role == DECODE; /* what waits there has its first token */
    for (int64_t n = 0; n < in->chunk_count; n++)
        if (c->requests.arrival_ns[in->chunks[n].request] < oldest) oldest = c->requests.arrival_ns[in->chunks[n].request];
    if (in->partial >= 0 && c->requests.arrival_ns[in->partial] < oldest) oldest = c->requests.arrival_ns[in->partial];
    for (int64_t n = 0; n < (decodes ? 0 : in->by_deadline ? in->waiting_count : in->waiting_count > 0); n++)
        if (c->requests.arrival_ns[in->waiting[n].request] < oldest) oldest = c->requests.arrival_ns[in->waiting[n].request];
    *out = (Observation){
        .running = in->running_count,
        .queued = in->waiting_count + in->in_prefill + in->incoming,
        .queued_prompt_tokens = in->outstanding - in->computed,
        .kv_used_ratio = (double)in->kv_reserved / (double)in->kv_tokens,
        .oldest_wait_s = seconds(c->now - oldest),
        .requests = (double)in->seen_requests,
        .prompt_tokens = (double)in->seen_prompt_tokens,
        .output_tokens = (double)in->seen_output_tokens,
        .ttft_p99_s = recent_ttft_p99_s(c, in),
        .tbt_p99_s = recent_tbt_p99_s(c, in),
        .parked = in->idle && c->config.park_after_ns != NEVER && c->now - in->idle_since > c->config.park_after_ns,
        .kv_reserved = in->kv_reserved,
        .outstanding = in->outstanding,
    };
    in->seen_requests = in->seen_prompt_tokens = in->seen_output_tokens = 0;
}

/* Copy requests, prompt and predicted output tokens that arrived by class since the last call. */
EXPORT void cluster_arrivals(Cluster *c, int64_t *out) {
    memcpy(out, c->class_loads, sizeof(c->class_loads));
    memset(c->class_loads, 0, sizeof(c->class_loads));
}

EXPORT void cluster_totals(const Cluster *c, Totals *out) { *out = c->totals; }

/* Count everything up to now, iterations in progress by their part; nothing can be changed afterwards. */
EXPORT void cluster_close(Cluster *c) {
    if (c->closed) return;
    c->closed = true;
    for (int32_t slot = 0; slot < c->instance_count; slot++) {
        Instance *in = &c->instances[slot];
        if (in->phase == FREE || in->phase == STOPPED) continue;
        engine_run(c, in, c->now);
        engine_settle(c, in, c->now);
    }
}

/* Count GPUs that belong to no instance and keep the weights for the next one. */
EXPORT void cluster_hold(Cluster *c, int32_t gpus, ns_t from, ns_t until, double idle_w) {
    Instance held = {.tp = gpus};
    if (until <= from) return;
    c->totals.idle_j += idle_w * gpus * seconds(until - from);
    meter(c, &held, from, until, idle_w * gpus);
}

EXPORT int cluster_failed(const Cluster *c) { return c->failed; }

/* Copy the joules and GPU seconds of up to `ticks` ticks. */
EXPORT void cluster_power(const Cluster *c, int64_t ticks, double *joules, double *gpu_s) {
    int64_t count = ticks < c->ticks ? ticks : c->ticks;
    if (count == 0) return;
    memcpy(joules, c->tick_j, (size_t)count * sizeof(double));
    memcpy(gpu_s, c->tick_gpu_s, (size_t)count * sizeof(double));
}
