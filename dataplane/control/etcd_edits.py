"""The control API's edits of services as transactions in etcd, so that every node sees them.

What is given is checked as a file would be, against the state of the node that was asked, and written as it was given.
Endpoints that people add come into a slice of their own, ``api``; those that stand in another slice are changed there.
"""

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dataplane.control.api import MissingError
from dataplane.control.etcd import Compare, Delete, Etcd, EtcdError, KeyValue, Operation, Put
from dataplane.control.etcd_contents import ObjectError, Objects, parsed
from dataplane.control.state import DesiredState

_SLICE = "api"
_TRIES = 10  # an endpoint's slice is read and written: others may come between
_MOST = 100  # operations of one transaction; etcd takes 128
_UNKNOWN = "whether the edit was carried out is not known"


@dataclass(frozen=True, slots=True)
class Done:
    """What became of an edit: lines for people, and the revision that has it; or errors, and nothing was changed."""

    applied: tuple[str, ...] = ()
    errors: tuple[str, ...] = ()
    revision: int = 0


class Edits:
    """Carries out edits under one prefix."""

    def __init__(self, etcd: Etcd, prefix: str, objects: Objects) -> None:
        self._etcd = etcd
        self._prefix = prefix
        self._objects = objects

    def concern(self, name: str, values: tuple[Any, ...], state: DesiredState) -> bool:
        """Whether an edit is about a service of etcd, or one that is new."""
        target = _target(name, values)
        return all(service.origin == "etcd" for service in state.services if service.id == target)

    async def carry_out(self, name: str, values: tuple[Any, ...], state: DesiredState) -> Done | None:
        """Carry out an edit of ``config_edit``; None: its service is not etcd's.

        Raises:
            MissingError: There is no such service or endpoint.
        """
        if not self.concern(name, values, state):
            return None
        target = _target(name, values)
        errors = await asyncio.to_thread(self._objects.check_edit, name, values, state)
        if errors:
            return Done(errors=errors)
        try:
            match name:
                case "set_service":
                    return await self._set(target, values[0])
                case "delete_service":
                    return await self._delete(target)
            return await self._edit_endpoint(name, target, values[1])
        except EtcdError as error:
            return Done(errors=(f"etcd: {error}; {_UNKNOWN}",))

    # --- services ----------------------------------------------------------------------------------------------------

    async def _set(self, target: str, values: Mapping[str, Any]) -> Done:
        """Write a service; its endpoints only if they are given."""
        own = {key: value for key, value in values.items() if key not in ("name", "namespace", "endpoints")}
        operations: list[Operation] = [Put(self._service(target), json.dumps(own))]
        if "endpoints" in values:
            operations += [Delete(item.key) for item in await self._slices(target) if item.key != self._slice(target)]
            endpoints = values["endpoints"]
            slice_ = self._slice(target)
            operations.append(Put(slice_, json.dumps(endpoints)) if endpoints else Delete(slice_))
        for first in range(0, len(operations), _MOST):
            written = await self._etcd.txn([], operations[first : first + _MOST])
        return Done((f"set service {target} in etcd revision={written.revision}",), revision=written.revision)

    async def _delete(self, target: str) -> Done:
        operations = (Delete(self._service(target)), Delete(f"{self._prefix}/endpoints/{target}/", prefix=True))
        deleted = await self._etcd.txn([], operations)
        line = f"delete service {target} in etcd revision={deleted.revision}"
        return Done((line,), revision=deleted.revision if deleted.wrote else 0)  # another was faster: nothing will come

    # --- endpoints ---------------------------------------------------------------------------------------------------

    async def _edit_endpoint(self, name: str, target: str, values: Mapping[str, Any]) -> Done:
        """Change one endpoint in the slice that has it."""
        verb = name.partition("_")[0]
        for _ in range(_TRIES):
            holder, endpoints = await self._find(target, str(values["ip"]))
            at = [number for number, each in enumerate(endpoints) if _same(each.get("ip"), values["ip"])]
            if verb != "add" and not at:
                raise MissingError(f"no such endpoint of {target}: {values['ip']}")
            match verb:
                case "drain":
                    changed = [each | {"draining": True} if n in at else each for n, each in enumerate(endpoints)]
                case "delete":
                    changed = [each for n, each in enumerate(endpoints) if n not in at]
                case _:
                    changed = [*(each for n, each in enumerate(endpoints) if n not in at), dict(values)]
            key = holder.key if holder else self._slice(target)
            write = Put(key, json.dumps(changed)) if changed else Delete(key)
            revision = holder.mod_revision if holder else 0
            written = await self._etcd.txn([Compare(key, "mod_revision", revision)], [write])
            if written.succeeded:
                line = f"{verb} endpoint {values['ip']} of service {target} in etcd revision={written.revision}"
                return Done((line,), revision=written.revision)
        return Done(errors=(f"others change endpoints of {target} all the time; try again",))

    async def _find(self, target: str, address: str) -> tuple[KeyValue | None, list[dict[str, Any]]]:
        """Return the slice that has an endpoint, else the one for new ones if it is there; and what is in it."""
        own: tuple[KeyValue | None, list[dict[str, Any]]] = (None, [])
        for item in await self._slices(target):
            try:
                endpoints = parsed(item.value)
            except ObjectError:
                continue
            if not isinstance(endpoints, list) or not all(isinstance(each, dict) for each in endpoints):
                continue
            if any(_same(each.get("ip"), address) for each in endpoints):
                return item, endpoints
            if item.key == self._slice(target):
                own = item, endpoints
        return own

    async def _slices(self, target: str) -> tuple[KeyValue, ...]:
        return (await self._etcd.range(f"{self._prefix}/endpoints/{target}/")).items

    def _service(self, target: str) -> str:
        return f"{self._prefix}/services/{target}"

    def _slice(self, target: str) -> str:
        return f"{self._prefix}/endpoints/{target}/{_SLICE}"


def _target(name: str, values: tuple[Any, ...]) -> str:
    return f"{values[0]['namespace']}/{values[0]['name']}" if name == "set_service" else str(values[0])


def _same(one: Any, other: str) -> bool:
    return isinstance(one, str) and one == other
