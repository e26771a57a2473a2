/* One engine: admission, chunked prefill, decode; iteration by iteration, equal ones at once.
 *
 * An iteration decodes one token of every running request and gives what is left of `chunk_tokens` to prompts, the one already
 * begun first, then the queue's head, as long as `max_running` and the KV cache allow. A request is admitted when its prompt and
 * its whole answer fit beside those of what is admitted already: nothing is ever preempted. Nobody overtakes the queue's head. */
#include <stdlib.h>
#include <string.h>

#include "cluster.h"

/* ---- two heaps ---- */

static bool sooner(const Waiting *a, const Waiting *b) { return a->key != b->key ? a->key < b->key : a->sequence < b->sequence; }

static void wait_down(Waiting *heap, int64_t count, int64_t at) {
    Waiting moved = heap[at];
    for (int64_t child; (child = 2 * at + 1) < count; at = child) {
        if (child + 1 < count && sooner(&heap[child + 1], &heap[child])) child++;
        if (!sooner(&heap[child], &moved)) break;
        heap[at] = heap[child];
    }
    heap[at] = moved;
}

static void wait_push(Cluster *c, Instance *in, Waiting item) {
    if (!grow(c, (void **)&in->waiting, &in->waiting_space, in->waiting_count + 1, sizeof(Waiting))) return;
    int64_t at = in->waiting_count++;
    for (int64_t parent; at > 0 && sooner(&item, &in->waiting[parent = (at - 1) / 2]); at = parent) in->waiting[at] = in->waiting[parent];
    in->waiting[at] = item;
}

static int64_t wait_pop(Instance *in) {
    int64_t request = in->waiting[0].request;
    in->waiting[0] = in->waiting[--in->waiting_count];
    if (in->waiting_count > 0) wait_down(in->waiting, in->waiting_count, 0);
    return request;
}

static bool earlier(const Running *a, const Running *b) {
    return a->finish_step != b->finish_step ? a->finish_step < b->finish_step : a->request < b->request;
}

static void run_push(Instance *in, Running item) { /* space for max_running is there */
    int64_t at = in->running_count++;
    for (int64_t parent; at > 0 && earlier(&item, &in->running[parent = (at - 1) / 2]); at = parent) in->running[at] = in->running[parent];
    in->running[at] = item;
}

static Running run_pop(Instance *in) {
    Running *heap = in->running, top = heap[0], moved = heap[--in->running_count];
    int64_t at = 0;
    for (int64_t child; (child = 2 * at + 1) < in->running_count; at = child) {
        if (child + 1 < in->running_count && earlier(&heap[child + 1], &heap[child])) child++;
        if (!earlier(&heap[child], &moved)) break;
        heap[at] = heap[child];
    }
    if (in->running_count > 0) heap[at] = moved;
    return top;
}

/* ---- requests ---- */

static void push_first(Cluster *c, Instance *in, ns_t at, double ttft_s) {
    if (in->first_count == in->first_space) {
        int64_t old = 0;
        while (old < in->first_count && in->firsts[old].at <= at - c->config.recent_ns) old++;
        in->first_count -= old;
        if (old > 0) memmove(in->firsts, in->firsts + old, (size_t)in->first_count * sizeof(First));
        if (in->first_count > in->first_space / 2 || in->first_space == 0)
            if (!grow(c, (void **)&in->firsts, &in->first_space, in->first_space + 1, sizeof(First))) return;
    }
    in->firsts[in->first_count++] = (First){at, ttft_s};
}

static void finish(Cluster *c, Instance *in, const Running *run) {
    int64_t r = run->request;
    c->requests.energy_j[r] += in->decoded_j - run->joined_j;
    c->requests.tbt_p99_s[r] = gap_p99_s(c, in, run->log_from, (int64_t)c->requests.output_tokens[r] - 1, run->before_ns);
    c->requests.finish_s[r] = seconds(in->at);
    in->kv_reserved -= need_on(c, in, r);
    c->totals.finished++;
}

static void first_token(Cluster *c, Instance *in, int64_t r) {
    double ttft_s = seconds(in->at - c->requests.arrival_ns[r]);
    Running run = {in->step + c->requests.output_tokens[r] - 1, r, in->gap_base + in->gap_count, in->decoded_j, 0};
    c->requests.ttft_s[r] = ttft_s;
    push_first(c, in, in->at, ttft_s);
    in->seen_requests++;
    in->seen_output_tokens++;
    c->totals.output_tokens++;
    in->outstanding -= c->requests.prompt_tokens[r];
    in->in_prefill--;
    in->gap_open = false; /* a run of gaps that began before it is not its own */
    if (c->requests.output_tokens[r] == 1) finish(c, in, &run);
    else if (in->role == PREFILL) {
        in->held++;
        move_begin(c, in, r);
    } else run_push(in, run);
}

/* ---- iterations ---- */

/* Let `count` iterations of those in flight end. */
static void land(Cluster *c, Instance *in, int64_t count) {
    ns_t end = in->start + count * in->span;
    meter(c, in, in->charged_ns, end, in->watts);
    in->charged_ns = end;
    c->totals.iterations += count;
    if (in->decoding > 0) {
        gap_log(c, in, end, in->span, count, in->decoding);
        in->step += count;
        in->decoded_j += (double)count * in->decode_j;
        in->seen_output_tokens += count * in->decoding;
        c->totals.output_tokens += count * in->decoding;
    }
    in->start = end;
    in->left -= count;
    if (in->left > 0) return;
    in->flying = false;
    in->at = end;
    in->seen_prompt_tokens += in->prompt_tokens;
    c->totals.prompt_tokens += in->prompt_tokens;
    while (in->running_count > 0 && in->running[0].finish_step == in->step) {
        Running run = run_pop(in);
        finish(c, in, &run);
    }
    for (int64_t n = 0; n < in->chunk_count; n++) {
        const Chunk *chunk = &in->chunks[n];
        c->requests.energy_j[chunk->request] += in->prefill_j * (double)chunk->tokens / (double)in->prompt_tokens;
        if (chunk->last) {
            in->computed = 0;
            first_token(c, in, chunk->request);
        } else {
            in->computed += chunk->tokens;
        }
    }
    in->chunk_count = 0;
}

static bool take_chunk(Cluster *c, Instance *in, int64_t tokens) {
    if (!grow(c, (void **)&in->chunks, &in->chunk_space, in->chunk_count + 1, sizeof(Chunk))) return false;
    in->partial_left -= tokens;
    in->prompt_tokens += tokens;
    in->chunks[in->chunk_count++] = (Chunk){in->partial, tokens, in->partial_left == 0};
    if (in->partial_left == 0) in->partial = -1;
    return true;
}

/* Let those join whose KV cache has come: their first gap began with the first token, elsewhere. */
static void join(Cluster *c, Instance *in) {
    if (in->waiting_count > 0) in->gap_open = false;
    while (in->waiting_count > 0) {
        int64_t r = wait_pop(in);
        ns_t first_ns = c->requests.arrival_ns[r] + rounded_ns(c->requests.ttft_s[r]);
        run_push(in, (Running){in->step + c->requests.output_tokens[r] - 1, r, in->gap_base + in->gap_count, in->decoded_j, in->at - first_ns});
        in->seen_requests++;
    }
}

static void fill(Cluster *c, Instance *in) {
    int64_t room = in->chunk_tokens - in->running_count;
    while (room > 0 && !c->failed) {
        if (in->partial < 0) {
            if (in->waiting_count == 0 || in->running_count + in->in_prefill >= c->config.max_running) return;
            int64_t head = in->waiting[0].request;
            if (in->kv_reserved + need_on(c, in, head) > in->kv_tokens) return;
            in->partial = wait_pop(in);
            in->partial_left = c->requests.prompt_tokens[head];
            in->kv_reserved += need_on(c, in, head);
            in->in_prefill++;
        }
        int64_t tokens = in->partial_left < room ? in->partial_left : room;
        if (!take_chunk(c, in, tokens)) return;
        room -= tokens;
    }
}

/* Begin what comes next at the boundary `at`: an iteration, several equal ones, or idleness. */
static void take_off(Cluster *c, Instance *in) {
    in->now = in->next;
    in->prompt_tokens = 0;
    if (in->role == DECODE) join(c, in);
    else fill(c, in);
    int64_t b = in->running_count, p = in->prompt_tokens;
    if (b == 0 && p == 0) {
        meter_idle(c, in, in->at);
        in->idle = true;
        in->idle_since = in->at;
        in->free_ns = in->at + in->stall_ns;
        in->stall_ns = 0;
        return;
    }
    meter_idle(c, in, in->at); /* what passed between an arrival and the begin: a clock set while idle, a wake-up */
    const Coefficients *k = &in->now;
    double decode_s = b ? k->decode_fixed_s : 0.0, prefill_fixed_s = p ? k->prefill_fixed_s : 0.0;
    double total_s = (decode_s > prefill_fixed_s ? decode_s : prefill_fixed_s) + k->prefill_token_s * (double)p + k->decode_request_s * (double)b;
    double prefill_s = k->prefill_token_s * (double)p + (b || !p ? 0.0 : k->prefill_fixed_s);
    double decoding_w = k->decode_w + k->decode_log2_w * c->log2s[b + 1];
    double prompt_j = in->tp * k->prefill_w * prefill_s;
    double rest_j = in->tp * decoding_w * (total_s - prefill_s + seconds(in->stall_ns));
    in->span = rounded_ns(total_s) + in->stall_ns;
    if (in->span < 1) in->span = 1;
    in->watts = (prompt_j + rest_j) / seconds(in->span);
    in->decoding = b;
    in->prefill_j = b ? prompt_j : prompt_j + rest_j;
    in->decode_j = b ? rest_j / (double)b : 0.0;
    in->left = p || in->stall_ns ? 1 : in->running[0].finish_step - in->step;
    in->start = in->at;
    in->stall_ns = 0;
    in->flying = true;
}

/* Simulate all that ends by `until` and all that begins before it. */
void engine_run(Cluster *c, Instance *in, ns_t until) {
    if (in->phase != SERVING && in->phase != DRAINING) return;
    while (!c->failed) {
        if (in->flying) {
            if (until - in->start < in->span) return;
            int64_t ended = (until - in->start) / in->span;
            land(c, in, ended < in->left ? ended : in->left);
            if (in->flying) {
                if (in->start == until) { /* at a boundary: what happens now is in the next iteration */
                    in->flying = false;
                    in->at = until;
                    in->left = 0;
                }
                return;
            }
        } else {
            if (in->idle || in->at >= until) return;
            take_off(c, in);
        }
    }
}

/* End a stretch of equal iterations with the one in progress: something happened that the next one has to know. */
static void cut_stretch(Instance *in) {
    if (in->flying) in->left = 1;
}

static void wake(Cluster *c, Instance *in, ns_t now) {
    int64_t wakes = c->config.park_after_ns != NEVER && now - in->idle_since > c->config.park_after_ns;
    meter_idle(c, in, now);
    in->at = (in->free_ns > now ? in->free_ns : now) + (wakes ? c->config.wake_ns : 0);
    in->idle = false;
    c->totals.wakes += wakes;
}

void engine_enqueue(Cluster *c, Instance *in, int64_t request, ns_t now) {
    if (in->idle) wake(c, in, now);
    cut_stretch(in);
    if (in->role != BOTH) c->special_known = false;
    int64_t sequence = c->sequence++;
    ns_t deadline = c->requests.arrival_ns[request] + c->config.ttft_slo_ns[c->requests.routed_class[request]];
    if (in->role != DECODE) in->outstanding += c->requests.prompt_tokens[request];
    c->requests.instance[request] = in->serial;
    wait_push(c, in, (Waiting){in->by_deadline ? deadline : sequence, sequence, request});
}

/* The KV cache of a request that decodes elsewhere has left; the queue's head may have waited for its place. */
void engine_release(Cluster *c, Instance *in, int64_t request, ns_t now) {
    in->kv_reserved -= need_on(c, in, request);
    in->held--;
    if (in->idle && in->waiting_count > 0) wake(c, in, now);
}

/* Ask for another clock: at once when idle, with the next iteration when not; both cost `clock_set_ns`. */
void engine_set_clock(Cluster *c, Instance *in, const Coefficients *to, ns_t now) {
    if (in->phase == STARTING || in->idle) meter_idle(c, in, now);
    if (in->phase == STARTING) in->now = *to;
    else if (in->idle) in->free_ns = now + c->config.clock_set_ns;
    else in->stall_ns += c->config.clock_set_ns;
    in->next = *to;
    cut_stretch(in);
    c->totals.clock_sets++;
}

void engine_reorder(Cluster *c, Instance *in, bool by_deadline) {
    if (in->by_deadline == by_deadline) return;
    in->by_deadline = by_deadline;
    cut_stretch(in);
    for (int64_t n = 0; n < in->waiting_count; n++) {
        Waiting *w = &in->waiting[n];
        ns_t slo = c->config.ttft_slo_ns[c->requests.routed_class[w->request]];
        w->key = by_deadline ? c->requests.arrival_ns[w->request] + slo : w->sequence;
    }
    for (int64_t n = in->waiting_count / 2; n-- > 0;) wait_down(in->waiting, in->waiting_count, n);
}

static int oldest_first(const void *a, const void *b) {
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x > y) - (x < y);
}

/* Take those out of the queue that arrived before `older_than`, in the order of arrival; return how many. */
int64_t engine_take_waiting(Cluster *c, Instance *in, ns_t older_than, int64_t *out, int64_t space) {
    int64_t taken = 0, kept = 0;
    if (in->role == DECODE) return 0; /* their KV cache is here and nowhere else */
    for (int64_t n = 0; n < in->waiting_count; n++) {
        int64_t r = in->waiting[n].request;
        if (c->requests.arrival_ns[r] < older_than && taken < space) {
            in->outstanding -= c->requests.prompt_tokens[r];
            out[taken++] = r;
        } else {
            in->waiting[kept++] = in->waiting[n];
        }
    }
    in->waiting_count = kept;
    for (int64_t n = kept / 2; n-- > 0;) wait_down(in->waiting, kept, n);
    qsort(out, (size_t)taken, sizeof(int64_t), oldest_first);
    if (taken > 0) cut_stretch(in);
    return taken;
}

int64_t engine_unfinished(const Instance *in) { return in->waiting_count + in->in_prefill + in->running_count + in->held + in->incoming; }

bool engine_empty(const Instance *in) { return engine_unfinished(in) == 0 && !in->flying; }

/* The moment at which something can change without anybody's doing. */
ns_t engine_next_event(const Instance *in) {
    if (in->flying) return in->start + in->left * in->span;
    if (engine_unfinished(in) == 0 && in->phase == DRAINING) return in->at;
    return in->idle ? NEVER : in->at + 1; /* one nanosecond on, the iteration has begun */
}

/* Count an iteration in progress, and what running requests used so far, up to `now`. */
void engine_settle(Cluster *c, Instance *in, ns_t now) {
    double part = 0.0;
    if (in->flying) {
        meter(c, in, in->charged_ns, now, in->watts);
        in->charged_ns = now;
        part = (double)(now - in->start) / (double)in->span;
    } else {
        meter_idle(c, in, now);
    }
    for (int64_t n = 0; n < in->chunk_count; n++)
        c->requests.energy_j[in->chunks[n].request] += part * in->prefill_j * (double)in->chunks[n].tokens / (double)in->prompt_tokens;
    for (int64_t n = 0; n < in->running_count; n++)
        c->requests.energy_j[in->running[n].request] += in->decoded_j - in->running[n].joined_j + part * in->decode_j;
}

/* Stop at once: whatever has begun is rejected. */
void engine_cut(Cluster *c, Instance *in, ns_t now) {
    engine_settle(c, in, now);
    for (int64_t n = 0; n < in->running_count; n++) reject(c, in->running[n].request, now, &c->totals.rejected_cut);
    for (int64_t n = 0; n < in->chunk_count; n++)
        if (in->chunks[n].last) reject(c, in->chunks[n].request, now, &c->totals.rejected_cut);
    if (in->partial >= 0) reject(c, in->partial, now, &c->totals.rejected_cut);
    for (int64_t n = 0; n < in->waiting_count; n++) reject(c, in->waiting[n].request, now, &c->totals.rejected_cut); /* of decode alone */
    in->waiting_count = in->running_count = in->chunk_count = in->in_prefill = 0;
    in->partial = -1;
    in->flying = false;
    in->at = now;
}
