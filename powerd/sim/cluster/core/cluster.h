/* A fleet of LLM engines with continuous batching, iteration by iteration.
 *
 * House rules: time is integer nanoseconds, so that a jump over n equal iterations lands exactly where n steps would; an
 * iteration in progress changes nothing that others see before its end; what arrives at the very moment at which an iteration
 * begins is in it; memory is bounded by what is unfinished, never by what has passed (but for one float a tick of the power).
 *
 * Every instance is simulated lazily, on its own, up to the moment at which somebody looks at it. */
#ifndef POWERD_CLUSTER_H
#define POWERD_CLUSTER_H

#include <stdbool.h>
#include <stdint.h>

#define CLASSES 9
#define NEVER INT64_MAX
#define EXPORT __attribute__((visibility("default")))

typedef int64_t ns_t;

typedef struct { /* one instance at one tensor parallelism and clock; watts are of one GPU */
    double prefill_fixed_s, prefill_token_s, decode_fixed_s, decode_request_s;
    double prefill_w, decode_w, decode_log2_w, idle_w;
} Coefficients;

typedef struct {
    int64_t max_running;
    ns_t clock_set_ns, park_after_ns /* NEVER: none */, wake_ns, drain_limit_ns /* NEVER: none */;
    ns_t tick_ns, recent_ns, begin_ns;
    int64_t context_limit;
    ns_t ttft_slo_ns[CLASSES];
    double move_fixed_s, move_token_bytes, move_bytes_per_s; /* of a KV cache from a prefill to a decode instance */
} Config;

typedef struct { /* arrays of the caller, one element a request */
    int64_t count;
    const ns_t *arrival_ns;
    const int32_t *prompt_tokens, *output_tokens, *predicted_tokens;
    const uint8_t *routed_class;
    double *ttft_s, *tbt_p99_s, *finish_s, *energy_j;
    uint8_t *rejected;
    int32_t *instance;
} Requests;

typedef struct { /* what happened so far */
    int64_t arrived, finished, rejected_context, rejected_shed, rejected_cut;
    int64_t waited, resteered, clock_sets, parks, wakes, iterations, prompt_tokens, output_tokens;
    int64_t moves, move_waits; /* KV caches that set off; those that had to wait for a place first */
    double energy_j, idle_j, gpu_s;
} Totals;

typedef struct { /* what an engine's own metrics would say */
    int64_t running, queued, queued_prompt_tokens;
    double kv_used_ratio, oldest_wait_s;
    double requests, prompt_tokens, output_tokens; /* first tokens, prompt and output tokens since the last look */
    double ttft_p99_s, tbt_p99_s;                  /* NaN: none in the window */
    int64_t parked, kv_reserved, outstanding;
} Observation;

typedef enum { FREE, STARTING, SERVING, DRAINING, STOPPED } Phase;
typedef enum { BOTH, PREFILL, DECODE } Role;

typedef struct { int64_t key, sequence, request; } Waiting;
typedef struct { int64_t finish_step, request, log_from; double joined_j; ns_t before_ns; } Running; /* before: of its first gap, elsewhere */
typedef struct { int64_t request; int32_t from, to; ns_t end; } Move; /* of a KV cache; to < 0: it waits for a place */
typedef struct { int64_t request, tokens; bool last; } Chunk;
typedef struct { ns_t duration, end; int64_t count, batch; } Gap;     /* a run of equal iterations with decoding requests */
typedef struct { ns_t at; double ttft_s; } First;
typedef struct { double value; int64_t weight; } Weighted;

typedef struct {
    Phase phase;
    Role role;
    int32_t serial, tp, pool;
    int64_t kv_tokens, chunk_tokens;
    Coefficients now, next; /* in force, and as last asked for: from the next iteration on */
    double park_idle_w;
    ns_t ready_ns, limit_ns, stop_ns;
    bool by_deadline;

    /* The timeline: in flight, at a boundary, or idle. */
    bool flying, idle;
    ns_t at, free_ns, idle_since, charged_ns, stall_ns;

    /* The iterations in flight: `left` equal ones, of which the first began at `start`. */
    ns_t start, span;
    int64_t left, decoding, prompt_tokens;
    double watts, prefill_j, decode_j; /* of the instance; joules of one iteration */
    Chunk *chunks;
    int64_t chunk_count, chunk_space;

    /* The work. */
    Waiting *waiting; /* a heap */
    int64_t waiting_count, waiting_space;
    Running *running; /* a heap */
    int64_t running_count;
    int64_t partial, partial_left; /* the request whose prompt is begun, or -1, and what no iteration has taken of it yet */
    int64_t computed;              /* tokens of it that are computed */
    int64_t in_prefill;            /* requests that are admitted and without a first token */
    int64_t step;                  /* iterations with decoding requests so far */
    double decoded_j;              /* what one request that decoded in all of them would have used */
    int64_t kv_reserved;           /* prompt and answer of what is admitted; of an instance that only prefills: prompts */
    int64_t held;                  /* prefill: requests with a first token whose KV cache is still here */
    int64_t incoming;              /* decode: requests whose KV cache is on its way; their place is reserved */
    int64_t outstanding;           /* prompt tokens of requests without a first token, whole prompts */

    /* Token gaps of whatever still runs, and of the recent past. */
    Gap *gaps;
    int64_t gap_base, gap_count, gap_space;
    bool gap_open;
    First *firsts;
    int64_t first_count, first_space;
    int64_t seen_requests, seen_prompt_tokens, seen_output_tokens;
} Instance;

typedef struct { /* for one class: its pools in order, each a list of instances in the plan's order */
    int32_t *slots, *pool_ends;
    int32_t pools;
} Route;

typedef struct {
    Config config;
    Requests requests;
    Totals totals;
    Instance *instances;
    int32_t instance_count;
    Route routes[CLASSES];
    ns_t now, special_ns;
    bool special_known, closed, failed; /* failed: out of memory */
    int64_t next, sequence;
    int64_t *unplaced;
    int64_t unplaced_count, unplaced_space;
    bool apart;   /* there is, or was, an instance of one phase only */
    Move *moves;  /* in the order of first tokens */
    int64_t move_count, move_space, moves_waiting;
    int32_t *decodes, decode_count; /* instances that only decode, in the plan's order */
    double *log2s;
    double *tick_j, *tick_gpu_s;
    int64_t ticks, tick_space;
    Weighted *scratch;
    int64_t scratch_space;
    int64_t class_loads[CLASSES][3]; /* requests, prompt and predicted output tokens since the last look */
} Cluster;

/* Grow an array of `size`-byte elements to hold `wanted`; false and `failed` when there is no memory. */
bool grow(Cluster *c, void **array, int64_t *space, int64_t wanted, int64_t size);

/* meter.c */
void meter(Cluster *c, const Instance *in, ns_t from, ns_t until, double watts);
void meter_idle(Cluster *c, Instance *in, ns_t until);

/* gaps.c */
void gap_log(Cluster *c, Instance *in, ns_t end, ns_t duration, int64_t count, int64_t batch);
double gap_p99_s(Cluster *c, const Instance *in, int64_t from, int64_t gaps, ns_t before_ns);
double recent_tbt_p99_s(Cluster *c, const Instance *in);
double recent_ttft_p99_s(Cluster *c, Instance *in);

/* engine.c */
void engine_run(Cluster *c, Instance *in, ns_t until);
void engine_enqueue(Cluster *c, Instance *in, int64_t request, ns_t now);
void engine_set_clock(Cluster *c, Instance *in, const Coefficients *to, ns_t now);
void engine_reorder(Cluster *c, Instance *in, bool by_deadline);
int64_t engine_take_waiting(Cluster *c, Instance *in, ns_t older_than, int64_t *out, int64_t space);
void engine_cut(Cluster *c, Instance *in, ns_t now);
void engine_settle(Cluster *c, Instance *in, ns_t now);
bool engine_empty(const Instance *in);
int64_t engine_unfinished(const Instance *in);
ns_t engine_next_event(const Instance *in);
void engine_release(Cluster *c, Instance *in, int64_t request, ns_t now);

/* router.c */
int32_t route(Cluster *c, int64_t request, int32_t except, ns_t now);
void place(Cluster *c, int64_t request, ns_t now);
void place_waiting(Cluster *c, ns_t now);
void reject(Cluster *c, int64_t request, ns_t now, int64_t *reason);

/* moves.c */
void move_begin(Cluster *c, const Instance *from, int64_t request);
ns_t move_next_event(const Cluster *c);
void moves_run(Cluster *c, ns_t now);
void moves_place(Cluster *c, ns_t now);
void moves_cut(Cluster *c, int32_t slot, ns_t now);

static inline int64_t need(const Cluster *c, int64_t request) {
    return (int64_t)c->requests.prompt_tokens[request] + c->requests.output_tokens[request];
}

/* What a request takes of an instance's KV cache. */
static inline int64_t need_on(const Cluster *c, const Instance *in, int64_t request) {
    return in->role == PREFILL ? c->requests.prompt_tokens[request] : need(c, request);
}

static inline ns_t rounded_ns(double seconds) { return (ns_t)(seconds * 1e9 + 0.5); }
static inline double seconds(ns_t ns) { return (double)ns * 1e-9; }

#endif
