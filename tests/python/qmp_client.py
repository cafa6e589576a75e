"""Drives Frazil's control server with the package `qemu.qmp`, as a user would.

Usage: qmp_client.py SOCKET. The server serves one fake disk, `vda`. Ends with status 0 if all is as it should be.
"""

import asyncio
import sys

from qemu.qmp import EventListener, ExecuteError, QMPClient


async def fails(client: QMPClient, error_class: str, desc: str, command: str, arguments: dict) -> None:
    """Executes a command that must fail in these words."""
    try:
        await client.execute(command, arguments)
    except ExecuteError as error:
        found = (error.error_class, str(error))
        assert found == (error_class, desc), found
    else:
        raise AssertionError(f"{command} {arguments} did not fail")


async def queries(client: QMPClient) -> None:
    """What can be asked."""
    assert client.greeting is not None and client.greeting.QMP.capabilities == []
    version = await client.execute("query-version")
    assert version == client.greeting.QMP.version, version
    names = [command["name"] for command in await client.execute("query-commands")]
    assert "snapshot-create" in names and "qmp_capabilities" in names, names
    assert (await client.execute("query-status"))["status"] == "running"
    disks = await client.execute("query-block")
    assert [disk["device"] for disk in disks] == ["vda"], disks
    nodes = await client.execute("query-named-block-nodes")
    assert [node["node-name"] for node in nodes] == ["vda", "vda.1", "vda.0", "target"], nodes


async def snapshots(client: QMPClient) -> None:
    """The life of a snapshot, with its events."""
    listener = EventListener(("FRAZIL_SNAPSHOT_CREATED", "FRAZIL_EXPORT_PROGRESS"))
    with client.listen(listener):
        made = await client.execute("snapshot-create", {"name": "über", "freeze": "never"})
        assert made["name"] == "über", made
        event = await asyncio.wait_for(listener.get(), 20)
        assert event["data"]["snapshot"] == made, event
        assert event["timestamp"]["seconds"] > 0
        await client.execute(
            "snapshot-export", {"name": "über", "disk": "vda", "target": "/nowhere", "format": "qcow2"}
        )
        progress = await asyncio.wait_for(listener.get(), 20)
        assert progress["data"]["len"] == 100, progress
    found = await client.execute("query-snapshot", {"name": "über", "probe": True})
    assert found["snapshot"] == made and found["probe"][0]["volumes"][0]["verdict"] == "clean", found
    await client.execute("snapshot-delete", {"name": "über"})
    assert await client.execute("query-snapshots") == []


async def refusals(client: QMPClient) -> None:
    """The classes and words of errors."""
    await fails(client, "CommandNotFound", "The command eject has not been found", "eject", {})
    await fails(client, "GenericError", "Parameter 'name' is missing", "snapshot-create", {})
    await fails(
        client, "GenericError", "Parameter 'extra' is unexpected", "snapshot-create", {"name": "a", "extra": 1}
    )
    await fails(
        client,
        "GenericError",
        "Invalid parameter type for 'name', expected: string",
        "snapshot-create",
        {"name": 1},
    )
    await fails(client, "DeviceNotFound", "no snapshot is named x", "query-snapshot", {"name": "x"})


async def several(path: str) -> None:
    """Several clients at once, each with commands in flight at once."""
    clients = [QMPClient(f"client {number}") for number in range(8)]
    for client in clients:
        await client.connect(path)
    pending = [client.execute("query-version") for client in clients for _ in range(20)]
    versions = await asyncio.gather(*pending)
    assert len(versions) == 160 and all(version == versions[0] for version in versions)
    for client in clients:
        await client.disconnect()


async def main(path: str) -> None:
    """All of it."""
    client = QMPClient("test")
    await client.connect(path)
    await queries(client)
    await snapshots(client)
    await refusals(client)
    await several(path)
    await client.execute("quit")
    await client.disconnect()


asyncio.run(main(sys.argv[1]))
