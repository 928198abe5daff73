/* The twin of dataplane/stages, continued from track.c: route, encapsulate, tally, and what drives all stages. */

/* --- route --- */

static inline int fits(const u8 *data, struct packet *p, i64 mtu)
{
    p->mtu = mtu;
    i64 l3 = p->l3, l4 = p->l4, size = p->start + p->length - l3;
    int whole = (p->flags & (DONT_FRAGMENT | REASSEMBLED)) == DONT_FRAGMENT;
    if (p->gso_type == GSO_NONE)
        return size <= mtu || !whole;
    i64 headers = l4 - l3 + (p->gso_type == GSO_UDP_L4 ? 8 : (data[l4 + 12] >> 4) * 4);
    if (headers + p->gso_size <= mtu)
        return 1;
    if (whole || headers >= mtu)
        return 0;
    if (p->gso_type == GSO_UDP_L4)
        return 1;
    p->gso_size = mtu - headers;
    return 1;
}

static inline void decrement_ttl(u8 *data, struct packet *p)
{
    u8 *header = data + p->l3;
    i64 ttl = p->ttl - 1;
    p->ttl = ttl;
    if (p->flags & IPV6) {
        header[7] = ttl;
        return;
    }
    u64 old = load16(header + 8);
    header[8] = ttl;
    store16(header + 10, update16(load16(header + 10), old, (u64)ttl << 8 | (old & 0xff)));
}

static inline i64 resolve(u8 *data, struct packet *p, const struct tables *t, i64 now)
{
    i64 row = find(t->neighbour_slots, t->neighbour_mask, t->neighbour_key, p->oif, p->next_hi, p->next_lo);
    if (row < 0)
        return NEIGH_RESOLVE;
    struct neighbour *entry = &t->neighbours[row];
    if (entry->state < STATE_REACHABLE || entry->state == STATE_FAILED)
        return NEIGH_RESOLVE;
    entry->used_ns = now;
    ethernet_emit(data + p->l3 - 14, entry->mac, t->interfaces[p->oif].mac, p->ethertype);
    return ACCEPTED;
}

static inline i64 to_host(u8 *data, struct packet *p, const struct tables *t, int flags)
{
    i64 host = t->settings[HOST_INTERFACE];
    if (host == 0 || !(flags & HOSTED))
        return LOCAL_DELIVERY;
    const struct interface *interface = &t->interfaces[host];
    p->oif = host;
    p->mtu = interface->mtu;
    ethernet_emit(data + p->l3 - 14, interface->peer_mac, interface->mac, p->ethertype);
    return ACCEPTED;
}

static inline i64 forward(u8 *data, struct packet *p, const struct tables *t, i64 now)
{
    if (p->route < 0)
        return ROUTE_NONE;
    const struct route *hop = &t->routes[p->route];
    int kind = hop->kind;
    if (kind == KIND_BLACKHOLE)
        return ROUTE_BLACKHOLE;
    if (kind == KIND_UNREACHABLE)
        return ROUTE_UNREACHABLE;
    if (kind == KIND_SERVICE)
        return LOCAL_DELIVERY;
    if (kind == KIND_LOCAL)
        return to_host(data, p, t, hop->flags);
    int injected = p->flags & INJECTED;
    if (!injected && p->ttl <= 1)
        return IP_TTL;
    i64 oif = hop->oif, mtu = hop->mtu;
    if (kind == KIND_TUNNEL) {
        if (hop->vtep < 0)
            return TUNNEL_NO_VTEP;
        oif = t->vteps[hop->vtep].oif;
        mtu = t->vteps[hop->vtep].mtu;
        p->vtep = hop->vtep;
    }
    const struct interface *interface = &t->interfaces[oif];
    if (mtu == 0)
        mtu = interface->mtu;
    p->oif = oif;
    if (!fits(data, p, mtu)) {
        p->oif = 0;
        p->vtep = -1;
        return MTU_DF;
    }
    if (!injected)
        decrement_ttl(data, p);
    if (kind == KIND_TUNNEL)
        return ACCEPTED;
    if (kind == KIND_POD) {
        ethernet_emit(data + p->l3 - 14, interface->peer_mac, interface->mac, p->ethertype);
        return ACCEPTED;
    }
    int on_link = hop->gateway_hi == 0 && hop->gateway_lo == 0;
    p->next_hi = on_link ? p->dst_hi : hop->gateway_hi;
    p->next_lo = on_link ? p->dst_lo : hop->gateway_lo;
    return resolve(data, p, t, now);
}

STAGE void route_stage(u8 *data, struct packet *packets, i64 count, const struct tables *t, i64 now)
{
    for (i64 i = 0; i < count; i++)
        if (packets[i].verdict == ACCEPT) {
            i64 row = fib(t, packets[i].dst_hi, packets[i].dst_lo);
            packets[i].route = row;
            __builtin_prefetch(&t->routes[row > 0 ? row : 0]);
            __builtin_prefetch(data + packets[i].l3);
        }
    for (i64 i = 0; i < count; i++) {
        struct packet *p = &packets[i];
        if (p->verdict != ACCEPT)
            continue;
        i64 why = forward(data, p, t, now);
        if (why == ACCEPTED)
            continue;
        p->reason = why;
        p->verdict = why == NEIGH_RESOLVE || why == LOCAL_DELIVERY ? QUEUE : DROP;
        if (why == IP_TTL || why == MTU_DF || why == ROUTE_NONE || why == ROUTE_UNREACHABLE)
            p->flags |= OWES_ERROR;
    }
}

/* --- encapsulate --- */

static inline u32 flow_hash(const struct packet *p)
{
    u32 ports = (u32)p->sport << 16 | p->dport;
    u32 mixed = (u32)(p->src_lo ^ p->src_hi) * 0x9e3779b1u + (u32)(p->dst_lo ^ p->dst_hi) * 0x85ebca77u;
    mixed += ports * 0xc2b2ae3du + p->protocol;
    mixed = (mixed ^ mixed >> 16) * 0x85ebca6bu;
    mixed = (mixed ^ mixed >> 13) * 0xc2b2ae35u;
    return mixed ^ mixed >> 16;
}

static inline i64 outer(u8 *data, const struct packet *p, const struct tables *t, u32 remote)
{
    const u64 *settings = t->settings;
    i64 at = p->l3 - 14 - 8, length = p->length;
    store32(data + at, 0x08000000);
    store32(data + at + 4, settings[VNI] << 8);
    at -= 8;
    u32 word = flow_hash(p), low = settings[TUNNEL_PORT_LOW], high = settings[TUNNEL_PORT_HIGH];
    word ^= word << 16;
    store16(data + at, ((u64)word * (high - low) >> 32) + low);
    store16(data + at + 2, settings[TUNNEL_PORT]);
    store16(data + at + 4, 16 + length);
    store16(data + at + 6, 0);
    at -= 20;
    u64 total = (36 + length) & 0xffff, source = settings[NODE_LO] & 0xffffffff, ecn = p->tos & 3;
    store16(data + at, 0x4500);
    store16(data + at + 2, total);
    store32(data + at + 4, 0);
    store16(data + at + 8, 64 << 8 | 17);
    store32(data + at + 12, source);
    store32(data + at + 16, remote);
    store16(data + at + 10, fold16(0x4500 + total + (64 << 8 | 17) + source + remote) ^ 0xffff);
    if (ecn) {
        u64 tos = ecn == 3 ? 2 : ecn;
        store16(data + at + 10, update16(load16(data + at + 10), load16(data + at), 0x4500 | tos));
        data[at + 1] = tos;
    }
    at -= 14;
    ethernet_emit(data + at, 0, 0, 0x0800);
    return at;
}

STAGE void encapsulate(u8 *data, struct packet *packets, i64 count, const struct tables *t, i64 now)
{
    for (i64 i = 0; i < count; i++) {
        struct packet *p = &packets[i];
        if (p->verdict != ACCEPT || p->vtep < 0 || p->flags & ENCAPSULATED)
            continue;
        struct vtep *peer = &t->vteps[p->vtep];
        i64 inner = p->l3 - 14, length = p->length;
        ethernet_emit(data + inner, peer->mac, t->settings[VTEP_MAC], p->flags & IPV6 ? 0x86dd : 0x0800);
        i64 start = outer(data, p, t, peer->lo);
        p->start = start;
        p->length = length + inner - start;
        p->csum_start += inner - start;
        p->hdr_len += inner - start;
        p->flags |= ENCAPSULATED;
        peer->tx_packets++;
        peer->tx_bytes += length;
    }
}

/* --- tally --- */

static RARE int may_answer(u64 *counters, i64 now)
{
    return counters[RECEIVED] == (u64)now;
}

STAGE i64 tally(u8 *data, struct packet *packets, i64 count, const struct tables *t, i64 now)
{
    i64 punted = 0, injected = 0;
    for (i64 i = 0; i < count; i++) {
        struct packet *p = &packets[i];
        t->counters[p->reason]++;
        injected += (p->flags & INJECTED) != 0;
        if (p->verdict == QUEUE)
            punted++;
        else if (p->flags & OWES_ERROR) {
            if (may_answer(t->counters, now))
                punted++;
            else
                p->flags &= ~OWES_ERROR;
        }
    }
    t->counters[INJECTED_TOTAL] += injected;
    t->counters[RECEIVED] += count - injected;
    return punted;
}

/* --- drivers --- */

void run(i64 first, i64 last, u8 *data, struct packet *packets, i64 count, const struct tables *t, i64 now)
{
    for (i64 stage = first; stage < last; stage++)
        switch (stage) {
        case 0: parse(data, packets, count, t, now); break;
        case 1: decapsulate(data, packets, count, t, now); break;
        case 2: arp(data, packets, count, t, now); break;
        case 3: guard(data, packets, count, t, now); break;
        case 4: defrag(data, packets, count, t, now); break;
        case 5: conntrack(data, packets, count, t, now); break;
        case 6: route_stage(data, packets, count, t, now); break;
        case 7: nat(data, packets, count, t, now); break;
        case 8: encapsulate(data, packets, count, t, now); break;
        default: tally(data, packets, count, t, now);
        }
}

static i64 clock_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000 + now.tv_nsec;
}

/* What a bench does to a stored segment so that it is a new one each time: 10 bytes further. */
static void advance(u8 *at, u64 bytes)
{
    store32(at, load32(at) + bytes);
    store32(at + 4, load32(at + 4) + bytes);
}

/* Return the nanoseconds in the stages alone over `passes` passes of ROWS packets; those are made anew before each one.
 * `cursor` is the next of the stored passes and how often all have been used; both implementations move it on. */
i64 drive_stages(i64 from, i64 to, u8 *data, struct packet *packets, const u8 *frames, const struct packet *records,
                 const i32 *segments, i64 *cursor, const struct tables *t, i64 now, i64 batch, i64 passes, i64 stored)
{
    i64 spent = 0;
    for (i64 pass = 0; pass < passes; pass++) {
        i64 first = cursor[0] * ROWS;
        memcpy(packets, records + first, ROWS * sizeof *packets);
        for (i64 i = 0; i < ROWS; i++) {
            memcpy(data + i * SMALL_STRIDE + FIRST, frames + (first + i) * KEPT, KEPT);
            if (segments[first + i])
                advance(data + i * SMALL_STRIDE + segments[first + i], SEGMENT * cursor[1]);
        }
        if (++cursor[0] == stored) {
            cursor[0] = 0;
            cursor[1]++;
        }
        i64 begin = clock_ns();
        for (i64 i = 0; i < ROWS; i += batch)
            run(from, to, data, packets + i, batch, t, now);
        spent += clock_ns() - begin;
    }
    return spent;
}
