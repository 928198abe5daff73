"""What a person at the terminal sees when the node is up: the devices, and lines to try."""

import shutil
import sys
from collections.abc import Iterator

from dataplane.control.snapshot import Interfaces
from dataplane.control.state import Pod, Service, Settings


def show(interfaces: Interfaces, settings: Settings) -> None:
    """Print the table of pods and a few commands that work right now."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    states = {row["pod"]: row["state"] for row in interfaces["interfaces"] if row["pod"]}
    table = Table(box=None, pad_edge=False)
    for column in ("POD", "ADDRESS", "NETNS", "MAC", "MTU", "STATE"):
        table.add_column(column)
    for pod in settings.state.pods:
        addresses = ",".join(str(address) for address in pod.addresses)
        mac = ":".join(f"{byte:02x}" for byte in pod.mac.to_bytes(6))
        table.add_row(pod.id, addresses, pod.netns, mac, str(pod.mtu), states.get(pod.id, "?"))
    console.print(table)
    console.print("\nTry, in another terminal:")
    for line in suggestions(settings.state.pods, settings.state.services):
        console.print(f"  {line}", soft_wrap=True)
    console.print("\nCtrl-C stops the node and takes everything away again.")


def suggestions(pods: tuple[Pod, ...], services: tuple[Service, ...] = ()) -> list[str]:
    """Return commands to try with these pods and services."""
    lines = []
    program = "dataplane" if shutil.which("dataplane") else sys.argv[0]
    if len(pods) > 1:
        server, client = pods[0], pods[-1]
        inside = f"ip netns exec {client.netns}"
        lines.append(f"{inside} ping -c 3 {server.addresses[0]}")
        lines.append(f"{inside} traceroute -n {server.addresses[0]}")
        lines.append(f"ip netns exec {server.netns} iperf3 -s -1 &")  # a line of its own: the client does not wait
        lines.append(f"{inside} iperf3 -c {server.addresses[0]}")
        lines.extend(_with_service(pods, services, inside, program))
    return [*lines, f"{program} show counters", f"{program} show drops"]


def _with_service(pods: tuple[Pod, ...], services: tuple[Service, ...], inside: str, program: str) -> Iterator[str]:
    """Yield how to serve and fetch a page, if a TCP service leads to pods of this node."""
    netns = {address: pod.netns for pod in pods for address in pod.addresses}
    for service in services:
        here = [netns[endpoint.address] for endpoint in service.endpoints if endpoint.address in netns]
        port = next(
            (port for port in service.ports if port.protocol == "TCP" and isinstance(port.target_port, int)), None
        )
        if here and port is not None and service.cluster_ips:
            serve = f"python3 -m http.server {port.target_port}"
            yield f"for pod in {' '.join(here)}; do ip netns exec $pod {serve} & done"
            yield f"{inside} curl -sS --retry 5 --retry-connrefused http://{service.cluster_ips[0]}:{port.port}"
            yield f"{program} show services"
            return
