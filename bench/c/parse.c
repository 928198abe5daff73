/* The twin of dataplane/stages: the same records, frames and tables, one function per stage over the batch. What this
 * bench's packets never reach (ARP bodies, IPv6 extension headers, reassembly) is a call to `elsewhere`: the branch to
 * it is paid for, the rest is not. bench/pipeline.py puts lpm.c and rows.c in front, and the records and names that it
 * writes from the Python sources; route.c continues. */
#include <time.h>
#include "bytes.h"

#define STAGE __attribute__((noinline))
#define RARE __attribute__((noinline, cold))

struct tables {
    struct interface *interfaces;
    u64 *counters, *settings;
    const i32 *nodes;
    const struct prefix *prefixes;
    i64 prefix_mask;
    const struct length *lengths;
    const u64 *lpm_key;
    const struct route *routes;
    const struct slot *neighbour_slots;
    i64 neighbour_mask;
    const u64 *neighbour_key;
    struct neighbour *neighbours;
    const struct slot *vtep_slots;
    i64 vtep_mask;
    const u64 *vtep_key;
    struct vtep *vteps;
    const i64 *flow_slots;
    i64 flow_mask;
    const u64 *flow_key;
    struct half *halves;
    struct flow *flows; /* the same memory: the fields of one lie where the other has none */
    struct service *services;
    struct backend *backends;
    const i64 *timeouts;
    i64 flow_rows;
    i32 *flow_free;
    i64 *flow_state;
    struct half *scratch;
    const struct slot *service_slots;
    i64 service_mask;
    const u64 *service_key;
    const struct policy *policies;
    const struct range *pools;
};

static RARE i64 elsewhere(const u8 *data, struct packet *p)
{
    __asm__ volatile("" : : "r"(data), "r"(p) : "memory");
    return -1;
}

static inline i64 fib(const struct tables *t, u64 hi, u64 lo)
{
    return lookup(t->nodes, t->prefixes, t->prefix_mask, t->lengths, t->lpm_key, hi, lo);
}

/* --- parse --- */

static inline void parse_transport(const u8 *data, struct packet *p, i64 end)
{
    i64 l4 = p->l4;
    int protocol = p->protocol;
    if ((protocol == 6 || protocol == 17) && l4 + 8 <= end) {
        p->sport = load16(data + l4);
        p->dport = load16(data + l4 + 2);
        if (protocol == 6 && l4 + 14 <= end)
            p->tcp_flags = data[l4 + 13];
    } else if ((protocol == 1 || protocol == 58) && l4 + 8 <= end) {
        int kind = data[l4], request = kind;
        if (p->protocol == 1) {
            if (kind == 0 || kind == 14 || kind == 16 || kind == 18)
                request = kind ? kind - 1 : 8;
            else if (kind != 8 && kind != 13 && kind != 15 && kind != 17)
                return;
        } else if (kind == 129) {
            request = 128;
        } else if (kind != 128) {
            return;
        }
        u16 name = load16(data + l4 + 4);
        p->sport = kind == request ? name : request << 8;
        p->dport = kind == request ? request << 8 : name;
    }
}

static inline i64 parse_ipv4(const u8 *data, struct packet *p, i64 end)
{
    i64 l3 = p->l3;
    if (!ipv4_valid(data, l3, end))
        return IP_BAD_HDR;
    i64 header = (data[l3] & 15) * 4;
    if (fold16(sum16(data + l3, header, 0)) != 0xffff)
        return IP_BAD_CSUM;
    i64 total = load16(data + l3 + 2);
    p->length = 14 + total;
    p->tos = data[l3 + 1];
    p->ttl = data[l3 + 8];
    p->protocol = data[l3 + 9];
    p->src_hi = p->dst_hi = 0;
    p->src_lo = V4_PREFIX | load32(data + l3 + 12);
    p->dst_lo = V4_PREFIX | load32(data + l3 + 16);
    p->l4 = l3 + header;
    i64 word = load16(data + l3 + 6);
    p->fragment = word;
    u16 flags = p->flags & ~(IPV6 | FRAGMENT | DONT_FRAGMENT);
    if (word & 0x3fff)
        flags |= FRAGMENT;
    if (word & 0x4000)
        flags |= DONT_FRAGMENT;
    p->flags = flags;
    if ((word & 0x1fff) == 0)
        parse_transport(data, p, l3 + total);
    return ACCEPTED;
}

static inline i64 parse_frame(const u8 *data, struct packet *p, u64 station)
{
    i64 start = p->start, length = p->length;
    if (length < 14)
        return L2_TOO_SHORT;
    u64 destination = load48(data + start);
    if (destination != station && !(destination & 1ull << 40))
        return L2_OTHER_MAC;
    u64 kind = load16(data + start + 12);
    p->ethertype = kind;
    p->l3 = start + 14;
    p->l4 = 0;
    p->sport = p->dport = 0;
    p->tcp_flags = 0;
    p->fragment = 0;
    if (kind == 0x0800)
        return parse_ipv4(data, p, start + length);
    if (kind == 0x86dd)
        return elsewhere(data, p);
    return kind == 0x0806 ? ACCEPTED : L2_BAD_ETHERTYPE;
}

STAGE void parse(u8 *data, struct packet *packets, i64 count, const struct tables *t, i64 now)
{
    for (i64 i = 0; i < count; i++) {
        struct packet *p = &packets[i];
        if (p->verdict != ACCEPT)
            continue;
        u64 station = t->interfaces[p->iif].mac;
        if (t->interfaces[p->iif].role == ROLE_NODE)
            station = load48(data + p->start);
        i64 why = parse_frame(data, p, station);
        if (why != ACCEPTED) {
            p->verdict = DROP;
            p->reason = why;
        }
    }
}

/* --- decapsulate --- */

static inline int outer_checksum_ok(const u8 *data, const struct packet *p)
{
    if (p->vnet_flags || load16(data + p->l4 + 6) == 0)
        return 1;
    i64 length = load16(data + p->l4 + 4);
    u64 pseudo = (p->src_lo & 0xffffffff) + (p->src_lo >> 32) + (p->dst_lo & 0xffffffff) + (p->dst_lo >> 32);
    return fold16(sum16(data + p->l4, length, pseudo + 17 + length)) == 0xffff;
}

static inline int unfinished(const u8 *data, const struct packet *p, i64 end)
{
    i64 l3 = p->l3;
    if (l3 >= end || data[l3] >> 4 != 4 || !ipv4_valid(data, l3, end) || load16(data + l3 + 6) & 0x3fff)
        return 0;
    i64 l4 = l3 + (data[l3] & 15) * 4, protocol = data[l3 + 9];
    end = l3 + load16(data + l3 + 2);
    if ((protocol != 6 && protocol != 17) || l4 + (protocol == 6 ? 20 : 8) > end)
        return 0;
    return load16(data + l4 + (protocol == 6 ? 16 : 6)) == fold16(sum16(data + l3 + 12, 8, 0) + protocol + end - l4);
}

static inline void pass_checksum_state(const u8 *data, struct packet *p, i64 pod_mtu)
{
    p->vnet_flags = 0;
    p->gso_type = GSO_NONE;
    i64 start = p->start, l3 = p->l3, l4 = p->l4, end = start + p->length;
    if (l4 == 0 || p->flags & FRAGMENT || (p->protocol != 6 && p->protocol != 17) || !unfinished(data, p, end))
        return;
    p->vnet_flags = NEEDS_CSUM;
    p->csum_start = l4 - start;
    p->csum_offset = p->protocol == 6 ? 16 : 6;
    if (p->protocol == 6 && end - l3 > pod_mtu) {
        i64 headers = l4 - l3 + (data[l4 + 12] >> 4) * 4;
        p->hdr_len = l3 - start + headers;
        p->gso_size = pod_mtu - headers;
        p->gso_type = p->flags & IPV6 ? GSO_TCPV6 : GSO_TCPV4;
    }
}

static inline i64 merge_ecn(u8 *data, struct packet *p, int outer_tos)
{
    if (!(outer_tos & 1) || p->ethertype == 0x0806)
        return ACCEPTED;
    return (outer_tos & 3) == 3 && (p->tos & 3) == 0 ? TUNNEL_ECN : elsewhere(data, p);
}

static inline i64 unwrap(u8 *data, struct packet *p, const struct tables *t)
{
    i64 sender = find(t->vtep_slots, t->vtep_mask, t->vtep_key, 0, p->src_hi, p->src_lo);
    if (sender < 0)
        return TUNNEL_SRC_NOT_NODE;
    i64 l3 = p->l3, l4 = p->l4, end = p->start + p->length;
    if (l4 + 8 > end || load16(data + l4 + 4) < 8 || l4 + (i64)load16(data + l4 + 4) > end)
        return TUNNEL_TRUNCATED;
    if (!outer_checksum_ok(data, p))
        return TUNNEL_CSUM;
    end = l4 + load16(data + l4 + 4);
    i64 at = l4 + 8;
    if (at + 8 + 14 > end)
        return TUNNEL_TRUNCATED;
    u64 first = load32(data + at);
    if (!(first & 0x08000000))
        return TUNNEL_BAD_FLAGS;
    if (first & ~0x08000000ull || data[at + 7])
        return TUNNEL_RESERVED;
    if (load32(data + at + 4) >> 8 != t->settings[VNI])
        return TUNNEL_VNI;
    i64 inner = at + 8;
    u64 mine = t->settings[VTEP_MAC], to = load48(data + inner);
    if (load48(data + inner + 6) == mine)
        return TUNNEL_OWN_MAC;
    if (to != mine && !(to & 1ull << 40))
        return TUNNEL_INNER_MAC;
    int outer_tos = data[l3 + 1];
    p->start = inner;
    p->length = end - inner;
    p->flags |= TUNNELED;
    p->vtep = -1;
    i64 why = parse_frame(data, p, mine);
    if (why != ACCEPTED)
        return why;
    t->vteps[sender].rx_packets++;
    t->vteps[sender].rx_bytes += p->length;
    pass_checksum_state(data, p, t->settings[POD_MTU]);
    return merge_ecn(data, p, outer_tos);
}

STAGE void decapsulate(u8 *data, struct packet *packets, i64 count, const struct tables *t, i64 now)
{
    u64 port = t->settings[TUNNEL_PORT], node = t->settings[NODE_LO];
    for (i64 i = 0; i < count; i++) {
        struct packet *p = &packets[i];
        if (p->verdict != ACCEPT || p->protocol != 17 || p->dport != port || p->dst_lo != node)
            continue;
        int role = t->interfaces[p->iif].role;
        if (role == ROLE_POD || role == ROLE_NODE || p->flags & (FRAGMENT | IPV6))
            continue;
        i64 why = unwrap(data, p, t);
        if (why != ACCEPTED) {
            p->verdict = DROP;
            p->reason = why;
        }
    }
}

/* --- arp, defrag: nothing to do for these packets --- */

STAGE void arp(u8 *data, struct packet *packets, i64 count, const struct tables *t, i64 now)
{
    for (i64 i = 0; i < count; i++)
        if (packets[i].ethertype == 0x0806 && packets[i].verdict == ACCEPT)
            packets[i].reason = elsewhere(data, &packets[i]);
}

STAGE void defrag(u8 *data, struct packet *packets, i64 count, const struct tables *t, i64 now)
{
    for (i64 i = 0; i < count; i++)
        if ((packets[i].flags & (FRAGMENT | IPV6)) == FRAGMENT && packets[i].verdict == ACCEPT)
            packets[i].reason = elsewhere(data, &packets[i]);
}

/* --- guard --- */

static inline int not_on_a_wire(u64 lo)
{
    return lo <= 1 || lo >> 32 == 0xffff;
}

static inline i64 impossible(const struct packet *p)
{
    if (p->flags & IPV6) {
        if (p->dst_hi >> 56 == 0xff)
            return IP_MULTICAST;
        if (p->src_hi >> 56 == 0xff || (p->src_hi == 0 && not_on_a_wire(p->src_lo)))
            return IP_MARTIAN;
        if (p->dst_hi == 0 && not_on_a_wire(p->dst_lo))
            return IP_MARTIAN;
        return ACCEPTED;
    }
    u8 source = p->src_lo >> 24, target = p->dst_lo >> 24;
    if (target >= 224)
        return target < 240 || (u32)p->dst_lo == 0xffffffff ? IP_MULTICAST : IP_MARTIAN;
    if (source >= 224 || source == 0 || source == 127 || target == 0 || target == 127)
        return IP_MARTIAN;
    return ACCEPTED;
}

static inline i64 to_many(const struct packet *p, const struct tables *t)
{
    i64 found = fib(t, p->dst_hi, p->dst_lo);
    return found >= 0 && t->routes[found].kind == KIND_LOCAL ? ACCEPTED : IP_MULTICAST;
}

static inline i64 from_pod(const u8 *data, const struct packet *p, const struct tables *t)
{
    if (load48(data + p->start + 6) != t->interfaces[p->iif].peer_mac)
        return L2_SPOOFED_SRC;
    i64 back = fib(t, p->src_hi, p->src_lo);
    if (back < 0 || t->routes[back].kind != KIND_POD || t->routes[back].oif != p->iif)
        return IP_SPOOFED_SRC;
    if (p->protocol == 4 || (p->protocol == 17 && p->dport == t->settings[TUNNEL_PORT]))
        return TUNNEL_FROM_POD;
    return ACCEPTED;
}

static inline i64 from_host(const struct packet *p, const struct tables *t)
{
    i64 back = fib(t, p->src_hi, p->src_lo);
    return back < 0 || t->routes[back].kind != KIND_LOCAL ? IP_SPOOFED_SRC : ACCEPTED;
}

static inline i64 from_outside(const struct packet *p, const struct tables *t)
{
    i64 back = fib(t, p->src_hi, p->src_lo);
    if (back >= 0) {
        int kind = t->routes[back].kind;
        if (kind == KIND_POD || kind == KIND_LOCAL || kind == KIND_BLACKHOLE || kind == KIND_SERVICE)
            return IP_MARTIAN;
    }
    return ACCEPTED;
}

STAGE void guard(u8 *data, struct packet *packets, i64 count, const struct tables *t, i64 now)
{
    for (i64 i = 0; i < count; i++) {
        struct packet *p = &packets[i];
        if (p->verdict != ACCEPT || p->flags & INJECTED)
            continue;
        i64 why = impossible(p);
        if (why == ACCEPTED && data[p->start] & 1)
            why = to_many(p, t);
        if (why == ACCEPTED) {
            int role = t->interfaces[p->iif].role;
            if (role == ROLE_POD)
                why = from_pod(data, p, t);
            else
                why = role == ROLE_HOST ? from_host(p, t) : from_outside(p, t);
        }
        if (why != ACCEPTED) {
            p->verdict = DROP;
            p->reason = why;
        }
    }
}
