"""Backs up all disks of a daemon as backup programs do, with the package `qemu.qmp`.

Usage: backup_client.py SOCKET WAY KIND SPEED FOLDER TARGET...

WAY is `direct`, the backup reads the disks; or `filter`, it reads `snapshot-access` nodes over `copy-before-write`.
KIND is `full`, which begins a persistent bitmap or cleans the one there is; `incremental`, by that bitmap; or `copy`,
without one. SPEED is in bytes a second, 0 for no limit. FOLDER takes the fleecing images. There is a TARGET for each disk,
an image that is there; its suffix is its format.

Says `ready` before the instant of the backup and waits for a line, `taken` after it, and `done` at the end.
"""

import asyncio
import json
import pathlib
import subprocess
import sys

from qemu.qmp import EventListener, QMPClient

BITMAP = "nightly"
JOB_EVENTS = ("BLOCK_JOB_COMPLETED", "BLOCK_JOB_ERROR", "BLOCK_JOB_CANCELLED")


def action(what: str, **data: object) -> dict:
    """An action of a transaction."""
    return {"type": what, "data": {name.replace("_", "-"): value for name, value in data.items()}}


class Disk:
    """A disk, its target, and the nodes of its backup."""

    def __init__(self, info: dict, target: str) -> None:
        inserted = info["inserted"]
        image = inserted["image"]
        assert "backing-image" not in image and "children" not in inserted, info
        assert inserted["drv"] == image["format"], info
        # Programs have a look at the image while it is served.
        command = ["qemu-img", "info", "--force-share", "--output=json", image["filename"]]
        looked = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        assert looked["format"] == image["format"], looked
        assert looked["virtual-size"] == image["virtual-size"], looked
        self.device, self.qdev, self.node = info["device"], info["qdev"], inserted["node-name"]
        self.size = image["virtual-size"]
        self.bitmaps = {bitmap["name"]: bitmap for bitmap in inserted.get("dirty-bitmaps", [])}
        self.file = target
        self.target, self.fleece = f"target-{self.device}", f"fleece-{self.device}"
        self.filter, self.access = f"cbw-{self.device}", f"access-{self.device}"

    def actions(self, way: str, kind: str, speed: int) -> list[dict]:
        """What the transaction does to it."""
        compress = self.file.endswith(".qcow2")
        backup = {"target": self.target, "job_id": f"backup-{self.device}", "speed": speed, "compress": compress}
        source = self.access if way == "filter" else self.node
        clear = action("block-dirty-bitmap-clear", node=self.node, name=BITMAP)
        if kind == "incremental" and way == "direct":
            return [action("blockdev-backup", device=source, sync="incremental", bitmap=BITMAP, **backup)]
        if kind == "incremental":
            merged = [{"node": self.node, "name": BITMAP}]
            return [
                action("block-dirty-bitmap-add", node=source, name=BITMAP),
                action("block-dirty-bitmap-merge", node=source, target=BITMAP, bitmaps=merged),
                action("blockdev-backup", device=source, sync="incremental", bitmap=BITMAP, **backup),
                clear,
            ]
        whole = action("blockdev-backup", device=source, sync="full", **backup)
        if kind == "copy":
            return [whole]
        add = action("block-dirty-bitmap-add", node=self.node, name=BITMAP, persistent=True)
        return [clear if BITMAP in self.bitmaps else add, whole]


async def look(client: QMPClient) -> None:
    """What programs ask before they begin."""
    assert (await client.execute("query-status"))["status"] in ("running", "prelaunch")
    assert await client.execute("query-tpm") == []
    await client.execute("query-name")
    await client.execute("query-version")
    assert await client.execute("query-block-jobs") == []
    await client.execute("query-named-block-nodes", {"flat": True})


async def add_image(client: QMPClient, name: str, file: str) -> None:
    """Adds a node for an image."""
    options = {"driver": pathlib.Path(file).suffix[1:], "node-name": name, "discard": "unmap"}
    await client.execute("blockdev-add", {**options, "file": {"driver": "file", "filename": file}})


async def put_filter(client: QMPClient, disk: Disk, folder: str) -> None:
    """Puts a filter on a disk."""
    fleece = f"{folder}/{disk.fleece}.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", fleece, str(disk.size)], check=True)
    await add_image(client, disk.fleece, fleece)
    filtered = {"driver": "copy-before-write", "node-name": disk.filter, "file": disk.node, "target": disk.fleece}
    await client.execute("blockdev-add", {**filtered, "on-cbw-error": "break-snapshot", "cbw-timeout": 45})
    access = {"driver": "snapshot-access", "node-name": disk.access, "file": disk.filter}
    await client.execute("blockdev-add", access)
    await client.execute("qom-set", {"path": disk.qdev, "property": "drive", "value": disk.filter})


async def take_filter(client: QMPClient, disk: Disk) -> None:
    """Takes it off again."""
    await client.execute("qom-set", {"path": disk.qdev, "property": "drive", "value": disk.node})
    for node in (disk.access, disk.filter, disk.fleece):
        await client.execute("blockdev-del", {"node-name": node})


async def wait(client: QMPClient, listener: EventListener, disks: list[Disk]) -> None:
    """Waits for the end of all jobs, and looks at them meanwhile."""
    left = {f"backup-{disk.device}" for disk in disks}
    while left:
        for job in await client.execute("query-block-jobs"):
            assert job["type"] == "backup" and 0 <= job["offset"] <= job["len"], job
            assert job["status"] in ("created", "running", "waiting", "pending", "concluded"), job
        event = await asyncio.wait_for(listener.get(), 60)
        data = event["data"]
        assert event["event"] == "BLOCK_JOB_COMPLETED" and "error" not in data, event
        assert data["offset"] == data["len"], event
        left.remove(data["device"])


async def main(socket: str, way: str, kind: str, speed: str, folder: str, *targets: str) -> None:
    """One backup."""
    client = QMPClient("backup")
    await client.connect(socket)
    await look(client)
    infos = await client.execute("query-block")
    disks = [Disk(info, target) for info, target in zip(infos, targets, strict=True)]
    for disk in disks:
        await add_image(client, disk.target, disk.file)
        if way == "filter":
            await put_filter(client, disk, folder)
    listener = EventListener(JOB_EVENTS)
    with client.listen(listener):
        actions = [one for disk in disks for one in disk.actions(way, kind, int(speed))]
        print("ready", flush=True)
        sys.stdin.readline()
        await client.execute("transaction", {"actions": actions})
        print("taken", flush=True)
        await wait(client, listener, disks)
    for disk in disks:
        if way == "filter":
            await take_filter(client, disk)
        await client.execute("blockdev-del", {"node-name": disk.target})
    await client.disconnect()
    print("done", flush=True)


asyncio.run(main(*sys.argv[1:]))
