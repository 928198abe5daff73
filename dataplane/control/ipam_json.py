"""Blocks, affinities and pools as JSON, with Calico's names where it has one."""

import json
from collections.abc import Mapping
from ipaddress import ip_network
from types import MappingProxyType
from typing import Any

from dataplane.control.ipam import BLOCK_SIZES, Affinity, Allocation, Block, Given, Pool
from dataplane.control.ipam_store import BLOCKS, NODES, Value, block_key
from dataplane.control.state import Network, Selector

_HOST = "host:"  # Calico's kind of affinity: there are others


class BookError(ValueError):
    """A text that is no entry of the books; it says why."""


def dump(value: Value) -> str:
    """Return a block or an affinity as text."""
    assert not isinstance(value, Given), "nodes write their own records"
    return json.dumps(_block_values(value) if isinstance(value, Block) else _affinity_values(value))


def load(key: str, text: str) -> Value:
    """Return what is stored under a key, relative to the prefix of all keys.

    Raises:
        BookError: The text is nothing of the kind.
    """
    try:
        given = json.loads(text)
        if not isinstance(given, dict):
            raise BookError("expected an object")
        if key.startswith(NODES):
            return Given(tuple(ip_network(cidr) for cidr in given.get("podCIDR", ())))
        if not key.startswith(BLOCKS):
            return _affinity(given)
        block = _block(given)
        if key != block_key(block.cidr):  # two keys with one block would give its addresses twice
            raise BookError(f"expected the cidr that the key says (got {block.cidr})")
        return block
    except KeyError as missing:
        raise BookError(f"{missing.args[0]} is missing") from None
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise BookError(str(error)) from None


def _block_values(block: Block) -> dict[str, Any]:
    return {
        "cidr": str(block.cidr),
        "affinity": _HOST + block.affinity if block.affinity else None,
        "number": block.number,
        "idleSince": block.idle_since,
        "sequenceNumber": block.sequence,
        "unallocated": list(block.unallocated),
        "released": [{"ordinal": ordinal, "releasedAt": since} for ordinal, since in block.released],
        "allocations": [
            {
                "ordinal": ordinal,
                "handle": each.handle,
                "node": each.node,
                "sequenceNumber": each.sequence,
                "attributes": dict(each.attributes),
            }
            for ordinal, each in block.allocations.items()
        ],
    }


def _block(given: Mapping[str, Any]) -> Block:
    cidr = ip_network(given["cidr"])
    block = Block(
        cidr=cidr,
        affinity=str(given["affinity"] or "").removeprefix(_HOST),
        number=int(given["number"]),
        idle_since=float(given["idleSince"]),
        sequence=int(given["sequenceNumber"]),
        unallocated=tuple(int(ordinal) for ordinal in given["unallocated"]),
        released=tuple((int(each["ordinal"]), float(each["releasedAt"])) for each in given["released"]),
        allocations=MappingProxyType({int(each["ordinal"]): _allocation(each) for each in given["allocations"]}),
    )
    ordinals = [*block.unallocated, *(ordinal for ordinal, _ in block.released)]
    ordinals += [int(each["ordinal"]) for each in given["allocations"]]
    if cidr.num_addresses != len(ordinals) or set(ordinals) != set(range(cidr.num_addresses)):
        raise BookError(f"expected each of the {cidr.num_addresses} addresses once")
    return block


def _allocation(given: Mapping[str, Any]) -> Allocation:
    attributes = tuple(sorted((str(key), str(value)) for key, value in given["attributes"].items()))
    return Allocation(str(given["handle"]), str(given["node"]), int(given["sequenceNumber"]), attributes)


def _affinity_values(affinity: Affinity) -> dict[str, Any]:
    state = "confirmed" if affinity.confirmed else "pending"
    return {"node": affinity.node, "cidr": str(affinity.cidr), "number": affinity.number, "state": state}


def _affinity(given: Mapping[str, Any]) -> Affinity:
    if given["state"] not in ("pending", "confirmed"):
        raise BookError(f'expected state "pending" or "confirmed" (got {given["state"]})')
    cidr = ip_network(given["cidr"])
    return Affinity(str(given["node"]), cidr, int(given["number"]), given["state"] == "confirmed")


# --- pools -----------------------------------------------------------------------------------------------------------


def dump_pool(pool: Pool) -> str:
    """Return a pool as text."""
    values: dict[str, Any] = {"cidr": str(pool.cidr), "blockSize": pool.block_size, "disabled": pool.disabled}
    if pool.node_selector is not None:
        values["nodeSelector"] = {
            "matchLabels": dict(pool.node_selector.labels),
            "matchExpressions": [
                {"key": key, "operator": operator, "values": list(values)}
                for key, operator, values in pool.node_selector.expressions
            ],
        }
    return json.dumps(values)


def load_pool(name: str, text: str) -> Pool:
    """Return the pool that is stored under a name.

    Raises:
        BookError: The text is no pool.
    """
    try:
        given = json.loads(text)
        cidr = ip_network(given["cidr"])
        size = int(given["blockSize"])
        selector = given.get("nodeSelector")
        pool = Pool(name, cidr, size, bool(given.get("disabled")), _selector(selector) if selector else None)
    except KeyError as missing:
        raise BookError(f"{missing.args[0]} is missing") from None
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise BookError(str(error)) from None
    check_block_size(cidr, size)
    return pool


def check_block_size(cidr: Network, size: int) -> None:
    """Refuse blocks that are too small or too large.

    Raises:
        BookError: They are.
    """
    low, high = BLOCK_SIZES[cidr.version]
    if not max(low, cidr.prefixlen) <= size <= high:
        raise BookError(f"expected a blockSize from {max(low, cidr.prefixlen)} to {high} (got {size})")


def _selector(given: Mapping[str, Any]) -> Selector:
    expressions = []
    for each in given.get("matchExpressions", ()):
        if each["operator"] not in ("In", "NotIn", "Exists", "DoesNotExist"):
            raise BookError(f"expected an operator of Kubernetes (got {each['operator']})")
        expressions.append((str(each["key"]), each["operator"], tuple(map(str, each.get("values", ())))))
    labels = given.get("matchLabels", {})
    return Selector(tuple(sorted((str(key), str(value)) for key, value in labels.items())), tuple(expressions))
