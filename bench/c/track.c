/* The twin of dataplane/stages, continued from parse.c: conntrack and nat, for packets of flows that are known; begin.c
 * is for the others. What ends or doubts a flow is `elsewhere`: the branch to it is paid for. */

enum { SEG_SYN, SEG_SYN_ACK, SEG_FIN, SEG_ACK, SEG_RST, SEG_NONE };
enum { W_SCALED = 1, W_SACK = 2, W_CLOSE_INIT = 4, W_LIBERAL = 8, W_UNACKED = 16, W_ACK_SEEN = 32 };
enum { INSIDE, TOLERATED, OUTSIDE };

#define AGAIN -1
#define PROBES 128
#define IGNORED 11
#define INVALID 10
#define ACK_SLACK 66000
#define STREAM_NS 2000000000ll

/* --- the index of flows (tables/flow.py, tables/tagged.py) --- */

static inline u64 hash_tuple(const struct tables *t, const struct packet *p)
{
    u64 last = (u64)p->protocol << 32 | (u64)p->sport << 16 | p->dport;
    return hash5(p->src_hi, p->src_lo, p->dst_hi, p->dst_lo, last, t->flow_key);
}

static inline i64 candidate(const struct tables *t, u64 word)
{
    u32 tag = word;
    i64 at = tag & t->flow_mask, half = -1;
    for (i64 i = 0; i < PROBES; i++) {
        i64 slot = t->flow_slots[at];
        if ((u32)slot == tag || slot == 0) {
            half = ((slot >> 32) - 1) >> 1;
            break;
        }
        at = (at + 1) & t->flow_mask;
    }
    __builtin_prefetch(&t->halves[half]);
    __builtin_prefetch(&t->halves[half].seq_end);
    __builtin_prefetch(&t->halves[half ^ 1]);
    __builtin_prefetch(&t->halves[half ^ 1].seq_end);
    return half;
}

#define SAME(a, b) \
    ((a)->src_lo == (b)->src_lo && (a)->dst_lo == (b)->dst_lo && (a)->src_hi == (b)->src_hi && \
     (a)->dst_hi == (b)->dst_hi && (a)->sport == (b)->sport && (a)->dport == (b)->dport && \
     (a)->protocol == (b)->protocol)

static inline int matches(const struct half *found, const struct packet *p)
{
    return SAME(found, p);
}

static inline i64 search(const struct tables *t, const struct packet *p)
{
    u32 tag = hash_tuple(t, p);
    i64 at = tag & t->flow_mask;
    for (i64 i = 0; i < PROBES; i++) {
        i64 slot = t->flow_slots[at];
        if (slot == 0)
            return -1;
        i64 half = ((slot >> 32) - 1) >> 1;
        if ((u32)slot == tag && matches(&t->halves[half], p))
            return half;
        at = (at + 1) & t->flow_mask;
    }
    return -1;
}

/* --- TCP (stages/tcp.py, stages/tcp_window.py) --- */

static inline int is_before(u32 left, u32 right)
{
    return left - right >= 0x80000000u;
}

static inline int segment_kind(int flags)
{
    if (flags & 4)
        return SEG_RST;
    if (flags & 2)
        return flags & 16 ? SEG_SYN_ACK : SEG_SYN;
    if (flags & 1)
        return SEG_FIN;
    return flags & 16 ? SEG_ACK : SEG_NONE;
}

static inline int is_malformed(const u8 *data, const struct packet *p)
{
    i64 l4 = p->l4, end = p->start + p->length;
    if (l4 == 0 || l4 + 20 > end)
        return 1;
    i64 size = data[l4 + 12] >> 4 << 2;
    if (size < 20 || l4 + size > end)
        return 1;
    int flags = p->tcp_flags & 0x37, bare = flags & ~0x20;
    if (bare == 2 || bare == 16 || bare == 17)
        return 0;
    return flags != 18 && flags != 4 && flags != 20;
}

static inline u32 segment_end(const u8 *data, const struct packet *p)
{
    i64 l4 = p->l4, payload = p->start + p->length - l4 - (data[l4 + 12] >> 4 << 2);
    return load32(data + l4 + 4) + payload + (p->tcp_flags & 1) + (p->tcp_flags >> 1 & 1);
}

static inline u32 acknowledged(const u8 *data, const struct packet *p, const struct half *receiver)
{
    i64 l4 = p->l4;
    if (receiver->window_flags & W_SACK && data[l4 + 12] >> 4 > 5)
        elsewhere(data, (struct packet *)p);
    return load32(data + l4 + 8);
}

static inline int compare(struct half *sender, const struct half *receiver, u32 seq, u32 end, u32 sack)
{
    u32 sent = receiver->seq_end, offered = receiver->max_window;
    u32 slack = sender->max_window > ACK_SLACK ? sender->max_window : ACK_SLACK;
    int fresh = offered == 0 || is_before(sender->seq_end - offered - 1, end);
    int recent = is_before(sent - slack - 1, sack), known = is_before(sack, sent + 1);
    if (!is_before(seq, sender->max_end + 1)) {
        u32 beyond = end - sender->max_end + 1;
        if (!(offered && fresh && recent && known && beyond <= offered))
            return OUTSIDE;
        sender->seq_end = end;
        sender->window_flags |= W_UNACKED;
        return TOLERATED;
    }
    if (!known)
        return OUTSIDE;
    return fresh && recent ? INSIDE : TOLERATED;
}

static inline void count_repeats(struct flow *flow, int direction, u32 seq, u32 ack, u32 end, u16 window)
{
    if (flow->last_direction == direction && flow->last_seq == seq && flow->last_ack == ack &&
        flow->last_end == end && flow->last_window == window) {
        flow->retrans += flow->retrans < 255;
        return;
    }
    flow->last_direction = direction;
    flow->last_seq = seq;
    flow->last_ack = ack;
    flow->last_end = end;
    flow->last_window = window;
    flow->retrans = 0;
}

static inline int place(u8 *data, struct packet *p, const struct tables *t, struct flow *flow, i64 e)
{
    struct half *sender = &t->halves[e], *receiver = &t->halves[e ^ 1];
    if (sender->max_window == 0 || p->tcp_flags & 2)
        elsewhere(data, p);
    i64 l4 = p->l4;
    int flags = p->tcp_flags;
    u32 seq = load32(data + l4 + 4), end = segment_end(data, p), ack = load32(data + l4 + 8);
    u32 sack = acknowledged(data, p, receiver);
    if (!(flags & 16) || (flags & 4 && ack == 0))
        sack = ack = receiver->seq_end;
    if (flags & 4 && seq == 0 && flow->state == TCP_SYN_SENT)
        end = seq = sender->seq_end;
    int where = compare(sender, receiver, seq, end, sack);
    if (where != INSIDE)
        return where;
    u32 raw = load16(data + l4 + 14), window = flags & 2 ? raw : raw << sender->scale, given = window + sack - ack;
    if (sender->max_window < given)
        sender->max_window = given;
    if (is_before(sender->seq_end, end)) {
        sender->seq_end = end;
        sender->window_flags |= W_UNACKED;
    }
    if (flags & 16 && (!(sender->window_flags & W_ACK_SEEN) || is_before(sender->max_ack, ack))) {
        sender->max_ack = ack;
        sender->window_flags |= W_ACK_SEEN;
    }
    if (receiver->max_window && is_before(sender->max_end, end))
        receiver->max_window += end - sender->max_end;
    if (is_before(receiver->max_end - 1, sack + window))
        receiver->max_end = sack + (window ? window : 1);
    if (ack == receiver->seq_end)
        receiver->window_flags &= ~W_UNACKED;
    if (segment_kind(flags) == SEG_ACK)
        count_repeats(flow, e & 1, seq, ack, end, raw);
    return INSIDE;
}

static inline i64 timeout_of(const struct tables *t, const struct flow *flow, i64 row, int kind)
{
    i64 usual = t->timeouts[TIMEOUT_TCP + flow->state], repeating = t->timeouts[TIMEOUT_RETRANS];
    if (flow->retrans >= 3 && usual > repeating)
        return repeating;
    if (kind == SEG_RST)
        return t->timeouts[TIMEOUT_TCP + TCP_CLOSE];
    int flags = t->halves[2 * row].window_flags | t->halves[2 * row + 1].window_flags;
    if (flags & W_UNACKED && usual > t->timeouts[TIMEOUT_UNACK])
        return t->timeouts[TIMEOUT_UNACK];
    return flow->last_window == 0 && repeating < usual ? repeating : usual;
}

static inline i64 step(u8 *data, struct packet *p, const struct tables *t, struct flow *flow, i64 e, i64 now)
{
    int kind = segment_kind(p->tcp_flags), old = flow->state, direction = e & 1;
    int new = CONNTRACK_ROWS[6 * direction + kind] >> 4 * old & 15;
    if ((new == TCP_SYN_SENT && old >= TCP_TIME_WAIT) || new == IGNORED || new == INVALID || new == TCP_SYN_SENT2)
        return elsewhere(data, p);
    if (new == TCP_TIME_WAIT && old == TCP_LAST_ACK && kind == SEG_ACK && flow->last_index == SEG_SYN)
        return elsewhere(data, p);
    if (new == TCP_SYN_RECV && direction && kind == SEG_ACK && flow->last_flags & 0x80)
        new = TCP_ESTABLISHED;
    if (kind == SEG_RST)
        return elsewhere(data, p);
    if (place(data, p, t, flow, e) != INSIDE && !(t->halves[e].window_flags & W_LIBERAL))
        return elsewhere(data, p);
    if (old != new && new == TCP_FIN_WAIT)
        t->halves[e].window_flags |= W_CLOSE_INIT;
    flow->last_index = kind;
    flow->last_direction = direction;
    flow->state = new;
    i64 timeout = timeout_of(t, flow, e >> 1, kind);
    if (!(flow->status & SEEN_REPLY)) {
        if (kind == SEG_RST)
            timeout = 0;
        else if (kind == SEG_SYN && old == TCP_SYN_SENT)
            return ACCEPTED;
        else if (new == TCP_ESTABLISHED && timeout > t->timeouts[TIMEOUT_UNACK])
            timeout = t->timeouts[TIMEOUT_UNACK];
    } else if (new == TCP_ESTABLISHED && (old == TCP_SYN_RECV || old == TCP_ESTABLISHED))
        flow->status |= ASSURED;
    flow->expires_ns = now + timeout;
    return ACCEPTED;
}

static inline i64 tcp_follow(u8 *data, struct packet *p, const struct tables *t, i64 e, i64 now)
{
    if (is_malformed(data, p))
        return CT_INVALID_FLAGS;
    struct flow *flow = &t->flows[e >> 1];
    i64 why = step(data, p, t, flow, e, now);
    if (why == ACCEPTED && e & 1)
        flow->status |= SEEN_REPLY;
    return why;
}

static inline int lb_follow(const struct packet *p, const struct flow *flow, int direction)
{
    int flags = p->tcp_flags, row;
    if (flags & 4)
        row = 3;
    else if (flags & 2)
        row = 0;
    else if (flags & 1)
        row = 1;
    else if (flags & 16)
        row = 2;
    else
        return LB_CLOSE;
    return LB_ROWS[4 * direction + row] >> 4 * flow->lb_state & 15;
}

/* --- conntrack (stages/conntrack.py, stages/service.py) --- */

static inline void refresh(struct flow *flow, int protocol, int direction, const i64 *timeouts, i64 now)
{
    int status = flow->status, kind = TIMEOUT_GENERIC;
    if (protocol == 1 || protocol == 58)
        kind = TIMEOUT_ICMP;
    else if (protocol == 17) {
        kind = TIMEOUT_UDP;
        if (status & SEEN_REPLY && now - flow->created_ns > STREAM_NS) {
            kind = TIMEOUT_UDP_STREAM;
            status |= ASSURED;
        }
    }
    if (direction)
        status |= SEEN_REPLY;
    flow->status = status;
    flow->expires_ns = now + timeouts[kind];
}

static inline void lb_count(u8 *data, struct packet *p, const struct tables *t, i64 e, i64 now)
{
    struct flow *flow = &t->flows[e >> 1];
    i64 chosen = flow->backend;
    if (chosen < 0)
        return;
    struct backend *backend = &t->backends[chosen];
    struct service *service = &t->services[flow->service];
    int status = flow->status, state = LB_UDP;
    if (!(status & COUNTED))
        elsewhere(data, p);
    if (p->protocol == 6)
        state = lb_follow(p, flow, e & 1);
    int active = 1 << state & (1 << LB_ESTABLISHED | 1 << LB_SYN_SENT | 1 << LB_SYN_RECV | 1 << LB_SYNACK);
    if (!active != !(status & ACTIVE)) {
        status ^= ACTIVE;
        if (backend->generation == flow->backend_generation) {
            backend->active += status & ACTIVE ? 1 : -1;
            backend->inactive -= status & ACTIVE ? 1 : -1;
        }
    }
    flow->status = status;
    flow->lb_state = state;
    flow->lb_expires_ns = now + t->timeouts[TIMEOUT_LB + state];
    if (state == LB_UDP && flow->lb_expires_ns > flow->expires_ns)
        flow->expires_ns = flow->lb_expires_ns;
    i64 size = p->length - 14;
    if (!(e & 1)) {
        service->in_packets++;
        service->in_bytes += size;
        backend->in_packets++;
        backend->in_bytes += size;
        return;
    }
    service->out_packets++;
    service->out_bytes += size;
    backend->out_packets++;
    backend->out_bytes += size;
}

static inline void take(struct packet *p, const struct tables *t, i64 e)
{
    const struct flow *flow = &t->flows[e >> 1];
    struct half *half = &t->halves[e];
    half->packets++;
    half->bytes += p->length - 14;
    p->flow = e;
    p->mark = flow->mark;
    if (flow->status & (SRC_NAT | DST_NAT)) {
        const struct half *other = &t->halves[e ^ 1];
        p->dst_hi = other->src_hi;
        p->dst_lo = other->src_lo;
        p->dport = other->sport;
    }
}

static inline i64 follow(u8 *data, struct packet *p, const struct tables *t, i64 e, i64 now)
{
    struct flow *flow = &t->flows[e >> 1];
    int direction = e & 1;
    if (flow->backend >= 0) {
        const struct backend *backend = &t->backends[flow->backend];
        if (backend->generation != flow->backend_generation || !(backend->flags & 1))
            return elsewhere(data, p);
        if (!direction && p->protocol == 6 && (p->tcp_flags & 0x16) == 2 && backend->weight == 0)
            return AGAIN;
    }
    if (flow->status & MASQUERADED && flow->route_generation != (i32)(t->settings[ROUTE_GENERATION] & 0x7fffffff))
        return elsewhere(data, p);
    if (p->protocol == 6) {
        i64 why = tcp_follow(data, p, t, e, now);
        if (why != ACCEPTED)
            return why;
    } else
        refresh(flow, p->protocol, direction, t->timeouts, now);
    lb_count(data, p, t, e, now);
    take(p, t, e);
    return ACCEPTED;
}

static i64 begin(u8 *data, struct packet *p, const struct tables *t, i64 now);

static inline i64 track(u8 *data, struct packet *p, const struct tables *t, i64 now)
{
    if (p->protocol == 1 || p->protocol == 58)
        return elsewhere(data, p);
    i64 e = p->flow;
    if (e < 0 || !matches(&t->halves[e], p))
        e = search(t, p);
    if (e >= 0 && t->flows[e >> 1].expires_ns > now) {
        i64 why = follow(data, p, t, e, now);
        if (why != AGAIN)
            return why;
    }
    if (e >= 0)
        elsewhere(data, p);
    return begin(data, p, t, now);
}

STAGE void conntrack(u8 *data, struct packet *packets, i64 count, const struct tables *t, i64 now)
{
    for (i64 i = 0; i < count; i++) {
        struct packet *p = &packets[i];
        p->flow = -1;
        if (p->verdict != ACCEPT)
            continue;
        p->next_lo = hash_tuple(t, p);
        __builtin_prefetch(&t->flow_slots[(u32)p->next_lo & t->flow_mask]);
    }
    for (i64 i = 0; i < count; i++)
        if (packets[i].verdict == ACCEPT)
            packets[i].flow = candidate(t, packets[i].next_lo);
    for (i64 i = 0; i < count; i++) {
        struct packet *p = &packets[i];
        if (p->verdict != ACCEPT || p->flags & FRAGMENT)
            continue;
        i64 why = track(data, p, t, now);
        if (why == ACCEPTED)
            continue;
        p->flow = -1;
        p->reason = why;
        p->verdict = why == HOST_OWNED ? STOLEN : DROP;
    }
}

/* --- nat --- */

static inline u64 update(u64 value, u64 change)
{
    return fold16((~value & 0xffff) + change) ^ 0xffff;
}

static inline i64 left_to_device(const struct packet *p)
{
    if (!(p->vnet_flags & NEEDS_CSUM))
        return -1;
    i64 at = p->l4;
    if (p->protocol == 6)
        at += 16;
    else if (p->protocol == 17)
        at += 6;
    else
        return -1;
    return p->start + p->csum_start + p->csum_offset == at ? at : -1;
}

static inline void write_transport(u8 *at, i64 left, int protocol, u64 ports, u64 change)
{
    if (protocol != 6 && protocol != 17) {
        elsewhere(at, NULL);
        return;
    }
    change += (~load32(at) & 0xffffffff) + ports;
    store32(at, ports);
    if (protocol == 6) {
        if (left >= 20)
            store16(at + 16, update(load16(at + 16), change));
        return;
    }
    u64 old = load16(at + 6);
    if (old) {
        u64 sum = update(old, change);
        store16(at + 6, sum ? sum : 0xffff);
    }
}

static inline void translate(u8 *data, struct packet *p, const struct half *other)
{
    p->src_hi = other->dst_hi, p->src_lo = other->dst_lo;
    p->dst_hi = other->src_hi, p->dst_lo = other->src_lo;
    p->sport = other->dport, p->dport = other->sport;
    if (p->flags & IPV6) {
        elsewhere(data, p);
        return;
    }
    u8 *header = data + p->l3;
    u64 source = (u32)p->src_lo, destination = (u32)p->dst_lo;
    u64 change = (~load32(header + 12) & 0xffffffff) + (~load32(header + 16) & 0xffffffff) + source + destination;
    store16(header + 10, update(load16(header + 10), change));
    store32(header + 12, source);
    store32(header + 16, destination);
    i64 at = p->l4, end = p->start + p->length;
    if (at + 8 > end)
        return;
    u64 ports = (u64)other->dport << 16 | other->sport;
    i64 field = left_to_device(p);
    if (field < 0) {
        write_transport(data + at, end - at, p->protocol, ports, change);
        return;
    }
    store16(data + field, fold16(load16(data + field) + change));
    store32(data + at, ports);
}

STAGE void nat(u8 *data, struct packet *packets, i64 count, const struct tables *t, i64 now)
{
    for (i64 i = 0; i < count; i++) {
        struct packet *p = &packets[i];
        i64 e = p->flow;
        if (e < 0 || p->verdict != ACCEPT || !(t->flows[e >> 1].status & (SRC_NAT | DST_NAT)))
            continue;
        if (p->flags & RELATED)
            elsewhere(data, p);
        else
            translate(data, p, &t->halves[e ^ 1]);
    }
}
