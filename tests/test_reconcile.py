"""Planning: the model of a node is four dictionaries; every plan must lead from the old model to the new one."""

from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address, IPv4Network, ip_address, ip_network
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataplane.control.edits import (
    AddDestination,
    AddPod,
    AddServer,
    AddVtep,
    ChangeDestination,
    ChangePod,
    ChangeServer,
    ChangeSettings,
    ChangeVtep,
    DeleteRoute,
    Edit,
    NeedsRestart,
    RemoveDestination,
    RemovePod,
    RemoveServer,
    RemoveVtep,
    RouteSpec,
    SetRoute,
    Source,
    describe,
)
from dataplane.control.ipam import Rules
from dataplane.control.process import Engine, Log
from dataplane.control.reconcile import plan, process_keys
from dataplane.control.routing import routes
from dataplane.control.services import Destination, ServerKey, VirtualServer, virtual_servers
from dataplane.control.state import (
    Address,
    Balancing,
    DesiredState,
    Network,
    Node,
    Peer,
    Pod,
    PodNetwork,
    Settings,
    StaticRoute,
    Uplink,
    Vxlan,
    host_interface,
    pod_mac,
    vtep_mac,
)
from tests import service_states
from tests.service_states import endpoint, web

BLOCK = IPv4Network("10.244.1.0/24")


def pod(name: str, address: str = "10.244.1.10", netns: str = "", mtu: int = 1450) -> Pod:
    interface = host_interface("cali", "default", name)
    return Pod(name, "default", netns or name, (ip_address(address),), pod_mac("default", name), mtu, interface)


def peer(name: str, address: str = "192.0.2.12", cidr: str = "10.244.2.0/24") -> Peer:
    return Peer(name, ip_address(address), (ip_network(cidr),), vtep_mac(name))


def state(**changes: object) -> DesiredState:
    fields: dict[str, object] = {
        "node": Node("node1", addresses=(IPv4Address("192.0.2.11"),)),
        "pod_network": PodNetwork(cidrs=(BLOCK,)),
        "uplink": Uplink("eth0"),
    }
    return DesiredState(**(fields | changes))  # type: ignore[arg-type]


@dataclass
class Model:
    """What a node holds. Each edit asserts that it can be carried out at this very moment."""

    pods: dict[str, Pod] = field(default_factory=dict)
    vteps: dict[str, Peer] = field(default_factory=dict)
    routes: dict[Network, RouteSpec] = field(default_factory=dict)
    servers: dict[ServerKey, VirtualServer] = field(default_factory=dict)
    settings: ChangeSettings | None = None

    @classmethod
    def of(cls, desired: DesiredState | None) -> "Model":
        if desired is None:
            return cls()
        peers = desired.peers if desired.tunnels else ()
        return cls(
            {item.interface: item for item in desired.pods},
            {item.name: item for item in peers},
            routes(desired),
            virtual_servers(desired),
            ChangeSettings.of(desired),
        )

    def apply(self, edit: Edit) -> None:
        match edit:
            case AddPod(item):
                assert item.interface not in self.pods
                self.pods[item.interface] = item
            case RemovePod(item):
                assert self.pods.pop(item.interface) == item
            case ChangePod(old, new):
                assert self.pods[old.interface] == old
                assert old.interface == new.interface
                self.pods[old.interface] = new
            case AddVtep(item):
                assert item.name not in self.vteps
                self.vteps[item.name] = item
            case RemoveVtep(item):
                assert self.vteps.pop(item.name) == item
            case ChangeVtep(old, new):
                assert self.vteps[old.name] == old
                assert old.name == new.name
                self.vteps[old.name] = new
            case SetRoute(prefix, spec):
                self.routes[prefix] = spec
            case DeleteRoute(prefix):
                del self.routes[prefix]
            case ChangeSettings():
                self.settings = edit
            case NeedsRestart():
                raise AssertionError(edit)
            case _:
                self.apply_to_servers(edit)

    def apply_to_servers(self, edit: Edit) -> None:
        match edit:
            case AddServer(server):
                assert server.key not in self.servers
                self.servers[server.key] = server
            case RemoveServer(server):
                assert self.servers.pop(server.key) == server
            case ChangeServer(old, new):
                held = self.servers[old.key]
                assert old.key == new.key
                assert replace(held, destinations=()) == replace(old, destinations=()) != replace(new, destinations=())
                self.servers[new.key] = replace(new, destinations=held.destinations)
            case AddDestination(server, each):
                held = self.servers[server.key]
                assert (each.address, each.port) not in {item[:2] for item in held.destinations}
                self.servers[server.key] = replace(held, destinations=(*held.destinations, each))
            case RemoveDestination(server, each):
                held = self.servers[server.key]
                assert each in held.destinations
                kept = tuple(item for item in held.destinations if item != each)
                self.servers[server.key] = replace(held, destinations=kept)
            case ChangeDestination(server, each):
                held = self.servers[server.key]
                changed = tuple(each if item[:2] == each[:2] else item for item in held.destinations)
                assert changed != held.destinations
                self.servers[server.key] = replace(held, destinations=changed)

    def sorted(self) -> "Model":
        """The same with destinations in the order of a state, though those that came later are the newest."""
        servers = {}
        for key, server in self.servers.items():
            in_order = sorted(server.destinations, key=lambda each: f"{each.address}:{each.port}")
            servers[key] = replace(server, destinations=tuple(in_order))
        return replace(self, servers=servers)

    def check(self) -> None:
        for spec in self.routes.values():
            assert spec.kind != "pod" or spec.target in self.pods
            assert spec.kind != "tunnel" or spec.target in self.vteps
        assert all(ip_network(key.address) in self.routes for key in self.servers)
        assert len({item.netns for item in self.pods.values()}) == len(self.pods)
        for key in ("address", "vtep_mac", "tunnel_address"):
            assert len({getattr(item, key) for item in self.vteps.values()}) == len(self.vteps), key


NAMES = "abcd"


@st.composite
def desired_states(draw: st.DrawFn) -> DesiredState:
    pod_names = draw(st.lists(st.sampled_from(NAMES), unique=True))
    addresses = draw(st.permutations([f"10.244.1.{host}" for host in range(10, 15)]))
    spaces = draw(st.permutations([f"ns-{letter}" for letter in "vwxyz"]))
    peer_names = draw(st.lists(st.sampled_from(NAMES), unique=True))
    nodes = draw(st.permutations(["192.0.2.12", "192.0.2.13", "203.0.113.12", "203.0.113.13"]))
    blocks = draw(st.permutations([f"10.244.{block}.0/24" for block in range(2, 6)]))
    return state(
        node=Node("node1", draw(st.sampled_from(["", "z1"])), (IPv4Address("192.0.2.11"),)),
        pod_network=PodNetwork(cidrs=(ip_network(draw(st.sampled_from(["10.244.1.0/24", "10.244.0.0/20"]))),)),
        pods=tuple(
            pod(name, address, netns, draw(st.sampled_from([1400, 1450])))
            for name, address, netns in zip(pod_names, addresses, spaces, strict=False)
        ),
        vxlan=Vxlan(draw(st.sampled_from(["Always", "CrossSubnet"]))),
        peers=tuple(
            peer(name, address, block) for name, address, block in zip(peer_names, nodes, blocks, strict=False)
        ),
        routes=draw(
            st.sampled_from([(), (StaticRoute(IPv4Network("198.51.100.0/24"), IPv4Address("192.0.2.1")),)]),
        ),
        on_link=draw(st.sampled_from([(), (IPv4Network("192.0.2.0/24"),)])),
        balancing=Balancing(
            scheduler=draw(st.sampled_from(["rr", "mh"])),
            cluster_cidrs=draw(st.sampled_from([(), (IPv4Network("10.244.0.0/16"),)])),
            service_cidrs=draw(st.sampled_from([(), (IPv4Network("10.96.0.0/12"),)])),
        ),
    )


@st.composite
def served_states(draw: st.DrawFn) -> DesiredState:
    names = draw(st.lists(st.sampled_from("ab"), unique=True))
    return replace(draw(desired_states()), services=tuple(draw(service_states.services(name)) for name in names))


@settings(max_examples=60)
@given(st.none() | served_states(), st.none() | served_states())
def test_a_plan_leads_from_the_old_node_to_the_new_one_and_every_step_is_whole(
    old: DesiredState | None, new: DesiredState | None
):
    model = Model.of(old)
    edits = plan(old, new)
    coming = pod_addresses(new) - pod_addresses(old) - endpoint_addresses(old)
    going = pod_addresses(old) - pod_addresses(new) - endpoint_addresses(new)
    for edit in edits:
        model.apply(edit)
        model.check()
        there = {address for item in model.pods.values() for address in item.addresses}
        used = {each.address for server in model.servers.values() for each in server.destinations}
        if new is not None and old is not None:
            assert not (used & coming) - there
            assert not isinstance(edit, RemovePod) or not used & going
    if new is None:
        model.settings = None
    assert model.sorted() == Model.of(new)


def pod_addresses(desired: DesiredState | None) -> set[Address]:
    return {address for item in desired.pods for address in item.addresses} if desired else set()


def endpoint_addresses(desired: DesiredState | None) -> set[Address]:
    return {each.address for service in desired.services for each in service.endpoints} if desired else set()


@given(desired_states())
def test_nothing_is_planned_for_a_state_that_is_reached(desired: DesiredState):
    assert plan(desired, desired) == ()


@given(desired_states(), st.randoms())
def test_the_order_of_pods_and_peers_in_the_file_does_not_matter(desired: DesiredState, random):
    pods, peers = list(desired.pods), list(desired.peers)
    random.shuffle(pods)
    random.shuffle(peers)
    assert plan(desired, replace(desired, pods=tuple(pods), peers=tuple(peers))) == ()


@given(desired_states(), desired_states())
def test_an_address_of_the_own_block_never_loses_its_blackhole(old: DesiredState, new: DesiredState):
    model = Model.of(old)
    if old.pod_network != new.pod_network:
        return
    for edit in plan(old, new):
        model.apply(edit)
        assert model.routes[old.pod_network.cidrs[0]].kind == "blackhole"


def test_a_pod_gets_a_route_and_the_rest_of_the_block_a_blackhole():
    assert routes(state(pods=(pod("web-0"),))) == {
        IPv4Network("169.254.1.1/32"): RouteSpec("local", Source.LOCAL_HOST),
        IPv4Network("192.0.2.11/32"): RouteSpec("local", Source.LOCAL_HOST, hosted=True),
        IPv4Network("10.244.1.0/32"): RouteSpec("local", Source.LOCAL_HOST),
        IPv4Network("10.244.1.10/32"): RouteSpec("pod", Source.LOCAL_WORKLOAD, pod("web-0").interface),
        BLOCK: RouteSpec("blackhole", Source.BLACKHOLE),
    }


def test_a_block_of_one_address_has_no_blackhole():
    desired = state(pod_network=PodNetwork(cidrs=(IPv4Network("10.244.1.10/32"),)), uplink=None)
    assert IPv4Network("10.244.1.10/32") not in routes(desired)


ON_LINK = (IPv4Network("192.0.2.0/24"),)
PEERS = """
# mode          peer           kind    source             gateway
Always          192.0.2.12     tunnel  VXLAN_TUNNEL       10.244.2.0
Always          203.0.113.12   tunnel  VXLAN_TUNNEL       10.244.2.0
CrossSubnet     192.0.2.12     via     VXLAN_SAME_SUBNET  192.0.2.12
CrossSubnet     203.0.113.12   tunnel  VXLAN_TUNNEL       10.244.2.0
Never           192.0.2.12     via     NO_ENCAP           192.0.2.12
Never           203.0.113.12   via     NO_ENCAP           203.0.113.12
"""


@pytest.mark.parametrize("row", [line.split() for line in PEERS.splitlines() if line and line[0] != "#"])
def test_a_remote_block_is_reached_as_the_vxlan_mode_says(row):
    mode, address, kind, source, gateway = row
    desired = state(vxlan=Vxlan(mode), peers=(peer("node2", address),), on_link=ON_LINK)
    target = "node2" if kind == "tunnel" else "eth0"
    assert routes(desired)[IPv4Network("10.244.2.0/24")] == RouteSpec(
        kind, Source[source], target, IPv4Address(gateway)
    )


def test_of_two_wishes_for_one_prefix_calicos_order_decides():
    block = IPv4Network("10.244.2.0/24")
    static = StaticRoute(block, IPv4Address("192.0.2.1"))
    desired = state(routes=(static,), on_link=(block,), pod_network=PodNetwork(cidrs=(block,)))
    assert routes(replace(desired, peers=(peer("node2"),)))[block].source == Source.VXLAN_TUNNEL
    assert routes(desired)[block].source == Source.STATIC
    assert routes(replace(desired, routes=()))[block].source == Source.ON_LINK
    assert routes(replace(desired, routes=(), on_link=()))[block].source == Source.BLACKHOLE


def test_the_uplinks_prefixes_and_static_routes_leave_by_the_uplink():
    desired = state(
        on_link=ON_LINK,
        routes=(
            StaticRoute(IPv4Network("198.51.100.0/24"), IPv4Address("192.0.2.1")),
            StaticRoute(IPv4Network("203.0.113.0/24"), None, "unreachable"),
        ),
    )
    table = routes(desired)
    assert table[ON_LINK[0]] == RouteSpec("via", Source.ON_LINK, "eth0")
    assert table[IPv4Network("198.51.100.0/24")] == RouteSpec("via", Source.STATIC, "eth0", IPv4Address("192.0.2.1"))
    assert table[IPv4Network("203.0.113.0/24")] == RouteSpec("unreachable", Source.STATIC)


def test_a_node_is_built_from_nothing_and_emptied():
    desired = state(pods=(pod("web-0"),), peers=(peer("node2"),))
    kinds = [type(edit) for edit in plan(None, desired)]
    assert kinds == [ChangeSettings, AddPod, AddVtep, *[SetRoute] * 6]
    assert [type(edit) for edit in plan(desired, None)] == [*[DeleteRoute] * 6, RemovePod, RemoveVtep]


def test_a_pod_that_moves_to_another_namespace_changes_in_place():
    old, new = pod("web-0"), pod("web-0", netns="elsewhere")
    assert plan(state(pods=(old,)), state(pods=(new,))) == (ChangePod(old, new),)


def test_a_pod_that_changes_its_address_loses_the_old_route_first_and_gets_the_new_one_last():
    old, new = pod("web-0"), pod("web-0", "10.244.1.11")
    assert plan(state(pods=(old,)), state(pods=(new,))) == (
        DeleteRoute(IPv4Network("10.244.1.10/32")),
        ChangePod(old, new),
        SetRoute(IPv4Network("10.244.1.11/32"), RouteSpec("pod", Source.LOCAL_WORKLOAD, new.interface)),
    )


def test_pods_that_swap_namespaces_go_and_come_again():
    a, b = pod("a", "10.244.1.10", "x"), pod("b", "10.244.1.11", "y")
    swapped = (replace(a, netns="y"), replace(b, netns="x"))
    edits = [type(edit) for edit in plan(state(pods=(a, b)), state(pods=swapped))]
    assert edits == [DeleteRoute, DeleteRoute, RemovePod, RemovePod, AddPod, AddPod, SetRoute, SetRoute]


def test_another_pod_is_left_alone():
    other = pod("client-0", "10.244.1.20")
    edits = plan(state(pods=(pod("web-0"), other)), state(pods=(other, pod("web-0", netns="elsewhere"))))
    assert other.interface not in str(edits)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"node": Node("node9", addresses=(IPv4Address("192.0.2.11"),))}, "node.name"),
        ({"node": Node("node1", addresses=(IPv4Address("192.0.2.19"),))}, "node.addresses"),
        ({"uplink": Uplink("eth1")}, "uplink"),
        ({"vxlan": Vxlan(vni=1)}, "vxlan.vni"),
        ({"vxlan": Vxlan(port=8472)}, "vxlan.port"),
        ({"vxlan": Vxlan("Never")}, "vxlan.mode"),
        ({"pod_network": PodNetwork(cidrs=(BLOCK,), gateway_mac=2)}, "pods.gatewayMAC"),
    ],
)
def test_what_is_fixed_for_a_running_node_is_named_and_nothing_else_is_planned(changes, key):
    (edit,) = plan(state(), state(**{"pods": (pod("web-0"),)} | changes))
    assert edit == NeedsRestart((key,))
    assert str(edit) == f"cannot be changed while running: {key}; restart the node to apply"


SERVICE = RouteSpec("service", Source.SERVICE)
VIP = IPv4Network("10.96.0.20/32")


def test_a_service_has_a_route_and_unused_addresses_are_a_black_hole():
    balancing = Balancing(service_cidrs=(IPv4Network("10.96.0.0/12"),))
    table = routes(state(services=(web(),), balancing=balancing))
    assert table[VIP] == SERVICE
    assert table[IPv4Network("10.96.0.0/12")] == RouteSpec("blackhole", Source.BLACKHOLE)


def test_a_load_balancers_address_is_announced_by_one_node_and_nodes_addresses_stay_theirs():
    given = web(endpoint("10.244.1.10"), load_balancer_ips=(IPv4Address("192.0.2.200"),))
    other = replace(web(external_ips=(IPv4Address("192.0.2.11"),)), name="other", cluster_ips=())
    here = state(peers=(peer("node2"),), services=(given, other))
    there = replace(here, node=Node("node2", addresses=here.node.addresses), peers=(peer("node1"),))
    found = [routes(here), routes(there)]
    assert [table[IPv4Network("192.0.2.200/32")].announced for table in found] == [False, True]
    assert found[0][IPv4Network("192.0.2.11/32")].kind == "local"
    assert not found[0][VIP].announced


def test_one_endpoint_more_is_one_edit_and_no_route_is_touched():
    old = state(services=(web(endpoint("10.244.1.10")),))
    new = state(services=(web(endpoint("10.244.1.10"), endpoint("10.244.2.10")),))
    (edit,) = plan(old, new)
    assert isinstance(edit, AddDestination)
    assert edit.destination == Destination(IPv4Address("10.244.2.10"), 8080)
    assert describe(edit) == "endpoint 10.244.2.10:8080 of default/web added at 10.96.0.20:80/TCP"


@given(served_states(), served_states())
@settings(max_examples=30)
def test_every_edit_can_be_told(old: DesiredState, new: DesiredState):
    assert all(describe(edit) for edit in plan(old, new))


def test_a_weight_is_told():
    old, new = (state(services=(web(endpoint("10.244.1.10", weight=weight)),)) for weight in (1, 0))
    (edit,) = plan(old, new)
    assert isinstance(edit, ChangeDestination)
    assert describe(edit) == "endpoint 10.244.1.10:8080 of default/web has weight 0 at 10.96.0.20:80/TCP"


def test_virtual_servers_come_after_their_routes_and_go_before_them():
    desired = state(services=(web(endpoint("10.244.1.10")),))
    come, go = plan(state(), desired), plan(desired, state())
    assert [type(edit) for edit in come] == [SetRoute, AddServer]
    assert [type(edit) for edit in go] == [RemoveServer, DeleteRoute]
    assert describe(come[0]) == "route 10.96.0.20/32 service"
    assert describe(go[0]) == "service default/web removed at 10.96.0.20:80/TCP"


def test_an_endpoint_on_a_new_pod_comes_after_it_and_one_on_an_old_pod_goes_before():
    old = state(pods=(pod("a", "10.244.1.10"),), services=(web(endpoint("10.244.1.10")),))
    new = state(pods=(pod("b", "10.244.1.11"),), services=(web(endpoint("10.244.1.11")),))
    kinds = [type(edit) for edit in plan(old, new)]
    assert kinds == [RemoveDestination, DeleteRoute, RemovePod, AddPod, SetRoute, AddDestination]


POOLS = """
# clusterCIDR    natOutgoing   -> cluster         outgoing
-                no            -                  -
10.244.0.0/16    no            10.244.0.0/16      -
10.244.0.0/16    yes           10.244.0.0/16      10.244.0.0/16
-                yes           -                  10.244.1.0/24,10.244.2.0/23
"""


@pytest.mark.parametrize("row", [line.split() for line in POOLS.splitlines() if line and line[0] != "#"])
def test_the_pools_are_the_cluster_or_all_blocks_that_are_known(row):
    given, nat, cluster, outgoing = ([IPv4Network(word) for word in column.split(",") if "/" in word] for column in row)
    desired = state(
        pod_network=PodNetwork(cidrs=(BLOCK,), nat_outgoing=row[1] == "yes"),
        peers=(peer("node2"), peer("node3", "192.0.2.13", "10.244.3.0/24")),
        balancing=Balancing(cluster_cidrs=tuple(given)),
    )
    edit = ChangeSettings.of(desired)
    assert (list(edit.cluster), list(edit.outgoing), nat) == (cluster, outgoing, [])


def test_timeouts_change_while_packets_flow_and_the_tables_size_does_not():
    timeouts = state(balancing=Balancing(timeouts=(("udpTimeout", 10),)))
    assert [type(edit) for edit in plan(state(), timeouts)] == [ChangeSettings]
    assert plan(state(), state(balancing=Balancing(conntrack_max=1024))) == (NeedsRestart(("services.conntrack.max",)),)


def test_what_concerns_the_process_is_named_too():
    old = Settings(state())
    new = replace(old, engine=Engine(batch=64), socket=Path("/x.sock"), metrics=("", 9091), log=Log("debug"))
    assert process_keys(old, old) == ()
    assert process_keys(old, new) == ("engine", "api.socket", "metrics.listen", "log")
    assert process_keys(old, replace(old, ipam=Rules(cooldown=30.0))) == ("ipam",)


def test_always_and_cross_subnet_change_while_packets_flow():
    old = state(peers=(peer("node2"),), on_link=ON_LINK)
    new = replace(old, vxlan=Vxlan("CrossSubnet"))
    spec = RouteSpec("via", Source.VXLAN_SAME_SUBNET, "eth0", IPv4Address("192.0.2.12"))
    assert plan(old, new) == (SetRoute(IPv4Network("10.244.2.0/24"), spec),)


def hosted(wanted: DesiredState) -> set[str]:
    return {str(prefix.network_address) for prefix, spec in routes(wanted).items() if spec.hosted}


def test_with_a_link_of_its_own_the_host_has_the_first_address_of_the_block_unless_a_pod_has_it():
    plain = state(uplink=None)
    linked = replace(plain, node=replace(plain.node, host_interface="dp0"))
    assert (hosted(plain), hosted(linked)) == ({"192.0.2.11"}, {"192.0.2.11", "10.244.1.0"})
    first = replace(pod("web-0"), addresses=(IPv4Address("10.244.1.0"),))
    assert hosted(replace(linked, pods=(first,))) == {"192.0.2.11"}
    assert linked.host_address == IPv4Address("10.244.1.0")
    assert replace(linked, pod_network=replace(linked.pod_network, cidrs=())).host_address is None
