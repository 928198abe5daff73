"""The books of addresses as tables: pure functions from the report to columns and rows of text."""

from collections.abc import Iterable

from dataplane.control.ipam_report import IpamReport, Use
from dataplane.control.views import View, as_rows


def summary(books: IpamReport) -> View:
    """One row per pool."""
    return _table((pool["name"], "", pool["cidr"], pool["use"]) for pool in books["pools"])


def with_blocks(books: IpamReport) -> View:
    """One row per pool, and below it one for each of its blocks, as ``calicoctl ipam show --show-blocks``."""
    rows = []
    for pool in books["pools"]:
        rows.append((pool["name"], "", pool["cidr"], pool["use"]))
        rows += [
            ("", block["node"], block["cidr"], block["use"])
            for block in books["blocks"]
            if block["pool"] == pool["name"]
        ]
    rows += [
        ("(no pool)", block["node"], block["cidr"], block["use"]) for block in books["blocks"] if not block["pool"]
    ]
    return _table(rows)


def _table(rows: Iterable[tuple[str, str, str, Use]]) -> View:
    columns = ("pool", "node", "cidr", ">total", ">in use", ">cooling", ">reserved", ">free")
    return View(
        columns,
        as_rows(
            (
                *(pool, node or ("" if pool else "-"), cidr, use["total"], _share(use["in_use"], use["total"])),
                *(use["cooling"], use["reserved"], _share(use["free"], use["total"])),
            )
            for pool, node, cidr, use in rows
        ),
    )


def _share(part: int, whole: int) -> str:
    return f"{part} ({round(100 * part / whole)}%)"


def holders(books: IpamReport) -> View:
    """One row per address that is held."""
    rows = [
        (
            *(each["address"], each["node"], each["handle"], "borrowed" if each["borrowed"] else ""),
            " ".join(f"{key}={value}" for key, value in each["attributes"].items()),
        )
        for block in books["blocks"]
        for each in block["allocations"]
    ]
    return View(("address", "node", "handle", "", "attributes"), as_rows(rows))
