/* Where the energy goes: into the total, into the power of each tick, and apart what was drawn with nothing to do. */
#include "cluster.h"

static bool reach(Cluster *c, int64_t tick) {
    if (tick < c->ticks) return true;
    int64_t space = c->tick_space;
    if (tick >= space) {
        int64_t same = space;
        if (!grow(c, (void **)&c->tick_j, &space, tick + 1, sizeof(double))) return false;
        if (!grow(c, (void **)&c->tick_gpu_s, &same, tick + 1, sizeof(double))) return false;
        c->tick_space = space;
    }
    while (c->ticks <= tick) {
        c->tick_j[c->ticks] = c->tick_gpu_s[c->ticks] = 0.0;
        c->ticks++;
    }
    return true;
}

/* Count `watts` of the whole instance from one moment to another. */
void meter(Cluster *c, const Instance *in, ns_t from, ns_t until, double watts) {
    if (until <= from) return;
    double whole_s = seconds(until - from);
    c->totals.energy_j += watts * whole_s;
    c->totals.gpu_s += in->tp * whole_s;
    ns_t tick_ns = c->config.tick_ns, begin = c->config.begin_ns;
    int64_t tick = (from - begin) / tick_ns;
    while (from < until) {
        ns_t edge = begin + (tick + 1) * tick_ns;
        ns_t to = edge < until ? edge : until;
        if (!reach(c, tick)) return;
        double part_s = seconds(to - from);
        c->tick_j[tick] += watts * part_s;
        c->tick_gpu_s[tick] += in->tp * part_s;
        from = to;
        tick++;
    }
}

static void idle_part(Cluster *c, Instance *in, ns_t until, double watts) {
    c->totals.idle_j += watts * in->tp * seconds(until - in->charged_ns);
    meter(c, in, in->charged_ns, until, watts * in->tp);
    in->charged_ns = until;
}

/* Count the idle watts of an instance up to a moment: at its clock, and at the parking clock once it is parked. */
void meter_idle(Cluster *c, Instance *in, ns_t until) {
    if (until <= in->charged_ns) return;
    if (in->idle && c->config.park_after_ns != NEVER) {
        ns_t parked = in->idle_since + c->config.park_after_ns;
        if (parked < until) {
            if (in->charged_ns <= parked) {
                c->totals.parks++;
                if (in->charged_ns < parked) idle_part(c, in, parked, in->next.idle_w);
            }
            idle_part(c, in, until, in->park_idle_w);
            return;
        }
    }
    idle_part(c, in, until, in->next.idle_w);
}
