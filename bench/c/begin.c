/* The twin of dataplane/stages, continued from track.c: the first packet of a flow. What this bench's flows never need
 * (TCP, masquerading, affinity, schedulers but rr, a full table) is `elsewhere`. */

enum { TABLE_USED, TABLE_HAND, TABLE_END, TABLE_FREED, TABLE_FIRST_FREED, RESERVE = 256 };

static inline u64 hash_half(const struct tables *t, const struct half *half)
{
    u64 last = (u64)half->protocol << 32 | (u64)half->sport << 16 | half->dport;
    return hash5(half->src_hi, half->src_lo, half->dst_hi, half->dst_lo, last, t->flow_key);
}

static inline i64 search_half(const struct tables *t, u64 word, const struct half *wanted)
{
    u32 tag = word;
    i64 at = tag & t->flow_mask;
    for (i64 i = 0; i < PROBES; i++) {
        i64 slot = t->flow_slots[at];
        if (slot == 0)
            return -1;
        i64 half = ((slot >> 32) - 1) >> 1;
        if ((u32)slot == tag && SAME(&t->halves[half], wanted))
            return half;
        at = (at + 1) & t->flow_mask;
    }
    return -1;
}

static inline int put(const struct tables *t, u64 word, i64 value)
{
    u32 tag = word;
    i64 at = tag & t->flow_mask, *slots = (i64 *)t->flow_slots;
    for (i64 i = 0; i < PROBES; i++) {
        if (slots[at] == 0) {
            slots[at] = (value + 1) << 32 | tag;
            return 1;
        }
        at = (at + 1) & t->flow_mask;
    }
    return 0;
}

static inline void copy_tuple(struct half *to, const struct half *from)
{
    to->src_hi = from->src_hi, to->src_lo = from->src_lo;
    to->dst_hi = from->dst_hi, to->dst_lo = from->dst_lo;
    to->sport = from->sport, to->dport = from->dport, to->protocol = from->protocol;
}

static inline i64 insert(const struct tables *t, i64 now)
{
    const struct half *original = &t->scratch[0], *reply = &t->scratch[1];
    i64 *state = t->flow_state;
    u64 word = hash_half(t, original), reply_word = hash_half(t, reply);
    __builtin_prefetch(&t->flow_slots[(u32)reply_word & t->flow_mask]);
    i64 row = -2;
    if (state[TABLE_USED] < t->flow_rows - RESERVE)
        row = state[TABLE_FREED] > RESERVE ? t->flow_free[state[TABLE_FIRST_FREED]] : state[TABLE_END];
    if (search_half(t, word, original) >= 0 || search_half(t, reply_word, reply) >= 0 || SAME(original, reply))
        return -3;
    if (row < 0 || !put(t, word, 4 * row) || !put(t, reply_word, 4 * row + 2))
        return -2;
    state[TABLE_USED]++;
    if (state[TABLE_FREED] > RESERVE) {
        state[TABLE_FREED]--;
        state[TABLE_FIRST_FREED] = state[TABLE_FIRST_FREED] + 1 < t->flow_rows ? state[TABLE_FIRST_FREED] + 1 : 0;
    } else
        state[TABLE_END]++;
    struct half *halves = &t->halves[2 * row];
    memcpy(&halves[0], &t->scratch[6], sizeof *halves);
    memcpy(&halves[1], &t->scratch[7], sizeof *halves);
    copy_tuple(&halves[0], original);
    copy_tuple(&halves[1], reply);
    t->flows[row].created_ns = now;
    state[COUNT_INSERT]++;
    return row;
}

/* --- who may come, and where to --- */

static inline int kind_of(const struct tables *t, u64 hi, u64 lo)
{
    i64 found = fib(t, hi, lo);
    return found < 0 ? KIND_NONE : t->routes[found].kind;
}

static inline int is_deliverable(const struct tables *t, int kind)
{
    if (kind == KIND_LOCAL)
        return t->settings[HOST_INTERFACE] != 0;
    return kind == KIND_POD || kind == KIND_VIA || kind == KIND_TUNNEL;
}

static inline int holds(const struct range *prefix, u64 hi, u64 lo)
{
    int mapped = hi == 0 && lo >> 32 == 0xffff;
    if (mapped != (prefix->version == 4) || hi < prefix->first_hi || hi > prefix->last_hi)
        return 0;
    if (hi == prefix->first_hi && lo < prefix->first_lo)
        return 0;
    return !(hi == prefix->last_hi && lo > prefix->last_lo);
}

static inline int is_in_pool(const struct tables *t, int pool, u64 hi, u64 lo)
{
    for (i64 k = 0; k < POOLS && t->pools[k].pool != POOL_END; k++)
        if (t->pools[k].pool == pool && holds(&t->pools[k], hi, lo))
            return 1;
    return 0;
}

static inline int has_pool(const struct tables *t, int pool)
{
    for (i64 k = 0; k < POOLS; k++)
        if (t->pools[k].pool == pool || t->pools[k].pool == POOL_END)
            return t->pools[k].pool == pool;
    return 0;
}

static inline int is_marked(const struct packet *p, const struct tables *t, i64 row)
{
    const struct policy *policy = &t->policies[row];
    if (policy->exposure != EXPOSURE_CLUSTER_IP)
        return policy->exposure != EXPOSURE_NONE && !(policy->flags & POLICY_LOCAL);
    if (t->settings[MASQUERADE_ALL])
        return 1;
    if (has_pool(t, POOL_CLUSTER))
        return !is_in_pool(t, POOL_CLUSTER, p->src_hi, p->src_lo);
    return p->src_hi == p->dst_hi && p->src_lo == p->dst_lo;
}

static inline i64 round_robin(struct service *s, struct backend *backends)
{
    i64 row = s->position;
    if (row >= 0)
        row = backends[row].next;
    for (i64 i = 0; i < s->count; i++) {
        if (row < 0)
            row = s->head;
        if (backends[row].weight > 0 && !(backends[row].flags & 2))
            return s->position = row;
        row = backends[row].next;
    }
    return -1;
}

/* --- the flow --- */

static inline void draft(const struct packet *p, const struct tables *t)
{
    struct half *original = &t->scratch[0], *reply = &t->scratch[1];
    original->src_hi = reply->dst_hi = p->src_hi, original->src_lo = reply->dst_lo = p->src_lo;
    original->dst_hi = reply->src_hi = p->dst_hi, original->dst_lo = reply->src_lo = p->dst_lo;
    original->sport = reply->dport = p->sport, original->dport = reply->sport = p->dport;
    original->protocol = reply->protocol = p->protocol;
}

static inline int is_masqueraded(const struct packet *p, const struct tables *t, int translated, int kind)
{
    if (translated && p->src_lo == p->dst_lo && p->src_hi == p->dst_hi)
        return 1;
    if (p->mark)
        return 1;
    int outside = kind == KIND_VIA || kind == KIND_TUNNEL;
    if (outside && t->settings[NAT_OUTGOING] && is_in_pool(t, POOL_OUTGOING, p->src_hi, p->src_lo) &&
        !is_in_pool(t, POOL_OUTGOING, p->dst_hi, p->dst_lo))
        return 1;
    return kind == KIND_TUNNEL && t->settings[TUNNEL_LO] && p->src_lo != t->settings[TUNNEL_LO] &&
           kind_of(t, p->src_hi, p->src_lo) == KIND_LOCAL;
}

static inline i64 enter(u8 *data, struct packet *p, const struct tables *t, int kind, int translated, i64 now)
{
    if (is_masqueraded(p, t, translated, kind))
        return elsewhere(data, p);
    if (search_half(t, hash_half(t, &t->scratch[1]), &t->scratch[1]) >= 0)
        return elsewhere(data, p);
    i64 row = insert(t, now);
    if (row < 0)
        return elsewhere(data, p);
    struct flow *flow = &t->flows[row];
    const struct half *original = &t->halves[2 * row], *reply = &t->halves[2 * row + 1];
    int status = translated ? DST_NAT : 0;
    if (reply->dst_lo != original->src_lo || reply->dst_hi != original->src_hi || reply->dport != original->sport)
        status |= SRC_NAT;
    flow->status = status;
    flow->mark = p->mark;
    flow->route_generation = t->settings[ROUTE_GENERATION] & 0x7fffffff;
    if (status & SRC_NAT || p->protocol == 6)
        elsewhere(data, p);
    refresh(flow, p->protocol, 0, t->timeouts, now);
    take(p, t, 2 * row);
    return ACCEPTED;
}

static inline i64 to_service(u8 *data, struct packet *p, const struct tables *t, i64 row, i64 now)
{
    if (t->policies[row].flags & (POLICY_RESTRICTED | POLICY_NO_LOCAL))
        return elsewhere(data, p);
    int marked = is_marked(p, t, row);
    struct service *service = &t->services[row];
    if (service->flags & 1 || service->scheduler != 0)
        return elsewhere(data, p);
    i64 chosen = round_robin(service, t->backends);
    if (chosen < 0)
        return elsewhere(data, p);
    draft(p, t);
    struct backend *backend = &t->backends[chosen];
    t->scratch[1].src_hi = p->dst_hi = backend->hi;
    t->scratch[1].src_lo = p->dst_lo = backend->lo;
    t->scratch[1].sport = p->dport = backend->port;
    p->mark = marked ? 0x4000 : 0;
    int kind = kind_of(t, backend->hi, backend->lo);
    if (!is_deliverable(t, kind))
        return ACCEPTED;
    i64 why = enter(data, p, t, kind, 1, now);
    if (why != ACCEPTED)
        return why;
    struct flow *flow = &t->flows[p->flow >> 1];
    service->connections++;
    backend->inactive++;
    backend->connections++;
    if (backend->u_threshold && backend->active + backend->inactive >= backend->u_threshold)
        backend->flags |= 2;
    flow->service = row;
    flow->service_generation = service->generation;
    flow->backend = chosen;
    flow->backend_generation = backend->generation;
    flow->template = -1;
    flow->lb_state = LB_NONE;
    flow->status |= COUNTED;
    lb_count(data, p, t, p->flow, now);
    return ACCEPTED;
}

static i64 begin(u8 *data, struct packet *p, const struct tables *t, i64 now)
{
    p->flow = -1;
    p->mark = 0;
    i64 row = -1, end = p->start + p->length;
    if (p->protocol == 6 || p->protocol == 17)
        row = find(t->service_slots, t->service_mask, t->service_key, p->protocol << 16 | p->dport, p->dst_hi, p->dst_lo);
    int kind = kind_of(t, p->dst_hi, p->dst_lo);
    if (p->protocol != 17 || (row < 0 && (kind == KIND_LOCAL || kind == KIND_SERVICE)))
        return elsewhere(data, p);
    if (p->l4 == 0 || p->l4 + 8 > end)
        return p->flags & INJECTED ? ACCEPTED : CT_INVALID_FLAGS;
    if (row >= 0)
        return to_service(data, p, t, row, now);
    if (!is_deliverable(t, kind))
        return ACCEPTED;
    draft(p, t);
    return enter(data, p, t, kind, 0, now);
}
