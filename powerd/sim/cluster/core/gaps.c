/* The gaps between tokens, exactly: runs of equal iterations, kept for as long as a running request began before them.
 *
 * A percentile is by nearest rank: the P99 of n values is the (n / 100 + 1)-th largest, so that at least 99 of 100 are no longer. */
#include <math.h>
#include <string.h>

#include "cluster.h"

static int64_t first_needed(const Cluster *c, const Instance *in, ns_t now) {
    int64_t from = in->gap_base + in->gap_count;
    for (int64_t n = 0; n < in->running_count; n++)
        if (in->running[n].log_from < from) from = in->running[n].log_from;
    int64_t recent = in->gap_base + in->gap_count;
    while (recent > in->gap_base && in->gaps[recent - 1 - in->gap_base].end > now - c->config.recent_ns) recent--;
    return recent < from ? recent : from;
}

void gap_log(Cluster *c, Instance *in, ns_t end, ns_t duration, int64_t count, int64_t batch) {
    if (in->gap_open && in->gap_count > 0) {
        Gap *last = &in->gaps[in->gap_count - 1];
        if (last->duration == duration && last->batch == batch) {
            last->count += count;
            last->end = end;
            return;
        }
    }
    if (in->gap_count == in->gap_space) {
        int64_t from = first_needed(c, in, end), drop = from - in->gap_base;
        if (drop > 0) {
            in->gap_count -= drop;
            memmove(in->gaps, in->gaps + drop, (size_t)in->gap_count * sizeof(Gap));
            in->gap_base = from;
        }
        if (in->gap_count > in->gap_space / 2 && !grow(c, (void **)&in->gaps, &in->gap_space, in->gap_space + 1, sizeof(Gap))) return;
        if (in->gap_space == 0 && !grow(c, (void **)&in->gaps, &in->gap_space, 256, sizeof(Gap))) return;
    }
    in->gaps[in->gap_count++] = (Gap){duration, end, count, batch};
    in->gap_open = true;
}

/* Keep the largest values of total weight `rank`; `kept` of them are in the scratch, descending. */
static bool keep(Cluster *c, int64_t *kept, int64_t *weight, int64_t rank, double value, int64_t of) {
    if (*weight >= rank && value <= c->scratch[*kept - 1].value) return true;
    if (!grow(c, (void **)&c->scratch, &c->scratch_space, *kept + 1, sizeof(Weighted))) return false;
    int64_t n = (*kept)++;
    for (; n > 0 && c->scratch[n - 1].value < value; n--) c->scratch[n] = c->scratch[n - 1];
    c->scratch[n] = (Weighted){value, of};
    *weight += of;
    while (*weight - c->scratch[*kept - 1].weight >= rank) *weight -= c->scratch[--(*kept)].weight;
    return true;
}

/* The P99 of the token gaps of a request that joined at `from` and has had `gaps` of them; NaN when it has had none.
 * Its first gap is longer than the iteration by `before_ns`: the way of its KV cache. */
double gap_p99_s(Cluster *c, const Instance *in, int64_t from, int64_t gaps, ns_t before_ns) {
    if (gaps <= 0) return NAN;
    int64_t rank = gaps / 100 + 1, kept = 0, weight = 0;
    const Gap *at = in->gaps + (from - in->gap_base), *end = in->gaps + in->gap_count;
    if (rank == 1) {
        ns_t longest = at->duration + before_ns;
        for (; at < end; at++)
            if (at->duration > longest) longest = at->duration;
        return seconds(longest);
    }
    int64_t first = before_ns > 0;
    if (first && !keep(c, &kept, &weight, rank, (double)(at->duration + before_ns), 1)) return NAN;
    for (; at < end; at++, first = 0)
        if (at->count > first && !keep(c, &kept, &weight, rank, (double)at->duration, at->count - first)) return NAN;
    return c->scratch[kept - 1].value * 1e-9;
}

double recent_tbt_p99_s(Cluster *c, const Instance *in) {
    int64_t from = in->gap_count, total = 0, kept = 0, weight = 0;
    while (from > 0 && in->gaps[from - 1].end > c->now - c->config.recent_ns) {
        from--;
        total += in->gaps[from].count * in->gaps[from].batch;
    }
    if (total == 0) return NAN;
    for (int64_t n = from; n < in->gap_count; n++)
        if (!keep(c, &kept, &weight, total / 100 + 1, (double)in->gaps[n].duration, in->gaps[n].count * in->gaps[n].batch)) return NAN;
    return c->scratch[kept - 1].value * 1e-9;
}

double recent_ttft_p99_s(Cluster *c, Instance *in) {
    int64_t old = 0, kept = 0, weight = 0;
    while (old < in->first_count && in->firsts[old].at <= c->now - c->config.recent_ns) old++;
    if (old > 0) {
        in->first_count -= old;
        memmove(in->firsts, in->firsts + old, (size_t)in->first_count * sizeof(First));
    }
    if (in->first_count == 0) return NAN;
    for (int64_t n = 0; n < in->first_count; n++)
        if (!keep(c, &kept, &weight, in->first_count / 100 + 1, in->firsts[n].ttft_s, 1)) return NAN;
    return c->scratch[kept - 1].value;
}
