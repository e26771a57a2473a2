/* Which instance takes a request; the rule is written down in powerd/sim/cluster/__init__.py. */
#include <string.h>

#include "cluster.h"

/* The seconds until the first token of a request of `prompt` tokens, if it were sent there now. */
static double estimate_s(const Instance *in, int64_t prompt) {
    const Coefficients *k = &in->next;
    int64_t b = in->running_count, tokens = in->outstanding + prompt, room = in->chunk_tokens - b;
    int64_t iterations = (tokens + room - 1) / room;
    double fixed_s = b && k->decode_fixed_s > k->prefill_fixed_s ? k->decode_fixed_s : k->prefill_fixed_s;
    return (double)iterations * (fixed_s + k->decode_request_s * (double)b) + k->prefill_token_s * (double)tokens;
}

static bool fewer(const Instance *a, const Instance *b) {
    if (a->outstanding != b->outstanding) return a->outstanding < b->outstanding;
    return engine_unfinished(a) * b->kv_tokens < engine_unfinished(b) * a->kv_tokens;
}

int32_t route(Cluster *c, int64_t request, int32_t except, ns_t now) {
    int klass = c->requests.routed_class[request];
    const Route *way = &c->routes[klass];
    double slo_s = seconds(c->config.ttft_slo_ns[klass]), soonest_s = 0.0;
    int32_t soonest = -1, n = 0;
    for (int32_t pool = 0; pool < way->pools; pool++) {
        int32_t best = -1;
        for (; n < way->pool_ends[pool]; n++) {
            int32_t slot = way->slots[n];
            Instance *in = &c->instances[slot];
            if (in->phase != SERVING || slot == except) continue;
            engine_run(c, in, now);
            double wait_s = estimate_s(in, c->requests.prompt_tokens[request]);
            if (wait_s <= slo_s) {
                if (best < 0 || fewer(in, &c->instances[best])) best = slot;
            } else if (soonest < 0 || wait_s < soonest_s) {
                soonest = slot;
                soonest_s = wait_s;
            }
        }
        if (best >= 0) return best;
    }
    return soonest;
}

void reject(Cluster *c, int64_t request, ns_t now, int64_t *reason) {
    c->requests.rejected[request] = 1;
    c->requests.finish_s[request] = seconds(now);
    (*reason)++;
}

static bool try_place(Cluster *c, int64_t request, ns_t now) {
    int32_t slot = route(c, request, -1, now);
    if (slot < 0) return false;
    Instance *in = &c->instances[slot];
    if (need_on(c, in, request) > in->kv_tokens) reject(c, request, now, &c->totals.rejected_context); /* the engine refuses it */
    else engine_enqueue(c, in, request, now);
    return true;
}

/* Send a request to an instance; where none serves its class it waits, in the order of arrival, until one does. */
void place(Cluster *c, int64_t request, ns_t now) {
    if (try_place(c, request, now)) return;
    if (!grow(c, (void **)&c->unplaced, &c->unplaced_space, c->unplaced_count + 1, sizeof(int64_t))) return;
    c->unplaced[c->unplaced_count++] = request;
    c->totals.waited++;
}

void place_waiting(Cluster *c, ns_t now) {
    int64_t kept = 0;
    for (int64_t n = 0; n < c->unplaced_count; n++)
        if (!try_place(c, c->unplaced[n], now)) c->unplaced[kept++] = c->unplaced[n];
    c->unplaced_count = kept;
}
