"""Services and connections as ``ipvsadm -L -n`` prints them, byte for byte, trailing spaces included.

Formats and order are those of ipvsadm 1.31 (Debian 12): services by protocol, address and port, their destinations by
address and port. The version is that of ip_vs's interface since Linux 2.6; the size is the flow table's.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from ipaddress import IPv4Address, ip_address
from typing import Any

from dataplane.control.snapshot import EndpointRow, FlowRow, ServiceRow, TemplateRow, endpoint_text

VERSION = "1.2.1"
_NUMBERS = {"TCP": 6, "UDP": 17, "SCTP": 132}
_COUNTERS = ("connections", "in_packets", "out_packets", "in_bytes", "out_bytes")
_FLAGS = ("sh-fallback", "sh-port", "mh-fallback", "mh-port")  # in the order of their bits
_UNITS = ((10**14, 10**12, "T"), (10**11, 10**9, "G"), (10**9, 10**6, "M"), (10**8, 10**3, "K"))

_Key = tuple[str, str, int]


def services(services: Sequence[ServiceRow], endpoints: Sequence[EndpointRow], size: int) -> str:
    """Return what ``ipvsadm -Ln`` prints.

    Args:
        services: All services.
        endpoints: All endpoints.
        size: Flows that the table can hold.
    """
    head = (
        f"{_banner(size)}Prot LocalAddress:Port Scheduler Flags\n"
        "  -> RemoteAddress:Port           Forward Weight ActiveConn InActConn\n"
    )
    lines = []
    for service, members in _ordered(services, endpoints):
        lines.append(f"{_name(service)} {service['scheduler']}{_flags(service)}\n")
        lines += [
            f"  -> {_remote(each):<28} {'Masq':<7} {each['weight']:<6} {each['active']:<10} {each['inactive']:<10}\n"
            for each in members
        ]
    return head + "".join(lines)


def stats(services: Sequence[ServiceRow], endpoints: Sequence[EndpointRow], size: int) -> str:
    """Return what ``ipvsadm -Ln --stats`` prints: totals."""
    lines = _titles(size, "Conns", "InPkts", "OutPkts", "InBytes", "OutBytes")
    for service, members in _ordered(services, endpoints):
        lines.append(f"{_name(service):<33}{_numbers(service)}\n")
        lines += [f"  -> {_remote(each):<28}{_numbers(each)}\n" for each in members]
    return "".join(lines)


def rate(services: Sequence[ServiceRow], endpoints: Sequence[EndpointRow], size: int) -> str:
    """Return what ``ipvsadm -Ln --rate`` prints, for rows whose counters are per second (``per_second``).

    A destination's connections and packets are not abbreviated, whatever their width.
    """
    lines = _titles(size, "CPS", "InPPS", "OutPPS", "InBPS", "OutBPS")
    for service, members in _ordered(services, endpoints):
        lines.append(f"{_name(service):<33}{_numbers(service)}\n")
        for each in members:
            whole = f"{each['connections']:>8} {each['in_packets']:>8} {each['out_packets']:>8}"
            lines.append(f"  -> {_remote(each):<28} {whole}{_large(each['in_bytes'])}{_large(each['out_bytes'])}\n")
    return "".join(lines)


def _titles(size: int, *titles: str) -> list[str]:
    head = f"{'Prot LocalAddress:Port':<33} {' '.join(f'{title:>8}' for title in titles)}\n"
    return [_banner(size), head, "  -> RemoteAddress:Port\n"]


def connections(flows: Iterable[FlowRow], templates: Iterable[TemplateRow]) -> str:
    """Return what ``ipvsadm -Lnc`` prints: connections, and persistence templates as entries of state NONE.

    A template stands for all of a client's ports: its own is 0.
    """
    lines = ["IPVS connection entries\n", _connection("pro", "expire", "state", "source", "virtual", "destination")]
    for row in templates:
        virtual = endpoint_text(row["virtual_address"], row["virtual_port"])
        client = endpoint_text(row["client"], 0)
        lines.append(_connection(row["protocol"], _expire(row["timeout_s"]), "NONE", client, virtual, row["backend"]))
    for flow in flows:
        if not flow["lb_state"]:
            continue
        original, reply = flow["original"], flow["reply"]
        lines.append(
            _connection(
                flow["protocol"].upper(),
                _expire(flow["lb_timeout_s"]),
                flow["lb_state"],
                endpoint_text(original["src"], original["sport"]),
                endpoint_text(original["dst"], original["dport"]),
                endpoint_text(reply["src"], reply["sport"]),
            )
        )
    return "".join(lines)


def per_second(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]], seconds: float) -> list[Any]:
    """Return the rows of ``after``, services or endpoints, with their counters' growth since ``before`` per second."""
    old = {_identity(row): row for row in before}
    return [
        {**row, **{name: round((row[name] - old.get(_identity(row), row)[name]) / seconds) for name in _COUNTERS}}
        for row in after
    ]


# --- parts -----------------------------------------------------------------------------------------------------------


def _banner(size: int) -> str:
    return f"IP Virtual Server version {VERSION} (size={size})\n"


def _ordered(
    services: Sequence[ServiceRow], endpoints: Sequence[EndpointRow]
) -> Iterator[tuple[ServiceRow, list[EndpointRow]]]:
    members: dict[_Key, list[EndpointRow]] = {}
    for each in endpoints:
        members.setdefault((each["protocol"], each["virtual_address"], each["virtual_port"]), []).append(each)
    for service in sorted(services, key=lambda row: (_NUMBERS[row["protocol"]], *_place(row))):
        key = service["protocol"], service["address"], service["port"]
        yield service, sorted(members.get(key, []), key=_place)


def _place(row: ServiceRow | EndpointRow) -> tuple[int, int, int]:
    address = ip_address(row["address"])
    return address.version, int(address), row["port"]


def _identity(row: Mapping[str, Any]) -> tuple[Any, ...]:
    virtual = row.get("virtual_address"), row.get("virtual_port")
    return row["protocol"], row["address"], row["port"], *virtual


def _name(service: ServiceRow) -> str:
    name = f"{service['protocol']:<4} {endpoint_text(service['address'], service['port'])}"
    return name if ":" in service["address"] else name[:33]


def _remote(row: EndpointRow) -> str:
    name = endpoint_text(row["address"], row["port"])
    return name if ":" in row["address"] else name[:28]


def _flags(service: ServiceRow) -> str:
    named = [flag for flag in _FLAGS if flag in service["scheduler_flags"]]
    text = f" ({','.join(named)})" if named else ""
    if service["affinity_s"]:
        text += f" persistent {service['affinity_s']}{_mask(service)}"
    return text + (" ops" if "ops" in service["scheduler_flags"] else "")


def _mask(service: ServiceRow) -> str:
    bits = service["mask_bits"]
    if ":" in service["address"]:
        return "" if bits == 128 else f" mask {bits}"
    return "" if bits == 32 else f" mask {IPv4Address((0xFFFF_FFFF << (32 - bits)) & 0xFFFF_FFFF)}"


def _numbers(row: ServiceRow | EndpointRow) -> str:
    return "".join(_large(row[name]) for name in _COUNTERS)  # type: ignore[literal-required]


def _large(number: int) -> str:
    """Return a counter in nine columns, decimal multiples where it would need more."""
    for least, unit, letter in _UNITS:
        if number >= least:
            return f"{number // unit:>8}{letter}"
    return f"{number:>9}"


def _expire(seconds: int) -> str:
    return f"{seconds // 60:02}:{seconds % 60:02}"


def _connection(*words: str) -> str:
    protocol, expire, state, source, virtual, destination = words
    return f"{protocol:<3} {expire:<6} {state:<11} {source:<18} {virtual:<18} {destination}\n"
