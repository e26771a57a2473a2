/* KV caches on their way from instances that prefill to instances that decode, within a pool.
 *
 * A request keeps its place on both sides while its KV cache moves. It goes to the instance with the fewest requests, on their way or
 * there; ties: the least KV cache reserved, then the plan's order. Where none has room it waits where it is, in the order of first
 * tokens, and nobody of its pool overtakes it. */
#include <string.h>

#include "cluster.h"

static ns_t first_ns(const Cluster *c, int64_t request) { return c->requests.arrival_ns[request] + rounded_ns(c->requests.ttft_s[request]); }

/* A first token has come: its KV cache waits for a place. */
void move_begin(Cluster *c, const Instance *from, int64_t request) {
    if (!grow(c, (void **)&c->moves, &c->move_space, c->move_count + 1, sizeof(Move))) return;
    int64_t at = c->move_count++;
    ns_t first = first_ns(c, request);
    for (; at > 0; at--) {
        int64_t before = c->moves[at - 1].request;
        ns_t before_ns = first_ns(c, before);
        if (before_ns < first || (before_ns == first && before < request)) break;
        c->moves[at] = c->moves[at - 1];
    }
    c->moves[at] = (Move){request, (int32_t)(from - c->instances), -1, NEVER};
    c->moves_waiting++;
}

static void drop(Cluster *c, int64_t at) {
    memmove(&c->moves[at], &c->moves[at + 1], (size_t)(--c->move_count - at) * sizeof(Move));
}

ns_t move_next_event(const Cluster *c) {
    ns_t next = NEVER;
    for (int64_t n = 0; n < c->move_count; n++)
        if (c->moves[n].end < next) next = c->moves[n].end;
    return next;
}

/* Let the instances of one phase come to `now`, and KV caches arrive whose way ends then. */
void moves_run(Cluster *c, ns_t now) {
    for (int32_t slot = 0; slot < c->instance_count; slot++)
        if (c->instances[slot].role == PREFILL || (c->instances[slot].role == DECODE && c->moves_waiting > 0)) engine_run(c, &c->instances[slot], now);
    for (int64_t n = 0; n < c->move_count;) {
        Move move = c->moves[n];
        if (move.end > now) {
            n++;
            continue;
        }
        drop(c, n);
        Instance *to = &c->instances[move.to];
        engine_release(c, &c->instances[move.from], move.request, now);
        engine_run(c, to, now);
        to->incoming--;
        engine_enqueue(c, to, move.request, now);
    }
}

static bool lighter(const Instance *a, const Instance *b) {
    int64_t have = engine_unfinished(a), other = engine_unfinished(b);
    return have != other ? have < other : a->kv_reserved < b->kv_reserved;
}

/* The instance that takes a request, or -1; `largest`: the most KV cache that any of the pool's has. */
static int32_t choose(Cluster *c, const Move *move, ns_t now, int64_t *largest) {
    int32_t best = -1;
    *largest = 0;
    for (int32_t n = 0; n < c->decode_count; n++) {
        Instance *in = &c->instances[c->decodes[n]];
        if (in->pool != c->instances[move->from].pool || in->phase > SERVING) continue;
        if (in->kv_tokens > *largest) *largest = in->kv_tokens;
        if (in->phase != SERVING) continue;
        engine_run(c, in, now);
        if (engine_unfinished(in) >= c->config.max_running || in->kv_reserved + need(c, move->request) > in->kv_tokens) continue;
        if (best < 0 || lighter(in, &c->instances[best])) best = c->decodes[n];
    }
    return best;
}

static ns_t lasts_ns(const Cluster *c, int64_t request) {
    const Config *config = &c->config;
    return rounded_ns(config->move_fixed_s + c->requests.prompt_tokens[request] * config->move_token_bytes / config->move_bytes_per_s);
}

/* Let KV caches set off that find a place now. */
void moves_place(Cluster *c, ns_t now) {
    for (int64_t n = 0; n < c->move_count;) {
        Move *move = &c->moves[n];
        int32_t pool = c->instances[move->from].pool;
        bool behind = move->to >= 0; /* it has set off, or somebody of its pool waits before it */
        for (int64_t k = 0; k < n && !behind; k++) behind = c->moves[k].to < 0 && c->instances[c->moves[k].from].pool == pool;
        if (behind) {
            n++;
            continue;
        }
        int64_t largest;
        int32_t to = choose(c, move, now, &largest);
        if (to >= 0) {
            c->instances[to].kv_reserved += need(c, move->request);
            c->instances[to].incoming++;
            move->to = to;
            move->end = now + lasts_ns(c, move->request);
            c->moves_waiting--;
            c->totals.moves++;
            c->totals.move_waits += now > first_ns(c, move->request);
        } else if (largest > 0 && need(c, move->request) > largest) { /* nobody there will ever have room for it */
            reject(c, move->request, now, &c->totals.rejected_context);
            engine_release(c, &c->instances[move->from], move->request, now);
            c->moves_waiting--;
            drop(c, n);
            continue;
        }
        n++;
    }
    c->special_known = false;
}

/* An instance is cut off: what is on its way from there is lost with it, what is on its way to there looks for another place. */
void moves_cut(Cluster *c, int32_t slot, ns_t now) {
    for (int64_t n = 0; n < c->move_count;) {
        Move *move = &c->moves[n];
        if (move->from != slot && move->to != slot) {
            n++;
            continue;
        }
        if (move->to >= 0) {
            c->instances[move->to].kv_reserved -= need(c, move->request);
            c->instances[move->to].incoming--;
        } else c->moves_waiting--;
        if (move->from == slot) {
            reject(c, move->request, now, &c->totals.rejected_cut);
            c->instances[slot].held--;
            drop(c, n);
            continue;
        }
        move->to = -1;
        move->end = NEVER;
        c->moves_waiting++;
        n++;
    }
}
