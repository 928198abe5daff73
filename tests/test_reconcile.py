"""Planning: the model of a node is three dictionaries; every plan must lead from the old model to the new one."""

from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address, IPv4Network, ip_address, ip_network
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataplane.control.edits import (
    AddPod,
    AddVtep,
    ChangePod,
    ChangeSettings,
    ChangeVtep,
    DeleteRoute,
    Edit,
    NeedsRestart,
    RemovePod,
    RemoveVtep,
    RouteSpec,
    SetRoute,
    Source,
)
from dataplane.control.reconcile import plan, process_keys
from dataplane.control.routing import routes
from dataplane.control.state import (
    DesiredState,
    Engine,
    Log,
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
    settings: tuple[object, ...] = ()

    @classmethod
    def of(cls, desired: DesiredState | None) -> "Model":
        if desired is None:
            return cls()
        peers = desired.peers if desired.tunnels else ()
        return cls(
            {item.interface: item for item in desired.pods},
            {item.name: item for item in peers},
            routes(desired),
            (desired.node, desired.pod_network),
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
            case ChangeSettings(node, pod_network):
                self.settings = (node, pod_network)
            case NeedsRestart():
                raise AssertionError(edit)

    def check(self) -> None:
        for spec in self.routes.values():
            assert spec.kind != "pod" or spec.target in self.pods
            assert spec.kind != "tunnel" or spec.target in self.vteps
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
    )


@given(st.none() | desired_states(), st.none() | desired_states())
def test_a_plan_leads_from_the_old_node_to_the_new_one_and_every_step_is_whole(
    old: DesiredState | None, new: DesiredState | None
):
    model = Model.of(old)
    for edit in plan(old, new):
        model.apply(edit)
        model.check()
    if new is None:
        model.settings = ()
    assert model == Model.of(new)


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


def test_what_concerns_the_process_is_named_too():
    old = Settings(state())
    new = replace(old, engine=Engine(batch=64), socket=Path("/x.sock"), metrics=("", 9091), log=Log("debug"))
    assert process_keys(old, old) == ()
    assert process_keys(old, new) == ("engine", "api.socket", "metrics.listen", "log")


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
